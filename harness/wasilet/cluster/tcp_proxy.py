"""A proxy by which other machines reach a server that listens on loopback: bytes pass, nothing is read or changed.

The API server of a local cluster (``host``, kind, k3d) listens on loopback only, and should. A node on another machine
gets this proxy instead: TLS goes through it end to end, so it needs no key and knows no secret, and who comes through
must still show the API server a credential. ``python -P -m wasilet.cluster.tcp_proxy --listen 192.0.2.1:6443 --to
HOST:PORT``"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence

from wasilet_common.relay import relay

logger = logging.getLogger("wasilet.tcp-proxy")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Connect = Callable[[str, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

MAX_CONNECTIONS = 500
"""A node holds about a dozen; the limit keeps a flood from taking the machine's descriptors."""

CONNECT_SECONDS = 5.0
_IP_FREEBIND = 15
"""``linux/in.h``; Python has no name for it."""


def listener(address: tuple[str, int], *, freebind: bool) -> socket.socket:
    """``freebind``: also at an address that this machine does not have yet. Raises OSError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if freebind:
            listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class Forwarding:
    """A listener whose connections are forwarded until it is closed. Of one event loop."""

    def __init__(
        self, to: tuple[str, int], *, allowed: Sequence[Network] = (), connect: Connect = asyncio.open_connection
    ) -> None:
        """``allowed``: whose connections are forwarded; empty: everyone's. Linux takes packets for any of its addresses
        on any of its interfaces, so an address of an inner network alone keeps out no neighbour who sets a route to
        it. ``connect``: by which way."""
        self._to = to
        self._connect = connect
        self._allowed = allowed
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def begin(self, sock: socket.socket) -> None:
        """Take the connections of a socket of :func:`listener`, which is closed with this."""
        self._server = await asyncio.start_server(self._accept, sock=sock)

    async def close(self) -> None:
        """End it, and the connections there are. Idempotent."""
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
            if self._allowed and not _is_within(writer.get_extra_info("peername"), self._allowed):
                logger.warning("a connection from %s was refused", writer.get_extra_info("peername"))
                return
            if self._places.locked():
                logger.warning("more than %d connections: one was refused", MAX_CONNECTIONS)
                return
            async with self._places:
                await _forward(reader, writer, self._to, self._connect)
        finally:
            await _close(writer)


async def serve(
    listen: tuple[str, int],
    to: tuple[str, int],
    *,
    stop: asyncio.Event,
    freebind: bool = False,
    allowed: Sequence[Network] = (),
) -> None:
    """Forward until ``stop`` is set; ``allowed`` as for :class:`Forwarding`. Raises OSError when it cannot listen."""
    forwarding = Forwarding(to, allowed=allowed)
    await forwarding.begin(listener(listen, freebind=freebind))
    logger.info("%s:%d leads to %s:%d", *listen, *to)
    try:
        await stop.wait()
    finally:
        await forwarding.close()


def _is_within(peer: tuple[str, int] | None, allowed: Sequence[Network]) -> bool:
    return peer is not None and any(ipaddress.ip_address(peer[0]) in network for network in allowed)


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: tuple[str, int], connect: Connect
) -> None:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            there_reader, there_writer = await connect(*to)
    except OSError as error:
        logger.warning("no connection to %s:%d: %s", *to, error)
        return
    try:
        await relay((reader, writer), (there_reader, there_writer))
    finally:
        await _close(there_writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


async def _run(listen: tuple[str, int], to: tuple[str, int], *, freebind: bool, allowed: Sequence[Network]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(listen, to, stop=stop, freebind=freebind, allowed=allowed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wasilet.cluster.tcp_proxy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--freebind", action="store_true", help="the address may come later")
    parser.add_argument(
        "--allow-from", type=ipaddress.ip_network, action="append", default=[], metavar="CIDR",
        help="whose connections are taken; repeatable (default: everybody's)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(_run(options.listen, options.to, freebind=options.freebind, allowed=options.allow_from))
    except OSError as error:
        logger.error("cannot listen on %s:%d: %s", *options.listen, error)  # noqa: TRY400  (no traceback for that)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
