"""NetworkPolicies as packet filter rules: a pure function of policies, pods and namespaces.

Rules are in the node's forward path, where every packet of a pod comes by: after a Service's address has been replaced
by a pod's, before anything is masqueraded. Each selected pod has a chain per direction that ends in a drop; what a rule
allows returns from it. So a packet between two pods of one node passes both. What the node itself sends (probes) is not
forwarded, what the machine sends is allowed, and a pod always reaches itself. Answers belong to what was allowed.

A pod must be isolated from its first instant. So where there is any policy, an address that is not known yet is
no pod's: what it sends and what is sent to it is dropped. The agent reports the addresses of its pods before their
containers start (``policy_gate``); those of other nodes' pods are known when their statuses name them.

The cluster's DNS is a process of the machine and no pod. For policies it is one: in the namespace kube-system, with the
label and the port that everyone's DNS has, so that the rule which every egress policy needs means what it says.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from wasilet_common.pod_fields import TERMINAL_PHASES

from wasilet_node.network.selectors import matches

TABLE = "wasilet-policies"
DNS_PORT = 53
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}

Object = Mapping[str, Any]
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where these rules are for."""

    pod_cidr: ipaddress.IPv4Network
    machine_address: str
    dns_addresses: tuple[str, ...] = ()
    """Service addresses of the cluster's DNS."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A pod as policies see it."""

    namespace: str
    labels: Mapping[str, str]
    address: str
    ports: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(name, protocol) to number."""


def rules(
    policies: Iterable[Object],
    pods: Iterable[Object],
    namespaces: Iterable[Object],
    place: Place,
    claims: Mapping[str, str] = _NONE,
) -> str:
    """The whole table, replacing what was there; without any policy an empty one.

    ``claims``: addresses by uid that the node's pods have now, whatever their statuses name so far.
    """
    holders = {address: uid for uid, address in claims.items()}
    peers = [peer for pod in pods if (peer := _peer(pod, claims, holders)) is not None]
    labels = {str(ns["metadata"]["name"]): ns["metadata"].get("labels") or {} for ns in namespaces}
    local = [peer for peer in peers if ipaddress.IPv4Address(peer.address) in place.pod_cidr]
    chains: dict[tuple[str, str], list[str]] = {}
    listed = sorted(policies, key=lambda policy: str(policy["metadata"]))
    for peer in local:
        for policy in listed:
            spec = policy.get("spec") or {}
            if policy["metadata"]["namespace"] != peer.namespace or not matches(
                spec.get("podSelector") or {}, peer.labels
            ):
                continue
            for direction in _directions(spec):
                chain = chains.setdefault((direction, peer.address), [])
                view = _View(pod=peer, direction=direction, peers=peers, labels=labels, place=place)
                for rule in spec.get(direction) or ():
                    chain += _allowed(rule, view)
    return _table(chains, place, known=[peer.address for peer in local] if listed else None)


def _directions(spec: Object) -> list[str]:
    """``ingress`` and ``egress``, by the API's own defaults."""
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") is not None else [])]
    return [str(kind).lower() for kind in types if kind in {"Ingress", "Egress"}]


def _peer(pod: Object, claims: Mapping[str, str], holders: Mapping[str, str]) -> Peer | None:
    """None: it has no address of its own, or not any more."""
    spec, status, uid = pod.get("spec") or {}, pod.get("status") or {}, str(pod["metadata"].get("uid"))
    address = claims.get(uid) or str(status.get("podIP") or "")
    if holders.get(address, uid) != uid:
        return None
    if not address or spec.get("hostNetwork") or status.get("phase") in TERMINAL_PHASES:
        return None
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return None
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    ports = {
        (str(port["name"]), str(port.get("protocol") or "TCP")): int(port["containerPort"])
        for container in containers
        for port in container.get("ports") or ()
        if port.get("name")
    }
    metadata = pod["metadata"]
    return Peer(namespace=str(metadata["namespace"]), labels=metadata.get("labels") or {}, address=address, ports=ports)


@dataclass(frozen=True, kw_only=True)
class _View:
    """What the rules of one pod and direction are made from."""

    pod: Peer
    direction: str
    peers: Sequence[Peer]
    labels: Mapping[str, Mapping[str, str]]
    """Of namespaces, by name."""

    place: Place

    def chooses(self, given: Object, peer: Peer) -> bool:
        """Whether a peer of a rule, which has selectors, means this pod."""
        if (of_namespaces := given.get("namespaceSelector")) is not None:
            if not matches(of_namespaces, self.labels.get(peer.namespace, {})):
                return False
        elif peer.namespace != self.pod.namespace:
            return False
        of_pods = given.get("podSelector")
        return of_pods is None or matches(of_pods, peer.labels)


