"""The node's routes to other nodes' pods, where those nodes are on the same bridge: one per Node, to its podCIDR by its
InternalIP, as kindnet has them the other way round.

Run by the policies' process, whose credential may list Nodes; a node's own may not. Routes stay when it ends; those of
Nodes that went meanwhile are taken away by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from wasilet_node.kube.client import KubeClient
from wasilet_node.network.netlink import Netlink, NetlinkError, NetlinkGoneError
from wasilet_node.network.uplink import UPLINK

logger = logging.getLogger(__name__)

NODES_PATH = "/api/v1/nodes"
SETTLE_SECONDS = 0.2
RETRY_SECONDS = 2.0

Network = ipaddress.IPv4Network
Routes = Mapping[Network, ipaddress.IPv4Address]


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """What is taken from Nodes, whose status each node writes itself."""

    own: Network
    """This node's podCIDR."""

    pods: Network
    """Of the whole cluster: no route leads outside of it."""

    uplink: ipaddress.IPv4Interface
    """This node's address in the network of the others: what is not of that network is no neighbour."""

    gateway: ipaddress.IPv4Address
    """The machine's own address there."""


def wanted(nodes: Iterable[Mapping[str, Any]], here: Neighbourhood) -> dict[Network, ipaddress.IPv4Address]:
    """The routes. A podCIDR that two Nodes have leads to the older one's, by its name when they are of one age."""
    found: dict[Network, ipaddress.IPv4Address] = {}
    for node in sorted(nodes, key=_age):
        network, address = _network(node), _internal_ip(node)
        if network is None or address is None or network.overlaps(here.own) or not network.subnet_of(here.pods):
            continue
        if address not in here.uplink.network or address in {here.uplink.ip, here.gateway}:
            continue
        found.setdefault(network, address)
    return found


def _age(node: Mapping[str, Any]) -> tuple[str, str]:
    return str(node["metadata"].get("creationTimestamp")), str(node["metadata"]["name"])


def _network(node: Mapping[str, Any]) -> Network | None:
    try:
        return Network(str((node.get("spec") or {}).get("podCIDR")))
    except ValueError:
        return None


def _internal_ip(node: Mapping[str, Any]) -> ipaddress.IPv4Address | None:
    for entry in (node.get("status") or {}).get("addresses") or ():
        if entry.get("type") == "InternalIP":
            with contextlib.suppress(ValueError):
                return ipaddress.IPv4Address(str(entry.get("address")))
    return None


def apply(netlink: Netlink, routes: Routes, here: Neighbourhood) -> None:
    """Have just these within the cluster's pods. Raises NetlinkError."""
    uplink = netlink.require(UPLINK)
    there = {
        route.destination: route
        for route in netlink.routes()
        if route.interface_index == uplink
        and isinstance(route.destination, Network)
        and route.destination.subnet_of(here.pods)
    }
    for destination, route in there.items():
        if destination not in routes:
            logger.info("no route to %s any longer", destination)
            with contextlib.suppress(NetlinkGoneError):
                netlink.remove_route(route)
    for destination, gateway in routes.items():
        known = there.get(destination)
        if known is None or known.gateway != gateway:
            logger.info("pods of %s are reached by %s", destination, gateway)
            netlink.add_route(destination, gateway=gateway, index=uplink, replace=True)


class RouteKeeper:
    """Follows the Nodes."""

    def __init__(self, kube: KubeClient, here: Neighbourhood) -> None:
        self._kube = kube
        self._here = here
        self._nodes: dict[str, Mapping[str, Any]] = {}
        self._synced = False
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="nodes")
            group.create_task(self._keep(), name="routes")

    async def _follow(self) -> None:
        fresh: dict[str, Mapping[str, Any]] = {}
        events = cast("Any", self._kube.watch(NODES_PATH))
        async with aclosing(events):
            async for event in events:
                if event.type == "SYNCED":
                    self._nodes, fresh, self._synced = fresh, {}, True
                elif event.type == "SYNC":
                    fresh[event.object["metadata"]["uid"]] = event.object
                    continue
                elif event.type == "DELETED":
                    self._nodes.pop(event.object["metadata"]["uid"], None)
                else:
                    self._nodes[event.object["metadata"]["uid"]] = event.object
                self._changed.set()

    async def _keep(self) -> None:
        applied: Routes | None = None
        while True:
            await self._changed.wait()
            await asyncio.sleep(SETTLE_SECONDS)
            self._changed.clear()
            routes = wanted(self._nodes.values(), self._here)
            # Each Node's status is written every few minutes, mostly with nothing new in it.
            if not self._synced or routes == applied:
                continue
            try:
                with Netlink() as netlink:
                    apply(netlink, routes, self._here)
                applied = routes
            except NetlinkError as error:
                logger.error("the routes to other nodes' pods: %s", error)  # noqa: TRY400
                await asyncio.sleep(RETRY_SECONDS)
                self._changed.set()
