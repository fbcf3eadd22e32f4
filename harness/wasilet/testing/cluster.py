"""The cluster of a test run: shared by all its workers and by other runs, and left as it was found.

A file beside the clusters' folders, changed only under a lock, says which test runs use a cluster and what it was like
before the first of them: not there, stopped, or running. The last one to leave brings that back. A run counts as one
user however many xdist workers it has: the process that started them joins once and leaves at its end, so a worker that
is done early takes nothing away from the others. Runs that were killed are recognised by pid and start time, and do not
count; the next run inherits what they would have had to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wasilet.console import PlainReporter
from wasilet.errors import ApiError, HarnessError, StateError, UsageError
from wasilet.kube.client import Kube, api_path
from wasilet.process import ProcessRecord, find, is_alive
from wasilet.settings import Settings, load
from wasilet.state import State
from wasilet.storage import locked_state, read_json, storage_errors, write_json

LOCK_TIMEOUT_SECONDS = 1800.0
"""Another run may be building a control plane from source meanwhile."""

RUN_LABEL = "wasilet-pytest-run"
"""On every namespace that the plugin makes: which run it belongs to."""

ABSENT, STOPPED, RUNNING = "absent", "stopped", "running"


@dataclass(frozen=True, kw_only=True)
class WasmCluster:
    """A running cluster with a Ready wasm node."""

    name: str
    provider: str
    """``host``, ``kind``, ``k3d``, ``minikube``, ``existing``; or ``kubeconfig`` when one was given."""

    kubeconfig: Path
    """With the administrator's rights."""

    kube: Kube = field(repr=False)
    registry: str = ""
    """``host:port`` that images are pushed to; empty when none is known."""

    node_logs: Mapping[str, Path] = field(default_factory=dict)
    """The log file of each node agent, by node."""

    has_other_nodes: bool = False
    """Whether pods must be told to go to wasm nodes."""

    settings: Settings

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self.kube.server


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line of the test run says."""

    provider: str = ""
    name: str = ""
    kubeconfig: str = ""
    registry: str = ""
    keep: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def settings(self) -> Settings:
        """Raises UsageError. A cluster that exists keeps its provider unless another one is asked for by name."""
        settings = load(environ=self.environ, name=self.name, provider=self.provider)
        recorded = State.of(settings).cluster.provider
        if recorded and not self.provider and not self.environ.get("WASILET_PROVIDER"):
            return replace(settings, provider=str(recorded))
        return settings


def run_identity(process: ProcessRecord) -> str:
    """A label value that names one process of one boot of one machine."""
    return f"{process.pid}-{process.start_time}-{hashlib.sha256(process.boot_id.encode()).hexdigest()[:8]}"


def own_process(pid: int) -> ProcessRecord:
    """The record of the process that stands for this test run."""
    record = find(pid)
    if record is None:
        raise StateError(f"process {pid}, which started this test worker, is gone")
    return record


# --- the users of a cluster ------------------------------------------------------------------------------------------


@dataclass
class Users:
    """The file that says who uses a cluster."""

    path: Path

    @classmethod
    def of(cls, settings: Settings) -> Users:
        """Of the cluster that settings name."""
        return cls(settings.state_root / f".pytest-{settings.name}.json")

    @contextlib.contextmanager
    def locked(self, *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> Iterator[dict[str, Any]]:
        """The content, to be changed; written down by :meth:`write`. Raises StateError after the time-out."""
        lock = self.path.with_suffix(".lock")
        with storage_errors(lock):
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        late = f"another test run has been working on the cluster for {timeout_seconds:g} s"
        with locked_state(lock, timeout_seconds=timeout_seconds, late=late):
            yield self._read()

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path)
        except StateError:
            # Damaged: what the cluster was like before is not known any more, so it is left alone.
            return {}

    def write(self, data: dict[str, Any]) -> None:
        """Replace the content."""
        if data.get("users"):
            write_json(self.path, data)
        else:
            self.path.unlink(missing_ok=True)

    def names(self, process: ProcessRecord) -> bool:
        """Whether that process is among them; asked without the lock."""
        return process in _processes(self._read())


def _processes(data: Mapping[str, Any]) -> list[ProcessRecord]:
    found = []
    for entry in data.get("users") or []:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found.append(ProcessRecord.from_json(entry))
    return found


def join(wish: Wish, user: ProcessRecord, *, say: Callable[[str], None] = lambda _: None) -> WasmCluster:
    """The cluster of the test run, started when it does not run. Raises HarnessError that says what to start."""
    if wish.kubeconfig:
        return _adopt(wish)
    from wasilet.cluster.up import check_provider

    settings = wish.settings()
    check_provider(settings)
    users = Users.of(settings)
    with users.locked() as data:
        known = _processes(data)
        dead = [process for process in known if not is_alive(process)]
        living = [process for process in known if process not in dead]
        origin = _origin(settings)
        if known and data.get("run_id") == State.of(settings).cluster.run_id:
            origin_before = str(data.get("origin") or origin)
        else:
            origin_before = origin
        now: dict[str, Any] = {
            "origin": origin_before,
            "keep": bool(wish.keep or (data.get("keep") and living)),
            "users": [process.to_json() for process in [*living, *([] if user in living else [user])]],
        }
        if origin_before == ABSENT:
            # Random and known before anything is started: a run that is killed in between is recognised by it.
            settings = replace(settings, kubeconfig=State.of(settings).path / "kubeconfig")
            now["run_id"] = State.of(settings).run_id()
        else:
            now["run_id"] = State.of(settings).cluster.run_id
        users.write(now)
        if origin != RUNNING or not is_fit(settings):
            _bring_up(settings, say)
    cluster = opened(settings, wish)
    for process in dead:
        _sweep(cluster.kube, run_identity(process))
    return cluster


def leave(wish: Wish, user: ProcessRecord) -> str:
    """The test run is over: the last one brings back what was before. What was done, as text. Raises HarnessError."""
    if wish.kubeconfig:
        return ""
    settings = wish.settings()
    users = Users.of(settings)
    with users.locked() as data:
        known = _processes(data)
        if user not in known:
            return ""
        living = [process for process in known if process != user and is_alive(process)]
        origin, keep = data.get("origin"), data.get("keep")
        if living:
            users.write({**data, "users": [process.to_json() for process in living]})
            return ""
        done = ""
        if origin == RUNNING:
            done = ""
        elif keep:
            typed = "" if settings.name == "wasilet" else f" --name {settings.name}"
            done = f"cluster {settings.name!r} is kept: `invoke status{typed}`, `invoke down --purge{typed}`"
        else:
            done = _take_down(settings, purge=origin == ABSENT)
        users.write({})
    return done


def _origin(settings: Settings) -> str:
    state = State.of(settings)
    if not state.cluster.provider:
        return ABSENT
    return RUNNING if any(is_alive(record.process) for record in state.records()) else STOPPED


def is_fit(settings: Settings) -> bool:
    """Whether pods can run and images can be pushed; a few milliseconds."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.readiness import missing_for_pods
    from wasilet.controlplane.local_registry import COMPONENT as REGISTRY

    with open_cluster(settings) as cluster:
        if cluster.state.alive(REGISTRY) is None:
            return False
        try:
            return not missing_for_pods(cluster.admin(), cluster.node_names())
        except (ApiError, UsageError):
            return False


