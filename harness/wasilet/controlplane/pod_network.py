"""The pod network of the ``host`` provider's clusters: which addresses it has, and what stands beside the nodes.

The ranges of pods and Services are chosen once, when the cluster is made, where neither a route of this machine (those
of Docker and of VPNs are routes) nor another cluster of this user is. Each node's
link to the machine has addresses from the end of the pods' range. What pods reach of this machine they reach at the
first of those: the API server (by a proxy, since it listens on loopback) and the cluster's DNS.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet_common.keeper import kept
from wasilet_node.runtime import rootless

from wasilet.build import apt
from wasilet.controlplane import joined_network
from wasilet.controlplane.components import Component
from wasilet.controlplane.control_plane import SERVICE_CIDR
from wasilet.controlplane.health import LOOPBACK, accepts
from wasilet.errors import HarnessError, UsageError
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Progress
from wasilet.storage import write_file

Network = ipaddress.IPv4Network
PROXY = "pod-network-proxy"
USUAL_SERVICE_CIDR = Network(SERVICE_CIDR)
NODE_PREFIX = 22
"""Of each node's share: 1,021 pods. Larger where a cluster is made for more per node."""

_SPARE_ADDRESSES = 24
"""Of a share, over the pods that are to run: the network's own, and those just given back."""

_LARGEST_PREFIX = 20
_SEARCHED = tuple(Network(f"10.{second}.0.0/16") for second in range(128, 255))
NFT_PACKAGE = "nftables"
ROOTLESS = "without root: reached by port-forward, proxies, NodePorts and host ports"
_LOCK = ".ranges.lock"
_LONGEST_SOCKET_PATH = 107


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A cluster's ranges."""

    pods: Network
    services: Network
    node_prefix: int = NODE_PREFIX
    """Of each node's share of ``pods``."""

    rootless: bool = False
    """It is in a user namespace, so nothing of it is at an address of this machine."""

    @property
    def uplinks(self) -> Network:
        """The last 256 addresses of the pods' range, which are in the last node's share."""
        return list(self.pods.subnets(new_prefix=24))[-1]

    @property
    def machine_address(self) -> str:
        """Where pods and nodes reach this machine."""
        return str(self.uplinks.network_address + 1)

    @property
    def service_ip(self) -> str:
        """Of ``kubernetes.default``."""
        return str(self.services.network_address + 1)

    @property
    def dns_ip(self) -> str:
        """Of ``kube-dns.kube-system``."""
        return str(self.services.network_address + 10)

    def uplink(self, index: int) -> str:
        """The end of a node's link that is its own; its ``index`` counts from 0."""
        return f"{self.uplinks.network_address + 4 * index + 2}/30"


def plan_of(state: State) -> NetworkPlan | None:
    """What was decided for a cluster; None: its pods share this machine's network."""
    recorded = state.read().get("pod_network") or {}
    if not recorded.get("pod_cidr"):
        return None
    return NetworkPlan(
        pods=Network(recorded["pod_cidr"]),
        services=Network(recorded["service_cidr"]),
        rootless=bool(recorded.get("rootless")),
        node_prefix=int(recorded.get("node_prefix", NODE_PREFIX)),
    )


def why_absent(state: State) -> str:
    """Why a cluster has no pod network; empty: it has one, or no one has decided yet."""
    decided = str((state.read().get("pod_network") or {}).get("absent") or "")
    provider = state.cluster.provider
    if decided or provider in {"", "host", "kind"}:
        return decided
    return f"wasm pods beside the nodes of provider {provider} share this machine's network"


def described(state: State) -> dict[str, str | bool | None]:
    """For ``status``: the ranges, where pods reach this machine and the cluster's DNS, and whether all of it is in a
    user namespace; or why there are none."""
    plan = plan_of(state)
    if (joined := joined_network.plan_of(state)) is not None:
        return {
            "pods": joined.pods,
            "services": joined.services,
            "machine_address": joined.gateway,
            "dns": joined.dns[0] if joined.dns else None,
            "absent": None,
        }
    if plan is None:
        reason = why_absent(state) or "the cluster has none"
        return {
            "pods": None,
            "services": None,
            "machine_address": None,
            "dns": None,
            "rootless": None,
            "absent": reason,
        }
    return {
        "pods": str(plan.pods),
        "services": str(plan.services),
        "machine_address": plan.machine_address,
        "dns": plan.dns_ip,
        "rootless": plan.rootless,
        "absent": None,
    }


def service_cidr(state: State) -> str:
    """Of a cluster, with a pod network or without."""
    plan = plan_of(state)
    return str(plan.services) if plan is not None else SERVICE_CIDR


