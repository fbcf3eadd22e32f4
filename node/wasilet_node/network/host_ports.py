"""Host ports: what comes to a port of the machine goes to a pod, byte by byte.

The agent listens in the machine's own namespace, where Wasilet may have no rule, and connects from the node's. So such
a connection ends with the agent, unlike one to the pod's address or a NodePort. TCP and UDP.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from wasilet_common.forwarding import Connections, Datagrams, Forwarding, listener
from wasilet_common.relay import Connection

from wasilet_node.network.errors import NetworkError

logger = logging.getLogger(__name__)

KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}

Connect = Callable[[str, int], Awaitable[Connection]]
ConnectDatagrams = Callable[[str, int], socket.socket]


@dataclass(frozen=True, kw_only=True)
class HostPort:
    """One port of the machine, and the pod's that it leads to."""

    address: str
    port: int
    target: int
    protocol: str = "TCP"

    def __str__(self) -> str:
        """As in messages."""
        return str(self.port) if self.protocol == "TCP" else f"{self.port}/{self.protocol}"


def wanted(pod: dict[str, Any]) -> list[HostPort]:
    """Those of a pod that can be had; others than TCP and UDP are logged."""
    found = []
    spec = pod.get("spec") or {}
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        for port in container.get("ports") or ():
            if not port.get("hostPort"):
                continue
            protocol = str(port.get("protocol") or "TCP")
            if protocol not in KINDS:
                logger.warning("host port %s/%s of %s leads nowhere", port["hostPort"], protocol, container["name"])
                continue
            address = str(port.get("hostIP") or "0.0.0.0")  # noqa: S104 - what the API means by an empty hostIP
            number, target = int(port["hostPort"]), int(port["containerPort"])
            found.append(HostPort(address=address, port=number, target=target, protocol=protocol))
    return found


class HostPorts:
    """All open host ports of a node, by pod."""

    def __init__(self, connect: Connect, connect_datagrams: ConnectDatagrams) -> None:
        """Both: to an address and port of a pod. They raise OSError."""
        self._connect = connect
        self._connect_datagrams = connect_datagrams
        self._open: dict[str, list[Forwarding]] = {}

    async def open(self, uid: str, ports: list[HostPort], address: str) -> None:
        """Listen for a pod; idempotent. Raises NetworkError when a port is taken, and none is open then."""
        if uid in self._open or not ports:
            return
        opened = self._open[uid] = []
        for port in ports:
            try:
                sock = listener((port.address, port.port), kind=KINDS[port.protocol])
            except OSError as error:
                await self.close(uid)
                raise NetworkError(f"host port {port}: {error.strerror or error}") from error
            forwarding = self._forwarding(port, address)
            opened.append(forwarding)
            await forwarding.begin(sock)

    async def close(self, uid: str) -> None:
        """Idempotent."""
        for forwarding in self._open.pop(uid, ()):
            await forwarding.close()

    async def close_all(self) -> None:
        """At the agent's end."""
        for uid in list(self._open):
            await self.close(uid)

    def _forwarding(self, port: HostPort, address: str) -> Forwarding:
        if port.protocol == "UDP":
            return Datagrams(lambda: self._connect_datagrams(address, port.target), to_port=port.target)
        return Connections(lambda: self._connect(address, port.target), name=f"{address}:{port.target}")
