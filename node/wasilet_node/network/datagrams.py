"""Datagrams passed on between two networks, for a protocol of questions and answers: each client has a socket there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import OrderedDict

logger = logging.getLogger(__name__)

MAX_CLIENTS = 512
"""The one that has been silent for longest gives way to the next."""

_DATAGRAM_BYTES = 65535
_AT_ONCE = 64
"""Datagrams that are taken before others get their turn."""

Address = tuple[str, int]


class DatagramRelay:
    """From one bound socket to one address, and what comes back to who asked. Of one event loop."""

    def __init__(self, listener: socket.socket, to: Address) -> None:
        """``listener``: not blocking; closed with this."""
        self._listener = listener
        self._to = to
        self._clients: OrderedDict[Address, socket.socket] = OrderedDict()

    def begin(self) -> None:
        """From here on."""
        asyncio.get_running_loop().add_reader(self._listener, self._forth)

    def close(self) -> None:
        """Idempotent."""
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        while self._clients:
            self._forget_oldest()

    def _forth(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, client = self._listener.recvfrom(_DATAGRAM_BYTES)
            except OSError:
                return
            # A datagram may be lost: who asked asks again.
            with contextlib.suppress(OSError):
                self._socket_of(client).send(data)

    def _socket_of(self, client: Address) -> socket.socket:
        known = self._clients.get(client)
        if known is not None:
            self._clients.move_to_end(client)
            return known
        while len(self._clients) >= MAX_CLIENTS:
            self._forget_oldest()
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.connect(self._to)
        except OSError:
            made.close()
            raise
        self._clients[client] = made
        asyncio.get_running_loop().add_reader(made, self._back, made, client)
        return made

    def _back(self, sock: socket.socket, client: Address) -> None:
        with contextlib.suppress(OSError):
            self._listener.sendto(sock.recv(_DATAGRAM_BYTES), client)

    def _forget_oldest(self) -> None:
        _, sock = self._clients.popitem(last=False)
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()
