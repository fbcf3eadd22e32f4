"""The way outward: TCP connections of pods to other machines, opened anew by a process in the machine's own network.

``python -P -m wasilet_node.network.outward ...``, started by the agent in the node's network namespace. Whatever a pod
sends beyond the cluster and the machine is routed to one more namespace behind a veth. There the kernel's ``redirect``
hands every connection to this process, which opens it again from the machine's network, to the address and port that
the pod asked for. So the machine needs no rule, no forwarding and no translation, which would have no owner when the
node dies, and which a firewall or a Docker engine would drop; its routes, VPNs and firewalls hold for pods as for its
own programs.

The packets pass the node's forward path first, where NetworkPolicies are. What lies behind the veth goes with this
process, its routes in the node's namespace go with the veth, and then the node refuses such packets.

A pod's connection is made before the other machine has answered, so that one which is refused there ends with a reset
right after it began. UDP and IPv6 have no way outward.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import resource
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence

from wasilet_common import addresses
from wasilet_common.relay import relay

from wasilet_node.network import nft
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import OUTWARD
from wasilet_node.network.routed_link import routes_to_nodes
from wasilet_node.runtime import linux, netns

logger = logging.getLogger("wasilet.outward")

MAX_CONNECTIONS = 8192
MAX_CONNECTIONS_PER_POD = 1024
CONNECT_SECONDS = 20.0
KNOWN_SECONDS = 1.0
"""How long addresses and routes of the machine are taken for what they were: reading them costs 0.1 ms."""

HERE = ipaddress.IPv4Address("192.0.0.8")
"""The address of this end of the veth: the one that RFC 7600 reserves for ends that never appear as an address."""

_HALVES = tuple(ipaddress.IPv4Network(text) for text in ("0.0.0.0/1", "128.0.0.0/1"))
"""More specific than the default route, which is there again when these go with the interface."""

_NOBODY = 65534
_SO_ORIGINAL_DST = 80
"""``linux/netfilter_ipv4.h``: where a redirected connection was going."""

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Machine:
    """What of the machine's network is no other machine. Of the network namespace that this is made in."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._netlink = Netlink()
        self._read_at = float("-inf")
        self._guard = addresses.Guard()
        self._nodes: tuple[ipaddress.IPv4Network, ...] = ()

    def refusal(self, address: str, port: int) -> str:
        """Why a pod may not connect there; empty: it may. Raises OSError."""
        if time.monotonic() - self._read_at > KNOWN_SECONDS:
            self._read()
        if found := self._guard.refusal(address, port):
            return found
        if any(ipaddress.IPv4Address(address) in network for network in self._nodes):
            return "another cluster's network"
        return "an address of the node itself" if _is_local(address) else ""

    def _read(self) -> None:
        self._guard = addresses.Guard(own=frozenset(self._netlink.addresses()))
        self._nodes = tuple(destination for _, destination in routes_to_nodes(self._netlink))
        self._read_at = time.monotonic()


def _is_local(address: str) -> bool:
    """Whether the kernel would keep packets to an address: it would send them from that address. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return False
        return bool(probe.getsockname()[0] == address)


class Outward:
    """Opens again what a listener takes in. Of one event loop."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._open: Counter[str] = Counter()

    async def serve(self, listener: socket.socket) -> None:
        """For ever."""
        server = await asyncio.start_server(self._accept, sock=listener)
        await server.serve_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pod = str(writer.get_extra_info("peername")[0])
        self._open[pod] += 1
        try:
            if problem := await self._forward(reader, writer, pod):
                logger.info("%s: %s", pod, problem)
                _reset(writer)
        except OSError as error:
            logger.info("%s: %s", pod, error)
            _reset(writer)
        finally:
            self._open[pod] -= 1
            if not self._open[pod]:
                del self._open[pod]
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pod: str) -> str:
        """Why it was not; empty: it was, to its end. Raises OSError."""
        if self._open[pod] > MAX_CONNECTIONS_PER_POD or self._open.total() > MAX_CONNECTIONS:
            return "too many connections outward"
        address, port = _destination(writer.get_extra_info("socket"))
        if refusal := self._machine.refusal(address, port):
            return f"{address}:{port} is {refusal}"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                there = await asyncio.open_connection(address, port)
        except OSError as error:
            return f"{address}:{port}: {error.strerror or type(error).__name__}"
        there[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            await relay((reader, writer), there)
        finally:
            there[1].close()
        return ""


def _destination(connection: socket.socket) -> tuple[str, int]:
    data = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    port, address = struct.unpack_from("!2xH4s", data)
    return socket.inet_ntoa(address), int(port)


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()


def open_namespace(gateway: ipaddress.IPv4Address) -> socket.socket:
    """Move this thread from the node's namespace into a new one behind a veth, and lead the node's pods there. The
    listener of what they open. ``gateway``: an address of the node's, which answers for its pods. Raises OSError."""
    with Netlink() as node:
        netns.unshare(netns.CLONE_NEWNET)
        with Netlink() as here:
            here.set_up(1)
            listener = socket.create_server(("", 0), backlog=1024)
            nft.apply(_rules(listener.getsockname()[1]))
            _join(node, here, gateway)
    return listener


def _join(node: Netlink, here: Netlink, gateway: ipaddress.IPv4Address) -> None:
    descriptor = netns.open_own()
    try:
        # An earlier one that was killed goes with its namespace, in the kernel's own time.
        if (old := node.index_of(OUTWARD)) is not None:
            node.delete_link(old)
        node.add_veth(OUTWARD, peer="pods", peer_namespace=descriptor)
    finally:
        os.close(descriptor)
    inner = here.require("pods")
    here.add_address(inner, HERE, prefix=32)
    here.set_up(inner)
    here.add_route(ipaddress.IPv4Network("0.0.0.0/0"), gateway=gateway, index=inner)
    outer = node.require(OUTWARD)
    for half in _HALVES:
        node.add_route(half, gateway=HERE, index=outer)


def _rules(port: int) -> str:
    return f"""
table ip outward {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        meta l4proto tcp redirect to :{port}
    }}
}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; runs until it is killed."""
    parser = argparse.ArgumentParser(prog="wasilet_node.network.outward")
    parser.add_argument("--gateway", type=ipaddress.IPv4Address, required=True)
    parser.add_argument("--machine-namespace", type=int, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    parent = os.getppid()
    listener = open_namespace(options.gateway)
    netns.setns(options.machine_namespace)
    os.close(options.machine_namespace)
    machine = Machine()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    linux.drop_privileges(keep=frozenset(), uid=_NOBODY)
    if os.getppid() != parent:
        return errno.ESRCH
    asyncio.run(Outward(machine).serve(listener))
    return 1


if __name__ == "__main__":
    sys.exit(main())
