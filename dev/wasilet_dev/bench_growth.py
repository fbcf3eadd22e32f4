"""``invoke bench growth``: what nodes and pods ask of the API server, and how that grows, in its own counts.

Requests are counted by the server (``apiserver_request_total``), so a busy machine changes how long it takes and not
what is counted. Of each size of cluster: what the start and the end of a pod add, and the resting traffic while they
run. What follows for a large cluster is calculated from these counts, and labelled so.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Reporter
from wasilet.storage import read_json

from wasilet_dev.bench import NAMESPACE, Watched, bench_cluster, make_namespace, push_sleeper, remove_cluster

NODES = (1, 3, 10)
PODS = (10, 100, 1000)
REST_SECONDS = 60.0
SETTLE_SECONDS = 6.0
"""Events are written behind statuses, 50 per second at most after the first 100."""

_EVENTS_PER_SECOND = 50.0
_LINE = re.compile(r"apiserver_request_total\{(?P<labels>[^}]*)\} (?P<value>[0-9.e+]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_QUIET_BELOW = 0.05
"""Requests per pod, or per node and minute, that are left out of the page: what happens once in a while."""

_BY_NODES = {
    "PATCH pods/status": "the pod's status",
    "POST events": "the Events of a start and an end",
    "POST serviceaccounts/token": "the service account's token",
    "PATCH nodes/status": "the node's status, on change and every 5 min",
    "PATCH leases": "the node's lease, every 10 s",
}
"""What of the table the node writes, and why."""

Say = Callable[[str], None]
Counts = Mapping[str, float]
"""Requests, by verb and resource."""


def parsed(metrics: str) -> dict[str, float]:
    """The counts of a ``/metrics`` page: verb, group but for the core one, resource and subresource. Watches are left
    out: they are counted when they end."""
    found: dict[str, float] = defaultdict(float)
    for match in _LINE.finditer(metrics):
        labels = dict(_LABEL.findall(match["labels"]))
        resource, verb = labels.get("resource", ""), labels.get("verb", "")
        if not resource or verb in {"WATCH", "CONNECT"}:
            continue
        group = f".{labels['group']}" if labels.get("group") and resource == "events" else ""
        subresource = f"/{labels['subresource']}" if labels.get("subresource") else ""
        found[f"{'PATCH' if verb == 'APPLY' else verb} {resource}{group}{subresource}"] += float(match["value"])
    return dict(found)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one number of pods was seen to need on one number of nodes."""

    nodes: int
    pods: int
    running_seconds: float
    """From the first creation until the last was seen Running."""

    start: Counts
    """Requests per pod."""

    rest: Counts
    """Requests per minute, of all nodes, with these pods running."""

    end: Counts
    """Requests per pod, the deletion that was asked for left out."""

    agent_mib: float
    supervisor_mib: float
    """Resident, of the node with most."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **{name: getattr(self, name) for name in ("nodes", "pods")},
            **{name: round(getattr(self, name), 2) for name in ("running_seconds", "agent_mib", "supervisor_mib")},
            **{name: {key: round(value, 3) for key, value in getattr(self, name).items()} for name in _TABLES},
        }

    def line(self) -> str:
        """For people."""
        return (
            f"{self.nodes} nodes, {self.pods:>5} pods: {sum(self.start.values()):.1f} requests per start, "
            f"{sum(self.end.values()):.1f} per end, {sum(self.rest.values()) / self.nodes:.1f} per node and minute at "
            f"rest; all Running after {self.running_seconds:.1f} s; agent {self.agent_mib:.0f} MiB, supervisor "
            f"{self.supervisor_mib:.0f} MiB"
        )


_TABLES = ("start", "rest", "end")


@dataclass
class _Growth:
    cluster: Cluster
    say: Say
    made: int = 0
    counted_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.kube = self.cluster.admin()
        self.nodes = len(self.cluster.node_names())

    def measure(self, pods: Sequence[int]) -> Iterator[Size]:
        """Each number in turn."""
        image = push_sleeper(self.cluster)
        make_namespace(self.kube)
        with Watched(Kube(self.cluster.admin_credentials())) as watched:
            # One of each first: what is read or compiled once counts for no pod.
            first = self._start(watched, image, self.nodes)
            self._end(watched, first)
            for number in pods:
                yield self._size(watched, image, number)

    def _size(self, watched: Watched, image: str, pods: int) -> Size:
        self.say(f"{self.nodes} nodes, {pods} pods")
        before, began = self._counts(), time.monotonic()
        names = self._start(watched, image, pods)
        running_seconds = max(watched.at[name, "Running"] for name in names) - began
        self._settle(pods)
        started = self._counts()
        memory = self._memory()
        time.sleep(REST_SECONDS)
        rested = self._counts()
        self._end(watched, names)
        self._settle(pods)
        ended = self._counts()
        start = _per(started, before, pods, without={"POST pods": 1.0})
        end = _per(ended, rested, pods, without={"DELETE pods": 1.0})
        rest = {name: count * 60 / REST_SECONDS for name, count in _per(rested, started, 1).items()}
        return Size(
            nodes=self.nodes,
            pods=pods,
            running_seconds=running_seconds,
            start=start,
            rest=rest,
            end=end,
            agent_mib=memory[0],
            supervisor_mib=memory[1],
        )

    def _start(self, watched: Watched, image: str, pods: int) -> list[str]:
        names = [f"g{self.made + number}" for number in range(pods)]
        self.made += pods
        for name in names:
            container = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent"}
            spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
            pod: KubeObject = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
            self.kube.create(api_path("pods", namespace=NAMESPACE), pod)
        watched.wait(dict.fromkeys(names, "Running"), "Running")
        return names

    def _end(self, watched: Watched, names: Sequence[str]) -> None:
        for name in names:
            self.kube.delete(api_path("pods", name, namespace=NAMESPACE))
        watched.wait(dict.fromkeys(names, "gone"), "gone")

    def _settle(self, pods: int) -> None:
        """Until the Events are written, too."""
        time.sleep(SETTLE_SECONDS + 3 * pods / self.nodes / _EVENTS_PER_SECOND)

    def _counts(self) -> dict[str, float]:
        return parsed(self.kube.body("/metrics", timeout_seconds=60).decode())

    def _memory(self) -> tuple[float, float]:
        """Of the largest agent and supervisor, in MiB."""
        agents = [r.process.pid for r in self.cluster.state.records() if r.name.startswith("node-")]
        pointers = [self.cluster.state.node(name) / "supervisor.json" for name in self.cluster.node_names()]
        supervisors = [int(read_json(pointer)["pid"]) for pointer in pointers]
        return _largest(agents), _largest(supervisors)


def _largest(pids: Sequence[int]) -> float:
    return max(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20


def _per(after: Counts, before: Counts, number: int, *, without: Counts | None = None) -> dict[str, float]:
    """What was asked in between, by ``number``; ``without``: the benchmark's own part, each."""
    found = {name: (value - before.get(name, 0.0)) / number for name, value in after.items()}
    for name, own in (without or {}).items():
        found[name] = found.get(name, 0.0) - own
    return {name: value for name, value in found.items() if value > 0}