def _allowed(rule: Object, view: _View) -> Iterator[str]:
    """The matches of one rule, each followed by a return."""
    direction, pod, peers, place = view.direction, view.pod, view.peers, view.place
    side = "saddr" if direction == "ingress" else "daddr"
    given = rule.get("from" if direction == "ingress" else "to") or ()
    ports = list(rule.get("ports") or ())
    if not given:
        for match in _ports(ports, pod, direction):
            yield f"{match} return".strip()
        if direction == "egress":
            # By the names of its ports a peer is asked one by one.
            for peer in peers:
                yield from _named(ports, peer)
            yield from _dns(ports, place)
        return
    for each in given:
        if (block := each.get("ipBlock")) is not None:
            for match in _ports(ports, pod, direction):
                yield f"{_block(block, side)} {match} return".replace("  ", " ")
            continue
        chosen = [peer for peer in peers if view.chooses(each, peer)]
        if chosen:
            addresses = ", ".join(sorted({peer.address for peer in chosen}, key=ipaddress.IPv4Address))
            for match in _ports(ports, pod, direction):
                yield f"ip {side} {{ {addresses} }} {match} return".replace("  ", " ")
        if direction == "egress":
            for peer in chosen:
                yield from _named(ports, peer)
            if view.chooses(each, _dns_peer(place)):
                yield from _dns(ports, place)


def _block(block: Object, side: str) -> str:
    network = ipaddress.IPv4Network(str(block["cidr"]), strict=False)
    text = f"ip {side} {network}"
    without = [str(ipaddress.IPv4Network(str(each), strict=False)) for each in block.get("except") or ()]
    return f"{text} ip {side} != {{ {', '.join(without)} }}" if without else text


def _ports(ports: Sequence[Object], pod: Peer, direction: str) -> Iterator[str]:
    """Matches of ports by number, and for ingress by the pod's own names; one that is empty matches all."""
    if not ports:
        yield ""
        return
    for port in ports:
        protocol = str(port.get("protocol") or "TCP")
        word, number = _PROTOCOLS.get(protocol), port.get("port")
        if word is None:
            continue
        if number is None:
            yield f"meta l4proto {word}"
        elif isinstance(number, int):
            last = port.get("endPort")
            yield f"{word} dport {number}-{last}" if isinstance(last, int) else f"{word} dport {number}"
        elif direction == "ingress" and (found := pod.ports.get((str(number), protocol))) is not None:
            yield f"{word} dport {found}"


def _named(ports: Sequence[Object], peer: Peer) -> Iterator[str]:
    for port in ports:
        protocol, name = str(port.get("protocol") or "TCP"), port.get("port")
        found = peer.ports.get((name, protocol)) if isinstance(name, str) else None
        if found is not None and protocol in _PROTOCOLS:
            yield f"ip daddr {peer.address} {_PROTOCOLS[protocol]} dport {found} return"


def _dns_peer(place: Place) -> Peer:
    return Peer(namespace="kube-system", labels={"k8s-app": "kube-dns"}, address=place.machine_address)


def _dns(ports: Sequence[Object], place: Place) -> Iterator[str]:
    """What went to the DNS' Service, if its port is allowed."""
    names = {("UDP", "dns"), ("TCP", "dns-tcp")}
    for protocol in ("UDP", "TCP"):
        wanted = not ports or any(
            str(port.get("protocol") or "TCP") == protocol
            and (
                port.get("port") is None
                or (protocol, port["port"]) in names
                or (
                    isinstance(port["port"], int)
                    and port["port"] <= DNS_PORT <= int(port.get("endPort") or port["port"])
                )
            )
            for port in ports
        )
        for address in place.dns_addresses if wanted else ():
            yield f"meta l4proto {protocol.lower()} ct original ip daddr {address} return"


def _table(chains: Mapping[tuple[str, str], Sequence[str]], place: Place, *, known: Sequence[str] | None) -> str:
    """``known``: the addresses of this node's pods; None: nothing is judged."""
    lines = [f"table ip {TABLE}", f"delete table ip {TABLE}", f"table ip {TABLE} {{"]
    jumps: dict[str, list[str]] = {"ingress": [], "egress": []}
    for (direction, address), allowed in sorted(chains.items()):
        name = f"{direction}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
        side = "saddr" if direction == "ingress" else "daddr"
        jumps[direction].append(f"{address} : jump {name}")
        lines += [f"    chain {name} {{", f"        ip {side} {address} return"]
        if direction == "ingress":
            lines.append(f"        ip saddr {place.machine_address} return")
        lines += [f"        {each}" for each in dict.fromkeys(allowed)]
        lines += ["        drop", "    }"]
    lines += ["    chain forward {", "        type filter hook forward priority 10; policy accept;"]
    lines.append("        ct state established,related accept")
    if known is not None:
        listed = ", ".join(sorted(known, key=ipaddress.IPv4Address))
        others = {side: f"ip {side} {place.pod_cidr}" for side in ("saddr", "daddr")}
        if listed:
            others = {side: f"{match} ip {side} != {{ {listed} }}" for side, match in others.items()}
        lines.append(f"        {others['saddr']} drop")
        lines.append(f"        {others['daddr']} ip saddr != {place.machine_address} drop")
    for direction, side in (("egress", "saddr"), ("ingress", "daddr")):
        if jumps[direction]:
            lines.append(f"        ip {side} vmap {{ {', '.join(jumps[direction])} }}")
    return "\n".join([*lines, "    }", "}", ""])
