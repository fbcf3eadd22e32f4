"""``status``: what runs, and whether it is well. The JSON is a contract: other programs build on it (docs/harness.md).

``name, provider, kubeconfig, context, server, registry, registry_login, pod_network, pod_security, components[],
nodes[], ready``; ``pod_security`` is the level of namespaces without labels, null where Wasilet did not choose it;
``pod_network`` is ``pods, services, machine_address, dns, rootless, absent``, either the last or all others null; each
component ``name, pid, ready, log``; each node ``name, address, port, pid, supervisor_pid, data_dir, ready, log``. A pid
is null when the process does not run. Fields are only ever added.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wasilet.cluster.down import unknown_cluster
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import own_components, steps
from wasilet.controlplane import pod_network
from wasilet.controlplane.components import Component
from wasilet.controlplane.kubectl import ensure_kubectl
from wasilet.controlplane.local_registry import login_file, registry_address
from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.client import KubeObject, api_path
from wasilet.kube.resources import node_is_ready
from wasilet.process import find, is_alive
from wasilet.providers.base import BINARIES_STEP, Cluster
from wasilet.providers.node_process import node_component
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.storage import read_json

FOLLOW_POLL_SECONDS = 0.2


def status(settings: Settings) -> dict[str, Any]:
    """The status of a cluster, as above. Raises UsageError when there is no such cluster."""
    state = State.of(settings)
    if not state.exists():
        raise unknown_cluster(settings)
    with open_cluster(settings) as cluster:
        _find_binaries(cluster)
        components = _components(cluster)
        nodes = _nodes(cluster)
    record = state.cluster
    added = record.kubeconfig
    return {
        "name": settings.name,
        "provider": cluster.provider.name,
        "kubeconfig": str(added.path) if added else None,
        "context": added.context if added else None,
        "server": added.server if added else None,
        "registry": registry_address(record.ports["registry"]) if "registry" in record.ports else None,
        "registry_login": str(login_file(state)) if login_file(state).is_file() else None,
        "state_dir": str(state.path),
        "pod_network": pod_network.described(state),
        "pod_security": record.pod_security or None,
        "components": components,
        "nodes": nodes,
        "ready": all(entry["ready"] for entry in (*components, *nodes)),
    }


def _find_binaries(cluster: Cluster) -> None:
    """A component is compared with what it would be started with; that needs the paths, but installs nothing."""
    for step in steps(cluster):
        if step.key == BINARIES_STEP:
            step.look()


def _components(cluster: Cluster) -> list[dict[str, Any]]:
    made = {**cluster.provider.components(cluster), **own_components(cluster)}
    names = [name for name in made if not name.startswith("node-")]
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        return list(pool.map(lambda name: _component(cluster, name, made[name]), names))


def _component(cluster: Cluster, name: str, make: Callable[[], Component]) -> dict[str, Any]:
    record = cluster.state.alive(name)
    ready = False
    if record is not None:
        try:
            ready = make().ready()
        except HarnessError:
            ready = False
    return {
        "name": name,
        "pid": record.process.pid if record else None,
        "ready": ready,
        "log": str(cluster.state.log(name)),
    }


def _nodes(cluster: Cluster) -> list[dict[str, Any]]:
    ports = cluster.ports()
    found = []
    for index, name in enumerate(cluster.node_names()):
        record = cluster.state.alive(node_component(name))
        data = cluster.state.node(name)
        node = _node_object(cluster, name)
        address = next((a["address"] for a in _addresses(node) if a.get("type") == "InternalIP"), None)
        found.append(
            {
                "name": name,
                "address": address,
                "port": ports.get("kubelet" if index == 0 else f"kubelet_{index + 1}"),
                "pid": record.process.pid if record else None,
                "supervisor_pid": _supervisor_pid(data),
                "data_dir": str(data),
                "ready": record is not None and node is not None and node_is_ready(node),
                "log": str(cluster.state.log(node_component(name))),
            }
        )
    return found


def _node_object(cluster: Cluster, name: str) -> KubeObject | None:
    try:
        return cluster.admin().find(api_path("nodes", name), timeout_seconds=3.0)
    except (ApiError, UsageError):
        return None


def _addresses(node: KubeObject | None) -> list[KubeObject]:
    return list(((node or {}).get("status") or {}).get("addresses") or [])


def _supervisor_pid(data: Path) -> int | None:
    """By the pointer that the supervisor leaves in the node's folder; believed only while that process runs."""
    try:
        pointer = read_json(data / "supervisor.json")
        pid, start = int(pointer["pid"]), int(pointer["start_time"])
    except (HarnessError, KeyError, TypeError, ValueError):
        return None
    record = find(pid)
    return pid if record is not None and record.start_time == start and is_alive(record) else None


