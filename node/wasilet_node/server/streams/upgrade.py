"""Taking a connection over from the HTTP server, for SPDY and WebSocket; and SPDY carried inside a WebSocket.

aiohttp upgrades to WebSocket only, and to one that a client can make do any amount of work (``websocket``). So the
transport is given another protocol after the ``101``, and the HTTP handler goes on running until the streams end; then
the HTTP protocol object is told that its connection is gone, as it would have been by the transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from wasilet_node.server.streams.frames import SpdyError
from wasilet_node.server.streams.limits import StreamLimits
from wasilet_node.server.streams.spdy import SpdyConnection, Stream
from wasilet_node.server.streams.turns import Connection, Turns
from wasilet_node.server.streams.websocket import WebSocketConnection, WebSocketError, handshake

logger = logging.getLogger(__name__)

SPDY = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
ACCEPTED_HEADER = "X-Accepted-Stream-Protocol-Versions"
LINGER_SECONDS = 5.0
"""How long the peer has to close after everything was sent: closing first could lose what it has not read yet."""

CLOSE_SECONDS = 1.0
"""How long TLS may take to end; after that the connection is cut."""

INBOX_BYTES = 64 * 1024
"""Read and not looked at yet; more stays in the client. One read of the transport may add 256 KiB."""

TURNS: web.AppKey[Turns] = web.AppKey("turns", Turns)
"""The turns of the server that the streams belong to."""

LIMITS: web.AppKey[StreamLimits] = web.AppKey("limits", StreamLimits)


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
    head = f"Upgrade: {SPDY}\r\n{PROTOCOL_HEADER}: {protocol}\r\n"
    async with _switched(request, head, lambda link: _spdy(link, accept)) as connection:
        yield connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await connection.closed.wait()


@asynccontextmanager
async def websocket(request: web.Request, protocols: Sequence[str]) -> AsyncIterator[WebSocketConnection]:
    """The connection of this request as a WebSocket. At the end it is closed. Raises HTTPBadRequest."""
    accept, protocol = handshake(request, protocols)
    head = f"Upgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n"
    if protocol:
        head += f"Sec-WebSocket-Protocol: {protocol}\r\n"
    async with _switched(request, head, lambda link: _websocket(link, protocol)) as connection:
        yield connection
        connection.send_last_frame()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await connection.closed.wait()


class _Switchable(Connection, Protocol):
    """What both protocols have in common."""

    closed: asyncio.Event

    def lost(self) -> None:
        """The transport is gone."""

    def send_last_frame(self) -> None:
        """The last frame."""


_Switched = TypeVar("_Switched", bound=_Switchable)


def _spdy(link: _Link, accept: Callable[[Stream], str | None]) -> SpdyConnection:
    return SpdyConnection(send=link.send, drain=link.drain, pause=link.pause, accept=accept, unsent=link.unsent)


def _websocket(link: _Link, protocol: str) -> WebSocketConnection:
    return WebSocketConnection(
        protocol=protocol,
        send=link.send,
        drain=link.drain,
        pause=link.pause,
        unsent=link.unsent,
        wake=link.wake,
    )


@asynccontextmanager
async def _switched(request: web.Request, head: str, make: Callable[[_Link], _Switched]) -> AsyncIterator[_Switched]:
    """Answer 101 with the header lines of ``head``, and speak the new protocol until the block ends."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client went away")
    http = request.protocol
    link = _Link(transport)
    connection = make(link)
    link.connection = connection
    transport.write(f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n{head}\r\n".encode("ascii"))
    transport.set_protocol(link)
    worker = asyncio.create_task(link.work(request.app[TURNS]))
    try:
        yield connection
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        connection.send_last_frame()
        if not transport.is_closing():
            # Once only: before Python 3.11.4 a second close takes from a TLS transport what abort() needs.
            transport.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await link.gone.wait()
        except TimeoutError:
            logger.debug("a peer did not answer the end of TLS")
        finally:
            transport.abort()
            asyncio.get_running_loop().call_soon(http.connection_lost, None)


class _Link(asyncio.Protocol):
    """Between a transport and the protocol spoken over it: a bounded inbox, worked off in turns."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._writable = asyncio.Event()
        self._writable.set()
        self._inbox = bytearray()
        self._arrived = asyncio.Event()
        self._full = False
        self._stopped = False
        self.connection: _Switchable | None = None
        self.gone = asyncio.Event()
        """The transport is closed for good."""

    # --- for the protocol -------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """To the peer, without waiting; nothing once it is gone."""
        if not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait while the transport's buffer is full; a turn of the loop at least, in which a lost connection shows."""
        await asyncio.sleep(0)
        await self._writable.wait()

    def unsent(self) -> int:
        """Bytes that the transport still holds."""
        return self._transport.get_write_buffer_size()

    def pause(self, stop: bool) -> None:  # noqa: FBT001 - a callback with one meaning
        """Stop reading, since no one takes what was read; or go on."""
        self._stopped = stop
        self._regulate()

    def wake(self) -> None:
        """Have the protocol step again."""
        self._arrived.set()

    async def work(self, turns: Turns) -> None:
        """Work off what comes in until cancelled, or until the peer breaks the protocol."""
        connection = self.connection
        if connection is None:
            return
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                connection.receive(self._inbox)
                self._inbox.clear()
                self._regulate()
                await turns.work_off(connection)
        except (SpdyError, WebSocketError) as error:
            logger.debug("a connection is closed: %s", error)
            if isinstance(connection, WebSocketConnection) and isinstance(error, WebSocketError):
                connection.send_last_frame(error.code)
            connection.lost()
            if isinstance(error, SpdyError):
                self._transport.abort()  # a polite end would let it go on sending for as long as TLS takes
            elif not self._transport.is_closing():
                self._transport.close()

    # --- for the transport ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return  # on its way out: what the peer goes on sending is dropped
        self._inbox += data
        self._arrived.set()
        self._regulate()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool | None:
        self._lose()
        return None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the interface of asyncio
        self._writable.set()
        self.gone.set()
        self._lose()

    def _lose(self) -> None:
        if self.connection is not None:
            self.connection.lost()

    def _regulate(self) -> None:
        """Read, unless the inbox is full or the protocol has stopped it."""
        full = self._stopped or len(self._inbox) > INBOX_BYTES
        if full == self._full or self._transport.is_closing():
            return
        self._full = full
        if full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


@asynccontextmanager
async def tunnel(
    socket: WebSocketConnection, turns: Turns, *, accept: Callable[[Stream], str | None]
) -> AsyncIterator[SpdyConnection]:
    """SPDY whose bytes travel in binary WebSocket messages (KEP-4006), as for port-forward."""
    reading = asyncio.Event()
    reading.set()

    def pause(stop: bool) -> None:  # noqa: FBT001 - a callback with one meaning
        (reading.clear if stop else reading.set)()

    connection = SpdyConnection(
        send=socket.send_now, drain=socket.drain, pause=pause, accept=accept, unsent=socket.unsent
    )

    async def read() -> None:
        try:
            async for message in socket.messages():
                if message.text:
                    break
                connection.receive(message.data)
                await turns.work_off(connection)
                await reading.wait()
        except SpdyError as error:
            logger.debug("a SPDY tunnel is closed: %s", error)
        finally:
            connection.lost()

    reader = asyncio.create_task(read())
    try:
        yield connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await connection.closed.wait()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
