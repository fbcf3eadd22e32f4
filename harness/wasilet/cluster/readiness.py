"""What a cluster has to have before a pod can start, and the last step of ``up``, which waits for it."""

from __future__ import annotations

import time

from wasilet.controlplane.local_registry import registry_address
from wasilet.errors import ApiError, ComponentError, UsageError, WaitTimeoutError
from wasilet.kube.client import Kube, api_path
from wasilet.kube.resources import node_is_ready
from wasilet.process import check_cancelled, is_alive, tail_of
from wasilet.providers.base import Cluster
from wasilet.providers.node_process import node_component
from wasilet.steps import Finding, Progress, Step

NOT_READY_TAINTS = frozenset({"node.kubernetes.io/not-ready", "node.cloudprovider.kubernetes.io/uninitialized"})


def ready_step(cluster: Cluster, *, after: tuple[str, ...]) -> Step:
    settings = cluster.settings

    def look() -> Finding:
        if not api_answers(cluster):
            return Finding.differs("wait for the nodes to be Ready")
        missing = missing_for_pods(cluster.admin(), cluster.node_names())
        return Finding.differs(f"wait for {missing}") if missing else Finding.ok(_ready_text(cluster))

    def change(progress: Progress) -> str:
        kube = cluster.admin()
        deadline = time.monotonic() + settings.timeouts.node_ready_seconds
        while missing := missing_for_pods(kube, cluster.node_names()):
            progress(f"waiting for {missing}")
            for node in cluster.node_names():
                record = cluster.state.record(node_component(node))
                if record is None or not is_alive(record.process):
                    log = cluster.state.log(node_component(node))
                    raise ComponentError(f"the agent of node {node} ended", log=log, tail=tail_of(log))
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(
                    f"{missing} did not come within {settings.timeouts.node_ready_seconds:g} s",
                    hint=f"see `invoke logs {node_component(cluster.node_names()[0])}` and `invoke logs approver`",
                )
            check_cancelled()
            time.sleep(settings.timeouts.poll_seconds)
        return _ready_text(cluster)

    return Step(name="Ready", look=look, change=change, after=after)


def missing_for_pods(kube: Kube, nodes: tuple[str, ...]) -> str:
    """What still keeps pods from starting, as text; empty when nothing does. Raises ApiError."""
    if not kube.ready():
        return "the API server to be ready"
    if kube.find(api_path("serviceaccounts", "default", namespace="default")) is None:
        return "the ServiceAccount default"
    if kube.find(api_path("configmaps", "kube-root-ca.crt", namespace="default")) is None:
        return "the ConfigMap kube-root-ca.crt"
    for name in nodes:
        node = kube.find(api_path("nodes", name))
        if node is None:
            return f"node {name} to join"
        if not node_is_ready(node):
            return f"node {name} to be Ready"
        taints = {taint.get("key") for taint in node.get("spec", {}).get("taints") or []}
        if left := taints & NOT_READY_TAINTS:
            return f"the taint {min(left)} to go from node {name}"
    return ""


def _ready_text(cluster: Cluster) -> str:
    names = ", ".join(cluster.node_names())
    words = [
        names,
        f"registry {registry_address(cluster.ports()['registry'])}, with a login",
        *cluster.provider.access(cluster).notes,
    ]
    return "; ".join(words)


def api_answers(cluster: Cluster) -> bool:
    """False in check mode on a cluster that is not there."""
    if not cluster.state.admin_kubeconfig.is_file():
        return False
    try:
        return cluster.admin().find(api_path("namespaces", "kube-system")) is not None
    except (ApiError, UsageError):
        return False
