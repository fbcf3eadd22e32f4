"""The node's own network namespace: a bridge for its pods, and one veth to the machine.

Nothing of the machine's own network is changed. What is in its namespace is the machine's end of the veth with an
address, routes through it to the cluster's pods and Services, and redirects from it to the cluster's other nodes; all
of it goes with the veth, which goes with the node's namespace, which goes with the supervisor. So several nodes, and
several clusters, share nothing on a machine, and kube-proxy, whose rules are global to a namespace, is at home in the
node's.

What one node sends another on the same machine is redirected from link to link (``cls_u32``, ``act_mirred``), past the
machine's routes and its packet filter: a Docker engine, or any firewall, makes that one drop what it would forward, and
writes to ``net.ipv4.ip_forward``. A frame arrives as it was sent, so all ends of the links have one hardware address. A
kernel without the two forwards such packets like any other.

A node beside kind's is different: its link is a port of the bridge that the cluster's other nodes are on, and all that
is beyond it is theirs (``wasilet_node.network.bridged_link``).

Pods have addresses of /32 and send everything to the bridge's address: the node routes between them, so that its
rules (Services, policies) see every packet, and no pod can answer ARP for another.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from wasilet_node.network import bridged_link, nft, routed_link
from wasilet_node.network.addresses import gateway_of
from wasilet_node.network.bridged_link import BridgedLink
from wasilet_node.network.errors import NetworkAbsentError, NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.routed_link import RoutedLink
from wasilet_node.network.uplink import UPLINK
from wasilet_node.runtime import netns
from wasilet_node.settings import NetworkSettings

BRIDGE = "pods"
MACHINE_SET = "machine"
"""Of the packet filter: the machine's own addresses."""

OUTWARD = "outward"
"""The interface by which packets to other machines leave, while there is a way (``wasilet_node.network.outward``)."""

BRIDGE_ADDRESS = bytes.fromhex("0257534c4252")
"""Of the pods' bridge: one that followed its ports' left pods with a gateway that was not there any longer, for half
a minute and more, each time a pod came whose interface had a lower address."""

_SYSCTLS = {
    "ipv4/ip_forward": "1",
    # Pods are to send to the bridge's address even what is for their neighbours.
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
}


def base_rules(pod_cidr: ipaddress.IPv4Network, settings: NetworkSettings) -> str:
    """Pods keep their address towards the cluster's pods and the machine; elsewhere they go by the node's. What is
    link-local, a cloud's metadata address above all, is no pod's business. What still goes to a Service's address when
    kube-proxy's rules are behind it has none, and must not go back and forth between the node and the machine.

    Beyond the machine no one knows the way back, so nothing leaves it with an address that is not its own: what is for
    other machines goes by the interface ``outward``, and what would go there by the uplink is refused at once, as is
    all but TCP and UDP."""
    link = bridged_link if settings.bridge is not None else routed_link
    beyond = f"ip daddr != {settings.cluster_cidr} ip daddr != @{MACHINE_SET} {link.near(settings)}"
    return f"""
table ip wasilet
delete table ip wasilet
table ip wasilet {{
    set {MACHINE_SET} {{
        type ipv4_addr
    }}
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{BRIDGE}" ip daddr 169.254.0.0/16 jump refuse
        ip daddr {settings.service_cidr} jump refuse
        iifname "{BRIDGE}" oifname "{UPLINK}" {beyond} jump refuse
        oifname "{OUTWARD}" meta l4proto != {{ tcp, udp }} jump refuse
        oifname "{OUTWARD}" ip saddr != {pod_cidr} jump refuse
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        oifname "{UPLINK}" ip saddr {pod_cidr} ip daddr != {settings.cluster_cidr} masquerade
        {link.returning(settings)}
    }}
    {link.arriving(settings)}
}}
"""


