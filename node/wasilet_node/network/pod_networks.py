"""The networks of pods: claimed from a pool of ready ones, given back by letting the supervisor's descriptor go.

A pod's address is taken first, and a namespace once something is to run that can open sockets. A core module cannot, so
a pod of modules alone never has one: a namespace that all of these share answers for their addresses, as the machine
answers where nothing listens, with a refusal at once. It costs such a pod one route instead of a namespace, two
interfaces and a port of the bridge.

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
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import NodeNetwork
from wasilet_node.runtime import netns

logger = logging.getLogger(__name__)

NODE_KEY = "node"
MACHINE_KEY = "machine"
"""What stands in for the machine's namespace where the node is an ordinary user's."""

MODULES_KEY = "modules"
"""Of the namespace that answers for pods without one."""

POOL_SIZE = 8
POOL_LOW = 3
"""With no more than these left, making others is no longer put off."""

BRIDGE_PORTS = 1023
"""The most that a Linux bridge takes (BR_MAX_PORTS); the next is refused with EXFULL. One is that of modules."""

POD_INTERFACE = "eth0"
_UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_T = TypeVar("_T")
_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A namespace that is plugged in and belongs to no pod yet."""

    key: str
    interface: str


@dataclass(frozen=True)
class _Modules:
    """The namespace that answers for pods of modules: requests to it, and the index of its loopback interface."""

    netlink: Netlink
    loopback: int