def bench_growth(settings: Settings, *, sizes: int, most_pods: int, reporter: Reporter, say: Say) -> Iterator[Size]:
    """The first ``sizes`` of the numbers of nodes, each with the numbers of pods up to ``most_pods``.

    Raises HarnessError when a cluster does not come up, WaitTimeoutError when pods do not come where they should."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.up import up

    pods = [number for number in PODS if number <= most_pods] or [most_pods]
    for nodes in NODES[:sizes]:
        with bench_cluster(replace(settings, nodes=nodes, max_pods=max(pods) + 50), name="growth") as bench:
            try:
                up(bench, reporter=reporter).raise_for_failure()
                with open_cluster(bench) as cluster:
                    yield from _Growth(cluster, say).measure(pods)
            finally:
                remove_cluster(bench)


# --- what is made of it ----------------------------------------------------------------------------------------------

LARGE_NODES = 1000
LARGE_PODS_PER_NODE = 30
LARGE_LIFE_HOURS = 1.0


def calculated(sizes: Sequence[Size]) -> dict[str, float]:
    """Requests per second of the nodes of a large cluster, by what causes them: from the largest size's counts, and
    from those that nodes write alone."""
    largest = max(sizes, key=lambda size: (size.nodes, size.pods))
    rest = _of_nodes(largest.rest) / largest.nodes / 60
    per_pod = _of_nodes(largest.start) + _of_nodes(largest.end)
    starts_per_second = LARGE_NODES * LARGE_PODS_PER_NODE / (LARGE_LIFE_HOURS * 3600)
    return {"at rest": LARGE_NODES * rest, "starts and ends of pods": starts_per_second * per_pod}


def _of_nodes(counts: Counts) -> float:
    return sum(value for name, value in counts.items() if name in _BY_NODES or name == "DELETE pods")


def page(sizes: Sequence[Size], measured: str) -> str:
    """``docs/growth.md``. ``measured``: the line on machine and versions."""
    parts = [
        "# Growth",
        _ABOUT,
        measured,
        "## How much, at each size",
        _sizes_table(sizes),
        "## What one pod asks",
        _OF_WHOLE_CLUSTER,
        _requests_table(sizes),
        "## What follows for a large cluster",
        _calculation(sizes),
        "## What grows how",
        _REASONS,
    ]
    return "\n\n".join(parts) + "\n"


_ABOUT = """\
Written by `./run bench growth --write`; do not edit. Requests are the API server's own counts, so they hold on a busy
machine; the seconds hold for this one and its load alone."""
_OF_WHOLE_CLUSTER = """\
Of the whole cluster: scheduler and controllers are among it. The creation and the deletion that a user asks for are
left out. The last column names what the node asks, and why."""
_SIZES = (
    *("nodes", "pods", "requests per start", "per end", "at rest, per node and minute"),
    *("all Running, s", "agent, MiB", "supervisor, MiB"),
)
_REASONS = """\
- **Requests per pod** do not grow with pods or nodes: each node watches its own pods alone (by a field selector), and
  writes a status per start and per end (one more where a start takes longer than a quarter of a second, as on a busy
  machine), the Events, and a token.
