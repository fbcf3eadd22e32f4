"""A node's link where the cluster's nodes are on this machine alone: the machine routes to the node's pods.

What the machine has of it is its end of the veth with an address, routes through it to the cluster's pods and Services,
and redirects from it to the links of the cluster's other nodes; all of it goes with the veth.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import zlib
from collections.abc import Iterable
from pathlib import Path

from wasilet_node.network.errors import NetworkAbsentError
from wasilet_node.network.netlink import Netlink, NetlinkError, NetlinkGoneError, Route
from wasilet_node.network.uplink import LINK_PREFIX, UPLINK, interface_name, interface_prefix
from wasilet_node.settings import NetworkSettings

logger = logging.getLogger(__name__)

LINK_ADDRESS = bytes.fromhex("0257534c4e4b")
"""Of every end of every node's link: locally administered, by its second bit."""

_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


def near(_: NetworkSettings) -> str:
    """A condition of the packet filter on what is no other machine beside the cluster and this machine: nothing."""
    return ""


def returning(settings: NetworkSettings) -> str:
    """A rule for what leaves by the link: what the machine sends to a Service whose pod is on another node must come
    back the way it went."""
    return f'oifname "{UPLINK}" ip saddr {settings.machine_address} masquerade'


def arriving(_: NetworkSettings) -> str:
    """Chains for what is sent to the node itself: none."""
    return ""


class RoutedLink:
    """See the module. Used in the thread of ``NodeNetwork``."""

    def __init__(self, settings: NetworkSettings, pod_cidr: ipaddress.IPv4Network, *, data: Path) -> None:
        self._settings = settings
        self._pod_cidr = pod_cidr
        self._data = data

    def make(self, machine: Netlink, node: Netlink, descriptor: int) -> None:
        """Join the node's namespace (``descriptor``) to the machine. Raises NetlinkError; NetworkAbsentError where
        another node has its address."""
        settings = self._settings
        self._check(machine)
        name = interface_name(self._data)
        machine.add_veth(name, peer=UPLINK, peer_namespace=descriptor, hardware_address=LINK_ADDRESS)
        uplink = node.require(UPLINK)
        node.add_address(uplink, settings.uplink.ip, prefix=32, peer=settings.machine_address)
        node.set_up(uplink)
        node.add_route(_EVERYWHERE, gateway=settings.machine_address, index=uplink)
        self._join_machine(machine, name)

    def keep(self, machine: Netlink) -> None:
        """Have the machine's routes where something took them: the node whose route led to the Services has ended, or
        a VPN's client cleared the table. Raises NetlinkError."""
        uplink = ipaddress.IPv4Network(self._settings.uplink.ip)
        routes = machine.routes()
        for route in routes:
            if route.destination == uplink:
                self._have_routes(machine, route.interface_index, known=routes)

    def lead_pods(self, node: Netlink) -> None:
        """To the cluster's other pods. Raises NetlinkError."""
        settings = self._settings
        uplink = node.require(UPLINK)
        node.add_route(settings.cluster_cidr, gateway=settings.machine_address, index=uplink, replace=True)

    def _check(self, machine: Netlink) -> None:
        """Two links with one address would take each other's packets. One of Wasilet's may still be on its way out."""
        names = dict(machine.links())
        for route in machine.routes():
            name = names.get(route.interface_index, "")
            if route.destination == ipaddress.IPv4Network(self._settings.uplink.ip) and not name.startswith(
                interface_prefix(self._data)
            ):
                raise NetworkAbsentError(f"{self._settings.uplink.ip} is reached by {name} already: another cluster's?")

    def _join_machine(self, machine: Netlink, name: str) -> None:
        settings = self._settings
        index = machine.require(name)
        machine.add_address(index, settings.machine_address, prefix=32, peer=settings.uplink.ip)
        machine.set_up(index)
        self._have_routes(machine, index, known=machine.routes())
        try:
            self._meet_other_nodes(machine, index)
        except NetlinkError as error:
            logger.warning("packets for pods of other nodes go through the machine's own firewall: %s", error)
            machine.set_forwarding(index)

    def _have_routes(self, machine: Netlink, index: int, *, known: Iterable[Route]) -> None:
        """Where another has a route to the Services, as the first node of a cluster does, that one is used."""
        there = {route.destination for route in known}
        for destination in {self._pod_cidr, self._settings.service_cidr} - there:
            try:
                machine.add_route(destination, gateway=self._settings.uplink.ip, index=index)
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise

    def _meet_other_nodes(self, machine: Netlink, index: int) -> None:
        """Redirect between this node's link and those of the cluster's other nodes, both ways. Each node does so after
        its own routes are there: of two that join at one moment, the later one sees both. Raises NetlinkError."""
        reached: dict[int, list[ipaddress.IPv4Network]] = {}
        for index_there, destination in routes_to_nodes(machine):
            if destination.subnet_of(self._settings.cluster_cidr):
                reached.setdefault(index_there, []).append(destination)
        machine.take_ingress(index)
        own = reached.pop(index, [])
        for other, destinations in reached.items():
            with contextlib.suppress(NetlinkGoneError):  # a node that ends takes its link with it
                _redirect(machine, index, destinations, to=other)
                _redirect(machine, other, own, to=index)


def routes_to_nodes(machine: Netlink) -> list[tuple[int, ipaddress.IPv4Network]]:
    """What the machine reaches by links of nodes, of whichever cluster, with the link's index. Raises NetlinkError."""
    names = dict(machine.links())
    return [
        (route.interface_index, route.destination)
        for route in machine.routes()
        if isinstance(route.destination, ipaddress.IPv4Network)
        and names.get(route.interface_index, "").startswith(LINK_PREFIX)
    ]


def _redirect(machine: Netlink, index: int, destinations: Iterable[ipaddress.IPv4Network], *, to: int) -> None:
    """Replaces what an earlier node with these addresses has left there: its interface is gone."""
    found = list(destinations)
    machine.take_ingress(index)
    for priority in {_priority(destination) for destination in found}:
        machine.forget_redirects(index, priority=priority)
    for destination in found:
        machine.redirect(index, destination, to=to, priority=_priority(destination))


def _priority(destination: ipaddress.IPv4Network) -> int:
    """One per range of addresses: by it the redirects for that range are found again."""
    return 1 + zlib.crc32(destination.network_address.packed) % 0xFFFE
