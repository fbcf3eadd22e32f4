"""What the benchmark beside the floor makes of its samples, and what the stand-in for a node writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from wasilet_dev.bench_floor import EVENTS, NODE, STATUS, Row, Samples, rows
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
