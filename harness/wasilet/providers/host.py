"""The ``host`` provider: a real etcd, API server, controller-manager and scheduler as plain processes. No Docker.

All of it listens on loopback, but for the nodes, whose address the API server must reach and will proxy to only when
it is not loopback.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wasilet.controlplane import pod_network, pod_security
from wasilet.controlplane.acquire import locate
from wasilet.controlplane.components import Component, component_step
from wasilet.controlplane.control_plane import SERVICE_IP, ControlPlane
from wasilet.controlplane.health import LOOPBACK
from wasilet.controlplane.pki import CLUSTER_CA, Pki, host_specs
from wasilet.kube.kubeconfig import write_kubeconfig
from wasilet.providers.base import API_SERVER_STEP, BINARIES_STEP, PREPARATION_STEP, Access, Cluster, Detection
from wasilet.providers.kubernetes_version import UPGRADE_STEP, upgrade_step
from wasilet.settings import Settings
from wasilet.steps import Finding, Progress, Step

PKI_STEP = "pki"
_CLIENTS = {
    "admin": "admin",
    "controller-manager": "controller-manager",
    "scheduler": "scheduler",
    "approver": "approver",
    "coredns": "coredns",
    "service-ports": "service-ports",
}
"""Kubeconfig ``etc/<key>.conf`` for certificate ``<value>``."""

_VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "kube", "podman", "tun", "tap", "wg")


class HostProvider:
    """See the module."""

    name = "host"
    summary = "plain processes on this machine; no Docker, no root"
    options: tuple[str, ...] = ("kubernetes_version", "pod_security")
    default_taints: tuple[str, ...] = ()
    binaries = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
    wanted_ports = ("apiserver", "etcd", "etcd_peer", "controller_manager", "scheduler")

    def detect(self, settings: Settings) -> Detection:
        """Usable wherever Wasilet runs; reports which binaries have still to be acquired."""
        missing = [n for n in self.binaries if locate(n, cache=settings.cache, environ=settings.environ) is None]
        if missing:
            return Detection(usable=True, detail=f"will acquire {', '.join(missing)}")
        return Detection(usable=True, detail="all binaries are here")

    def confirm(self, settings: Settings) -> None:
        """Everything here is the user's own."""

    def create_steps(self, cluster: Cluster) -> Sequence[Step]:
        """etcd and the API server start together (it waits for etcd by itself); the other two as soon as it answers,
        because they give up, or back off, when it is not there."""
        both = (UPGRADE_STEP, PKI_STEP)
        made = self.components(cluster)
        settings, state = cluster.settings, cluster.state

        def step(name: str, title: str, after: tuple[str, ...], key: str = "") -> Step:
            return component_step(made[name], name, title=title, key=key, state=state, settings=settings, after=after)

        return (
            self._pki_step(cluster),
            upgrade_step(cluster, self.components, after=(BINARIES_STEP, PKI_STEP)),
            step("etcd", "etcd", both),
            step("kube-apiserver", "API server", both, API_SERVER_STEP),
            step("kube-controller-manager", "controller-manager", (API_SERVER_STEP,)),
            step("kube-scheduler", "scheduler", (API_SERVER_STEP,)),
        )

    def must_settle(self) -> tuple[str, ...]:
        """The two that a node's joining does not wait for by name."""
        return ("kube-controller-manager", "kube-scheduler", "etcd")

    def components(self, cluster: Cluster) -> Mapping[str, Callable[[], Component]]:
        """By the names of their executables."""

        def plane() -> ControlPlane:
            plan = pod_network.plan_of(cluster.state)
            return ControlPlane(
                binaries={name: cluster.binary(name) for name in self.binaries},
                ports=cluster.ports(),
                state=cluster.state,
                advertise_address=node_address(cluster.settings),
                service_cidr=pod_network.service_cidr(cluster.state),
                pod_cidr=str(plan.pods) if plan is not None else "",
                node_prefix=plan.node_prefix if plan is not None else pod_network.NODE_PREFIX,
                kubernetes=cluster.state.cluster.kubernetes,
                admission_config=pod_security.write_config(cluster.state),
                egress_config=pod_network.write_egress_config(plan, cluster.state),
            )

        return {
            "etcd": lambda: plane().etcd(),
            "kube-apiserver": lambda: plane().apiserver(),
            "kube-controller-manager": lambda: plane().controller_manager(),
            "kube-scheduler": lambda: plane().scheduler(),
        }

    def access(self, cluster: Cluster) -> Access:
        """One authority signs both servers and clients here."""
        ca = Pki(cluster.state.pki).read_certificate(CLUSTER_CA)
        address = node_address(cluster.settings)
        notes: tuple[str, ...] = ()
        if ipaddress.ip_address(address).is_loopback:
            notes = ("this machine has no address but loopback: `kubectl get --raw .../proxy` will not reach nodes",)
        if level := cluster.state.cluster.pod_security:
            notes = (*notes, f"PodSecurity {level}")
        return Access(server=self._server(cluster), ca=ca, client_ca=ca, node_address=address, notes=notes)

    def approver_kubeconfig(self, cluster: Cluster) -> Path:
        """Written with the others, beside the certificates."""
        return cluster.state.etc / "approver.conf"

    def deletion(self, cluster: Cluster) -> str:  # noqa: ARG002
        """Nothing but processes, which are in the records."""
        return ""

    def delete(self, cluster: Cluster, *, purge: bool) -> list[str]:  # noqa: ARG002
        """Its processes are all in the records."""
        return []

    def _server(self, cluster: Cluster) -> str:
        return f"https://{LOOPBACK}:{cluster.ports()['apiserver']}"

    def _pki_step(self, cluster: Cluster) -> Step:
        state = cluster.state
        pki = Pki(state.pki)

        def specs() -> tuple[str, ...]:
            plan = pod_network.plan_of(state)
            reached = (plan.machine_address,) if plan is not None else ()
            return tuple(dict.fromkeys((LOOPBACK, node_address(cluster.settings), *reached)))

        def wanted_configs() -> dict[Path, tuple[str, str]]:
            configs = {state.etc / f"{file}.conf": (self._server(cluster), name) for file, name in _CLIENTS.items()}
            if (plan := pod_network.plan_of(state)) is not None:
                server = f"https://{plan.machine_address}:{cluster.ports()['apiserver']}"
                configs |= {state.etc / f"{name}.conf": (server, name) for name in ("kube-proxy", "netpol")}
            return configs

        def service_ip() -> str:
            plan = pod_network.plan_of(state)
            return plan.service_ip if plan is not None else SERVICE_IP

        def stale() -> list[Path]:
            current = state.cluster.client_configs
            return [
                path
                for path, (server, name) in wanted_configs().items()
                if not path.is_file() or current.get(path.name) != (server, _digest(pki.certificate(name)))
            ]

        def look() -> Finding:
            if not state.exists() or "apiserver" not in cluster.ports():
                return Finding.differs("make them", ["+ certificates and keys"])
            names = pki.missing(host_specs(addresses=specs(), service_ip=service_ip()))
            if names:
                return Finding.differs(f"make {len(names)}: {', '.join(names)}", [f"+ {name}" for name in names])
            if paths := stale():
                return Finding.differs("write kubeconfigs", [f"+ {path.name}" for path in paths])
            return Finding.ok("valid for a month at least")

        def change(_: Progress) -> str:
            names = pki.make(host_specs(addresses=specs(), service_ip=service_ip()))
            ca = pki.read_certificate(CLUSTER_CA)
            written: dict[str, list[str]] = {}
            for path, (server, name) in wanted_configs().items():
                write_kubeconfig(
                    path,
                    name="wasilet",
                    server=server,
                    ca=ca,
                    certificate=pki.read_certificate(name),
                    key=pki.key(name).read_bytes(),
                )
                written[path.name] = [server, _digest(pki.certificate(name))]
            state.update(client_configs=written)
            return f"made {len(names)}" if names else "wrote kubeconfigs"

        return Step(name="certificates", key=PKI_STEP, look=look, change=change, after=(PREPARATION_STEP,))


def node_address(settings: Settings) -> str:
    """The address nodes advertise: the one asked for, else that of the default route, else any that is not loopback
    or a container bridge's, else loopback."""
    if settings.node_ip:
        return settings.node_ip
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only asks the routing table for the source address.
        probe.connect(("198.51.100.1", 9))
        address = str(probe.getsockname()[0])
        if _global(address):
            return address
    import psutil

    for interface, addresses in sorted(psutil.net_if_addrs().items()):
        if interface.startswith(_VIRTUAL):
            continue
        for entry in addresses:
            if entry.family == socket.AF_INET and _global(entry.address):
                return str(entry.address)
    return LOOPBACK


def _global(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast)


def _digest(path: Path) -> str:
    import hashlib

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
