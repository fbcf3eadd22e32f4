"""``down``: ends a cluster and nothing else; ``--purge`` removes what it kept as well.

Nodes end first, while there is still something to report to; then everything else at once. What is ended is what the
records name, and what carries the cluster's own random run id in its environment: a process that a killed run could
not write down any more. No process is ever found by its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.controlplane.components import environment_for_tools
from harness.errors import CommandError, HarnessError, StateError, UsageError
from harness.play import Finding, Play, Progress, Recap, Step
from harness.process import is_alive, run, stop
from harness.providers.base import Cluster
from harness.settings import Settings
from harness.state import State, clusters
from harness.up import node_component, open_cluster

if TYPE_CHECKING:
    from harness.console import Reporter


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
            say=lambda line: reporter.step_progress("lock", line),
            what="invoke down",
        ):
            return play.run(reporter=reporter)


def unknown_cluster(settings: Settings) -> UsageError:
    """The error for a name that no cluster has."""
    names = clusters(settings.state_root)
    hint = f"there are: {', '.join(names)}" if names else "`invoke up` makes one"
    return UsageError(f"there is no cluster {settings.name!r}", hint=hint)


def steps(cluster: Cluster, *, purge: bool) -> list[Step]:
    """In order; nodes beside each other."""
    nodes = [_node_step(cluster, name, purge=purge) for name in _node_folders(cluster.state)]
    after = tuple(node.name for node in nodes)
    return [
        _kubeconfig_step(cluster),
        *nodes,
        _processes_step(cluster, after=after),
        _provider_step(cluster, purge=purge),
        *([_purge_step(cluster)] if purge else []),
    ]


def _node_folders(state: State) -> list[str]:
    try:
        return sorted(entry.name for entry in (state.path / "nodes").iterdir() if entry.is_dir())
    except OSError:
        return []


def _node_step(cluster: Cluster, name: str, *, purge: bool) -> Step:
    settings, state = cluster.settings, cluster.state

    def look() -> Finding:
        if state.alive(node_component(name)) or state.stray_processes():
            return Finding.differs("end its containers and its agent", [f"- node {name}"])
        if purge:
            # An agent and a supervisor that were killed left mounts, memory and control groups behind.
            return Finding.differs("clear away what it left")
        return Finding.ok("not running")

    def change(_: Progress) -> str:
        limit = settings.timeouts.node_stop_seconds
        try:
            run(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "node",
                    "shutdown",
                    "--data-dir",
                    state.node(name),
                    "--timeout",
                    f"{limit:g}",
                ],
                timeout_seconds=limit + 5,
                cwd=Path("/"),
                env=environment_for_tools(settings),
            )
        except CommandError as error:
            # Whatever could not be ended in an orderly way is ended by the next step; nothing may stay behind.
            return f"did not end by itself ({error.message})"
        state.forget(node_component(name))
        return "ended"

    return Step(name=f"node {name}", look=look, change=change, after=(), log=state.log(node_component(name)))


def _processes_step(cluster: Cluster, *, after: tuple[str, ...]) -> Step:
    settings, state = cluster.settings, cluster.state

    def look() -> Finding:
        names = [record.name for record in state.records() if is_alive(record.process)]
        strays = state.stray_processes()
        if not names and not strays:
            return Finding.ok("none runs")
        return Finding.differs(f"end {', '.join(names) or 'what is left'}", [f"- {name}" for name in names])

    def change(_: Progress) -> str:
        records = state.records()
        known = {record.process.pid for record in records}
        processes = [record.process for record in records]
        processes += [process for process in state.stray_processes() if process.pid not in known]
        left = stop(processes, grace_seconds=settings.timeouts.stop_grace_seconds)
        left += stop(state.stray_processes(), grace_seconds=settings.timeouts.stop_grace_seconds)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise HarnessError(f"processes that cannot be ended: {pids}", hint="they belong to another user, or hang")
        for record in records:
            state.forget(record.name)
        (state.run / "approver.status").unlink(missing_ok=True)
        return f"ended {len(processes)}"

    return Step(name="processes", look=look, change=change, after=after)


def _kubeconfig_step(cluster: Cluster) -> Step:
    from harness import kubeconfig as files

    state = cluster.state

    def look() -> Finding:
        recorded = state.read().get("kubeconfig")
        if not recorded or not Path(recorded["path"]).exists():
            return Finding.ok("no entry")
        data = files.read_config(Path(recorded["path"]))
        names = [e.get("name") for section in files.SECTIONS for e in data.get(section) or [] if isinstance(e, dict)]
        if recorded["context"] not in names:
            return Finding.ok("no entry")
        return Finding.differs(f"remove context {recorded['context']}", [f"- context {recorded['context']}"])

    def change(_: Progress) -> str:
        recorded = state.read()["kubeconfig"]
        path = Path(recorded["path"])
        removed = files.remove(
            path,
            recorded["context"],
            server=recorded.get("server", ""),
            previous=recorded.get("previous", ""),
            delete_if_empty=bool(recorded.get("created")),
        )
        return f"{path} as it was" if removed else f"the entry in {path} is another cluster's by now"

    return Step(name="kubeconfig", look=look, change=change, after=())


def _provider_step(cluster: Cluster, *, purge: bool) -> Step:
    def change(_: Progress) -> str:
        return "; ".join(cluster.provider.delete(cluster, purge=purge))

    def look() -> Finding:
        if cluster.provider.name == "host":
            return Finding.ok("nothing but processes")
        return Finding.differs(f"delete the {cluster.provider.name} cluster")

    return Step(name=f"provider {cluster.provider.name}", look=look, change=change)


def _purge_step(cluster: Cluster) -> Step:
    state = cluster.state

    def look() -> Finding:
        return Finding.differs(f"remove {state.path}", [f"- {state.path}"])

    def change(_: Progress) -> str:
        from harness.state import storage_errors

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
