"""What one wants to read when something went wrong, in one place: pods with their reasons and events, nodes, the ends
of logs. Demos and fixtures add it to their failures; ``invoke diagnose`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from wasilet.errors import ApiError, HarnessError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.process import is_alive, run, tail_of
from wasilet.providers.base import Cluster
from wasilet.settings import Settings

MAX_EVENTS = 15
MAX_RULES = 300
INSPECT_SECONDS = 15.0


def examine(settings: Settings, *, namespace: str = "") -> Iterator[str]:
    """As :func:`diagnose`, of the cluster that settings name. Raises UsageError when there is none."""
    from wasilet.cluster.down import unknown_cluster
    from wasilet.cluster.opening import open_cluster

    with open_cluster(settings) as cluster:
        if not cluster.state.exists():
            raise unknown_cluster(settings)
        yield from diagnose(cluster, namespace=namespace)


def diagnose(cluster: Cluster, *, namespace: str = "") -> Iterator[str]:
    """Lines about the whole cluster. Never raises HarnessError: what cannot be asked is reported."""
    state = cluster.state
    for record in state.records():
        if not is_alive(record.process):
            yield f"{record.name} (pid {record.process.pid}) is gone; the end of {record.log}:"
            yield from (f"    {line}" for line in tail_of(record.log, 10))
    try:
        kube = cluster.admin()
        nodes = kube.get(api_path("nodes"), timeout_seconds=5.0).get("items") or []
        pods = kube.get(api_path("pods", namespace=namespace), timeout_seconds=5.0).get("items") or []
    except HarnessError as error:
        yield f"the cluster cannot be asked: {error}"
        return
    for node in nodes:
        yield from node_report(node)
    for pod in pods:
        if not _well(pod):
            yield from pod_report(kube, pod)
    yield from network_report(cluster)
    for node_name in cluster.node_names():
        log = state.log(f"node-{node_name}")
        yield f"the end of {log}:"
        yield from (f"    {line}" for line in tail_of(log, 10))


def network_report(cluster: Cluster) -> Iterator[str]:
    """Of a cluster with a pod network: what is in each node's namespace, and the ends of what keeps its rules."""
    from wasilet.cluster import cluster_dns
    from wasilet.controlplane import joined_network, pod_network

    state = cluster.state
    if pod_network.plan_of(state) is None and joined_network.plan_of(state) is None:
        reason = pod_network.why_absent(state) or "pods share the network of this machine"
        yield f"no pod network: {reason}"
        return
    logs = [state.log(cluster_dns.COMPONENT)]
    for name in cluster.node_names():
        folder = state.node(name) / "network"
        logs += [folder / "kube-proxy.log", folder / "network-policies.log"]
        yield f"the network of node {name}:"
        argv = [sys.executable, "-P", "-m", "wasilet_node.network.inspect", "--data-dir", str(state.node(name))]
        try:
            done = run(argv, timeout_seconds=INSPECT_SECONDS, check=False)
        except HarnessError as error:
            yield f"    {error}"
            continue
        yield from (f"    {line}" for line in (done.stdout or done.stderr).splitlines()[:MAX_RULES])
    for log in logs:
        if log.is_file():
            yield f"the end of {log}:"
            yield from (f"    {line}" for line in tail_of(log, 10))


def node_report(node: KubeObject) -> Iterator[str]:
    """One line per node, and one for each condition that is not as it should be."""
    conditions = (node.get("status") or {}).get("conditions") or []
    taints = ", ".join(f"{t['key']}:{t['effect']}" for t in node.get("spec", {}).get("taints") or []) or "none"
    ready: KubeObject = next((c for c in conditions if c.get("type") == "Ready"), {})
    yield f"node {node['metadata']['name']}: Ready={ready.get('status', 'Unknown')}, taints {taints}"
    for condition in conditions:
        wanted = "True" if condition.get("type") == "Ready" else "False"
        if condition.get("status") != wanted:
            yield f"    {condition.get('type')}={condition.get('status')}: {condition.get('message', '')}"


def pod_report(kube: Kube, pod: KubeObject) -> Iterator[str]:
    """Phase, container states with their reasons, and the pod's last events."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    where = (pod.get("spec") or {}).get("nodeName") or "no node"
    words = f"{status.get('reason', '')} {status.get('message', '')}".strip()
    yield f"pod {metadata['namespace']}/{metadata['name']} on {where}: {status.get('phase')} {words}".rstrip()
    for condition in status.get("conditions") or []:
        if condition.get("status") != "True" and condition.get("message"):
            yield f"    {condition['type']}: {condition['message']}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        yield f"    container {container['name']}: {_state(container)}, restarts {container.get('restartCount', 0)}"
    yield from (f"    event {line}" for line in events_of(kube, pod))


def events_of(kube: Kube, obj: KubeObject) -> list[str]:
    """``Reason: message`` of the last events about an object, oldest first."""
    metadata = obj["metadata"]
    try:
        answer = kube.get(
            api_path("events", namespace=metadata["namespace"]),
            timeout_seconds=5.0,
            fieldSelector=f"involvedObject.uid={metadata['uid']}",
        )
    except ApiError as error:
        return [f"cannot be read: {error}"]
    events = sorted(answer.get("items") or [], key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))
    return [
        f"{e.get('reason')}: {e.get('message')}" + (f" (x{e['count']})" if (e.get("count") or 1) > 1 else "")
        for e in events[-MAX_EVENTS:]
    ]


def _well(pod: KubeObject) -> bool:
    status = pod.get("status") or {}
    if status.get("phase") == "Succeeded":
        return True
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or [])


def _state(container: KubeObject) -> str:
    for kind, detail in (container.get("state") or {}).items():
        words = [str(detail[key]) for key in ("reason", "message") if detail.get(key)]
        code = f" with exit code {detail['exitCode']}" if "exitCode" in detail else ""
        return f"{kind}{code}" + (f" ({': '.join(words)})" if words else "")
    return "unknown"
