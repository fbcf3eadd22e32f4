"""The pod network of wasm nodes beside a cluster's own nodes on one bridge, as beside kind's containers: their pods
have addresses of the cluster's range and are reached as those of its other nodes are.

What there is of it is the cluster's: its ranges, DNS and API server. Of its own is an address per wasm node in
the network of the bridge, and two credentials (``manifests/joined-network.yaml.j2``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wasilet.settings import Settings
from wasilet.state import State

Network = ipaddress.IPv4Network
Address = ipaddress.IPv4Address

KUBE_PROXY_USER = "wasilet:kube-proxy"
POLICIES_USER = "wasilet:network-policies"
CREDENTIALS: Mapping[str, str] = {"kube-proxy.conf": KUBE_PROXY_USER, "netpol.conf": POLICIES_USER}
"""File in the cluster's ``etc`` to the user whose certificate it holds."""


@dataclass(frozen=True, kw_only=True)
class JoinedPlan:
    """What was found and chosen; as text, since it is kept in ``cluster.json``."""

    pods: str
    services: str
    dns: tuple[str, ...]
    domain: str
    bridge: str
    """The interface of this machine."""

    network: str
    """Of the bridge."""

    gateway: str
    """This machine's address there."""

    server: str
    """The API server's URL, as the bridge's network reaches it."""

    kubernetes: str
    """Of the kube-proxy that is brought: of the API server's minor, or the next older one that is known."""

    addresses: tuple[str, ...] = ()
    """Of the wasm nodes, in their order."""

    def uplink(self, index: int) -> str:
        """A node's address as an interface has it."""
        return f"{self.addresses[index]}/{Network(self.network).prefixlen}"


def plan_of(state: State) -> JoinedPlan | None:
    """What was decided for a cluster; None: there is no such network, or no one has decided yet."""
    recorded = (state.read().get("pod_network") or {}).get("joined")
    if not recorded:
        return None
    values: dict[str, Any] = dict(recorded)
    return JoinedPlan(**values | {name: tuple(values[name]) for name in ("dns", "addresses")})


def record(state: State, plan: JoinedPlan) -> None:
    """Write it down. Raises StateError."""
    state.update(pod_network={"joined": asdict(plan)})


def node_arguments(plan: JoinedPlan, *, index: int, folder: Path, kube_proxy: Path) -> list[str]:
    """What a node's command line states about the network; ``folder`` holds the kubeconfigs."""
    return [
        *("--cluster-cidr", plan.pods, "--service-cidr", plan.services, "--cluster-domain", plan.domain),
        *("--uplink", plan.uplink(index), "--uplink-bridge", plan.bridge, "--uplink-gateway", plan.gateway),
        *("--kube-proxy", str(kube_proxy), "--kube-proxy-kubeconfig", str(folder / "kube-proxy.conf")),
        *("--network-policies-kubeconfig", str(folder / "netpol.conf")),
        *(word for address in plan.dns for word in ("--cluster-dns", address)),
    ]


def choose_addresses(network: Network, *, count: int, have: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """``count`` addresses, those of ``have`` first. New ones are from the end of the network, since an engine gives its
    containers the first that are free. Fewer when there are no more."""
    used = {*have, *taken}
    chosen = list(have)[:count]
    for address in _from_the_end(network):
        if len(chosen) >= count:
            break
        if str(address) not in used:
            chosen.append(str(address))
    return tuple(chosen)


def _from_the_end(network: Network) -> Iterator[Address]:
    for number in range(int(network.broadcast_address) - 1, int(network.network_address), -1):
        yield Address(number)


def addresses_of_others(settings: Settings, state: State) -> list[str]:
    """Those of this user's other clusters, which may be on the same bridge."""
    found: list[str] = []
    for folder in sorted(settings.state_root.glob("*/")) if settings.state_root.is_dir() else ():
        other = plan_of(State(settings.state_root, folder.name)) if folder != state.path else None
        found += other.addresses if other is not None else ()
    return found


def first_ipv4(networks: Any) -> str:
    """Of kubeadm's comma-separated ranges the IPv4 one; empty: there is none."""
    for text in str(networks or "").split(","):
        try:
            return str(Network(text.strip()))
        except ValueError:
            continue
    return ""
