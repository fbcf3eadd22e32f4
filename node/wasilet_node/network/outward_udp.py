"""The way outward for UDP: datagrams of pods to other machines, sent again from the machine's own network.

In the namespace of :mod:`wasilet_node.network.outward` every address is a local one, and ``tproxy`` brings a flow's
first datagram to one listener, with the address that the pod asked. From then on the flow has two sockets: in that
namespace one that has the asked address for its own and is connected to the pod, by which the kernel finds it; and in
the machine's network one that is connected to the other machine, so that nothing comes back but what that sends.

What is refused, here or by the other machine, is refused as the kernel does it, by an ICMP message: a program that has
two servers to ask need not wait before it asks the second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from wasilet_common.datagrams import AT_ONCE, MAX_BYTES, Flow, Flows, Limits, idle_seconds
from wasilet_common.sparing_log import SparingLog

log = SparingLog(logging.getLogger("wasilet.outward"))

MAX_FLOWS = 1024
"""Two descriptors each, which together with those of all connections are less than 20,000, a limit that is common."""

MAX_FLOWS_PER_POD = 256

_SOL_RAW, _ICMP_FILTER, _NO_ICMP = 255, 1, 0xFFFFFFFF
_IP_TRANSPARENT, _IP_ORIGDSTADDR = 19, 20
"""``linux/in.h``; Python has no names for them."""

_CONTROL_BYTES = socket.CMSG_SPACE(16)
_UNREACHABLE, _PORT = 3, 3
"""ICMP's type and code."""

_PROTOCOL_UDP = 17

Address = tuple[str, int]
Refusal = Callable[[str, int], str]
"""Why a pod may not send there; empty: it may. Raises OSError."""

MakeSocket = Callable[[], socket.socket]
"""A socket for datagrams. Raises OSError."""


@dataclass(frozen=True)
class Inside:
    """Sockets of the namespace to which pods' datagrams are led; made while there are still privileges."""

    listener: socket.socket
    errors: socket.socket

    def close(self) -> None:
        """Idempotent."""
        self.listener.close()
        self.errors.close()


def open_inside() -> Inside:
    """In the calling thread's namespace. Raises OSError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    errors = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
    listener.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
    listener.setsockopt(socket.SOL_IP, _IP_ORIGDSTADDR, 1)
    # Pods may ask the very port that this is at, and a flow's socket has that port as well.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", 0))
    errors.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", _NO_ICMP))
    return Inside(listener, errors)


class OutwardDatagrams:
    """Sends again what a listener takes in. Of one event loop, in the machine's network."""

    def __init__(self, refusal: Refusal, inside: Inside, make_inside: MakeSocket, limits: Limits | None = None) -> None:
        """``make_inside``: in the namespace of ``inside``."""
        self._refusal = refusal
        self._inside = inside
        self._make_inside = make_inside
        self._flows = Flows(limits or Limits(flows=MAX_FLOWS, per_client=MAX_FLOWS_PER_POD))

    def begin(self) -> None:
        """Until the event loop ends."""
        asyncio.get_running_loop().add_reader(self._inside.listener, self._readable)

    def _readable(self) -> None:
        for _ in range(AT_ONCE):
            try:
                data, control, _, pod = self._inside.listener.recvmsg(MAX_BYTES, _CONTROL_BYTES)
            except OSError:
                return  # nothing more
            if (asked := _asked(control)) is not None:
                self._take(data, pod, asked)

    def _take(self, data: bytes, pod: Address, asked: Address) -> None:
        # Others of a flow may be here already when its own socket is made.
        key = (pod, asked)
        if self._flows.send(key, data):
            return
        if problem := self._begin(key, pod, asked):
            log.info("%s: UDP to %s:%d: %s", pod[0], *asked, problem)
            self._refuse(pod, asked)
        else:
            self._flows.send(key, data)

    def _begin(self, key: tuple[Address, Address], pod: Address, asked: Address) -> str:
        """Why there is no such flow now; empty: there is."""
        if not self._flows.make_room(pod[0]):
            return "too many flows outward"
        try:
            if refusal := self._refusal(*asked):
                return f"that is {refusal}"
            with contextlib.ExitStack() as undo:
                far = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
                far.connect(asked)
                near = undo.enter_context(self._make_inside())
                near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                near.bind(asked)
                near.connect(pod)
                undo.pop_all()
        except OSError as error:
            return error.strerror or str(error)
        self._flows.add(
            key,
            Flow(
                client=pod[0],
                far=far,
                near=near,
                answer=near.send,
                idle_seconds=idle_seconds(asked[1]),
                refused=lambda: self._refuse(pod, asked),
            ),
        )
        return ""

    def _refuse(self, pod: Address, asked: Address) -> None:
        with contextlib.suppress(OSError):
            self._inside.errors.sendto(port_unreachable(pod, asked), (pod[0], 0))


def _asked(control: list[tuple[int, int, bytes]]) -> Address | None:
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_IP, _IP_ORIGDSTADDR):
            port, address = struct.unpack_from("!2xH4s", data)
            return socket.inet_ntoa(address), int(port)
    return None


def port_unreachable(sender: Address, asked: Address) -> bytes:
    """The ICMP message (RFC 792) about a datagram without contents: of it only addresses and ports are read."""
    ports = struct.pack("!HHHH", sender[1], asked[1], 8, 0)
    packet = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(ports), 0, 0, 64, _PROTOCOL_UDP, 0),
        *(socket.inet_aton(sender[0]), socket.inet_aton(asked[0])),
    )
    packet = packet[:10] + _checksum(packet) + packet[12:]
    message = struct.pack("!BBHI", _UNREACHABLE, _PORT, 0, 0) + packet + ports
    return message[:2] + _checksum(message) + message[4:]


def _checksum(data: bytes) -> bytes:
    """Of the Internet (RFC 1071); ``data`` has an even length."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
