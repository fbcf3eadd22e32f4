"""The steps of ``up`` that give wasm pods addresses beside those of a cluster of containers (kind).

What is needed is asked of the cluster itself: its ranges (kubeadm's configuration), DNS Service, API server and network
plug-in, and of Docker: the bridge, and which addresses are taken. Where something is missing, pods share the machine's
network as without this, and the step says why.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from wasilet.controlplane import pod_network
from wasilet.controlplane.acquire import acquire, locate
from wasilet.controlplane.joined_network import (
    CREDENTIALS,
    JoinedPlan,
    addresses_of_others,
    choose_addresses,
    first_ipv4,
    plan_of,
    record,
)
from wasilet.controlplane.versions import minor_of, versions
from wasilet.errors import HarnessError
from wasilet.kube.client import Kube, api_path
from wasilet.kube.credentials import load_yaml
from wasilet.process import check_cancelled
from wasilet.providers.base import API_SERVER_STEP, NETWORK_STEP, Cluster
from wasilet.providers.client_credential import client_credential, is_current
from wasilet.providers.docker import BridgeNetwork, Container, Docker, is_local
from wasilet.providers.existing_base import patience
from wasilet.steps import Finding, Progress, Step

KUBEADM = api_path("configmaps", "kubeadm-config", namespace="kube-system")
DNS_SERVICE = api_path("services", "kube-dns", namespace="kube-system")
API_SLICE = api_path("endpointslices", "kubernetes", group="discovery.k8s.io", namespace="default")
CNI_FOLDER = "/etc/cni/net.d"
KINDNET = "10-kindnet.conflist"
"""What kindnet, kind's own network, writes in each node: with another one no route leads to a Node by its podCIDR."""

PLUGIN_PATIENCE = 3
"""How many times an API server's limit a network plug-in has, which is a pod of the cluster and may start late."""

PLUGIN_POLL_SECONDS = 1.0
_KUBE_PROXY = "kube-proxy"
_LOCK = ".ranges.lock"


class _AbsentError(HarnessError):
    """Why there can be no such network here."""


class _PendingError(_AbsentError):
    """It may be there in a moment."""


Nodes = Callable[[], list[Container]]
"""Answers with the cluster's containers that run pods."""


def joined_network_steps(cluster: Cluster, nodes: Nodes) -> list[Step]:
    """Whether there can be one is seen by the first of them, and written down."""
    return [_network_step(cluster, nodes), _kube_proxy_step(cluster)]


def _network_step(cluster: Cluster, nodes: Nodes) -> Step:
    state = cluster.state

    def look() -> Finding:
        if not state.admin_kubeconfig.is_file() or not _answers(cluster):
            return Finding.differs("see what addresses pods can get")
        if absent := pod_network.why_absent(state):
            return Finding.ok(f"none: {absent}")
        try:
            plan = _found(cluster, nodes())
        except _AbsentError as error:
            return Finding.differs(f"none: {error.message}")
        text = f"pods {plan.pods}, Services {plan.services}, on {plan.bridge}"
        if plan != plan_of(state) or len(plan.addresses) < cluster.node_count() or not _has_credentials(cluster, plan):
            return Finding.differs(text, ["+ pod network"])
        return Finding.ok(text)

    def change(say: Progress) -> str:
        absent = pod_network.why_absent(state) or _obstacle(cluster, say)
        try:
            plan = _settled(cluster, nodes, say) if not absent else None
        except _AbsentError as error:
            absent = error.message
        if absent or plan is None:
            state.update(pod_network={"absent": absent})
            return f"none: {absent}"
        with state.locked_root(_LOCK):
            plan = _with_addresses(cluster, plan, nodes())
            record(state, plan)
        ca = cluster.provider.access(cluster).ca
        for file, user in CREDENTIALS.items():
            client_credential(
                cluster.admin,
                state.etc / file,
                user=user,
                server=plan.server,
                ca=ca,
                sign_seconds=patience(cluster),
            )
        return f"pods {plan.pods}, Services {plan.services}, on {plan.bridge}"

    return Step(name="pod network", key=NETWORK_STEP, look=look, change=change, after=(API_SERVER_STEP,))


def _obstacle(cluster: Cluster, say: Progress) -> str:
    """Why this machine allows none; empty: it does. A port of another's bridge is root's to make."""
    if cluster.settings.pod_network and os.geteuid() != 0:
        return "it needs root"
    return pod_network.obstacle(cluster.settings, say=say)


def _kube_proxy_step(cluster: Cluster) -> Step:
    """Nodes do not wait for it: an agent starts it when its executable is there."""
    settings = cluster.settings

    def look() -> Finding:
        plan = plan_of(cluster.state)
        if plan is None:
            if cluster.state.exists() and pod_network.why_absent(cluster.state):
                return Finding.ok("none without a pod network")
            return Finding.differs("have the one of the cluster's version")
        found = locate(_KUBE_PROXY, cache=settings.cache, environ=settings.environ, kubernetes=plan.kubernetes)
        return Finding.ok(str(found.path)) if found else Finding.differs(f"acquire {plan.kubernetes}", ["+ kube-proxy"])

    def change(say: Progress) -> str:
        plan = plan_of(cluster.state)
        if plan is None:
            return "none without a pod network"
        found = acquire(
            [_KUBE_PROXY],
            cache=settings.cache,
            environ=settings.environ,
            progress=say,
            mirror=settings.mirror,
            allow_download=settings.download,
            kubernetes=plan.kubernetes,
        )[_KUBE_PROXY]
        return f"{found.version} ({found.source})"

    return Step(name=_KUBE_PROXY, look=look, change=change, after=(NETWORK_STEP,))


