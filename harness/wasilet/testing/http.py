"""HTTP as a test uses it: one request, what is expected of its answer, and asking again until it is so.

No redirect is followed, no proxy of the environment is used and no answer is cached: a test sees what the app sent.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from wasilet.errors import UsageError
from wasilet.testing.log_match import Text, found, printable, quoted

MAX_BODY_BYTES = 16 * 1024 * 1024
FIRST_PAUSE_SECONDS = 0.02
MAX_PAUSE_SECONDS = 0.5
REQUEST_SECONDS = 10.0
SHOWN_BODY_LINES = 20
SHOWN_LINE_CHARACTERS = 300


class NoAnswerError(Exception):
    """There was no answer, or not a whole one; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an app answered."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case; of a header that came several times the values are joined by ``", "``."""

    body: bytes = b""
    seconds: float = 0.0
    """From the request to the last byte."""

    @property
    def text(self) -> str:
        """The body; what is not UTF-8 is replaced."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body, decoded. Raises ValueError."""
        return json.loads(self.body)


Connect = Callable[[tuple[str, int], float], socket.socket]
"""To an address, within so many seconds. Raises OSError."""

Ask = Callable[[float], Answer]
"""Sends the request, with a limit in seconds. Raises NoAnswerError."""


def ask(
    url: str,
    *,
    method: str = "GET",
    send_headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
    timeout_seconds: float = REQUEST_SECONDS,
    connect: Connect | None = None,
) -> Answer:
    """One request. ``connect``: by another way than the machine's. Raises NoAnswerError, and UsageError for what is no
    http URL."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"{url!r} is no URL that can be asked", hint="write http://HOST:PORT/PATH")
    try:
        port = parts.port or 80
    except ValueError as error:
        raise UsageError(f"{url!r} has no port that there can be") from error
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    began = time.monotonic()
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_seconds)
    with contextlib.closing(connection):
        try:
            data = body.encode() if isinstance(body, str) else body
            if connect is not None:
                connection.sock = connect((parts.hostname, port), timeout_seconds)
            connection.request(method, target, body=data, headers=dict(send_headers or {}))
            response = connection.getresponse()
            read = response.read(MAX_BODY_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = f"nothing within {timeout_seconds:g} s" if isinstance(error, TimeoutError) else str(error)
            raise NoAnswerError(f"{method} {url}: {said or type(error).__name__}") from error
    return answer_of(response.status, response.getheaders(), read, began=began)


def answer_of(status: int, headers: Iterable[tuple[str, str]], body: bytes, *, began: float) -> Answer:
    """An answer as it was read. Raises NoAnswerError when its body is too long."""
    if len(body) > MAX_BODY_BYTES:
        raise NoAnswerError(f"the body is longer than {MAX_BODY_BYTES // 1024**2} MiB")
    joined: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        joined[key] = f"{joined[key]}, {value}" if key in joined else value
    return Answer(status=status, headers=joined, body=body, seconds=time.monotonic() - began)


@dataclass(frozen=True, kw_only=True)
class WantedAnswer:
    """What an answer must be like."""

    status: int | Collection[int] | None = 200
    """One, or any of several; None: whichever."""

    headers: Mapping[str, Text | None] = field(default_factory=dict)
    """By name: the value, or a regular expression that is found in it; None: it is not there."""

    contains: Sequence[Text] = ()
    """Texts and regular expressions of the body."""

    absent: Sequence[Text] = ()

    def lacks(self, answer: Answer) -> list[str]:
        """What is not as wanted, as text."""
        said = []
        if self.status is not None:
            wanted = {self.status} if isinstance(self.status, int) else set(self.status)
            if answer.status not in wanted:
                said.append(f"status {answer.status}, not {' or '.join(map(str, sorted(wanted)))}")
        for name, value in self.headers.items():
            got = answer.headers.get(name.lower())
            if value is None and got is not None:
                said.append(f"header {name} is there: {got!r}")
            elif isinstance(value, str) and got != value:
                said.append(f"header {name} is {got!r}, not {value!r}")
            elif value is not None and not isinstance(value, str) and (got is None or not found(value, got)):
                said.append(f"header {name} is {got!r}, which does not match {value.pattern!r}")
        said += [f"the body lacks {quoted(text)}" for text in self.contains if not found(text, answer.text)]
        said += [f"the body holds {quoted(text)}" for text in self.absent if found(text, answer.text)]
        return said


@dataclass(frozen=True)
class Asked:
    """How asking again and again went."""

    answer: Answer | None
    """The last one, if there was any."""

    lacks: list[str]
    """Empty when it was as wanted."""

    times: int
    seconds: float

    def describe(self) -> list[str]:
        """The last answer, in lines."""
        if self.answer is None:
            return ["  (none)"]
        said = [f"  HTTP {self.answer.status} after {self.answer.seconds * 1000:.0f} ms"]
        said += [f"  {printable(f'{name}: {value}')}" for name, value in self.answer.headers.items()]
        lines = self.answer.text.splitlines()
        said += ["", *(f"  | {printable(line[:SHOWN_LINE_CHARACTERS])}" for line in lines[:SHOWN_BODY_LINES])]
        if len(lines) > SHOWN_BODY_LINES:
            said.append(f"  | ... {len(lines) - SHOWN_BODY_LINES} lines more")
        return said


def ask_until(send: Ask, wanted: WantedAnswer, *, within_seconds: float) -> Asked:
    """Ask until the answer is as wanted, or the time is over."""
    began = time.monotonic()
    deadline = began + within_seconds
    times, pause, last = 0, FIRST_PAUSE_SECONDS, None
    while True:
        times += 1
        left = deadline - time.monotonic()
        try:
            last = send(max(0.1, min(REQUEST_SECONDS, left)))
            lacks = wanted.lacks(last)
        except NoAnswerError as error:
            lacks = [str(error)]
        left = deadline - time.monotonic()
        if not lacks or left <= 0:
            return Asked(last, lacks, times, time.monotonic() - began)
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, MAX_PAUSE_SECONDS)
