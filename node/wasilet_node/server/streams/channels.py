"""The streams of one exec or attach (stdin, stdout, stderr, error, resize), whichever way they travel.

SPDY: each is a stream that the client opens, told apart by its ``streamtype`` header. WebSocket: the first byte of each
message is the channel's number; v5 adds a message that closes one channel, without which stdin could not end. Sources:
k8s.io/kubelet/pkg/cri/streaming/remotecommand and KEP-4006.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from wasilet_node.server.streams.spdy import Stream, chunks
from wasilet_node.server.streams.upgrade import negotiate, take_over, wants_spdy, wants_websocket, websocket
from wasilet_node.server.streams.websocket import WebSocketConnection

SPDY_PROTOCOLS = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
WEBSOCKET_PROTOCOLS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)
CREATION_SECONDS = 30.0
"""How long a client may take to open its streams."""

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
_NUMBERS = {"stdin": STDIN, "stdout": STDOUT, "stderr": STDERR, "error": ERROR}
_WAITING_MESSAGES = 16


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Which streams a client wants."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    @classmethod
    def of(cls, request: web.Request) -> StreamOptions:
        """From the query that the API server sends. Raises HTTPBadRequest when it asks for nothing."""
        stdin, stdout, stderr, tty = (request.query.get(key) == "1" for key in ("input", "output", "error", "tty"))
        if not (stdin or stdout or stderr):
            raise web.HTTPBadRequest(text="you must specify at least 1 of stdin, stdout, stderr")
        return cls(stdin=stdin, stdout=stdout, stderr=stderr and not tty, tty=tty)


class Channels(Protocol):
    """What a session sees of its client."""

    @property
    def closed(self) -> asyncio.Event:
        """Set when the client is gone."""

    def stdin(self) -> AsyncIterator[bytes]:
        """What the client types, until it closes stdin or goes away."""

    async def write(self, name: str, data: bytes) -> None:
        """To ``stdout`` or ``stderr``; waits while the client does not read. A stream no one asked for is dropped."""

    async def finish(self, status: dict[str, Any]) -> None:
        """The outcome, a v1.Status, and the end of all streams."""


@asynccontextmanager
async def open_channels(request: web.Request, options: StreamOptions) -> AsyncIterator[Channels]:
    """Upgrade the connection. Raises an HTTP error when it cannot be, TimeoutError when the client opens no streams."""
    if wants_websocket(request):
        async with _websocket_channels(request, options) as channels:
            yield channels
    elif wants_spdy(request):
        protocol = negotiate(request, SPDY_PROTOCOLS)
        gathering = _Gathering(options, resize=protocol in SPDY_PROTOCOLS[:2])
        async with take_over(request, protocol=protocol, accept=gathering.accept) as connection:
            async with asyncio.timeout(CREATION_SECONDS):
                await _first(gathering.complete, connection.closed)
            if not gathering.complete.is_set():
                raise ConnectionResetError("the client went away before it had opened its streams")
            yield _SpdyChannels(gathering.streams, connection.closed, structured=protocol == SPDY_PROTOCOLS[0])
    else:
        raise web.HTTPBadRequest(text="unable to upgrade: missing upgrade headers in request")


class _Gathering:
    """Collects the streams that a client opens until all it announced are there."""

    def __init__(self, options: StreamOptions, *, resize: bool) -> None:
        wanted = {"error": True, "stdin": options.stdin, "stdout": options.stdout, "stderr": options.stderr}
        wanted["resize"] = options.tty and resize
        self._wanted = {name for name, want in wanted.items() if want}
        self.streams: dict[str, Stream] = {}
        self.complete = asyncio.Event()

    def accept(self, stream: Stream) -> str | None:
        kind = stream.headers.get("streamtype", "")
        if kind not in {"error", "stdin", "stdout", "stderr", "resize"} or kind in self.streams:
            return f"unexpected stream type: {kind!r}"
        self.streams[kind] = stream
        if kind != "stdin":  # resize included: there is no terminal whose size a module could ask for
            stream.ignore()
        if self._wanted <= self.streams.keys():
            self.complete.set()
        return None


class _SpdyChannels:
    def __init__(self, streams: dict[str, Stream], closed: asyncio.Event, *, structured: bool) -> None:
        self._streams = streams
        self._structured = structured
        self.closed = closed

    async def stdin(self) -> AsyncIterator[bytes]:
        stream = self._streams.get("stdin")
        if stream is not None:
            async for chunk in chunks(stream):
                yield chunk

    async def write(self, name: str, data: bytes) -> None:
        stream = self._streams.get(name)
        if stream is not None:
            await stream.write(data)

    async def finish(self, status: dict[str, Any]) -> None:
        await self._streams["error"].write(_encoded(status, structured=self._structured))
        for stream in self._streams.values():
            stream.close()


@asynccontextmanager
async def _websocket_channels(request: web.Request, options: StreamOptions) -> AsyncIterator[Channels]:
    async with websocket(request, WEBSOCKET_PROTOCOLS) as socket:
        channels = _WebSocketChannels(socket, options)
        reader = asyncio.create_task(channels.receive())
        try:
            # an empty message on the lowest channel that is written tells the client that the connection stands
            await channels.send(STDOUT if options.stdout else STDERR if options.stderr else ERROR, b"")
            yield channels
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


class _WebSocketChannels:
    def __init__(self, socket: WebSocketConnection, options: StreamOptions) -> None:
        self._socket = socket
        protocol = socket.protocol
        self._base64 = "base64" in protocol
        self._structured = protocol.startswith(("v4", "v5"))
        self._wanted = {STDOUT: options.stdout, STDERR: options.stderr}
        self._input: asyncio.Queue[bytes] = asyncio.Queue(_WAITING_MESSAGES)
        self._input_ended = not options.stdin
        # Not the socket's own: that we read no longer, since all is said, must not keep the closing frame back.
        self.closed = asyncio.Event()

    async def stdin(self) -> AsyncIterator[bytes]:
        while chunk := await self._input.get():
            yield chunk

    async def write(self, name: str, data: bytes) -> None:
        number = _NUMBERS[name]
        if self._wanted[number]:
            await self.send(number, data)

    async def finish(self, status: dict[str, Any]) -> None:
        data = _encoded(status, structured=self._structured)
        if data:
            await self.send(ERROR, data)

    async def send(self, number: int, data: bytes) -> None:
        if self._base64:
            await self._socket.send(f"{number}".encode() + base64.b64encode(data), text=True)
        else:
            await self._socket.send(bytes([number]) + data)

    async def receive(self) -> None:
        """Take the client's messages apart until it goes away."""
        try:
            async for message in self._socket.messages():
                if not message.text and not self._base64:
                    payload = message.data
                elif message.text and message.data[:1].isdigit():
                    payload = bytes([int(message.data[:1])]) + base64.b64decode(message.data[1:], validate=True)
                else:
                    break
                if not payload:
                    continue
                if payload[0] == STDIN and len(payload) > 1 and not self._input_ended:
                    await self._input.put(payload[1:])
                elif payload[0] == CLOSE and payload[1:2] == bytes([STDIN]) and not self._input_ended:
                    self._input_ended = True
                    await self._input.put(b"")
        except binascii.Error:
            pass
        finally:
            # Whatever ended it: what the client sends is no longer understood, or it is gone.
            self.closed.set()


def _encoded(status: dict[str, Any], *, structured: bool) -> bytes:
    """Before v4 the error stream carried text, and nothing in case of success."""
    if structured:
        return json.dumps(status, separators=(",", ":")).encode()
    return b"" if status["status"] == "Success" else status["message"].encode()


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
