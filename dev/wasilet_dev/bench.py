"""``invoke bench up`` and ``pods``: the command line, and what a node does.

``up``: the command line as a person types it, interpreter and all. ``pods``: from the creation of a pod to the status
that says Running, as a watch sees it; bursts, deletions, the agent's memory over many pods, and logs.

A separate cluster is started for it and deleted with all it held, so that no one's images, kubeconfig or pods have a
part in it.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from wasilet import process
from wasilet.errors import ApiError, HarnessError, WaitTimeoutError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.reflector import Reflector
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Reporter, SilentReporter

CLUSTER = "bench"
NAMESPACE = "bench"
COMMAND_TIMEOUT_SECONDS = 600.0
WAIT_SECONDS = 300.0
BURST_PODS = 100
IN_FLIGHT = 10
PROGRESS_SECONDS = 10.0
LOG_MEGABYTES = 50
LATENCY_RUNS = 30
TURN_PODS = 300

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and what it is held against."""

    name: str
    value: float
    unit: str
    target: float | None = None
    """At most this; None: nothing is promised."""

    peers: str = ""
    """What others take for the same on the machine that the targets were set on."""

    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """With the ratio to the target: above 1 is slower than promised."""
        data: dict[str, Any] = {"name": self.name, "value": round(self.value, 3), "unit": self.unit}
        if self.target is not None:
            data |= {"target": self.target, "ratio": round(self.value / self.target, 2)}
        return data | ({"detail": self.detail} if self.detail else {})

    def line(self) -> str:
        """For people."""
        text = f"{self.name:<44} {self.value:10.2f} {self.unit:<8}"
        if self.target is not None:
            text += f" target {self.target:g}, ratio {self.value / self.target:.2f}"
        notes = "; ".join(note for note in (self.detail, self.peers) if note)
        return text + (f"  ({notes})" if notes else "")


# --- up --------------------------------------------------------------------------------------------------------------


def bench_up(settings: Settings, *, runs: int, say: Say) -> list[Figure]:
    """Medians of cold ``up``, second ``up``, ``demo hello-world`` and ``down``. Raises CommandError with the output of
    a command that failed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tasks.py").is_file():
        raise HarnessError("the benchmark of the command line is part of a checkout, not of the installed package")
    taken: dict[str, list[float]] = defaultdict(list)
    with bench_cluster(settings) as bench:

        def timed(what: str, *words: str) -> None:
            say(what)
            began = time.monotonic()
            argv = [sys.executable, "-P", "-m", "invoke", *words, "--name", CLUSTER]
            process.run(argv, timeout_seconds=COMMAND_TIMEOUT_SECONDS, cwd=root, env=bench.environ)
            taken[what].append(time.monotonic() - began)

        try:
            for number in range(runs):
                say(f"run {number + 1} of {runs}")
                timed("up, nothing there", "up")
                timed("up, all there", "up")
                timed("demo hello-world", "demo", "hello-world")
                timed("down", "down", "--purge")
        finally:
            remove_cluster(bench)
    targets = {"up, nothing there": 12.0, "up, all there": 1.5, "down": 3.0, "demo hello-world": 3.0}
    peers = {"up, nothing there": "kind, k3d and minikube: 12 to 35 s"}
    return [
        Figure(
            name=name,
            value=statistics.median(seconds),
            unit="s",
            target=targets[name],
            peers=peers.get(name, ""),
            detail=f"median of {len(seconds)}, {min(seconds):.2f} to {max(seconds):.2f}",
        )
        for name, seconds in taken.items()
    ]


# --- pods ------------------------------------------------------------------------------------------------------------


def bench_pods(settings: Settings, *, pods: int, reporter: Reporter, say: Say) -> list[Figure]:
    """Latencies, a burst, the agent's memory over ``pods`` pods run one after another, and log throughput.

    Raises HarnessError when the cluster does not come up, WaitTimeoutError when pods do not come where they should."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.up import up

    with bench_cluster(replace(settings, max_pods=BURST_PODS + 50)) as bench:
        try:
            up(bench, reporter=reporter).raise_for_failure()
            with open_cluster(bench) as cluster:
                return _Pods(cluster, say).measure(pods)
        finally:
            remove_cluster(bench)


