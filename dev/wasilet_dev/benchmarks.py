"""``invoke bench``: how fast, on this machine, in medians and beside the figures that the project holds itself to.

It measures and prints and judges nothing: a figure on a busy machine says more about the machine. ``up`` and ``pods``
are in ``bench``; ``http`` is requests beside what serves them elsewhere (``bench_throughput``) and pods that serve
(``bench_http``); ``network`` is the pod network (``bench_network``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from wasilet.controlplane.versions import supported_kubernetes, versions
from wasilet.errors import UsageError
from wasilet.settings import Settings
from wasilet.steps import Reporter

from wasilet_dev import bench, bench_floor, bench_growth, bench_http, bench_network, bench_throughput, benchmark_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Measured(Protocol):
    """What a benchmark prints."""

    def to_json(self) -> dict[str, Any]:
        """For ``--output json``."""

    def line(self) -> str:
        """For people."""


def figures(
    what: str, settings: Settings, *, runs: int, pods: int, reporter: Reporter, write: bool = False
) -> Iterator[Measured]:
    """``up``, ``pods``, ``floor``, ``growth``, ``http`` or ``network``, as they are measured. ``write``: floor writes
    ``docs/benchmarks.md``, growth ``docs/growth.md``. Raises UsageError for anything else."""

    def say(line: str) -> None:
        sys.stderr.write(f"bench: {line}\n")

    if runs < 1 or pods < 0:
        raise UsageError("at least one run, and at least one pod (0: as many as is usual)")
    if write and what not in {"floor", "growth"}:
        raise UsageError(f"bench {what} writes no page", hint="`invoke bench floor --write` and `growth` do")
    if what == "up":
        yield from bench.bench_up(settings, runs=runs, say=say)
    elif what == "pods":
        yield from bench.bench_pods(settings, pods=pods or bench.TURN_PODS, reporter=reporter, say=say)
    elif what == "floor":
        bursts = (bench_floor.BURST_PODS, bench_floor.MANY_PODS) if write else (bench_floor.BURST_PODS,)
        machine = benchmark_page.machine_now(_versions(settings))
        tables = bench_floor.bench_floor(
            settings, runs=runs, bursts=(pods,) if pods else bursts, reporter=reporter, say=say
        )
        if write:
            for path in benchmark_page.write(DOCS, machine, tables, rounds=runs):
                say(f"written: {path}")
        for table in tables.values():
            yield from table
    elif what == "growth":
        machine = benchmark_page.machine_now(_versions(settings))
        sizes: list[bench_growth.Size] = []
        most = pods or max(bench_growth.PODS)
        for size in bench_growth.bench_growth(settings, sizes=runs, most_pods=most, reporter=reporter, say=say):
            sizes.append(size)
            yield size
        if write:
            text = bench_growth.page(sizes, benchmark_page.measured_on(machine))
            (DOCS / "growth.md").write_text(text, encoding="utf-8")
            say(f"written: {DOCS / 'growth.md'}")
    elif what == "http":
        yield from bench_throughput.compare(settings, rounds=runs, say=say)
        yield from bench_http.bench_servers(settings, pods=pods or bench_http.PODS, reporter=reporter, say=say)
    elif what == "network":
        yield from bench_network.bench_network(
            settings, rounds=runs, pods=pods or bench_network.PODS, reporter=reporter, say=say
        )
    else:
        raise UsageError(f"there is no benchmark {what!r}", hint="there are up, pods, floor, growth, http and network")


def _versions(settings: Settings) -> dict[str, str]:
    return {
        "Kubernetes": supported_kubernetes(settings.kubernetes_version or ""),
        "etcd": versions().others["etcd"],
        "wasmtime": version("wasmtime"),
    }
