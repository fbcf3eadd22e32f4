"""What pods ask of a network, and the answer of a node that has none of its own: every pod shares the machine's."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import dataclass
from typing import Any, Protocol

from wasilet_node.runtime.protocol import GuestKind

Pod = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What a container needs to run in its pod's network."""

    key: str
    """Of its namespace; empty: it has none, as nothing in it has a socket."""

    addresses: tuple[str, ...]


class Networks(Protocol):
    """``wasilet_node.network.service.PodNetwork``, as pods and the kubelet API use it."""

    async def attach(self, pod: Pod, guest: GuestKind | None = GuestKind.COMPONENT) -> Attachment | None:
        """Have a pod's network, as far as a guest of this kind needs one; None: its address is enough for now. None as
        the answer: it shares the machine's. Idempotent. Raises NetworkError."""

    async def await_policies(self, pod: Pod) -> None:
        """Wait, for a short time at most, until NetworkPolicies, if there are any, know an attached pod: till then
        nothing that it sends gets through."""

    async def etc_files(self, pod: Pod) -> tuple[tuple[str, str], ...]:
        """Write what an attached pod resolves names by; see ``ContainerConfig.etc_files``. Raises NetworkError."""

    async def detach(self, uid: str) -> None:
        """Take a pod's network down; idempotent. Raises NetworkError."""

    def addresses(self, pod: Pod) -> tuple[str, ...] | None:
        """A pod's own addresses; None: it shares the machine's, or has none yet."""

    def shares_machine(self, pod: Pod) -> bool:
        """Whether a pod has the machine's network, so that its address is the node's."""

    def make_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket that reaches pods, not blocking. Raises OSError."""

    async def connect(self, address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TCP connection to a pod. Raises OSError."""

    async def connect_inside(self, pod: Pod, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TCP connection to a port of a pod's own loopback, else of its address. Raises OSError."""

    def uids(self) -> list[str]:
        """Of all pods that have their own network."""


class MachineNetwork:
    """No pod network."""

    async def attach(self, pod: Pod, guest: GuestKind | None = GuestKind.COMPONENT) -> Attachment | None:  # noqa: ARG002
        """None."""
        return None

    async def await_policies(self, pod: Pod) -> None:
        """At once."""

    async def etc_files(self, pod: Pod) -> tuple[tuple[str, str], ...]:  # noqa: ARG002
        """None."""
        return ()

    async def detach(self, uid: str) -> None:
        """Nothing to remove."""

    def addresses(self, pod: Pod) -> tuple[str, ...] | None:  # noqa: ARG002
        """None."""
        return None

    def shares_machine(self, pod: Pod) -> bool:  # noqa: ARG002
        """True."""
        return True

    def make_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """One of the machine's."""
        return socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)

    async def connect(self, address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """From the machine."""
        return await asyncio.open_connection(address, port)

    async def connect_inside(self, pod: Pod, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:  # noqa: ARG002
        """A pod's loopback would be the machine's: refused."""
        raise OSError(errno.ENETUNREACH, "the pod has no network of its own")

    def uids(self) -> list[str]:
        """None."""
        return []