class NodeNetwork:
    """The namespace; made and used in one thread, which stays in it."""

    def __init__(self, settings: NetworkSettings, pod_cidr: ipaddress.IPv4Network, *, data: Path) -> None:
        self.settings = settings
        self.pod_cidr = pod_cidr
        self.gateway = gateway_of(pod_cidr)
        self._link = _link(settings, pod_cidr, data)
        self._machine: Netlink | None = None
        self._node: Netlink | None = None
        self._bridge = 0
        self._machine_addresses: frozenset[ipaddress.IPv4Address] | None = None

    @property
    def node(self) -> Netlink:
        """Requests to the node's namespace."""
        if self._node is None:
            raise NetworkError("the node's network is not there yet")
        return self._node

    @property
    def bridge(self) -> int:
        """The index of the pods' bridge."""
        return self._bridge

    def make(self) -> int:
        """Move this thread into a new namespace, and join it to the machine. A descriptor of it, the caller's to close.
        Raises NetworkError; NetworkAbsentError where the machine does not allow it."""
        nft.find()
        home = netns.open_own()
        try:
            self._machine = Netlink()
            try:
                netns.unshare(netns.CLONE_NEWNET)
            except OSError as error:
                raise NetworkAbsentError(f"no network namespace may be made: {error.strerror}") from error
            try:
                return self._fill(self._machine)
            except BaseException:
                # The next attempt begins in the machine's namespace again; what was made here goes with its last user.
                self.close()
                netns.setns(home)
                raise
        finally:
            os.close(home)

    def _fill(self, machine: Netlink) -> int:
        descriptor = netns.open_own()
        try:
            self._node = Netlink()
            self._join(machine, descriptor)
        except OSError as error:
            os.close(descriptor)
            raise NetworkError(str(error)) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def enter(self, descriptor: int) -> None:
        """Move this thread into the namespace that an earlier agent made. Raises NetworkError when it is not as this
        agent would have made it."""
        home = netns.open_own()
        try:
            self._machine = Netlink()
            netns.setns(descriptor)
            self._node = Netlink()
            self._bridge = self._node.require(BRIDGE)
            self._node.require(UPLINK)
            if self.settings.uplink.ip not in self._node.addresses():
                raise NetworkError(f"it has not the address {self.settings.uplink.ip}")
            nft.apply(base_rules(self.pod_cidr, self.settings))
        except (OSError, NetworkError) as error:
            self.close()
            netns.setns(home)
            raise NetworkError(f"the node's network cannot be used: {error}") from error
        finally:
            os.close(home)

    def know_machine(self) -> None:
        """Let pods reach the machine's own addresses, as they are now. Raises NetworkError, OSError."""
        if self._machine is None:
            return
        known = frozenset(address for address in self._machine.addresses() if not address.is_loopback)
        if known == self._machine_addresses:
            return
        elements = "".join(f"add element ip wasilet {MACHINE_SET} {{ {address} }}\n" for address in sorted(known))
        nft.apply(f"flush set ip wasilet {MACHINE_SET}\n{elements}")
        # The way outward has routes that are wider than these.
        self._link.lead_pods(self.node)
        uplink = self.node.require(UPLINK)
        for address in known - {self.settings.machine_address}:
            destination = ipaddress.IPv4Network(address)
            self.node.add_route(destination, gateway=self.settings.machine_address, index=uplink, replace=True)
        self._machine_addresses = known

    def keep_machine(self) -> None:
        """Have what the machine has for this node where something took it. Raises NetlinkError."""
        if self._machine is not None:
            self._link.keep(self._machine)

    def close(self) -> None:
        """Of this thread; the namespace stays."""
        for netlink in (self._machine, self._node):
            if netlink is not None:
                netlink.close()
        self._machine = self._node = None

    def _join(self, machine: Netlink, descriptor: int) -> None:
        node = self.node
        for name, value in _SYSCTLS.items():
            _write_sysctl(name, value)
        node.set_up(1)
        node.add_bridge(BRIDGE, hardware_address=BRIDGE_ADDRESS)
        self._bridge = bridge = node.require(BRIDGE)
        node.add_address(bridge, self.gateway, prefix=self.pod_cidr.prefixlen)
        node.set_up(bridge)
        nft.apply(base_rules(self.pod_cidr, self.settings))
        self._link.make(machine, node, descriptor)


def _link(settings: NetworkSettings, pod_cidr: ipaddress.IPv4Network, data: Path) -> RoutedLink | BridgedLink:
    if settings.bridge is not None:
        return BridgedLink(settings, settings.bridge, data=data)
    return RoutedLink(settings, pod_cidr, data=data)


def _write_sysctl(name: str, value: str) -> None:
    path = Path("/proc/sys/net") / name
    try:
        path.write_text(value, encoding="ascii")
    except OSError as error:
        raise NetworkAbsentError(f"{path} cannot be set to {value}: {error.strerror}") from error