- **Requests at rest** grow with nodes and not with pods: a lease every 10 s per node, and a status every 5 min; the API
  server renews a lease of its own. Tokens are renewed after 80 % of their hour, one request per pod and 48 min;
  ConfigMaps that pods share are watched once per node.
- **Memory of the agent and the supervisor** grows with the pods of their node: specs, statuses and records.
- **Time until all run** is processor time: on one machine, all nodes and the control plane share it."""


def _sizes_table(sizes: Sequence[Size]) -> str:
    rows = [f"| {' | '.join(_SIZES)} |", "| --- " * len(_SIZES) + "|"]
    for size in sizes:
        figures = (
            *(sum(size.start.values()), sum(size.end.values()), sum(size.rest.values()) / size.nodes),
            *(size.running_seconds, size.agent_mib, size.supervisor_mib),
        )
        rows.append(f"| {size.nodes} | {size.pods} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    return "\n".join(rows)


def _requests_table(sizes: Sequence[Size]) -> str:
    largest = max(sizes, key=lambda size: (size.pods, size.nodes))
    counted = f"request ({largest.nodes} nodes, {largest.pods} pods)"
    rows = [
        f"| {counted} | per start | per end | at rest, per node and minute | of the node |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted({*largest.start, *largest.end, *largest.rest}):
        values = (largest.start.get(name, 0.0), largest.end.get(name, 0.0), largest.rest.get(name, 0.0) / largest.nodes)
        if max(values) >= _QUIET_BELOW:
            cells = " | ".join(f"{value:.2f}" if value >= _QUIET_BELOW else "" for value in values)
            rows.append(f"| {name} | {cells} | {_why(name)} |")
    return "\n".join(rows)


def _why(name: str) -> str:
    return "the last step of a deletion" if name == "DELETE pods" else _BY_NODES.get(name, "")


def _calculation(sizes: Sequence[Size]) -> str:
    found = calculated(sizes)
    lines = [
        (
            f"**Calculated, not measured**: {LARGE_NODES:,} nodes of {LARGE_PODS_PER_NODE} pods that live for "
            f"{LARGE_LIFE_HOURS:g} h each would ask the API server, at the counts of the largest size above and by the "
            "nodes alone,"
        ),
        *(f"- {cause}: {rate:.0f} requests per second" for cause, rate in found.items()),
    ]
    return "\n".join([lines[0], "", *lines[1:]])
