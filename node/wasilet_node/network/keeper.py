"""The machine's stand-in for an ordinary user's nodes: a user namespace, and in it the network they are joined to.

``python -P -m wasilet_node.network.keeper ...``. Without root no node may plug a link into the machine's network. So
this process makes a user namespace, where everything of the user's is allowed, and in it an empty network namespace.
Agents ask for that one by a Unix socket, enter both, and make their networks there as they do on a machine as root:
links, routes and redirects between nodes are those of ``wasilet_node.network.node_network``.

What leads across, either way, are connections that this process opens again, since it has sockets in both:

- what listens on the machine's loopback and is for pods (API server, cluster DNS), at an address inside;
- an HTTP CONNECT proxy at a second Unix socket, by which the API server reaches pods and Services (egress selector);
  any other address, as a node's, it opens from the machine.

The way outward is the nodes' own (``wasilet_node.network.outward``).

If it dies: networks live on, since the nodes' supervisors hold the namespaces; the next keeper finds them there. Its
sockets' files stay behind and are taken over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wasilet_common.datagrams import DNS_PORT
from wasilet_common.forwarding import Connections, Datagrams, connected_datagrams, listener
from wasilet_common.relay import Connection, relay

from wasilet_node.network.channel import NamespaceChannel
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.pod_networks import MACHINE_KEY
from wasilet_node.runtime import linux, netns, rootless, supervisor_registry

logger = logging.getLogger("wasilet.network-keeper")

MAX_CONNECTIONS = 2048
"""Of the API server's."""

CONNECT_SECONDS = 10.0
_HEAD_BYTES = 4096
_BACKLOG = 256

Network = ipaddress.IPv4Network
Address = tuple[str, int]


# --- the agent's side ------------------------------------------------------------------------------------------------


def enter(path: Path) -> int:
    """Move this process, which must have one thread, into the user namespace of a keeper. A descriptor of the network
    namespace that stands in for the machine's. Raises NetworkError."""
    try:
        handed = rootless.ask(path)
        os.close(handed.stream)
        os.close(handed.datagrams)
        rootless.join(handed.namespace)
        linux.keep_only_capabilities(rootless.RIGHTS)
    except OSError as error:
        raise NetworkError(
            f"the keeper of the pod network does not let this node in ({path}): {error.strerror or error}"
        ) from error
    return handed.namespace


# --- the process -----------------------------------------------------------------------------------------------------


class Inside:
    """The network namespace, and the one thread that is in it."""

    def __init__(self, found: int | None) -> None:
        """``found``: it is there already. Raises OSError."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inside")
        self.descriptor = self._thread.submit(_move_inside, found).result()

    def make_socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """Not blocking. Takes some 50 us of the caller's time. Raises OSError."""
        made = self._thread.submit(socket.socket, socket.AF_INET, kind).result()
        made.setblocking(False)  # noqa: FBT003
        return made

    def listen(self, address: Address, kind: socket.SocketKind) -> socket.socket:
        """At an address that the first node brings. Raises OSError."""
        return self._thread.submit(listener, address, kind=kind, freebind=True).result()

    async def connect(self, address: Address) -> Connection:
        """Raises OSError."""
        made = self.make_socket()
        try:
            await asyncio.get_running_loop().sock_connect(made, address)
            return await asyncio.open_connection(sock=made)
        except BaseException:
            made.close()
            raise


def _move_inside(found: int | None) -> int:
    if found is not None:
        netns.setns(found)
        return found
    netns.unshare(netns.CLONE_NEWNET)
    with Netlink() as inside:
        inside.set_up(1)
    return netns.open_own()


@dataclass(frozen=True)
class Way:
    """From an address inside to one of the machine's."""

    listen: Address
    to: Address


async def serve_way(inside: Inside, way: Way) -> None:
    """TCP, and UDP beside it, which is the DNS's. Raises OSError."""
    streams = Connections(lambda: asyncio.open_connection(*way.to), name=f"{way.to[0]}:{way.to[1]}")
    await streams.begin(inside.listen(way.listen, socket.SOCK_STREAM))
    datagrams = Datagrams(lambda: connected_datagrams(way.to), to_port=DNS_PORT)
    await datagrams.begin(inside.listen(way.listen, socket.SOCK_DGRAM))


