"""Taking a connection over from the HTTP server, for SPDY; and SPDY carried inside a WebSocket.

aiohttp upgrades to WebSocket only. For SPDY the transport is given another protocol after the ``101``, and the HTTP
handler goes on running until the streams end; then the HTTP protocol object is told that its connection is gone, as it
would have been by the transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import WSMsgType, web
from aiohttp.abc import AbstractStreamWriter

from wasilet_node.server.streams.frames import SpdyError
from wasilet_node.server.streams.spdy import SpdyConnection, Stream

logger = logging.getLogger(__name__)

SPDY = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
ACCEPTED_HEADER = "X-Accepted-Stream-Protocol-Versions"
LINGER_SECONDS = 5.0
"""How long the peer has to close after everything was sent: closing first could lose what it has not read yet."""

CLOSE_SECONDS = 1.0
"""How long TLS may take to end; after that the connection is cut."""

MAX_MESSAGE_BYTES = 4 * 1024 * 1024


class Upgraded(web.StreamResponse):
    """Stands for a response that was written by hand; nothing is left to send."""

    def __init__(self) -> None:
        super().__init__(status=101)
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002
        """The 101 is out already."""
        return None

    async def write_eof(self, data: bytes | bytearray | memoryview = b"") -> None:
        """The connection no longer speaks HTTP."""


def wants_spdy(request: web.Request) -> bool:
    """Whether the request asks to become a SPDY connection."""
    connection = request.headers.get("Connection", "").lower()
    return "upgrade" in connection and SPDY.lower() in request.headers.get("Upgrade", "").lower()


def wants_websocket(request: web.Request) -> bool:
    """Whether the request asks to become a WebSocket."""
    connection = request.headers.get("Connection", "").lower()
    return "upgrade" in connection and request.headers.get("Upgrade", "").lower() == "websocket"


def negotiate(request: web.Request, supported: Sequence[str]) -> str:
    """The first subprotocol of the client that is supported. Raises an HTTP error as kubelet's handshake does."""
    offered = [
        each.strip()
        for value in request.headers.getall(PROTOCOL_HEADER, [])
        for each in value.split(",")
        if each.strip()
    ]
    if not offered:
        raise web.HTTPBadRequest(text=f"unable to upgrade: {PROTOCOL_HEADER} is required")
    for each in offered:
        if each in supported:
            return each
    raise web.HTTPForbidden(
        text=f"unable to upgrade: unable to negotiate protocol: client supports {offered}, server accepts {supported}",
        headers=[(ACCEPTED_HEADER, each) for each in supported],
    )


@asynccontextmanager
async def take_over(
    request: web.Request, *, protocol: str, accept: Callable[[Stream], str | None]
) -> AsyncIterator[SpdyConnection]:
    """The connection of this request, speaking SPDY from now on. At the end it is closed."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client went away")
    http = request.protocol
    spdy = _SpdyProtocol(transport, accept)
    transport.write(
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
            f"Upgrade: {SPDY}\r\n{PROTOCOL_HEADER}: {protocol}\r\n\r\n"
        ).encode("ascii")
    )
    transport.set_protocol(spdy)
    try:
        yield spdy.connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await spdy.connection.closed.wait()
    finally:
        spdy.connection.say_goodbye()
        if not transport.is_closing():
            # Once only: before Python 3.11.4 a second close takes from a TLS transport what abort() needs.
            transport.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await spdy.gone.wait()
        except TimeoutError:
            logger.debug("a peer did not answer the end of TLS")
        finally:
            transport.abort()
            asyncio.get_running_loop().call_soon(http.connection_lost, None)


class _SpdyProtocol(asyncio.Protocol):
    def __init__(self, transport: asyncio.Transport, accept: Callable[[Stream], str | None]) -> None:
        self._transport = transport
        self._writable = asyncio.Event()
        self._writable.set()
        self.gone = asyncio.Event()
        """The transport is closed for good."""

        self.connection = SpdyConnection(
            send=transport.write,
            drain=self._drain,
            pause=self._pause_reading,
            accept=accept,
            unsent=transport.get_write_buffer_size,
        )

    def data_received(self, data: bytes) -> None:
        try:
            self.connection.feed(data)
        except SpdyError as error:
            logger.debug("a SPDY connection is closed: %s", error)
            self.connection.lost()
            self._transport.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool | None:
        self.connection.lost()
        return None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the interface of asyncio
        self._writable.set()
        self.gone.set()
        self.connection.lost()

    async def _drain(self) -> None:
        await self._writable.wait()

    def _pause_reading(self, pause: bool) -> None:  # noqa: FBT001 - a callback with one meaning
        if self._transport.is_closing():
            return
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


@asynccontextmanager
async def tunnel(
    socket: web.WebSocketResponse, *, accept: Callable[[Stream], str | None]
) -> AsyncIterator[SpdyConnection]:
    """SPDY whose bytes travel in binary WebSocket messages (KEP-4006), as for port-forward."""
    outgoing: asyncio.Queue[bytes] = asyncio.Queue()
    room = asyncio.Event()
    room.set()
    reading = asyncio.Event()
    reading.set()
    unsent = 0

    def send(data: bytes) -> None:
        nonlocal unsent
        unsent += len(data)
        outgoing.put_nowait(data)
        if outgoing.qsize() > 64:
            room.clear()

    async def drain() -> None:
        await room.wait()

    def pause(stop: bool) -> None:  # noqa: FBT001 - a callback with one meaning
        (reading.clear if stop else reading.set)()

    connection = SpdyConnection(send=send, drain=drain, pause=pause, accept=accept, unsent=lambda: unsent)

    async def write() -> None:
        nonlocal unsent
        while True:
            data = await outgoing.get()
            await socket.send_bytes(data)
            unsent -= len(data)
            outgoing.task_done()
            if outgoing.qsize() <= 32:
                room.set()

    async def read() -> None:
        try:
            async for message in socket:
                if message.type is not WSMsgType.BINARY:
                    break
                connection.feed(message.data)
                await reading.wait()
        except SpdyError as error:
            logger.debug("a SPDY tunnel is closed: %s", error)
        finally:
            connection.lost()
            room.set()

    tasks = [asyncio.create_task(write()), asyncio.create_task(read())]
    try:
        yield connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await connection.closed.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await socket.close()