def reserve(settings: Settings, state: State, *, say: Progress) -> None:
    """Record the ranges of a new cluster, or why it has none. Those that are made at the same moment, by one user,
    choose one after the other. Raises UsageError for ranges that cannot be used, when they were asked for."""
    absent = obstacle(settings, say=say) or _long_path(state)
    if absent and (settings.pod_cidr or settings.service_cidr):
        raise UsageError(f"there can be no pod network: {absent}")
    with state.locked_root(_LOCK):
        state.update(pod_network={"absent": absent} if absent else _choose(settings, state) | _manner())


def _manner() -> dict[str, bool]:
    return {"rootless": True} if os.geteuid() != 0 else {}


def _long_path(state: State) -> str:
    """A Unix socket's path has 107 bytes at most, and the API server is told one."""
    path = keeper_sockets(state)[1]
    if os.geteuid() == 0 or len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return ""
    return f"the path {path} is too long for a socket (set WASILET_STATE_HOME to a shorter one)"


def _choose(settings: Settings, state: State) -> dict[str, Any]:
    taken = [*machine_networks(), *_networks_of_others(settings, state)]
    pods = _chosen(settings.pod_cidr, "--pod-cidr", _candidates(state), taken)
    services = _chosen(
        settings.service_cidr, "--service-cidr", (USUAL_SERVICE_CIDR, *_candidates(state)), [*taken, pods]
    )
    prefix = _node_prefix(settings.max_pods)
    if prefix <= pods.prefixlen:
        most = settings.max_pods
        raise UsageError(f"--pod-cidr {pods}: too small for nodes of {most} pods, which take a /{prefix} each")
    return {"pod_cidr": str(pods), "service_cidr": str(services), "node_prefix": str(prefix)}


def _node_prefix(pods: int) -> int:
    """The usual one, or that of the smallest share that holds so many pods."""
    return min(NODE_PREFIX, 32 - (pods + _SPARE_ADDRESSES - 1).bit_length())