def _answers(cluster: Cluster) -> bool:
    try:
        return cluster.admin().ready()
    except HarnessError:
        return False


def _has_credentials(cluster: Cluster, plan: JoinedPlan) -> bool:
    ca = cluster.provider.access(cluster).ca
    return all(is_current(cluster.state.etc / file, server=plan.server, ca=ca) for file in CREDENTIALS)


def _found(cluster: Cluster, nodes: list[Container]) -> JoinedPlan:
    """As things are now, with the addresses that were chosen before. Raises _AbsentError, ApiError, CommandError."""
    bridge = _bridge(cluster, nodes)
    kube = cluster.admin()
    configured = _kubeadm(kube)
    networking = configured.get("networking") or {}
    pods, services = first_ipv4(networking.get("podSubnet")), first_ipv4(networking.get("serviceSubnet"))
    if not pods or not services:
        raise _AbsentError("the cluster has no IPv4 range of pods and Services")
    before = plan_of(cluster.state)
    return JoinedPlan(
        pods=pods,
        services=services,
        dns=_dns(kube),
        domain=str(networking.get("dnsDomain") or "cluster.local"),
        bridge=bridge.interface,
        network=str(bridge.network),
        gateway=bridge.gateway,
        server=_server(kube, bridge.network),
        kubernetes=_version(kube),
        addresses=before.addresses if before is not None and before.network == str(bridge.network) else (),
    )


def _settled(cluster: Cluster, nodes: Nodes, say: Progress) -> JoinedPlan:
    """As ``_found``, once the cluster has its network plug-in, which comes some seconds after its API server. Raises
    what that does."""
    timeouts = cluster.settings.timeouts
    deadline = time.monotonic() + PLUGIN_PATIENCE * timeouts.ready_seconds
    while True:
        try:
            return _found(cluster, nodes())
        except _PendingError as error:
            if time.monotonic() >= deadline:
                raise
            say(f"waiting: {error.message}")
        check_cancelled()
        # Each look is a command in a container, which takes of the processor time that the plug-in waits for.
        time.sleep(PLUGIN_POLL_SECONDS)


def _with_addresses(cluster: Cluster, plan: JoinedPlan, nodes: list[Container]) -> JoinedPlan:
    bridge = _bridge(cluster, nodes)
    taken = [*bridge.addresses, bridge.gateway, *addresses_of_others(cluster.settings, cluster.state)]
    count = cluster.node_count()
    addresses = choose_addresses(bridge.network, count=count, have=plan.addresses, taken=taken)
    if len(addresses) < count:
        raise HarnessError(f"no free address in {bridge.network}, the network of {bridge.interface}")
    return replace(plan, addresses=addresses)


def _bridge(cluster: Cluster, nodes: list[Container]) -> BridgeNetwork:
    docker = Docker(cluster.settings.environ)
    for node in nodes:
        plugins = [name for name in docker.names(node.id, CNI_FOLDER) if name.endswith((".conf", ".conflist"))]
        if not plugins:
            raise _PendingError(f"{node.name} has no network plug-in")
        if KINDNET not in plugins:
            raise _AbsentError("the cluster's network is not kindnet, kind's own")
        for name in node.networks:
            found = docker.bridge(name)
            if found is None:
                continue
            if not is_local(found.gateway) or not Path("/sys/class/net", found.interface).exists():
                raise _AbsentError(f"Docker's network {name} is not on this machine")
            return found
    raise _AbsentError("its nodes are in no Docker network with a bridge")


def _kubeadm(kube: Kube) -> dict[str, Any]:
    text = ((kube.find(KUBEADM) or {}).get("data") or {}).get("ClusterConfiguration")
    data = load_yaml(str(text)) if text else None
    if not isinstance(data, dict):
        raise _AbsentError("the cluster has no kubeadm-config, which names its ranges of addresses")
    return data


def _dns(kube: Kube) -> tuple[str, ...]:
    """Nothing where the cluster has no DNS of its own: pods use the machine's then."""
    spec = (kube.find(DNS_SERVICE) or {}).get("spec") or {}
    found = []
    for address in spec.get("clusterIPs") or [spec.get("clusterIP")]:
        try:
            found.append(str(ipaddress.IPv4Address(address)))
        except ValueError:
            continue
    return tuple(found)


def _server(kube: Kube, network: ipaddress.IPv4Network) -> str:
    """Of the first API server in the bridge's network."""
    found = kube.find(API_SLICE) or {}
    for endpoint in found.get("endpoints") or ():
        for address in endpoint.get("addresses") or ():
            if ipaddress.ip_address(address) in network:
                return f"https://{address}:{found['ports'][0]['port']}"
    raise _AbsentError(f"no API server in {network}, the network of its nodes")


def _version(kube: Kube) -> str:
    """kube-proxy may be older than the API server by three minors, and never newer."""
    server = minor_of(str(kube.get("/version").get("gitVersion") or ""))
    for minor, version in versions().kubernetes.items():
        if _number(minor) <= _number(server):
            return version
    raise _AbsentError(f"Kubernetes {server} is older than every kube-proxy that is brought")


def _number(minor: str) -> tuple[int, ...]:
    return tuple(int(part) for part in minor.split(".") if part.isdecimal())
