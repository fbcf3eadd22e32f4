"""The way outward: what pods send to other machines, sent again by a process in the machine's own network.

``python -P -m wasilet_node.network.outward ...``, started by the agent in the machine's network. Whatever a pod
sends beyond the cluster and the machine is routed to one more namespace behind a veth. There the kernel's ``redirect``
hands every TCP connection to this process, which opens it again from the machine's network, to the address and port
that the pod asked for; datagrams come by ``tproxy`` (:mod:`wasilet_node.network.outward_udp`). So the machine needs no
rule, no forwarding and no translation, which would have no owner when the node dies, and which a firewall or a Docker
engine would drop; its routes, VPNs and firewalls hold for pods as for its own programs.

The packets pass the node's forward path first, where NetworkPolicies are. What lies behind the veth goes with this
process, its routes in the node's namespace go with the veth, and then the node refuses such packets.

A pod's connection is made before the other machine has answered, so that one which is refused there ends with a reset
right after it began. Other protocols and IPv6 have no way outward, nor has UDP where the kernel has no ``tproxy``
(nft_tproxy, nft_socket).
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wasilet_common import addresses
from wasilet_common.relay import relay
from wasilet_common.sparing_log import SparingLog

from wasilet_node.network import nft, outward_udp
from wasilet_node.network.addresses import gateway_of
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import OUTWARD
from wasilet_node.network.routed_link import routes_to_nodes
from wasilet_node.runtime import linux, netns

log = SparingLog(logging.getLogger("wasilet.outward"))

MAX_CONNECTIONS = 8192
MAX_CONNECTIONS_PER_POD = 1024
CONNECT_SECONDS = 20.0
NEW_FLOWS_PER_SECOND = 250
NEW_FLOWS_AT_ONCE = 500
"""Of one pod, by UDP. A new flow costs this process some 0.3 ms."""

KNOWN_SECONDS = 1.0
"""How long addresses and routes of the machine are taken for what they were: reading them costs 0.1 ms."""

HERE = ipaddress.IPv4Address("192.0.0.8")
"""The address of this end of the veth: the one that RFC 7600 reserves for ends that never appear as an address."""

_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")
_HALVES = tuple(ipaddress.IPv4Network(text) for text in ("0.0.0.0/1", "128.0.0.0/1"))
"""More specific than the default route, which is there again when these go with the interface."""

_LOOPBACK = 1
"""The index of ``lo`` in every network namespace."""

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
                log.info("%s: %s", pod, problem)
                _reset(writer)
        except OSError as error:
            log.info("%s: %s", pod, error)
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


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Where pods' packets to other machines end."""

    listener: socket.socket
    """Of their TCP connections."""

    datagrams: outward_udp.Inside | None
    """None: this kernel has no ``tproxy``."""

    thread: ThreadPoolExecutor
    """The one thread that stays there."""

    def make_socket(self) -> socket.socket:
        """For datagrams. Takes some 50 us of the caller's time. Raises OSError."""
        return self.thread.submit(socket.socket, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK).result()


def open_namespace(pod_cidr: ipaddress.IPv4Network) -> Namespace:
    """Move this thread from the node's namespace into a new one behind a veth, and lead the node's pods there. Raises
    OSError, NetworkError."""
    with Netlink() as node:
        netns.unshare(netns.CLONE_NEWNET)
        with Netlink() as here:
            here.set_up(_LOOPBACK)
            listener = socket.create_server(("", 0), backlog=1024)
            nft.apply(_rules(listener.getsockname()[1]))
            datagrams = _take_datagrams()
            _join(node, here, pod_cidr)
    thread = ThreadPoolExecutor(1, thread_name_prefix="outward")
    thread.submit(int).result()  # it is in this namespace by being started now
    return Namespace(listener=listener, datagrams=datagrams, thread=thread)


def _take_datagrams() -> outward_udp.Inside | None:
    inside = outward_udp.open_inside()
    try:
        nft.apply(_datagram_rules(inside.listener.getsockname()[1]))
    except NetworkError as error:
        # Without a listener the kernel refuses what comes.
        log.info("no UDP to other machines: %s", error)
        inside.close()
        return None
    _write_sysctl("ipv4/ip_unprivileged_port_start", "0")
    return inside


def _write_sysctl(name: str, value: str) -> None:
    (Path("/proc/sys/net") / name).write_text(value, encoding="ascii")


def _join(node: Netlink, here: Netlink, pod_cidr: ipaddress.IPv4Network) -> None:
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
    # Every address is this namespace's own but the pods': sockets may have the addresses that pods ask.
    here.add_local_route(pod_cidr, gateway=gateway_of(pod_cidr), index=inner)
    here.add_local_route(_EVERYWHERE, index=_LOOPBACK)
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


def _datagram_rules(port: int) -> str:
    """What has a flow goes to that flow's socket. All else waits in one queue, where the datagrams of a pod must leave
    room for those of others."""
    limit = f"limit rate over {NEW_FLOWS_PER_SECOND}/second burst {NEW_FLOWS_AT_ONCE} packets"
    return f"""
table ip outward-datagrams {{
    set askers {{
        type ipv4_addr
        size 65535
        flags dynamic
        timeout 1m
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto != udp accept
        socket transparent 0 accept
        update @askers {{ ip saddr {limit} }} counter drop
        meta l4proto udp tproxy to :{port}
    }}
}}
"""


def _drop_privileges(thread: ThreadPoolExecutor) -> None:
    """The user is the process's, the rest each thread's own. In this order: the C library ends a process whose threads
    may not all become that user."""
    linux.drop_privileges(keep=frozenset(), uids=(_NOBODY,))
    thread.submit(linux.drop_privileges, keep=frozenset()).result()


async def _serve(machine: Machine, namespace: Namespace) -> None:
    if namespace.datagrams is not None:
        outward_udp.OutwardDatagrams(machine.refusal, namespace.datagrams, namespace.make_socket).begin()
    await Outward(machine).serve(namespace.listener)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; runs until it is killed."""
    parser = argparse.ArgumentParser(prog="wasilet_node.network.outward")
    parser.add_argument("--pod-cidr", type=ipaddress.IPv4Network, required=True)
    parser.add_argument("--node-namespace", type=int, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    parent = os.getppid()
    # In a thread: without root there is no way back into the machine's namespace.
    with ThreadPoolExecutor(1) as inside:
        inside.submit(netns.setns, options.node_namespace).result()
        namespace = inside.submit(open_namespace, options.pod_cidr).result()
    os.close(options.node_namespace)
    machine = Machine()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _drop_privileges(namespace.thread)
    if os.getppid() != parent:
        return errno.ESRCH
    asyncio.run(_serve(machine, namespace))
    return 1


if __name__ == "__main__":
    sys.exit(main())