def status_lines(data: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"{data['name']} ({data['provider']}): {'ready' if data['ready'] else 'not ready'}"
    yield f"  kubeconfig  {data['kubeconfig'] or '-'} (context {data['context'] or '-'})"
    yield f"  API server  {data['server'] or '-'}"
    yield f"  registry    {data['registry'] or '-'}"
    if data["registry_login"]:
        yield f"  its login   DOCKER_CONFIG={Path(data['registry_login']).parent}  for docker, crane, wkg and others"
    network = data["pod_network"]
    ranges = (
        f"{network['pods']}, Services {network['services']}{f', {pod_network.ROOTLESS}' if network['rootless'] else ''}"
    )
    yield f"  pod network {network['absent'] or ranges}"
    if data["pod_security"]:
        yield f"  PodSecurity {data['pod_security']} where a namespace has no label of its own"
    for entry in data["components"]:
        yield _line(entry["name"], entry)
    for entry in data["nodes"]:
        supervisor = f", supervisor pid {entry['supervisor_pid']}" if entry["supervisor_pid"] else ""
        yield _line(f"node {entry['name']}", entry) + f"  {entry['address'] or '-'}:{entry['port'] or '-'}{supervisor}"


def _line(name: str, entry: dict[str, Any]) -> str:
    pid = f"pid {entry['pid']}" if entry["pid"] else "not running"
    return f"  {name:<26} {'ready' if entry['ready'] else 'NOT READY':<10} {pid:<12}"


def kubeconfig_path(settings: Settings) -> Path:
    """The kubeconfig that has the cluster's context. Raises UsageError."""
    state = State.of(settings)
    recorded = state.cluster.kubeconfig
    if not state.exists() or recorded is None:
        raise unknown_cluster(settings)
    return recorded.path


def kubectl_command(
    settings: Settings, words: Sequence[str], *, say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a kubectl that has the administrator's rights, brought now where the machine has
    none. Raises UsageError; AcquireError: it cannot be had."""
    state = State.of(settings)
    if not state.exists():
        raise unknown_cluster(settings)
    env = {**settings.environ, "KUBECONFIG": str(state.admin_kubeconfig)}
    return [str(ensure_kubectl(settings, say=say)), *words], env


# --- logs ------------------------------------------------------------------------------------------------------------


def log_file(settings: Settings, component: str) -> Path:
    """The log of a component (or of a node by its name). Raises UsageError that names those there are."""
    state = State.of(settings)
    if not state.exists():
        raise unknown_cluster(settings)
    names = sorted(path.stem for path in state.logs.glob("*.log"))
    for name in (component, f"kube-{component}", node_component(component)):
        if name in names:
            return state.log(name)
    raise UsageError(f"no component {component!r} has a log", hint=f"there are: {', '.join(names) or 'none'}")


def log_lines(path: Path, *, tail: int, follow: bool, poll_seconds: float = FOLLOW_POLL_SECONDS) -> Iterator[str]:
    """The last ``tail`` lines (0: all), and with ``follow`` those that come, until the reader has enough: what writes
    them may be started again. Raises UsageError."""
    if tail < 0:
        raise UsageError(f"--lines {tail}: how many of the last lines, or 0 for all")
    position = _start_of_last(path, tail) if tail else 0
    rest = b""
    while True:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < position:
                position = 0
            file.seek(position)
            block = file.read()
        position += len(block)
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if not follow:
            if rest:
                yield rest.decode(errors="replace")
            return
        time.sleep(poll_seconds)


def _start_of_last(path: Path, count: int, *, limit_bytes: int = 1_000_000) -> int:
    """Where the last ``count`` lines begin, as far as ``limit_bytes`` reach."""
    with path.open("rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - limit_bytes)
        file.seek(begin)
        block = file.read()
    lines = block.splitlines(keepends=True)[1 if begin else 0 :]
    return begin + len(block) - sum(map(len, lines[-count:]))