class ConnectProxy:
    """For the API server: ``CONNECT HOST:PORT`` to where pods and Services are, or to the machine's own network."""

    def __init__(self, inside: Inside, networks: Sequence[Network]) -> None:
        self._inside = inside
        self._networks = networks
        self._open = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            address = _asked(head)
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()
            return
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                await self._pass_on((reader, writer), address)
        except OSError as error:
            logger.info("%s:%d: %s", *address, error)
        finally:
            self._open -= 1
            writer.close()

    async def _pass_on(self, here: Connection, address: Address) -> None:
        """Raises OSError."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                there = await self._connect(address)
        except OSError:
            here[1].write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            await here[1].drain()
            raise
        try:
            here[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await relay(here, there)
        finally:
            there[1].close()

    async def _connect(self, address: Address) -> Connection:
        if _is_within(address[0], self._networks):
            return await self._inside.connect(address)
        return await asyncio.open_connection(*address)


def _is_within(host: str, networks: Sequence[Network]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)


def _asked(head: bytes) -> Address:
    """Raises ValueError."""
    method, target, _version = head.decode("ascii").partition("\r\n")[0].split(" ")
    if method != "CONNECT":
        raise ValueError(method)
    host, _, port = target.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(path: Path) -> socket.socket:
    """For this user alone; takes the place of one that an ended keeper left. Raises OSError."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        made.bind(str(path))
        made.listen(_BACKLOG)
        made.setblocking(False)  # noqa: FBT003
    except OSError:
        made.close()
        raise
    finally:
        os.umask(mask)
    return made


def _hand_out(entrance: socket.socket, inside: Inside) -> None:
    """See ``rootless.Handed``."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        connection, _ = entrance.accept()
        stack.enter_context(connection)
        sockets = [stack.enter_context(inside.make_socket(kind)) for kind in rootless.KINDS]
        socket.send_fds(connection, [b"inside"], [inside.descriptor, *(made.fileno() for made in sockets)])


def _found(nodes: Path) -> int | None:
    """A descriptor of the namespace that an earlier keeper made, from a supervisor that still has it."""
    for channel in _channels(nodes):
        if MACHINE_KEY in channel.kept():
            return channel.get(MACHINE_KEY)
    return None


def _channels(nodes: Path) -> Iterator[NamespaceChannel]:
    for data in sorted(nodes.glob("*/")):
        pointer = supervisor_registry.current(data)
        if pointer is None:
            continue
        try:
            channel = NamespaceChannel(pointer)
        except NetworkError as error:
            logger.warning("%s: %s", data.name, error)
            continue
        try:
            yield channel
        finally:
            channel.close()


async def _serve(inside: Inside, options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for way in options.way:
        await serve_way(inside, way)
        logger.info("%s:%d inside leads to %s:%d", *way.listen, *way.to)
    proxy = ConnectProxy(inside, options.inside)
    await asyncio.start_unix_server(proxy.accept, sock=_listen(options.connect_socket), limit=_HEAD_BYTES)
    # Last: by it others know that all is there.
    entrance = _listen(options.socket)
    loop.add_reader(entrance, _hand_out, entrance, inside)
    await stop.wait()
    loop.remove_reader(entrance)
    entrance.close()


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return str(ipaddress.IPv4Address(host)), int(port)


def _way(text: str) -> Way:
    listen, _, to = text.partition("=")
    return Way(_address(listen), _address(to))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; runs until SIGTERM."""
    parser = argparse.ArgumentParser(prog="wasilet_node.network.keeper")
    parser.add_argument("--socket", type=Path, required=True, help="by which agents come in")
    parser.add_argument("--connect-socket", type=Path, required=True, help="by which the API server reaches pods")
    parser.add_argument("--nodes", type=Path, required=True, help="whose folders are data folders of nodes")
    parser.add_argument("--inside", type=Network, action="append", default=[], help="ranges of pods and Services")
    parser.add_argument("--way", type=_way, action="append", default=[], metavar="IP:PORT=IP:PORT")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        found = _found(options.nodes)
        if found is not None:
            rootless.join(found)
            logger.info("found the namespaces of an earlier keeper")
        else:
            rootless.make()
        linux.keep_only_capabilities(rootless.RIGHTS)
        inside = Inside(found)
        asyncio.run(_serve(inside, options))
    except (OSError, NetworkError) as error:
        logger.error("%s", error)  # noqa: TRY400  (no traceback for that)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
