"""``invoke bench floor``: the node beside the least that any node must do, on one cluster, in alternating rounds.

Three agents take turns: the real node, one that only reports each pod as Running, and one that also writes the
kubelet's Events (``floor_agent``). Scheduler, API server and etcd are the same for all, and so is what else the machine
does at the time: the ratios mean something on a busy machine too, the absolute figures only on a quiet one.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wasilet.errors import WaitTimeoutError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Reporter

from wasilet_dev.bench import (
    NAMESPACE,
    Watched,
    bench_cluster,
    make_namespace,
    push_sleeper,
    quantile,
    remove_cluster,
)
from wasilet_dev.cpu_time import CpuTimes, per_pod_ms
from wasilet_dev.floor_agent import HOSTNAME

NODE = "wasilet"
STATUS = "floor"
EVENTS = "floor with Events"
NAMES = (NODE, STATUS, EVENTS)

SINGLES = 20
"""Pods of each round that are started one at a time."""

BURST_PODS = 100
MANY_PODS = 500
_READY_SECONDS = 60.0
_STOP_SECONDS = 10.0

Say = Callable[[str], None]


@dataclass
class Samples:
    """What one agent was seen to need, over all rounds."""

    running_ms: list[float] = field(default_factory=list)
    gone_ms: list[float] = field(default_factory=list)
    burst_per_second: list[float] = field(default_factory=list)
    burst_gone_per_second: list[float] = field(default_factory=list)
    start_cpu_ms: list[Mapping[str, float]] = field(default_factory=list)
    end_cpu_ms: list[Mapping[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of all three agents."""

    name: str
    unit: str
    values: Mapping[str, float]
    """By agent; a process that only the real node has is missing elsewhere."""

    more_is_better: bool = False
    reach: float | None = None
    """The ratio that is aimed at: at most, or where more is better, at least."""

    @property
    def ratio(self) -> float | None:
        """Of the node to the floor with Events, which is what a kubelet must do."""
        floor = self.values.get(EVENTS)
        return self.values[NODE] / floor if floor else None

    def to_json(self) -> dict[str, Any]:
        """With the ratio."""
        values = {name: round(value, 3) for name, value in self.values.items()}
        ratio = None if self.ratio is None else round(self.ratio, 2)
        return {"name": self.name, "unit": self.unit, **values, "ratio": ratio, "reach": self.reach}

    def line(self) -> str:
        """For people."""
        *values, ratio, reach = self.cells()
        shown = "".join(f"  {name} {value:>6}" for name, value in zip(NAMES, values, strict=True) if value)
        text = f"{self.name:<36}{self.unit:<7}{shown}"
        if ratio:
            text += f"  ratio {ratio}" + (f" ({reach})" if reach else "")
        return text

    def cells(self) -> list[str]:
        """The three values, the ratio and what is aimed at."""
        shown = [f"{self.values[name]:.1f}" if name in self.values else "" for name in NAMES]
        reach = "" if self.reach is None else f"{'at least' if self.more_is_better else 'at most'} {self.reach:g}"
        return [*shown, "" if self.ratio is None else f"{self.ratio:.2f}", reach]


HEADINGS = (*NAMES, "ratio", "reach")


def bench_floor(
    settings: Settings, *, runs: int, bursts: Sequence[int], reporter: Reporter, say: Say
) -> dict[int, list[Row]]:
    """``runs`` rounds of single pods and of bursts, each agent in its turn; a table for each size of burst.

    Raises HarnessError when the cluster does not come up, WaitTimeoutError when pods do not come where they should."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.up import up

    with bench_cluster(replace(settings, max_pods=max(bursts) + 50)) as bench:
        try:
            up(bench, reporter=reporter).raise_for_failure()
            with open_cluster(bench) as cluster, _floor_agents(cluster) as pids:
                turns = _Turns(cluster, pids, say)
                return {pods: rows(turns.measure(runs, pods), pods) for pods in bursts}
        finally:
            remove_cluster(bench)


@contextlib.contextmanager
def _floor_agents(cluster: Cluster) -> Iterator[dict[str, int]]:
    """The two stand-ins; their pids. They end with this process, whatever way it ends."""
    argv = [sys.executable, "-P", "-m", "wasilet_dev.floor_agent", str(cluster.state.admin_kubeconfig)]
    started: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        for name, options in ((STATUS, []), (EVENTS, ["--events"])):
            words = [*argv, node_name(name), *options]
            started[name] = stack.enter_context(
                subprocess.Popen(words, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])
            )
            stack.callback(_stop, started[name])
        yield {name: process.pid for name, process in started.items()}


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def node_name(agent: str) -> str:
    """A stand-in's Node."""
    return agent.lower().replace(" ", "-")