def find_nft(environ: Mapping[str, str]) -> str | None:
    """Its path; administrators' folders count, whatever ``PATH`` holds."""
    return shutil.which("nft", path=environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


def obstacle(
    settings: Settings,
    *,
    say: Progress | None = None,
    find_nft: Callable[[Mapping[str, str]], str | None] = find_nft,
) -> str:
    """Why there can be no pod network on this machine, in one line; empty: there can. With ``say`` a missing package
    is installed where that is allowed."""
    if not settings.pod_network:
        return "it is switched off (--no-pod-network)"
    if not Path("/proc/self/ns/net").exists():
        return "the kernel has no network namespaces"
    if find_nft(settings.environ) is None:
        if say is None or not settings.install or not apt.may_install(settings.environ):
            return f"nft is not installed (package {NFT_PACKAGE})"
        try:
            apt.install([NFT_PACKAGE], why="the pod network", say=say, env=settings.environ)
        except HarnessError as error:
            return f"nft is not installed: {error}"
    return _kernel_obstacle() if os.geteuid() == 0 else rootless.obstacle()


def _kernel_obstacle() -> str:
    try:
        limit = int(Path("/proc/sys/user/max_user_namespaces").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return "the kernel has no user namespaces"
    return "user namespaces are switched off (user.max_user_namespaces is 0)" if limit == 0 else ""


def _candidates(state: State) -> tuple[Network, ...]:
    """Beginning somewhere else for each cluster, since those of two users see nothing of each other before they run."""
    first = int.from_bytes(hashlib.sha256(str(state.path).encode()).digest()[:4], "big") % len(_SEARCHED)
    return (*_SEARCHED[first:], *_SEARCHED[:first])


def _chosen(asked: str, flag: str, candidates: Iterable[Network], taken: Iterable[Network]) -> Network:
    others = list(taken)
    if asked:
        try:
            wanted = Network(asked)
        except ValueError as error:
            raise UsageError(f"{flag} {asked!r}: {error}") from None
        if wanted.prefixlen > _LARGEST_PREFIX:
            raise UsageError(f"{flag} {asked}: too small, /{_LARGEST_PREFIX} is the least")
        for other in others:
            if other.overlaps(wanted):
                raise UsageError(f"{flag} {asked} overlaps {other}, to which this machine has a route")
        return wanted
    for candidate in candidates:
        if not any(other.overlaps(candidate) for other in others):
            return candidate
    raise UsageError(f"no free /16 in 10.0.0.0/8 for the pod network: choose one by {flag}")


def machine_networks(table: Path = Path("/proc/net/route")) -> list[Network]:
    """Where this machine has routes to, the default one left out."""
    found = []
    try:
        lines = table.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        words = line.split()
        # Printed as integers of the machine's order whose bytes in memory are the address.
        address, mask = (socket.inet_ntoa(struct.pack("=I", int(words[column], 16))) for column in (1, 7))
        if mask != "0.0.0.0":  # noqa: S104 - the default route's mask
            found.append(Network(f"{address}/{mask}", strict=False))
    return found


def _networks_of_others(settings: Settings, state: State) -> list[Network]:
    """Of this user's other clusters, which may be stopped."""
    found = []
    for folder in sorted(settings.state_root.glob("*/")) if settings.state_root.is_dir() else ():
        if folder == state.path:
            continue
        other = plan_of(State(settings.state_root, folder.name))
        if other is not None:
            found += [other.pods, other.services]
    return found


# --- the components --------------------------------------------------------------------------------------------------


def keeper_sockets(state: State) -> tuple[Path, Path]:
    """Of a network without root: by which nodes come in, and by which the API server reaches pods."""
    return state.run / "network.sock", state.run / "connect.sock"


def keeper_of(state: State) -> Path | None:
    """The socket by which a cluster's network without root is entered; None: it is the machine's, or there is none."""
    plan = plan_of(state)
    return keeper_sockets(state)[0] if plan is not None and plan.rootless else None


def proxy_component(plan: NetworkPlan, state: State) -> Component:
    """What leads between this machine and the pods' network."""
    return _keeper(plan, state) if plan.rootless else _proxy(plan, state.cluster.ports["apiserver"])


def keeper_answers(state: State) -> bool:
    """Whether nodes can come in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(keeper_sockets(state)[0]))
        except OSError:
            return False
    return True


def _keeper(plan: NetworkPlan, state: State) -> Component:
    """Without root: see ``wasilet_node.network.keeper``. The API server and the cluster's DNS listen on loopback."""
    ports = state.cluster.ports
    entrance, connect = keeper_sockets(state)
    ways = (f"{plan.machine_address}:{ports[name]}={LOOPBACK}:{ports[name]}" for name in ("apiserver", "dns"))
    return Component(
        name=PROXY,
        argv=kept(
            PROXY,
            (
                *(sys.executable, "-P", "-m", "wasilet_node.network.keeper", "--nodes", str(state.path / "nodes")),
                *("--socket", str(entrance), "--connect-socket", str(connect)),
                *("--inside", str(plan.pods), "--inside", str(plan.services)),
                *(word for way in ways for word in ("--way", way)),
            ),
        ),
        addresses=(),
        ready=lambda: keeper_answers(state),
    )


def write_egress_config(plan: NetworkPlan | None, state: State) -> Path | None:
    """How the API server reaches nodes, pods and Services (its ``--egress-selector-config-file``); None: directly."""
    if plan is None or not plan.rootless:
        return None
    connection = {
        "proxyProtocol": "HTTPConnect",
        "transport": {"uds": {"udsName": str(keeper_sockets(state)[1])}},
    }
    config = {
        "apiVersion": "apiserver.k8s.io/v1beta1",
        "kind": "EgressSelectorConfiguration",
        "egressSelections": [{"name": "cluster", "connection": connection}],
    }
    path, text = state.etc / "egress-selector.yaml", json.dumps(config, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text.encode())
    return path


def _proxy(plan: NetworkPlan, apiserver_port: int) -> Component:
    """The API server for pods and for kube-proxy: the same port at the machine's end of the nodes' links. It listens
    before the address is there, since nodes make it, and takes connections from the pods' range alone."""
    return Component(
        name=PROXY,
        argv=kept(
            PROXY,
            (
                *(sys.executable, "-P", "-m", "wasilet.cluster.tcp_proxy", "--freebind"),
                *("--listen", f"{plan.machine_address}:{apiserver_port}", "--to", f"127.0.0.1:{apiserver_port}"),
                *("--allow-from", str(plan.pods)),
            ),
        ),
        addresses=(),
        ready=lambda: accepts(plan.machine_address, apiserver_port),
    )


def node_arguments(plan: NetworkPlan, *, index: int, state: State, kube_proxy: Path) -> list[str]:
    """What a node's command line states about the network."""
    folder = state.etc
    return [
        *(("--network-keeper", str(keeper_sockets(state)[0])) if plan.rootless else ()),
        *("--cluster-cidr", str(plan.pods), "--service-cidr", str(plan.services), "--uplink", plan.uplink(index)),
        *("--kube-proxy", str(kube_proxy), "--kube-proxy-kubeconfig", str(folder / "kube-proxy.conf")),
        *("--network-policies-kubeconfig", str(folder / "netpol.conf"), "--cluster-dns", plan.dns_ip),
    ]


def objects(plan: NetworkPlan, ports: Mapping[str, int]) -> list[dict[str, Any]]:
    """What makes ``kubernetes.default`` and ``kube-dns`` lead somewhere, and the rights of the cluster's DNS."""
    from wasilet.kube.manifests import render_objects

    return render_objects(
        "pod-network.yaml.j2",
        address=plan.machine_address,
        port=ports["apiserver"],
        dns_ip=plan.dns_ip,
        dns_port=ports["dns"],
    )
