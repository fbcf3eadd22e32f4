"""Host ports: what comes to a port of the machine goes to a pod, byte by byte.

The agent listens in the machine's own namespace, where Wasilet may have no rule, and connects from the node's. So such
a connection ends with the agent, unlike one to the pod's address or a NodePort. TCP only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from wasilet_common.relay import relay

from wasilet_node.network.errors import NetworkError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""Of one port."""

CONNECT_SECONDS = 10.0

Connect = Callable[[str, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@dataclass(frozen=True, kw_only=True)
class HostPort:
    """One port of the machine, and the pod's that it leads to."""

    address: str
    port: int
    target: int


def wanted(pod: dict[str, Any]) -> list[HostPort]:
    """Those of a pod that can be had; others than TCP are logged."""
    found = []
    spec = pod.get("spec") or {}
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        for port in container.get("ports") or ():
            if not port.get("hostPort"):
                continue
            if (port.get("protocol") or "TCP") != "TCP":
                logger.warning("host port %s of %s is not TCP and leads nowhere", port["hostPort"], container["name"])
                continue
            address = str(port.get("hostIP") or "0.0.0.0")  # noqa: S104 - what the API means by an empty hostIP
            found.append(HostPort(address=address, port=int(port["hostPort"]), target=int(port["containerPort"])))
    return found


class HostPorts:
    """All open host ports of a node, by pod."""

    def __init__(self, connect: Connect) -> None:
        """``connect``: to an address and port of a pod. Raises OSError."""
        self._connect = connect
        self._servers: dict[str, list[asyncio.Server]] = {}
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}

    async def open(self, uid: str, ports: list[HostPort], address: str) -> None:
        """Listen for a pod; idempotent. Raises NetworkError when a port is taken, and none is open then."""
        if uid in self._servers or not ports:
            return
        tasks = self._tasks[uid] = set()
        servers = self._servers[uid] = []
        for port in ports:
            try:
                servers.append(await self._listen(port, address, tasks))
            except OSError as error:
                await self.close(uid)
                raise NetworkError(f"host port {port.port}: {error.strerror or error}") from error

    async def close(self, uid: str) -> None:
        """Idempotent."""
        for server in self._servers.pop(uid, ()):
            server.close()
        tasks = self._tasks.pop(uid, set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close_all(self) -> None:
        """At the agent's end."""
        for uid in list(self._servers):
            await self.close(uid)

    async def _listen(self, port: HostPort, address: str, tasks: set[asyncio.Task[None]]) -> asyncio.Server:
        places = asyncio.Semaphore(MAX_CONNECTIONS)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            try:
                if not places.locked():
                    async with places:
                        await self._relay(reader, writer, address, port.target)
            finally:
                writer.close()

        return await asyncio.start_server(accept, port.address, port.port)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, port: int) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                there_reader, there_writer = await self._connect(address, port)
        except OSError as error:
            logger.info("a host port leads to %s:%d, where no process answers: %s", address, port, error)
            return
        try:
            await relay((reader, writer), (there_reader, there_writer))
        finally:
            there_writer.close()
