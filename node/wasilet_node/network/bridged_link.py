"""A node's link where the cluster's other nodes are on a bridge of this machine, as kind's containers are.

The machine's end of the veth is one more port of that bridge, and the node's end has an address of that network, which
is the Node's InternalIP. So the other nodes reach this node's pods as they reach each other's (kindnet, kind's own
network, has a route per Node: to its podCIDR by its InternalIP), no packet between them passes the machine's routes or
needs its forwarding, and clusters with the same ranges of addresses share a machine. What the machine has of it is a
port of a bridge, which goes with the veth; an engine that filters what it bridges lets its own network's packets pass.

The node's routes to the other nodes' pods are kept by ``wasilet_node.network.node_routes``. What is sent to the node's
own address is the machine's: the kubelet API, pods with ``hostNetwork`` and host ports listen there.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

from wasilet_node.network.errors import NetworkAbsentError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.uplink import UPLINK, interface_name, interface_prefix
from wasilet_node.settings import NetworkSettings

_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


def near(settings: NetworkSettings) -> str:
    """A condition of the packet filter on what is no other machine beside the cluster and this machine: the other
    nodes, with the API server."""
    return f"ip daddr != {settings.uplink.network}"


def returning(settings: NetworkSettings) -> str:
    """A rule for what leaves by the link: what another node sent to the machine by this node's address must come back
    this way."""
    return f'oifname "{UPLINK}" ip daddr {settings.machine_address} ct status dnat masquerade'


def arriving(settings: NetworkSettings) -> str:
    """Chains for what is sent to the node itself: it is the machine's, but for NodePorts, which kube-proxy's chain, of
    a lower priority, has translated by then."""
    return f"""
    chain prerouting {{
        type nat hook prerouting priority -90; policy accept;
        ip daddr {settings.uplink.ip} meta l4proto {{ tcp, udp }} dnat to {settings.machine_address}
    }}"""


class BridgedLink:
    """See the module. Used in the thread of ``NodeNetwork``."""

    def __init__(self, settings: NetworkSettings, bridge: str, *, data: Path) -> None:
        self._settings = settings
        self._bridge = bridge
        self._data = data

    def make(self, machine: Netlink, node: Netlink, descriptor: int) -> None:
        """Join the node's namespace (``descriptor``) to the bridge. Raises NetlinkError; NetworkAbsentError where there
        is no such bridge."""
        settings = self._settings
        master = machine.index_of(self._bridge)
        if master is None:
            raise NetworkAbsentError(f"this machine has no bridge {self._bridge}")
        machine.add_veth(interface_name(self._data), peer=UPLINK, peer_namespace=descriptor, master=master)
        uplink = node.require(UPLINK)
        node.add_address(uplink, settings.uplink.ip, prefix=settings.uplink.network.prefixlen)
        node.set_up(uplink)
        node.add_route(_EVERYWHERE, gateway=settings.machine_address, index=uplink)
        self.lead_pods(node)

    def keep(self, machine: Netlink) -> None:
        """Have the port where the bridge was made again, as an engine does that starts again. Raises NetlinkError."""
        links = machine.links()
        prefix = interface_prefix(self._data)
        for master, name in links:
            if name == self._bridge:
                for index in (index for index, port in links if port.startswith(prefix)):
                    machine.set_master(index, master)

    def lead_pods(self, node: Netlink) -> None:
        """To pods of nodes that are not known (yet): nowhere. Raises NetlinkError."""
        node.refuse(self._settings.cluster_cidr)
