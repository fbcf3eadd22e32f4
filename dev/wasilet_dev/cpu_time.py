"""Processor time of a cluster's processes, by what they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
from wasilet.providers.base import Cluster
from wasilet.storage import read_json

QUIET_SECONDS = 1.0
QUIET_CPU_SECONDS = 0.015
"""Of the agent; the kernel counts in steps of 0.01."""

SETTLE_SECONDS = 60.0
IDLE_SECONDS = 5.0

_NAMES = {
    "kube-apiserver": "API server",
    "etcd": "etcd",
    "kube-scheduler": "scheduler",
    "kube-controller-manager": "controller-manager",
}


@dataclass(frozen=True)
class Reading:
    """At one moment of the monotonic clock."""

    at: float
    seconds: Mapping[str, float]


class CpuTimes:
    """Of the control plane and of whatever acts as the node, in seconds since each began."""

    def __init__(self, cluster: Cluster, *, agent: int | None = None) -> None:
        """``agent``: the pid of a stand-in for the node, which has no supervisor; None: the cluster's first node."""
        self._processes: dict[str, psutil.Process] = {}
        self._supervisor: psutil.Process | None = None
        for record in cluster.state.records():
            if record.name in _NAMES:
                self._processes[_NAMES[record.name]] = psutil.Process(record.process.pid)
            elif record.name.startswith("node-") and agent is None:
                agent = record.process.pid
                pointer = read_json(cluster.state.node(cluster.node_names()[0]) / "supervisor.json")
                self._supervisor = psutil.Process(int(pointer["pid"]))
        if agent is not None:
            self._processes["agent"] = psutil.Process(agent)

    def read(self) -> Reading:
        """Now. ``sandboxes``: all descendants of the supervisor, those that ended too."""
        found = {name: _own(process) for name, process in self._processes.items()}
        if self._supervisor is not None:
            found["supervisor"] = _own(self._supervisor)
            times = self._supervisor.cpu_times()
            ended = times.children_user + times.children_system
            alive = 0.0
            for child in self._supervisor.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    alive += times.user + times.system + times.children_user + times.children_system
            found["sandboxes"] = ended + alive
        return Reading(time.monotonic(), found)

    def settled(self) -> Reading:
        """Once the agent does nothing any more: what it writes behind belongs to the pods that it is written for."""
        deadline = time.monotonic() + SETTLE_SECONDS
        before = self.read()
        while time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            now = self.read()
            if now.seconds["agent"] - before.seconds["agent"] < QUIET_CPU_SECONDS:
                return now
            before = now
        return before

    def idle(self) -> dict[str, float]:
        """What each takes with nothing to do, in seconds per second."""
        before = self.settled()
        time.sleep(IDLE_SECONDS)
        now = self.read()
        return {name: (now.seconds[name] - before.seconds[name]) / (now.at - before.at) for name in now.seconds}


def per_pod_ms(before: Reading, after: Reading, *, idle: Mapping[str, float], pods: int) -> dict[str, float]:
    """Milliseconds per pod of each process between two readings, less what it takes with nothing to do."""
    lasted = after.at - before.at
    return {
        name: max(0.0, seconds - before.seconds[name] - idle[name] * lasted) * 1000 / pods
        for name, seconds in after.seconds.items()
    }


def _own(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
