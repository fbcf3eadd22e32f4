"""A SPDY/3.1 connection of the serving side: the peer opens streams, both sides write, either may close.

Flow control: the peers are Go programs whose SPDY library neither sends nor heeds WINDOW_UPDATE, so waiting for one
would stop every transfer after 64 KiB. What is sent is held back by TCP alone; what is received and not yet read stops
the reading of the socket. Windows are still announced, for a peer that counts them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from wasilet_node.server.streams import frames
from wasilet_node.server.streams.frames import ControlFrame, DataFrame, FrameDecoder, FrameEncoder, SpdyError
from wasilet_node.server.streams.turns import Allowance

logger = logging.getLogger(__name__)

MAX_STREAMS = 512
"""Open at a time: a port-forward has two for each of its connections."""

READ_AHEAD_BYTES = 256 * 1024
WRITE_CHUNK_BYTES = 32 * 1024
WINDOW_BYTES = 32 * 1024
MAX_UNSENT_BYTES = 4 * 1024 * 1024
"""Answers wait for no reader; a peer that causes answers and reads nothing is hung up on, whatever its frames are."""

READ_BYTES = 64 * 1024


class Stream:
    """One stream that the peer opened."""

    def __init__(self, connection: SpdyConnection, stream_id: int, headers: Mapping[str, str]) -> None:
        self.id = stream_id
        self.headers = headers
        """Names in lower case."""

        self._connection = connection
        self._data = bytearray()
        self._arrived = asyncio.Event()
        self._remote_closed = False
        self._local_closed = False
        self._unannounced = 0
        self._ignored = False

    @property
    def finished(self) -> bool:
        """Both sides are done with it."""
        return self._remote_closed and self._local_closed

    async def read(self) -> bytes:
        """The next piece; empty at the end."""
        while not self._data:
            if self._remote_closed:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        chunk = bytes(self._data[:READ_BYTES])
        del self._data[:READ_BYTES]
        self._unannounced += len(chunk)
        self._connection.consumed(len(chunk))
        if self._unannounced >= WINDOW_BYTES and not self._remote_closed:
            self._connection.send(frames.window_update(self.id, self._unannounced))
            self._unannounced = 0
        return chunk

    async def write(self, data: bytes) -> None:
        """Send, and wait while the peer does not read. What is written after the end is dropped."""
        for start in range(0, len(data), WRITE_CHUNK_BYTES):
            if self._local_closed:
                return
            self._connection.send(frames.data_frame(self.id, data[start : start + WRITE_CHUNK_BYTES]))
            await self._connection.drain()

    def ignore(self) -> None:
        """What comes in is dropped: no one will read it."""
        self._ignored = True

    def close(self) -> None:
        """Nothing more will be written."""
        if not self._local_closed:
            self._local_closed = True
            self._connection.send(frames.data_frame(self.id, b"", fin=True))
            self._connection.forget_if_finished(self)

    def reset(self, status: int = frames.CANCEL) -> None:
        """End it at once."""
        if not self.finished:
            self._local_closed = True
            self._connection.send(frames.rst_stream(self.id, status))
            self.remote_end(drop=True)

    def remote_data(self, data: bytes) -> bool:
        """A piece came in; False: no one wants it any more."""
        if self._remote_closed or self._ignored:
            return False
        self._data += data
        self._arrived.set()
        return True

    def remote_end(self, *, drop: bool = False, both: bool = False) -> None:
        """The peer writes no more; ``both``: nor does it read. ``drop``: what it wrote is not wanted."""
        self._remote_closed = True
        self._local_closed = self._local_closed or both
        if drop:
            self._connection.consumed(len(self._data))
            self._data.clear()
        self._arrived.set()
        self._connection.forget_if_finished(self)


class SpdyConnection:
    """The protocol's state over any transport: ``receive`` and ``step`` take what comes in, ``send`` gives out.

    ``accept`` decides on each new stream: a text refuses it. ``pause`` is told when to stop and to go on reading.
    ``unsent`` gives how many bytes the transport still holds. ``answers``: how many the peer may cause.
    """

    def __init__(
        self,
        *,
        send: Callable[[bytes], None],
        drain: Callable[[], Awaitable[None]],
        pause: Callable[[bool], None],
        accept: Callable[[Stream], str | None],
        unsent: Callable[[], int],
        answers: Allowance | None = None,
    ) -> None:
        self._unsent = unsent
        self._send = send
        self._drain = drain
        self._pause = pause
        self._accept = accept
        self._decoder = FrameDecoder()
        self._encoder = FrameEncoder()
        self._streams: dict[int, Stream] = {}
        self._last_id = 0
        self._waiting_bytes = 0
        self._paused = False
        self._answers = answers or Allowance()
        self._replies = bytearray()
        self.closed = asyncio.Event()
        """The connection is gone, or the peer reported it."""

    def receive(self, data: bytes | bytearray) -> None:
        """Bytes of the peer."""
        self._decoder.add(data)

    def step(self, until: float) -> float | None:
        """See ``turns.Connection``. Answers are sent together, at the end. Raises SpdyError: the connection must be
        closed."""
        try:
            return self._step(until)
        finally:
            if self._replies:
                self.send(bytes(self._replies))
                self._replies.clear()

    def _step(self, until: float) -> float | None:
        if (wait := self._answers.wait_seconds()) > 0:
            return wait
        for frame in self._decoder.frames():
            if self._unsent() + len(self._replies) > MAX_UNSENT_BYTES:
                raise SpdyError("the peer does not read what it is sent")
            if isinstance(frame, DataFrame):
                self._on_data(frame)
            else:
                self._on_control(frame)
            if (wait := self._answers.wait_seconds()) > 0:
                return wait
            if time.monotonic() >= until:
                return 0.0
        return None

    def _answer(self, data: bytes) -> None:
        """Send what the peer caused, when this step ends."""
        self._answers.spend()
        self._replies += data

    def lost(self) -> None:
        """The transport is gone: readers see the end, writers go nowhere."""
        self.closed.set()
        for stream in list(self._streams.values()):
            stream.remote_end(both=True)

    def send(self, data: bytes) -> None:
        """Hand a frame to the transport."""
        if not self.closed.is_set():
            self._send(data)

    async def drain(self) -> None:
        """Wait while the transport's buffer is full."""
        if not self.closed.is_set():
            await self._drain()

    def consumed(self, count: int) -> None:
        """A reader took so many bytes."""
        self._waiting_bytes -= count
        if self._paused and self._waiting_bytes < READ_AHEAD_BYTES // 2:
            self._paused = False
            self._pause(False)  # noqa: FBT003 - a callback with one meaning

    def forget_if_finished(self, stream: Stream) -> None:
        """Streams that both sides closed need no entry."""
        if stream.finished:
            self._streams.pop(stream.id, None)

    def send_last_frame(self) -> None:
        """GOAWAY: after this the transport may be closed."""
        self.send(frames.goaway(self._last_id))

    def _on_data(self, frame: DataFrame) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            if frame.stream_id > self._last_id or frame.stream_id % 2 == 0:
                raise SpdyError(f"data for stream {frame.stream_id}, which was never opened")
            return  # it ended, or was refused, while this was on its way
        if frame.data and stream.remote_data(frame.data):
            self._waiting_bytes += len(frame.data)
            if not self._paused and self._waiting_bytes > READ_AHEAD_BYTES:
                self._paused = True
                self._pause(True)  # noqa: FBT003 - a callback with one meaning
        if frame.fin:
            stream.remote_end()

    def _on_control(self, frame: ControlFrame) -> None:
        if frame.type == frames.SYN_STREAM:
            self._on_open(frame)
        elif frame.type == frames.PING:
            if frame.value % 2:  # the client's numbers are odd; an even one answers a ping of this side's
                self._answer(frames.ping(frame.value))
        elif frame.type == frames.RST_STREAM:
            stream = self._streams.get(frame.stream_id)
            if stream is not None:
                stream.remote_end(both=True)
        elif frame.type == frames.GOAWAY:
            self.lost()

    def _on_open(self, frame: ControlFrame) -> None:
        if frame.stream_id % 2 == 0 or frame.stream_id <= self._last_id:
            raise SpdyError(f"stream {frame.stream_id} may not be opened")
        self._last_id = frame.stream_id
        stream = Stream(self, frame.stream_id, frame.headers)
        refusal = "too many streams" if len(self._streams) >= MAX_STREAMS else self._accept(stream)
        if refusal is not None:
            logger.debug("refused a stream: %s", refusal)
            self._answer(frames.rst_stream(frame.stream_id, frames.REFUSED_STREAM))
            return
        self._streams[stream.id] = stream
        self._answer(self._encoder.syn_reply(stream.id))
        if frame.flags & frames.FLAG_FIN:
            stream.remote_end()


async def chunks(stream: Stream) -> AsyncIterator[bytes]:
    """What comes in on a stream until its end."""
    while chunk := await stream.read():
        yield chunk
