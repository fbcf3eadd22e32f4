"""Listeners that pass on to another place what they take in: accepted, bounded and closed in one way.

A client's address ends here, as with every proxy. Connections of TCP are relayed to their ends; UDP has flows, which
end by silence (:mod:`wasilet_common.datagrams`). What goes beyond a listener's limit is refused, so that a flood of one
takes no other's descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from wasilet_common.datagrams import AT_ONCE, MAX_BYTES, Flow, Flows, Limits, idle_seconds
from wasilet_common.relay import Connection, relay
from wasilet_common.sparing_log import SparingLog

log = SparingLog(logging.getLogger(__name__))

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_CONNECTIONS = 1024
MAX_FLOWS = 1024
"""Of one listener."""

CONNECT_SECONDS = 10.0
_BACKLOG = 100
_IP_PKTINFO, _IP_FREEBIND = 8, 15
"""``linux/in.h``; Python has no names for them."""

_PKTINFO = struct.Struct("=i4s4s")
"""``struct in_pktinfo``: an interface, this machine's address, the one in the packet."""


class Forwarding(Protocol):
    """What passes on. Of one event loop."""

    async def begin(self, sock: socket.socket) -> None:
        """Take what comes to a socket of :func:`listener`, which is closed with this."""

    async def close(self) -> None:
        """End it and all that is under way. Idempotent."""


def listener(address: tuple[str, int], *, kind: int = socket.SOCK_STREAM, freebind: bool = False) -> socket.socket:
    """``freebind``: also at an address that this machine does not have yet. Raises OSError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Never for datagrams: two processes could have one port then, and the first would hear nothing.
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        elif kind == socket.SOCK_DGRAM:
            made.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        if freebind:
            made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        made.bind(address)
        if kind == socket.SOCK_STREAM:
            made.listen(_BACKLOG)  # which finds another listener that the address was shared with
    except OSError:
        made.close()
        raise
    return made


class Connections:
    """TCP: each connection is opened again, and relayed until an end."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        *,
        name: str,
        allowed: Sequence[Network] = (),
        limit: int = MAX_CONNECTIONS,
    ) -> None:
        """``connect``: to the other place, named ``name`` in the log; raises OSError. ``allowed``: whose connections
        are forwarded; empty: everyone's. Linux takes packets for any of its addresses on any of its interfaces, so an
        address of an inner network alone keeps out no neighbour who sets a route to it."""
        self._connect = connect
        self._name = name
        self._allowed = allowed
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def begin(self, sock: socket.socket) -> None:
        """See :class:`Forwarding`."""
        self._server = await asyncio.start_server(self._accept, sock=sock)

    async def close(self) -> None:
        """See :class:`Forwarding`."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            peer = writer.get_extra_info("peername")
            if self._allowed and not _is_within(peer, self._allowed):
                log.info("a connection from %s was refused", peer)
            elif len(self._tasks) > self._limit:
                log.info("more than %d connections to %s: one was refused", self._limit, self._name)
            else:
                await self._forward(reader, writer)
        finally:
            await _close(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                there = await self._connect()
        except OSError as error:
            log.info("no connection to %s: %s", self._name, error or type(error).__name__)
            return
        try:
            await relay((reader, writer), there)
        finally:
            await _close(there[1])


class Datagrams:
    """UDP: each client has a socket of its own at the other place."""

    def __init__(self, connect: Callable[[], socket.socket], *, to_port: int, limit: int = MAX_FLOWS) -> None:
        """``connect``: a non-blocking socket that is connected to the other place; raises OSError. ``to_port``: there,
        by which the time of silence goes."""
        self._connect = connect
        self._idle_seconds = idle_seconds(to_port)
        self._flows = Flows(Limits(flows=limit, per_client=limit))
        self._socket: socket.socket | None = None

    async def begin(self, sock: socket.socket) -> None:
        """See :class:`Forwarding`."""
        self._socket = sock
        asyncio.get_running_loop().add_reader(sock, self._readable, sock)

    async def close(self) -> None:
        """See :class:`Forwarding`."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._flows.close()

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, control, _, client = sock.recvmsg(MAX_BYTES, socket.CMSG_SPACE(_PKTINFO.size))
            except OSError:
                return  # nothing more
            self._take(sock, data, client, _asked_address(control))

    def _take(self, sock: socket.socket, data: bytes, client: tuple[str, int], asked: bytes) -> None:
        key = (client, asked)
        if self._flows.send(key, data) or not self._flows.make_room(client[0]):
            return
        try:
            far = self._connect()
        except OSError as error:
            log.info("no flow of %s: %s", client, error)
            return
        answer = functools.partial(_answer, sock, client, asked)
        self._flows.add(key, Flow(client=client[0], far=far, answer=answer, idle_seconds=self._idle_seconds))
        self._flows.send(key, data)


def connected_datagrams(to: tuple[str, int]) -> socket.socket:
    """A socket for :class:`Datagrams`. Raises OSError."""
    made = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(to)
    except OSError:
        made.close()
        raise
    return made


def _asked_address(control: list[tuple[int, int, bytes]]) -> bytes:
    """Which of this machine's addresses a client asked: it takes an answer from no other. Empty: not known."""
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            _, own, _ = _PKTINFO.unpack(data)
            return bytes(own)
    return b""


def _answer(sock: socket.socket, client: tuple[str, int], asked: bytes, data: bytes) -> None:
    control = [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, asked, bytes(4)))] if asked else []
    sock.sendmsg([data], control, 0, client)


def _is_within(peer: tuple[str, int] | None, allowed: Sequence[Network]) -> bool:
    return peer is not None and any(ipaddress.ip_address(peer[0]) in network for network in allowed)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
