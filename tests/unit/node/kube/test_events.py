from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
from wasilet_node.kube.base import (
    ApiStatusError,
    ApiUnavailableError,
    ConflictError,
    ForbiddenError,
    KubeObject,
    NotFoundError,
)
from wasilet_node.kube.events import KubeEventRecorder, Pace

from tests.unit.node.fake_kube import FakeKube

pytestmark = pytest.mark.unit

POD: KubeObject = {
    "kind": "Pod",
    "apiVersion": "v1",
    "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "resourceVersion": "9"},
}


class EventKube(FakeKube):
    """Keeps events as the API server would."""

    def __init__(self) -> None:
        self.created: list[KubeObject] = []
        self.patched: list[tuple[str, Mapping[str, Any]]] = []
        self.failures: list[Exception] = []

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        assert timeout_seconds > 0
        assert path == f"/api/v1/namespaces/{body['metadata']['namespace']}/events"
        if self.failures:
            raise self.failures.pop(0)
        self.created.append(body)
        return body

    async def patch(
        self, path: str, body: KubeObject, *, content_type: str = "", timeout_seconds: float = 10.0
    ) -> KubeObject:
        if self.failures:
            raise self.failures.pop(0)
        self.patched.append((path, body))
        return body


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], bool]) -> None:
    """Within 5 s."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the store has no event
            await asyncio.sleep(0.002)


UNLIMITED = Pace(write_burst=100_000, retry_seconds=0.01)


@pytest.fixture
def store() -> EventKube:
    return EventKube()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def recorder(store: EventKube, clock: Clock) -> AsyncIterator[KubeEventRecorder]:
    recorder = KubeEventRecorder(store, host="n1", clock=clock, pace=UNLIMITED)
    task = asyncio.create_task(recorder.run())
    yield recorder
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_event_is_what_kubectl_describe_expects(recorder: KubeEventRecorder, store: EventKube) -> None:
    recorder.event(POD, "Normal", "Pulled", "Successfully pulled", field_path="spec.containers{c}")
    await recorder.flush(timeout_seconds=2)

    (event,) = store.created
    assert event["involvedObject"] == {
        "kind": "Pod",
        "apiVersion": "v1",
        "name": "web",
        "namespace": "shop",
        "uid": "u1",
        "resourceVersion": "9",
        "fieldPath": "spec.containers{c}",
    }
    assert event["source"] == {"component": "kubelet", "host": "n1"}
    assert (event["type"], event["reason"], event["message"], event["count"]) == (
        "Normal", "Pulled", "Successfully pulled", 1,
    )  # fmt: skip
    assert event["metadata"]["name"].startswith("web.")
    assert event["firstTimestamp"] == event["lastTimestamp"]


async def test_events_of_the_node_go_into_the_default_namespace(recorder: KubeEventRecorder, store: EventKube) -> None:
    recorder.event({"kind": "Node", "metadata": {"name": "n1", "uid": "n1"}}, "Normal", "Starting", "x")
    await recorder.flush(timeout_seconds=2)
    assert store.created[0]["metadata"]["namespace"] == "default"
    assert "namespace" not in store.created[0]["involvedObject"]


async def test_the_same_text_again_counts_up_the_first_event(recorder: KubeEventRecorder, store: EventKube) -> None:
    for _ in range(3):
        recorder.event(POD, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)

    assert len(store.created) == 1
    name = store.created[0]["metadata"]["name"]
    assert [(path, body["count"]) for path, body in store.patched] == [
        (f"/api/v1/namespaces/shop/events/{name}", 2),
        (f"/api/v1/namespaces/shop/events/{name}", 3),
    ]


async def test_the_same_text_about_another_container_is_another_event(
    recorder: KubeEventRecorder, store: EventKube
) -> None:
    recorder.event(POD, "Normal", "Started", "x", field_path="spec.containers{a}")
    recorder.event(POD, "Normal", "Started", "x", field_path="spec.containers{b}")
    await recorder.flush(timeout_seconds=2)
    assert len(store.created) == 2


async def test_an_event_that_expired_is_made_again_with_its_count(
    recorder: KubeEventRecorder, store: EventKube
) -> None:
    recorder.event(POD, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)
    store.failures = [NotFoundError(404, "NotFound", "gone")]
    recorder.event(POD, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)
    assert [event["count"] for event in store.created] == [1, 2]


async def test_many_texts_of_one_reason_become_one_event(recorder: KubeEventRecorder, store: EventKube) -> None:
    for number in range(15):
        recorder.event(POD, "Warning", "Unhealthy", f"probe failed {number}")
    await recorder.flush(timeout_seconds=2)

    combined = [event for event in store.created if event["message"].startswith("(combined from similar events): ")]
    assert len(store.created) == 10
    assert len(combined) == 1
    assert store.patched[-1][1]["count"] == 6
    assert store.patched[-1][1]["message"] == "(combined from similar events): probe failed 14"


async def test_combining_ends_after_ten_quiet_minutes(
    recorder: KubeEventRecorder, store: EventKube, clock: Clock
) -> None:
    for number in range(12):
        recorder.event(POD, "Warning", "Unhealthy", f"probe failed {number}")
    await recorder.flush(timeout_seconds=2)
    clock.now += 3601
    recorder.event(POD, "Warning", "Unhealthy", "probe failed again")
    await recorder.flush(timeout_seconds=2)
    assert store.created[-1]["message"] == "probe failed again"


async def test_one_object_gets_25_at_once_then_one_in_five_minutes(
    recorder: KubeEventRecorder, store: EventKube, clock: Clock
) -> None:
    for _ in range(40):
        recorder.event(POD, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)
    assert len(store.created) + len(store.patched) == 25

    clock.now += 301
    for _ in range(5):
        recorder.event(POD, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)
    assert len(store.created) + len(store.patched) == 26
    assert store.patched[-1][1]["count"] == 41

    other = {**POD, "metadata": {**POD["metadata"], "name": "db", "uid": "u2"}}
    recorder.event(other, "Warning", "BackOff", "restarting")
    await recorder.flush(timeout_seconds=2)
    assert len(store.created) + len(store.patched) == 27


@pytest.mark.parametrize(
    "failure",
    [
        ForbiddenError(403, "Forbidden", "namespace shop is being terminated"),
        NotFoundError(404, "NotFound", "namespace"),
        ConflictError(409, "AlreadyExists", "there"),
        ApiStatusError(422, "Invalid", "bad"),
    ],
)
async def test_a_refused_event_is_dropped_and_the_next_is_written(
    recorder: KubeEventRecorder, store: EventKube, failure: Exception
) -> None:
    store.failures = [failure]
    recorder.event(POD, "Normal", "Killing", "x")
    recorder.event(POD, "Normal", "Started", "y")
    await recorder.flush(timeout_seconds=2)
    assert [event["reason"] for event in store.created] == ["Started"]


async def test_an_api_server_that_is_away_is_waited_for(recorder: KubeEventRecorder, store: EventKube) -> None:
    store.failures = [ApiUnavailableError("away"), ApiUnavailableError("away")]
    recorder.event(POD, "Normal", "Started", "x")
    await until(lambda: bool(store.created))
    assert [event["reason"] for event in store.created] == ["Started"]


async def test_at_the_end_an_api_server_that_is_away_is_not_waited_for(store: EventKube) -> None:
    recorder = KubeEventRecorder(store, host="n1")
    task = asyncio.create_task(recorder.run())
    store.failures = [ApiUnavailableError("away") for _ in range(100)]
    recorder.event(POD, "Normal", "Started", "x")
    await until(lambda: len(store.failures) < 100)  # and it sleeps for 10 s before it asks again
    recorder.event(POD, "Normal", "Killing", "x")
    async with asyncio.timeout(5):
        await recorder.flush(timeout_seconds=60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_let_statuses_go_first(store: EventKube) -> None:
    busy = True
    recorder = KubeEventRecorder(store, host="n1", busy=lambda: busy)
    task = asyncio.create_task(recorder.run())
    for reason in ("Pulled", "Created", "Started"):
        recorder.event(POD, "Normal", reason, "x")
    await asyncio.sleep(0.1)
    assert store.created == []
    busy = False
    await until(lambda: len(store.created) == 3)
    assert [event["reason"] for event in store.created] == ["Pulled", "Created", "Started"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_statuses_without_end_hold_no_event_up_for_long(store: EventKube, clock: Clock) -> None:
    recorder = KubeEventRecorder(store, host="n1", clock=clock, busy=lambda: True, pace=UNLIMITED)
    task = asyncio.create_task(recorder.run())
    recorder.event(POD, "Normal", "Started", "x")
    await asyncio.sleep(0.1)
    assert store.created == []
    clock.now += 2.1
    await until(lambda: bool(store.created))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_waits_at_the_end_is_written_without_waiting(store: EventKube) -> None:
    """500 pods started just before: at 50 per second their Events would take half a minute."""
    pace = Pace(write_burst=1, writes_per_second=0.01)
    recorder = KubeEventRecorder(store, host="n1", busy=lambda: True, pace=pace)
    task = asyncio.create_task(recorder.run())
    for number in range(1500):
        recorder.event({**POD, "metadata": {**POD["metadata"], "uid": str(number)}}, "Normal", "Started", "x")
    await recorder.flush(timeout_seconds=30)
    assert len(store.created) == 1500
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_flood_never_blocks_and_is_told(
    store: EventKube, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = KubeEventRecorder(store, host="n1", clock=clock, pace=UNLIMITED)
    for _ in range(6000):
        recorder.event(POD, "Normal", "Started", "x")
    assert recorder._queue.qsize() == 5000
    assert caplog.text.count("were dropped so far") == 1


async def test_the_end_waits_only_as_long_as_it_may(store: EventKube, clock: Clock) -> None:
    recorder = KubeEventRecorder(store, host="n1", clock=clock, pace=UNLIMITED)
    recorder.event(POD, "Normal", "Started", "x")
    async with asyncio.timeout(2):
        await recorder.flush(timeout_seconds=0.05)


async def test_writes_are_limited_to_kubelets_rate(store: EventKube) -> None:
    recorder = KubeEventRecorder(store, host="n1", pace=Pace(write_burst=2))
    task = asyncio.create_task(recorder.run())
    began = asyncio.get_running_loop().time()
    for number in range(7):
        recorder.event({**POD, "metadata": {**POD["metadata"], "uid": str(number)}}, "Normal", "Started", "x")
    await until(lambda: len(store.created) == 7)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert asyncio.get_running_loop().time() - began >= 5 / 50 * 0.9


async def test_an_endless_message_is_shortened(recorder: KubeEventRecorder, store: EventKube) -> None:
    recorder.event(POD, "Warning", "Failed", "x" * 100_000)
    await recorder.flush(timeout_seconds=2)
    assert len(store.created[0]["message"]) == 1024


async def test_a_pod_with_the_longest_name_has_events_too(recorder: KubeEventRecorder, store: EventKube) -> None:
    recorder.event({**POD, "metadata": {**POD["metadata"], "name": "p" * 253}}, "Normal", "Started", "x")
    await recorder.flush(timeout_seconds=2)
    assert len(store.created[0]["metadata"]["name"]) <= 253


async def test_a_slow_api_server_does_not_hold_the_events_of_other_pods_back(clock: Clock) -> None:
    class Slow(EventKube):
        async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
            await asyncio.sleep(0.1)
            return await super().create(path, body, timeout_seconds=timeout_seconds)

    store = Slow()
    recorder = KubeEventRecorder(store, host="n1", clock=clock, pace=UNLIMITED)
    task = asyncio.create_task(recorder.run())
    for number in range(24):
        recorder.event({**POD, "metadata": {**POD["metadata"], "uid": str(number)}}, "Normal", "Started", "x")
    for reason in ("Pulling", "Pulled", "Created", "Started"):
        recorder.event(POD, "Normal", reason, "x")
    began = asyncio.get_running_loop().time()
    await recorder.flush(timeout_seconds=5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(store.created) == 28
    assert asyncio.get_running_loop().time() - began < 1.5
    mine = [event["reason"] for event in store.created if event["involvedObject"]["uid"] == "u1"]
    assert mine == ["Pulling", "Pulled", "Created", "Started"]
