"""``invoke bench``: how fast, on this machine, in medians and beside the figures that the project holds itself to.

It measures and prints and judges nothing: a figure on a busy machine says more about the machine. ``up`` and ``pods``
are in ``bench``; ``http`` is requests beside what serves them elsewhere (``bench_throughput``) and pods that serve
(``bench_http``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol

from wasilet.errors import UsageError
from wasilet.settings import Settings
from wasilet.steps import Reporter

from wasilet_dev import bench, bench_floor, bench_http, bench_throughput


class Measured(Protocol):
    """What a benchmark prints."""

    def to_json(self) -> dict[str, Any]:
        """For ``--output json``."""

    def line(self) -> str:
        """For people."""


def figures(what: str, settings: Settings, *, runs: int, pods: int, reporter: Reporter) -> Iterator[Measured]:
    """``up``, ``pods``, ``floor`` or ``http``, as they are measured. Raises UsageError for anything else."""

    def say(line: str) -> None:
        sys.stderr.write(f"bench: {line}\n")

    if runs < 1 or pods < 0:
        raise UsageError("at least one run, and at least one pod (0: as many as is usual)")
    if what == "up":
        yield from bench.bench_up(settings, runs=runs, say=say)
    elif what == "pods":
        yield from bench.bench_pods(settings, pods=pods or bench.TURN_PODS, reporter=reporter, say=say)
    elif what == "floor":
        burst = pods or bench_floor.BURST_PODS
        yield from bench_floor.bench_floor(settings, runs=runs, pods=burst, reporter=reporter, say=say)
    elif what == "http":
        yield from bench_throughput.compare(settings, rounds=runs, say=say)
        yield from bench_http.bench_servers(settings, pods=pods or bench_http.PODS, reporter=reporter, say=say)
    else:
        raise UsageError(f"there is no benchmark {what!r}", hint="there are up, pods, floor and http")