class PodNetworks:
    """Makes, claims and gives back; needs a made ``NodeNetwork`` of the same thread."""

    def __init__(self, node: NodeNetwork, channel: NamespaceChannel, records: PodRecords) -> None:
        """Finds what an earlier agent made. Raises NetworkError, OSError."""
        self._node = node
        self._channel = channel
        self._records = records
        self._pool: deque[_Ready] = deque()
        self._pods: dict[str, PodRecord] = {}
        self._modules: _Modules | None = None
        kept = set(channel.kept())
        for record in records.load():
            if (
                (record.key in kept or not record.key)
                and record.supervisor == channel.pointer.pid
                and self._fits(record)
            ):
                self._pods[record.uid] = record
                kept.discard(record.key)
            else:
                records.remove(record.uid)
        # What no record names was in the pool, or was being made, when the agent before this one ended.
        channel.drop([key for key in kept if key not in {NODE_KEY, MACHINE_KEY, MODULES_KEY}])
        self._modules_kept = MODULES_KEY in kept
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

    def close(self) -> None:
        """What this object has open; all networks stay. Idempotent."""
        if self._modules is not None:
            self._modules.netlink.close()
            self._modules = None

    def claim(self, uid: str) -> PodRecord:
        """A pod's address, taken if it has none. Raises NetworkError, OSError."""
        if (known := self._pods.get(uid)) is not None:
            return known
        address = self._addresses.take()
        try:
            return self._record(uid, address)
        except BaseException:
            self._addresses.give_back(address)
            raise

    def plug(self, uid: str) -> PodRecord:
        """A pod's namespace, made if it has none. Raises NetworkError, OSError."""
        record = self.claim(uid)
        if record.key:
            return record
        address = ipaddress.IPv4Address(record.address)
        if self._modules_kept:
            modules = self._shared()
            modules.netlink.forget_local_address(address, index=modules.loopback)
            self._node.node.forget_neighbour(address, index=self._node.bridge)
        ready = self._pool.popleft() if self._pool else self._make()
        try:
            descriptor = self._channel.get(ready.key)
            try:
                _inside(descriptor, lambda: _give(address, self._node.gateway))
            finally:
                os.close(descriptor)
            return self._record(uid, address, ready)
        except BaseException:
            # It may have the address already, so it is no other pod's.
            self._channel.drop([ready.key])
            raise

    def answer(self, uid: str) -> PodRecord:
        """Have connections to a pod without a namespace refused at once. Raises NetworkError, OSError."""
        record = self.claim(uid)
        if not record.key:
            modules = self._shared()
            modules.netlink.have_local_address(ipaddress.IPv4Address(record.address), index=modules.loopback)
        return record

    def _record(self, uid: str, address: ipaddress.IPv4Address, ready: _Ready | None = None) -> PodRecord:
        """Write down what a pod has. Raises OSError."""
        record = PodRecord(
            uid=uid,
            key=ready.key if ready is not None else "",
            address=str(address),
            interface=ready.interface if ready is not None else "",
            supervisor=self._channel.pointer.pid,
        )
        self._records.write(record)
        self._pods[uid] = record
        return record

    def _shared(self) -> _Modules:
        """The namespace that answers for modules, made if there is none. Raises NetworkError, OSError."""
        if self._modules is not None:
            return self._modules
        if not self._modules_kept:
            self._plug_in(MODULES_KEY, f"m{secrets.token_hex(5)}", lambda: _route_by(self._node.gateway))
            self._modules_kept = True
        descriptor = self._channel.get(MODULES_KEY)
        try:
            netlink = _inside(descriptor, Netlink)
        finally:
            os.close(descriptor)
        try:
            loopback = netlink.require("lo")
            for record in self._pods.values():
                if not record.key:
                    netlink.have_local_address(ipaddress.IPv4Address(record.address), index=loopback)
        except BaseException:
            netlink.close()
            raise
        self._modules = _Modules(netlink, loopback)
        return self._modules

    def release(self, uid: str) -> None:
        """Idempotent. Raises NetworkError."""
        record = self._pods.get(uid)
        if record is None:
            return
        if record.key:
            self._channel.drop([record.key])
        elif self._modules_kept:
            modules = self._shared()
            modules.netlink.forget_local_address(ipaddress.IPv4Address(record.address), index=modules.loopback)
        self._records.remove(uid)
        # Last: until all of it is done, another try must find it.
        del self._pods[uid]
        self._addresses.give_back(ipaddress.IPv4Address(record.address))

    def uids(self) -> list[str]:
        """Of all pods that have a network."""
        return list(self._pods)

    def refill(self) -> bool:
        """Make one for the pool, unless it or the bridge is full. Whether there is room for another. Raises
        NetworkError."""
        if len(self._pool) >= POOL_SIZE or self._ports_left() <= 0:
            return False
        self._pool.append(self._make())
        return len(self._pool) < POOL_SIZE

    def _ports_left(self) -> int:
        return BRIDGE_PORTS - 1 - len(self._pool) - sum(bool(record.key) for record in self._pods.values())

    def inside(self, record: PodRecord, work: Callable[[], _T]) -> _T:
        """Do something in the namespace of a pod that has one. Raises NetworkError, OSError."""
        descriptor = self._channel.get(record.key)
        try:
            return _inside(descriptor, work)
        finally:
            os.close(descriptor)

    def _fits(self, record: PodRecord) -> bool:
        return ipaddress.IPv4Address(record.address) in self._node.pod_cidr

    def _make(self) -> _Ready:
        if self._ports_left() <= 0:
            raise NetworkError(
                f"the pods' bridge is full: {BRIDGE_PORTS - 1} pods with components are the most per node"
            )
        key = secrets.token_hex(5)
        interface = f"w{key}"
        self._plug_in(key, interface, _bring_up)
        return _Ready(key=key, interface=interface)

    def _plug_in(self, key: str, interface: str, configure: Callable[[], None]) -> None:
        """A new namespace that is a port of the bridge. Raises NetworkError."""
        try:
            descriptor = self._channel.make(key)
            try:
                self._node.node.add_veth(
                    interface, peer=POD_INTERFACE, peer_namespace=descriptor, master=self._node.bridge
                )
                _inside(descriptor, configure)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._channel.drop([key])
            raise NetworkError(str(error)) from error


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


def _bring_up() -> None:
    """All but the address of the pod whose namespace this thread is in. Raises OSError."""
    with Netlink() as inside:
        inside.set_up(inside.require("lo"))
        inside.set_up(inside.require(POD_INTERFACE))
    # Of this thread's namespace. A pod has its ports to itself, 80 too, as under containerd and CRI-O.
    _UNPRIVILEGED_PORTS.write_text("0", encoding="ascii")


def _give(address: ipaddress.IPv4Address, gateway: ipaddress.IPv4Address) -> None:
    """An address and the default route to the pod whose namespace this thread is in. Raises OSError."""
    with Netlink() as inside:
        interface = inside.require(POD_INTERFACE)
        inside.add_address(interface, address, prefix=32)
        inside.add_route(_EVERYWHERE, gateway=gateway, index=interface)


def _route_by(gateway: ipaddress.IPv4Address) -> None:
    """The same without an address. Raises OSError."""
    _bring_up()
    with Netlink() as inside:
        inside.add_route(_EVERYWHERE, gateway=gateway, index=inside.require(POD_INTERFACE))
