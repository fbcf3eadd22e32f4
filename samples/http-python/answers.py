"""What an app wants of HTTP, in terms of ``wasi:http/types``."""

from dataclasses import dataclass

from componentize_py_types import Err, Ok
from wit_world.imports.streams import StreamError_Closed
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)

PIECE_BYTES = 4096


@dataclass
class Answer:
    status: int
    text: str


class BodyError(Exception):
    """The body is none, or too long; ``answer`` says so."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.text)
        self.answer = answer


def read_body(request: IncomingRequest, most: int) -> str:
    """The body as text. Raises BodyError."""
    read = b""
    with request.consume() as body, body.stream() as stream:
        while True:
            try:
                read += stream.blocking_read(PIECE_BYTES)
            except Err as error:
                if isinstance(error.value, StreamError_Closed):
                    break
                raise BodyError(Answer(400, "the body cannot be read\n")) from error
            if len(read) > most:
                raise BodyError(Answer(413, f"an entry has at most {most} bytes\n"))
    try:
        return read.decode()
    except UnicodeDecodeError as error:
        raise BodyError(Answer(400, "the body is not UTF-8\n")) from error


def send(out: ResponseOutparam, answer: Answer) -> None:
    """Send the answer. What fails here means that the client has gone."""
    data = answer.text.encode()
    headers = [("content-type", b"text/plain; charset=utf-8"), ("content-length", str(len(data)).encode())]
    response = OutgoingResponse(Fields.from_list(headers))
    response.set_status_code(answer.status)
    body = response.body()
    ResponseOutparam.set(out, Ok(response))
    with body.write() as stream:
        for start in range(0, len(data), PIECE_BYTES):
            stream.blocking_write_and_flush(data[start : start + PIECE_BYTES])
    OutgoingBody.finish(body, None)