class _LongStepsReporter(PlainReporter):
    """Writes everything down, and reports steps that take long."""

    def __init__(self, log: io.StringIO, say: Callable[[str], None]) -> None:
        super().__init__(log)
        self._say = say
        self._log = log

    def notice(self, message: str) -> None:
        """Passed on."""
        super().notice(message)
        self._say(message)

    def step_progress(self, name: str, message: str) -> None:
        """Only what the parent would print."""
        before = self._log.tell()
        super().step_progress(name, message)
        if self._log.tell() != before:
            self._say(f"{name}: {message}")


def _bring_up(settings: Settings, say: Callable[[str], None]) -> None:
    from wasilet.cluster.up import up

    log = io.StringIO()
    say(f"bringing cluster {settings.name!r} up ({settings.provider})")
    recap = up(settings, reporter=_LongStepsReporter(log, say))
    if not recap.succeeded:
        failure = recap.failures[0] if recap.failures else None
        raise HarnessError(
            f"cluster {settings.name!r} did not come up"
            + (f": {failure.name}: {failure.detail}" if failure else "")
            + f"\n{log.getvalue()}",
            hint="`invoke doctor` says what is missing, `invoke up` tries again",
        )


def _take_down(settings: Settings, *, purge: bool) -> str:
    from wasilet.cluster.down import down

    log = io.StringIO()
    recap = down(settings, reporter=PlainReporter(log), purge=purge)
    if not recap.succeeded:
        raise HarnessError(f"cluster {settings.name!r} could not be taken down\n{log.getvalue()}")
    return ""


