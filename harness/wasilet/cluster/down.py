"""``down``: ends a cluster and nothing else; ``--purge`` removes what it kept as well.

Nodes and the rest end beside each other: neither needs the other any more. What is ended is what the records name, and
at last what carries the cluster's own random run id in its environment: a process that a killed run could not write
down any more. No process is ever found by its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from wasilet_common.kubeconfig import SECTIONS

from wasilet.cluster.opening import open_cluster
from wasilet.errors import HarnessError, StateError, UsageError
from wasilet.process import ProcessRecord, is_alive, stop
from wasilet.providers.base import Cluster
from wasilet.providers.node_process import end_node, node_component
from wasilet.settings import Settings
from wasilet.state import ComponentRecord, State, clusters
from wasilet.steps import Finding, Play, Progress, Recap, Step

if TYPE_CHECKING:
    from wasilet.steps import Reporter


_KEEP_NOTHING_ELSE = frozenset({"etcd", "kube-apiserver"})
"""What they write lies in the cluster's folder alone. Asked to end together, the API server waits for etcd and etcd for
its clients until the grace period is over: it is not given where the folder is deleted next."""


def down(settings: Settings, *, reporter: Reporter, purge: bool = False, check: bool = False) -> Recap:
    """End the cluster that settings name. With ``purge`` also one that is damaged, and it is no error when there is
    none. Raises UsageError and StateError before anything is changed."""
    state = State.of(settings)
    if not state.path.is_dir() or not (state.exists() or purge):
        if purge:
            return Play(f"down {settings.name}", []).run(reporter=reporter)
        raise unknown_cluster(settings)
    try:
        cluster = open_cluster(settings)
    except StateError:
        if not purge:
            raise
        (state.path / "cluster.json").unlink(missing_ok=True)
        cluster = open_cluster(settings)
    with cluster:
        play = Play(f"down {settings.name}", steps(cluster, purge=purge))
        if check:
            return play.run(reporter=reporter, check=True)
        with state.locked(
            timeout_seconds=settings.timeouts.lock_seconds,
            say=reporter.notice,
            what="invoke down",
        ):
            return play.run(reporter=reporter)


def unknown_cluster(settings: Settings) -> UsageError:
    """The error for a name that no cluster has."""
    names = clusters(settings.state_root)
    hint = f"there are: {', '.join(names)}" if names else "`invoke up` makes one"
    return UsageError(f"there is no cluster {settings.name!r}", hint=hint)


def steps(cluster: Cluster, *, purge: bool) -> list[Step]:
    """Everything ends at once; then whatever is left; then what has to be written, for which there may be no room."""
    nodes = [_node_step(cluster, name, purge=purge) for name in _node_folders(cluster.state)]
    components = _components_step(cluster, purge=purge)
    return [
        *nodes,
        components,
        _leftovers_step(cluster, after=(*(node.key for node in nodes), components.key)),
        _provider_step(cluster, purge=purge),
        _kubeconfig_step(cluster),
        *([_purge_step(cluster)] if purge else []),
    ]


def _node_folders(state: State) -> list[str]:
    try:
        return sorted(entry.name for entry in (state.path / "nodes").iterdir() if entry.is_dir())
    except OSError:
        return []


def _node_step(cluster: Cluster, name: str, *, purge: bool) -> Step:
    state = cluster.state

    def look() -> Finding:
        if state.alive(node_component(name)) or state.stray_processes():
            return Finding.differs("end its containers and its agent", [f"- node {name}"])
        if purge:
            # An agent and a supervisor that were killed left mounts, memory and control groups behind.
            return Finding.differs("clear away what it left")
        return Finding.ok("not running")

    def change(_: Progress) -> str:
        return end_node(cluster, name)

    return Step(name=f"node {name}", look=look, change=change, after=(), log=state.log(node_component(name)))


def _components_step(cluster: Cluster, *, purge: bool) -> Step:
    settings, state = cluster.settings, cluster.state

    def records() -> list[ComponentRecord]:
        nodes = {node_component(name) for name in _node_folders(state)}
        return [record for record in state.records() if record.name not in nodes]

    def look() -> Finding:
        names = [record.name for record in records() if is_alive(record.process)]
        if not names:
            return Finding.ok("none runs")
        return Finding.differs(f"end {', '.join(names)}", [f"- {name}" for name in names])

    def change(_: Progress) -> str:
        chosen = records()
        if purge:
            stop([record.process for record in chosen if record.name in _KEEP_NOTHING_ELSE], grace_seconds=0)
        left = stop([record.process for record in chosen], grace_seconds=settings.timeouts.stop_grace_seconds)
        _check_gone(left)
        for record in chosen:
            state.forget(record.name)
        for status in state.run.glob("*.status"):
            status.unlink(missing_ok=True)
        return f"ended {len(chosen)}"

    return Step(name="components", look=look, change=change, after=())


def _leftovers_step(cluster: Cluster, *, after: tuple[str, ...]) -> Step:
    settings, state = cluster.settings, cluster.state

    def processes() -> list[ProcessRecord]:
        recorded = [record.process for record in state.records() if is_alive(record.process)]
        pids = {process.pid for process in recorded}
        return recorded + [process for process in state.stray_processes() if process.pid not in pids]

    def look() -> Finding:
        found = processes()
        return Finding.differs(f"end {len(found)}") if found or state.records() else Finding.ok("none")

    def change(_: Progress) -> str:
        found = processes()
        _check_gone(stop(found, grace_seconds=settings.timeouts.stop_grace_seconds))
        # One of them may have started another while it was being ended.
        _check_gone(stop(processes(), grace_seconds=0))
        for record in state.records():
            state.forget(record.name)
        return f"ended {len(found)}"

    return Step(name="whatever is left", look=look, change=change, after=after)


def _check_gone(left: list[ProcessRecord]) -> None:
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise HarnessError(f"processes that cannot be ended: {pids}", hint="they belong to another user, or hang")


def _kubeconfig_step(cluster: Cluster) -> Step:
    from wasilet.kube import kubeconfig as files

    state = cluster.state

    def look() -> Finding:
        recorded = state.cluster.kubeconfig
        if recorded is None or not recorded.path.exists():
            return Finding.ok("no entry")
        data = files.read_config(recorded.path)
        names = [e.get("name") for section in SECTIONS for e in data.get(section) or [] if isinstance(e, dict)]
        if recorded.context not in names:
            return Finding.ok("no entry")
        return Finding.differs(f"remove context {recorded.context}", [f"- context {recorded.context}"])

    def change(_: Progress) -> str:
        recorded = state.cluster.kubeconfig
        if recorded is None:
            return "no entry"
        removed = files.remove(
            recorded.path,
            recorded.context,
            server=recorded.server,
            previous=recorded.previous,
            delete_if_empty=recorded.created,
        )
        path = recorded.path
        return f"{path} as it was" if removed else f"the entry in {path} is another cluster's by now"

    return Step(name="kubeconfig", look=look, change=change)


def _provider_step(cluster: Cluster, *, purge: bool) -> Step:
    def change(_: Progress) -> str:
        return "; ".join(cluster.provider.delete(cluster, purge=purge))

    def look() -> Finding:
        words = cluster.provider.deletion(cluster)
        return Finding.differs(words) if words else Finding.ok("nothing but processes")

    return Step(name=f"provider {cluster.provider.name}", look=look, change=change)


def _purge_step(cluster: Cluster) -> Step:
    state = cluster.state

    def look() -> Finding:
        return Finding.differs(f"remove {state.path}", [f"- {state.path}"])

    def change(_: Progress) -> str:
        from wasilet.storage import storage_errors

        with storage_errors(state.path):
            for path in _runtime_folders(state):
                shutil.rmtree(path, ignore_errors=True)
        state.remove()
        return str(state.path)

    return Step(name="folder", look=look, change=change)


def _runtime_folders(state: State) -> list[Path]:
    """Folders of sockets that supervisors made elsewhere because the file system of the state has no sockets. One that
    ended in order has removed its own; one that was killed has not."""
    found: list[Path] = []
    for file in state.path.glob("nodes/*/supervisors/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            folder = Path(json.loads(file.read_text())["socket"]).parent
            private = folder.is_absolute() and folder.stat().st_uid == os.getuid()
            if private and folder.name.startswith("wasilet-") and not folder.is_relative_to(state.path):
                found.append(folder)
    return found