class _Pods:
    def __init__(self, cluster: Cluster, say: Say) -> None:
        self.cluster = cluster
        self.kube = cluster.admin()
        self.say = say
        self.sleeper, self.ender, self.writer = _push_guests(cluster)

    def measure(self, pods: int) -> list[Figure]:
        make_namespace(self.kube)
        with Watched(Kube(self.cluster.admin_credentials())) as watched:
            for image in (self.sleeper, self.ender, self.writer):
                self._create("warm", image)
                watched.wait({"warm": "Running"}, "Running")
                self._delete(watched, ["warm"])
            return [
                *self._latency(watched),
                *self._burst(watched),
                *self._one_after_another(watched, pods),
                self._log(watched),
            ]

    def _latency(self, watched: Watched) -> list[Figure]:
        self.say(f"{LATENCY_RUNS} pods, one at a time")
        running, gone = [], []
        for number in range(LATENCY_RUNS):
            name = f"single-{number}"
            began = time.monotonic()
            self._create(name, self.sleeper)
            watched.wait({name: "Running"}, "Running")
            running.append((watched.at[name, "Running"] - began) * 1000)
            began = time.monotonic()
            self._delete(watched, [name])
            gone.append((watched.at[name, "gone"] - began) * 1000)
        return [
            Figure(
                name="create to Running, p50",
                value=statistics.median(running),
                unit="ms",
                target=100.0,
                peers="Krustlet 1073, kind 982",
            ),
            Figure(name="create to Running, p90", value=quantile(running, 0.9), unit="ms"),
            Figure(
                name="delete to gone, p50",
                value=statistics.median(gone),
                unit="ms",
                peers="Krustlet 54; kind with a grace of 1 s 4100",
            ),
        ]

    def _burst(self, watched: Watched) -> list[Figure]:
        self.say(f"{BURST_PODS} pods at once")
        names = [f"burst-{number}" for number in range(BURST_PODS)]
        began = time.monotonic()
        for name in names:
            self._create(name, self.sleeper)
        watched.wait(dict.fromkeys(names, "Running"), "Running")
        running = max(watched.at[name, "Running"] for name in names) - began
        began = time.monotonic()
        self._delete(watched, names)
        gone = max(watched.at[name, "gone"] for name in names) - began
        return [
            Figure(
                name=f"burst of {BURST_PODS}, all Running",
                value=running,
                unit="s",
                target=10.0,
                detail=f"{BURST_PODS / running:.1f} pods/s",
                peers="Krustlet 17 pods/s, kind 2.7",
            ),
            Figure(name=f"burst of {BURST_PODS}, all gone", value=gone, unit="s"),
        ]

    def _one_after_another(self, watched: Watched, pods: int) -> list[Figure]:
        self.say(f"{pods} pods, {IN_FLIGHT} at a time")
        started = told = time.monotonic()
        sizes = [self._agent_mebibytes()]
        for first in range(0, pods, IN_FLIGHT):
            names = [f"turn-{number}" for number in range(first, min(first + IN_FLIGHT, pods))]
            for name in names:
                self._create(name, self.ender)
            watched.wait(dict.fromkeys(names, "Succeeded"), "Succeeded")
            self._delete(watched, names)
            sizes.append(self._agent_mebibytes())
            if (now := time.monotonic()) - told >= PROGRESS_SECONDS:
                told = now
                done = first + len(names)
                self.say(f"{done} of {pods} pods, {done / (now - started):.1f} a second, agent {sizes[-1]:.1f} MiB")
        # Caches that are bounded fill first; what still grows from quarter to quarter after them is a leak.
        quarters = ", ".join(f"{sizes[len(sizes) * part // 4]:.1f}" for part in (1, 2, 3))
        return [
            Figure(
                name=f"agent memory after {pods} pods",
                value=sizes[-1],
                unit="MiB",
                detail=f"before: {sizes[0]:.1f}; at each quarter: {quarters}",
            ),
            Figure(
                name="pods created, run and deleted",
                value=pods / (time.monotonic() - started),
                unit="pods/s",
            ),
        ]

    def _log(self, watched: Watched) -> Figure:
        self.say(f"{LOG_MEGABYTES} MB of log")
        began = time.monotonic()
        self._create("writer", self.writer)
        watched.wait({"writer": "Succeeded"}, "Succeeded")
        seconds = watched.at["writer", "Succeeded"] - began
        return Figure(
            name=f"log of {LOG_MEGABYTES} MB, create to Succeeded",
            value=LOG_MEGABYTES / seconds,
            unit="MB/s",
            detail=f"{seconds:.2f} s, lines of 100 bytes",
        )

    # --- small things ----------------------------------------------------------------------------------------------

    def _create(self, name: str, image: str) -> None:
        container = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent"}
        spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
        pod: KubeObject = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        self.kube.create(api_path("pods", namespace=NAMESPACE), pod)

    def _delete(self, watched: Watched, names: Sequence[str]) -> None:
        for name in names:
            self.kube.delete(api_path("pods", name, namespace=NAMESPACE))
        watched.wait(dict.fromkeys(names, "gone"), "gone")

    def _agent_mebibytes(self) -> float:
        import psutil

        record = next(r for r in self.cluster.state.records() if r.name.startswith("node-"))
        return float(psutil.Process(record.process.pid).memory_info().rss) / 2**20