def opened(settings: Settings, wish: Wish) -> WasmCluster:
    """A cluster of Wasilet's that runs."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.controlplane.local_registry import registry_address
    from wasilet.providers.node_process import node_component

    with open_cluster(settings) as cluster:
        port = cluster.ports().get("registry")
        return WasmCluster(
            name=settings.name,
            provider=cluster.provider.name,
            kubeconfig=cluster.state.admin_kubeconfig,
            kube=Kube(cluster.admin_credentials()),
            registry=wish.registry or (registry_address(port) if port else ""),
            node_logs={node: cluster.state.log(node_component(node)) for node in cluster.node_names()},
            has_other_nodes=cluster.provider.name != "host" or bool(cluster.taints()),
            settings=settings,
        )


def _adopt(wish: Wish) -> WasmCluster:
    """The cluster of a kubeconfig: nothing is started there, and nothing ended."""
    from wasilet.apps.render import WASM_ARCHITECTURE

    path = Path(wish.kubeconfig).expanduser()
    kube = Kube.from_kubeconfig(path)
    selector = f"kubernetes.io/arch={WASM_ARCHITECTURE}"
    nodes = kube.get(api_path("nodes"), labelSelector=selector).get("items") or []
    ready = [node for node in nodes if _is_ready(node)]
    if not ready:
        raise UsageError(
            f"the cluster of {path} has no Ready node with {selector}",
            hint="`invoke up --provider existing` joins one to it",
        )
    settings = load(environ=wish.environ)
    return WasmCluster(
        name=path.name,
        provider="kubeconfig",
        kubeconfig=path,
        kube=kube,
        registry=wish.registry or _registry_of(kube.server, settings),
        has_other_nodes=True,
        settings=settings,
    )


def _is_ready(node: Mapping[str, Any]) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _registry_of(server: str, settings: Settings) -> str:
    """The registry of Wasilet's cluster that has this API server; empty when none has."""
    from wasilet.controlplane.local_registry import registry_address

    for file in settings.state_root.glob("*/cluster.json"):
        with contextlib.suppress(StateError):
            data = read_json(file)
            port = data.get("ports", {}).get("registry")
            if port and data.get("kubeconfig", {}).get("server") == server:
                return registry_address(int(port))
    return ""


def _sweep(kube: Kube, run: str) -> None:
    """Remove the namespaces of a test run that was killed."""
    try:
        left = kube.get(api_path("namespaces"), labelSelector=f"{RUN_LABEL}={run}").get("items") or []
        for namespace in left:
            kube.delete(api_path("namespaces", str(namespace["metadata"]["name"])))
    except ApiError:
        # The tests of this run do not need it; the next one tries again.
        return
