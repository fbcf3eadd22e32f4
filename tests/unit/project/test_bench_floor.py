"""What the benchmark beside the floor makes of its samples, and what the stand-in for a node writes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest
from wasilet.errors import UsageError
from wasilet.settings import load
from wasilet.steps import SilentReporter
from wasilet_dev import benchmark_page
from wasilet_dev.bench_floor import EVENTS, NODE, STATUS, Row, Samples, rows
from wasilet_dev.benchmarks import figures
from wasilet_dev.cpu_time import Reading, per_pod_ms
from wasilet_dev.floor_agent import FloorAgent
from wasilet_node.kube.base import WatchEvent
from wasilet_node.kube.client import KubeClient

pytestmark = pytest.mark.unit


def _samples(factor: float, **processes: float) -> Samples:
    return Samples(
        running_ms=[factor * number for number in range(1, 101)],
        gone_ms=[factor],
        burst_per_second=[1.0, 100 / factor, 1000.0],
        burst_gone_per_second=[factor],
        start_cpu_ms=[processes],
        end_cpu_ms=[processes],
    )


def _rows() -> dict[str, Row]:
    samples = {
        NODE: _samples(2.0, agent=6.0, supervisor=2.0),
        STATUS: _samples(1.0, agent=1.0),
        EVENTS: _samples(1.0, agent=3.0),
    }
    return {row.name: row for row in rows(samples, 100)}


def test_ratios_are_of_the_floor_that_writes_events() -> None:
    found = _rows()
    assert found["create to Running, p50"].ratio == 2.0
    assert found["CPU per start: agent"].ratio == 2.0
    assert found["CPU per start: all"].values == {NODE: 8.0, STATUS: 1.0, EVENTS: 3.0}


def test_a_burst_is_the_median_of_its_rounds() -> None:
    assert _rows()["burst of 100, Running"].values[NODE] == 50.0
    assert _rows()["create to Running, p99"].values[STATUS] == 99.0


def test_a_process_that_only_the_node_has_has_no_ratio() -> None:
    row = _rows()["CPU per start: supervisor"]
    assert (row.ratio, row.values) == (None, {NODE: 2.0})
    assert row.line().split() == ["CPU", "per", "start:", "supervisor", "ms", "wasilet", "2.0"]


def test_a_line_shows_all_three_and_what_is_aimed_at() -> None:
    line = _rows()["burst of 100, Running"].line()
    assert "wasilet   50.0  floor  100.0  floor with Events  100.0  ratio 0.50 (at least 0.6)" in line


def test_processor_time_is_less_what_idling_takes() -> None:
    before, after = Reading(10.0, {"etcd": 1.0, "agent": 5.0}), Reading(20.0, {"etcd": 2.0, "agent": 5.01})
    found = per_pod_ms(before, after, idle={"etcd": 0.05, "agent": 0.01}, pods=100)
    assert found == {"etcd": pytest.approx(5.0), "agent": 0.0}


class _Kube:
    """Records what is written, and shows what it is told to."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.wrote = asyncio.Condition()
        self.changes: asyncio.Queue[WatchEvent] = asyncio.Queue()

    async def _write(self, what: str) -> None:
        async with self.wrote:
            self.written.append(what)
            self.wrote.notify_all()

    async def create(self, path: str, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        if body["kind"] == "Event":
            await self._write(body["reason"])
        return body

    async def patch(self, path: str, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        if "phase" in body.get("status", {}):
            await self._write(body["status"]["phase"])
        return body

    async def delete(self, path: str, **_: Any) -> dict[str, Any]:
        await self._write("DELETE")
        return {}

    async def watch(self, path: str, **_: Any) -> AsyncIterator[WatchEvent]:
        while True:
            yield await self.changes.get()


@pytest.mark.parametrize(
    ("events", "started", "ended"),
    [
        (False, ["Running"], ["DELETE"]),
        (True, ["Running", "Pulled", "Created", "Started"], ["Failed", "DELETE", "Killing"]),
    ],
)
async def test_the_stand_in_writes_each_thing_once_and_in_order(
    *, events: bool, started: list[str], ended: list[str]
) -> None:
    kube = _Kube()
    agent = asyncio.create_task(FloorAgent(cast("KubeClient", kube), "floor", events=events).run())
    container = {"name": "main", "image": "x"}
    metadata: dict[str, Any] = {"name": "a", "namespace": "n", "uid": "u"}
    pod = {"metadata": metadata, "spec": {"containers": [container]}}
    deleted = {**pod, "metadata": {**metadata, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    try:
        for shown, expected in ((pod, started), (deleted, started + ended)):
            for _ in range(2):  # its own writes come back to it
                kube.changes.put_nowait(WatchEvent(type="MODIFIED", object=shown))
            async with asyncio.timeout(5), kube.wrote:
                while len(kube.written) < len(expected):
                    await kube.wrote.wait()
            assert kube.written == expected
    finally:
        agent.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await agent


MACHINE = benchmark_page.Machine(
    processor="A <processor>",
    cores=2,
    memory_gib=8.0,
    kernel="6.1",
    python="3.11.2",
    load=0.1,
    versions={"etcd": "3.6.1"},
    date="1 January 2026",
)


def test_the_page_names_the_machine_and_every_figure(tmp_path: Path) -> None:
    table = list(_rows().values())
    written = benchmark_page.write(tmp_path, MACHINE, {100: table, 500: table}, rounds=3)
    assert [path.name for path in written] == ["benchmarks.md", "benchmarks.svg", "benchmarks.json"]
    text = written[0].read_text()
    assert "2 cores, 8 GiB, Linux 6.1, Python 3.11.2; etcd 3.6.1; 3 rounds" in text
    assert "| create to Running, p50 | ms | 102.0 | 51.0 | 51.0 | 2.00 | at most 1.5 |" in text
    assert text.index("## Bursts of 100") < text.index("## Bursts of 500")
    assert "had other work" not in text
    kept = json.loads(written[2].read_text())
    assert kept["bursts"]["500"][0]["ratio"] == 2.0
    assert kept["machine"]["versions"] == {"etcd": "3.6.1"}


def test_a_busy_machine_is_named_on_the_page() -> None:
    busy = dataclasses.replace(MACHINE, load=5.0)
    assert "**The machine had other work to do** (load 5" in benchmark_page.page(busy, {}, rounds=1)


def test_the_chart_is_xml_with_a_bar_for_every_agent() -> None:
    drawn = ET.fromstring(benchmark_page.chart(list(_rows().values())))  # noqa: S314 - made here
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect") if each.get("x") == "250"]
    shown = [row for row in _rows().values() if not row.name.startswith("CPU") or row.name.endswith(": all")]
    assert len(bars) == 1 + 3 * len(shown)  # and the legend's first


def test_only_floor_writes_a_page() -> None:
    with pytest.raises(UsageError, match="bench up writes no page"):
        list(figures("up", load(environ={}), runs=1, pods=0, reporter=SilentReporter(), write=True))