def make_namespace(kube: Kube) -> None:
    """With its ServiceAccount. Raises WaitTimeoutError."""
    kube.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    path = api_path("serviceaccounts", "default", namespace=NAMESPACE)
    deadline = time.monotonic() + WAIT_SECONDS
    while kube.find(path) is None:
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"namespace {NAMESPACE} got no ServiceAccount within {WAIT_SECONDS:g} s")
        time.sleep(0.05)


class Watched:
    """When the bench's pods first showed each phase, on this process's clock; ``gone`` when they were deleted,
    ``address`` and ``Ready`` when they had that."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._hangup = Hangup()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="watch pods", daemon=True)
        self._failure = ""
        self._there: set[str] = set()
        self.at: dict[tuple[str, str], float] = {}
        self.addresses: dict[str, str] = {}
        """Of pods that were seen with ``address``."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hangup.end()
        self._thread.join(15)
        self._kube.close()

    def wait(self, wanted: Mapping[str, str], what: str) -> None:
        """Until each pod was seen so. A pod that ended was Running, too. Raises WaitTimeoutError."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while left := [name for name, seen in wanted.items() if (name, seen) not in self.at]:
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    reason = f" ({self._failure})" if self._failure else ""
                    raise WaitTimeoutError(
                        f"{len(left)} pods were not {what} within {WAIT_SECONDS:g} s, as {left[0]}{reason}"
                    )
                self._changed.wait(seconds)

    def _watch(self) -> None:
        Reflector(
            kube=self._kube,
            path=api_path("pods", namespace=NAMESPACE),
            hangup=self._hangup,
            listed=self._learn_all,
            changed=self._learn,
            failed=self._fail,
        ).run()

    def _fail(self, error: ApiError) -> None:
        """A server that is busy drops watchers, so this is the reason only where the time runs out as well."""
        self._failure = str(error)

    def _learn_all(self, pods: list[KubeObject]) -> None:
        for name in self._there - {str(pod["metadata"]["name"]) for pod in pods}:
            self._see(name, "gone")
        for pod in pods:
            self._learn("MODIFIED", pod)

    def _learn(self, kind: str, pod: KubeObject) -> None:
        name = str(pod["metadata"]["name"])
        if kind == "DELETED":
            self._see(name, "gone")
            return
        if name not in self._there:
            self._there.add(name)
            with self._changed:
                for seen in ("Running", "Succeeded", "gone", "address", "Ready"):
                    self.at.pop((name, seen), None)
        status = pod["status"]
        if status.get("podIP"):
            self.addresses[name] = str(status["podIP"])
            self._see(name, "address")
        if any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or ()):
            self._see(name, "Ready")
        self._see(name, str(status.get("phase")))

    def _see(self, name: str, what: str) -> None:
        now = time.monotonic()
        if what == "gone":
            self._there.discard(name)
        with self._changed:
            self.at.setdefault((name, what), now)
            if what == "Succeeded":
                self.at.setdefault((name, "Running"), now)
            self._changed.notify_all()


# --- guests and surroundings -----------------------------------------------------------------------------------------

_IMPORTS = """
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))"""

_SLEEPER = f"""(module {_IMPORTS}
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const 3600000000000))
    (drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))))"""

_ENDER = f'(module {_IMPORTS} (memory (export "memory") 1) (func (export "_start")))'

_WRITER = f"""(module {_IMPORTS}
  (memory (export "memory") 1)
  (func (export "_start") (local $at i32) (local $left i32)
    (loop $fill
      (i32.store8 (i32.add (i32.const 100) (local.get $at))
        (select (i32.const 10) (i32.const 120)
          (i32.eq (i32.rem_u (local.get $at) (i32.const 100)) (i32.const 99))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br_if $fill (i32.lt_u (local.get $at) (i32.const 50000))))
    (local.set $left (i32.const {LOG_MEGABYTES * 20}))
    (loop $again
      (i32.store (i32.const 0) (i32.const 100))
      (i32.store (i32.const 4) (i32.const 50000))
      (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
      (local.set $left (i32.sub (local.get $left) (i32.const 1)))
      (br_if $again (local.get $left)))))"""


def push_guest(cluster: Cluster, module: Path) -> str:
    """Its reference, with the digest."""
    from wasilet.controlplane.local_registry import registry_address
    from wasilet.oci.artifact import make_artifact
    from wasilet.oci.push import push, reference_named

    reference = f"{registry_address(cluster.ports()['registry'])}/bench/{module.stem.replace('_', '-')}:v1"
    return push(make_artifact(module), reference_named(reference), environ=cluster.settings.environ).pinned


def push_sleeper(cluster: Cluster) -> str:
    """A guest that sleeps for an hour: its reference with the digest."""
    import wasmtime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sleeper.wasm"
        file.write_bytes(wasmtime.wat2wasm(_SLEEPER))
        return push_guest(cluster, file)


def _push_guests(cluster: Cluster) -> tuple[str, str, str]:
    """One that sleeps, one that ends at once, one that writes: references with digests."""
    import wasmtime

    pinned = []
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("sleeper", _SLEEPER), ("ender", _ENDER), ("writer", _WRITER)):
            file = Path(folder) / f"{name}.wasm"
            file.write_bytes(wasmtime.wat2wasm(text))
            pinned.append(push_guest(cluster, file))
    return pinned[0], pinned[1], pinned[2]


@contextlib.contextmanager
def bench_cluster(settings: Settings, name: str = CLUSTER) -> Iterator[Settings]:
    """Settings for a cluster that touches nothing of the user's; the cache of binaries and builds is shared."""
    root = Path(tempfile.mkdtemp(prefix="wasilet-b", dir="/tmp"))
    environ = {
        **settings.environ,
        "WASILET_STATE_HOME": str(root / "state"),
        "WASILET_CACHE": str(settings.cache),
        "KUBECONFIG": str(root / "kubeconfig"),
    }
    environ.pop("WASILET_NAME", None)
    try:
        yield replace(settings, name=name, kubeconfig=root / "kubeconfig", environ=environ)
    finally:
        if not (root / "state" / name).exists():  # else what is there names processes that are still to be ended
            shutil.rmtree(root, ignore_errors=True)


def remove_cluster(bench: Settings) -> None:
    from wasilet.cluster.down import down

    down(bench, reporter=SilentReporter(), purge=True).raise_for_failure()


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