class _Turns:
    def __init__(self, cluster: Cluster, pids: Mapping[str, int], say: Say) -> None:
        self.cluster = cluster
        self.kube = cluster.admin()
        self.say = say
        self.image = push_sleeper(cluster)
        self.nodes = {NODE: cluster.node_names()[0]} | {name: node_name(name) for name in pids}
        self.cpu = {NODE: CpuTimes(cluster)} | {name: CpuTimes(cluster, agent=pid) for name, pid in pids.items()}
        self.samples: dict[str, Samples] = defaultdict(Samples)
        make_namespace(self.kube)

    def measure(self, rounds: int, pods: int) -> dict[str, Samples]:
        """All rounds with bursts of ``pods``."""
        self.samples = defaultdict(Samples)
        for node in self.nodes.values():
            self._wait_ready(node)
        with Watched(Kube(self.cluster.admin_credentials())) as watched:
            for name in NAMES:
                self._single(watched, name, Samples(), f"warm-{pods}-{node_name(name)}")
            idle = {name: self.cpu[name].idle() for name in NAMES}
            for number in range(rounds):
                # Who goes first changes from round to round: caches and a server that grows are no one's handicap.
                order = [NAMES[(number + shift) % len(NAMES)] for shift in range(len(NAMES))]
                self.say(f"round {number + 1} of {rounds}, bursts of {pods}")
                for single in range(SINGLES):
                    for name in order:
                        self._single(watched, name, self.samples[name], f"{node_name(name)}-{pods}-{number}-{single}")
                for name in order:
                    self._burst(
                        watched, name, idle[name], [f"b{pods}-{node_name(name)}-{number}-{i}" for i in range(pods)]
                    )
        return self.samples

    def _single(self, watched: Watched, agent: str, samples: Samples, name: str) -> None:
        began = time.monotonic()
        self._create(name, agent)
        watched.wait({name: "Running"}, "Running")
        samples.running_ms.append((watched.at[name, "Running"] - began) * 1000)
        began = time.monotonic()
        self._delete(watched, [name])
        samples.gone_ms.append((watched.at[name, "gone"] - began) * 1000)

    def _burst(self, watched: Watched, agent: str, idle: Mapping[str, float], names: Sequence[str]) -> None:
        samples, cpu, pods = self.samples[agent], self.cpu[agent], len(names)
        before = cpu.settled()
        began = time.monotonic()
        for name in names:
            self._create(name, agent)
        watched.wait(dict.fromkeys(names, "Running"), "Running")
        samples.burst_per_second.append(pods / (max(watched.at[name, "Running"] for name in names) - began))
        between = cpu.settled()
        samples.start_cpu_ms.append(per_pod_ms(before, between, idle=idle, pods=pods))
        began = time.monotonic()
        self._delete(watched, names)
        samples.burst_gone_per_second.append(pods / (max(watched.at[name, "gone"] for name in names) - began))
        samples.end_cpu_ms.append(per_pod_ms(between, cpu.settled(), idle=idle, pods=pods))

    def _create(self, name: str, agent: str) -> None:
        container = {"name": "main", "image": self.image, "imagePullPolicy": "IfNotPresent"}
        spec = {
            "containers": [container],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "nodeSelector": {HOSTNAME: self.nodes[agent]},
        }
        pod: KubeObject = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        self.kube.create(api_path("pods", namespace=NAMESPACE), pod)

    def _delete(self, watched: Watched, names: Sequence[str]) -> None:
        for name in names:
            self.kube.delete(api_path("pods", name, namespace=NAMESPACE))
        watched.wait(dict.fromkeys(names, "gone"), "gone")

    def _wait_ready(self, node: str) -> None:
        """Until pods can be placed there."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            found = self.kube.find(f"/api/v1/nodes/{node}")
            if found and not found["spec"].get("taints") and _is_ready(found):
                return
            time.sleep(0.1)
        raise WaitTimeoutError(f"node {node} was not Ready within {_READY_SECONDS:g} s")


def _is_ready(node: KubeObject) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


# --- what is made of it ----------------------------------------------------------------------------------------------


def rows(samples: Mapping[str, Samples], pods: int) -> list[Row]:
    """The table: latencies over all rounds, medians of bursts, processor time per pod by process."""

    def each(of: Callable[[Samples], float]) -> dict[str, float]:
        return {name: of(samples[name]) for name in NAMES}

    found = [
        Row(
            name=f"create to Running, p{share}",
            unit="ms",
            values={name: quantile(samples[name].running_ms, share / 100) for name in NAMES},
            reach=reach,
        )
        for share, reach in ((50, 1.5), (90, None), (99, 4.0))
    ]
    found += [
        Row(name="delete to gone, p50", unit="ms", values=each(lambda s: statistics.median(s.gone_ms))),
        Row(
            name=f"burst of {pods}, Running",
            unit="pods/s",
            values=each(lambda s: statistics.median(s.burst_per_second)),
            more_is_better=True,
            reach=0.6,
        ),
        Row(
            name=f"burst of {pods}, gone",
            unit="pods/s",
            values=each(lambda s: statistics.median(s.burst_gone_per_second)),
            more_is_better=True,
        ),
    ]
    return [
        *found,
        *_cpu_rows("CPU per start", {name: samples[name].start_cpu_ms for name in NAMES}),
        *_cpu_rows("CPU per end", {name: samples[name].end_cpu_ms for name in NAMES}),
    ]


def _cpu_rows(title: str, taken: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    medians = {
        name: {process: statistics.median(turn[process] for turn in turns) for process in turns[0]}
        for name, turns in taken.items()
    }
    made = [
        Row(
            name=f"{title}: {process}",
            unit="ms",
            values={name: found[process] for name, found in medians.items() if process in found},
        )
        for process in medians[NODE]
    ]
    whole = {name: sum(found.values()) for name, found in medians.items()}
    return [*made, Row(name=f"{title}: all", unit="ms", values=whole)]
