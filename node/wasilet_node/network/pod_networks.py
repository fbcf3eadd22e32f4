"""The networks of pods: claimed from a pool of ready ones, given back by letting the supervisor's descriptor go.

All of it runs in the network's own thread, blocking. Order of what is done for a pod: the record, then the network is
used; on the way back the namespace is let go, then the record. Whatever dies in between, the next start finds either
both, or a namespace without record, which is dropped, or a record without namespace, whose pod gets a new network.

Deletion is ``close()`` and never RTM_DELLINK, which waits 14 to 20 ms for the kernel; one after the other, since the
kernel deletes namespaces in batches and delays every process that makes one meanwhile (500 at once: 336 ms; 20: 10 ms).
The name of a veth is never used again, because the old one may still be there.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wasilet_node.network.addresses import AddressPool, PodRecord, PodRecords
from wasilet_node.network.channel import NamespaceChannel
from wasilet_node.network.errors import AddressesExhaustedError, NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import NodeNetwork
from wasilet_node.runtime import netns

logger = logging.getLogger(__name__)

NODE_KEY = "node"
POOL_SIZE = 8
POOL_LOW = 3
"""With no more than these left, making others is no longer put off."""

POD_INTERFACE = "eth0"
_UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_T = TypeVar("_T")
_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A namespace that is plugged in and belongs to no pod yet."""

    key: str
    address: ipaddress.IPv4Address
    interface: str


class PodNetworks:
    """Makes, claims and gives back; needs a made ``NodeNetwork`` of the same thread."""

    def __init__(self, node: NodeNetwork, channel: NamespaceChannel, records: PodRecords) -> None:
        """Finds what an earlier agent made. Raises NetworkError, OSError."""
        self._node = node
        self._channel = channel
        self._records = records
        self._pool: deque[_Ready] = deque()
        self._pods: dict[str, PodRecord] = {}
        kept = set(channel.kept())
        for record in records.load():
            if record.key in kept and record.supervisor == channel.pointer.pid and self._fits(record):
                self._pods[record.uid] = record
                kept.discard(record.key)
            else:
                records.remove(record.uid)
        # What no record names was in the pool, or was being made, when the agent before this one ended.
        channel.drop([key for key in kept if key != NODE_KEY])
        taken = [ipaddress.IPv4Address(record.address) for record in self._pods.values()]
        self._addresses = AddressPool(node.pod_cidr, taken=taken)

    def __len__(self) -> int:
        """How many pods have a network."""
        return len(self._pods)

    @property
    def ready(self) -> int:
        """How many wait for a pod."""
        return len(self._pool)

    def find(self, uid: str) -> PodRecord | None:
        """The network of a pod that has one."""
        return self._pods.get(uid)

    def claim(self, uid: str) -> PodRecord:
        """The network of a pod, made if there is none. Raises NetworkError, OSError."""
        if (known := self._pods.get(uid)) is not None:
            return known
        ready = self._pool.popleft() if self._pool else self._make()
        record = PodRecord(
            uid=uid,
            key=ready.key,
            address=str(ready.address),
            interface=ready.interface,
            supervisor=self._channel.pointer.pid,
        )
        try:
            self._records.write(record)
        except OSError:
            self._pool.append(ready)
            raise
        self._pods[uid] = record
        return record

    def release(self, uid: str) -> None:
        """Idempotent. Raises NetworkError."""
        record = self._pods.get(uid)
        if record is None:
            return
        self._channel.drop([record.key])
        self._records.remove(uid)
        # Last: until all of it is done, another try must find it.
        del self._pods[uid]
        self._addresses.give_back(ipaddress.IPv4Address(record.address))

    def uids(self) -> list[str]:
        """Of all pods that have a network."""
        return list(self._pods)

    def refill(self) -> bool:
        """Make one for the pool. Whether there is room for another: it is not full, and addresses are left. Raises
        NetworkError."""
        if len(self._pool) >= POOL_SIZE:
            return False
        try:
            self._pool.append(self._make())
        except AddressesExhaustedError:
            return False
        return len(self._pool) < POOL_SIZE

    def inside(self, record: PodRecord, work: Callable[[], _T]) -> _T:
        """Do something in a pod's namespace. Raises NetworkError, OSError."""
        descriptor = self._channel.get(record.key)
        try:
            return _inside(descriptor, work)
        finally:
            os.close(descriptor)

    def _fits(self, record: PodRecord) -> bool:
        return ipaddress.IPv4Address(record.address) in self._node.pod_cidr

    def _make(self) -> _Ready:
        address = self._addresses.take()
        key = secrets.token_hex(5)
        interface = f"w{key}"
        try:
            descriptor = self._channel.make(key)
            try:
                self._node.node.add_veth(
                    interface, peer=POD_INTERFACE, peer_namespace=descriptor, master=self._node.bridge
                )
                _inside(descriptor, lambda: _configure(address, self._node.gateway))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._channel.drop([key])
            self._addresses.give_back(address)
            raise NetworkError(str(error)) from error
        except NetworkError:
            self._addresses.give_back(address)
            raise
        return _Ready(key=key, address=address, interface=interface)


def _inside(descriptor: int, work: Callable[[], _T]) -> _T:
    """``work`` in a namespace, then this thread back where it was. Raises OSError, and what ``work`` does."""
    home = netns.open_own()
    try:
        netns.setns(descriptor)
        try:
            return work()
        finally:
            netns.setns(home)
    finally:
        os.close(home)


def _configure(address: ipaddress.IPv4Address, gateway: ipaddress.IPv4Address) -> None:
    """Addresses and the default route of the pod whose namespace this thread is in. Raises OSError."""
    with Netlink() as inside:
        interface = inside.require(POD_INTERFACE)
        inside.set_up(inside.require("lo"))
        inside.add_address(interface, address, prefix=32)
        inside.set_up(interface)
        inside.add_route(_EVERYWHERE, gateway=gateway, index=interface)
    # Of this thread's namespace. A pod has its ports to itself, 80 too, as under containerd and CRI-O.
    _UNPRIVILEGED_PORTS.write_text("0", encoding="ascii")
