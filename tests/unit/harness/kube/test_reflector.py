"""One collection, listed and watched: nothing is lost and nothing is asked for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, KubeObject
from wasilet.kube.reflector import Reflector

from tests.unit.harness.fake_kube import FakeKube

pytestmark = pytest.mark.unit

NODES = "/api/v1/nodes"


class Watchless(FakeKube):
    """Whose watches are first answered as a test has it."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[ApiError | list[KubeObject]] = []
        self.lists = 0

    def _read(self, path: str, query: Any) -> KubeObject:
        self.lists += 1
        return super()._read(path, query)

    @contextmanager
    def watch(self, path: str, hangup: Hangup | None = None, /, **query: Any) -> Iterator[Iterator[KubeObject]]:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, ApiError):
            raise answer
        if answer is not None:
            yield iter(answer)
            return
        with super().watch(path, hangup, **query) as events:
            yield events


class Seen:
    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self.changes: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self.recovered = 0

    def _recover(self) -> None:
        self.recovered += 1

    @contextmanager
    def reflecting(self, kube: FakeKube, **more: Any) -> Iterator[None]:
        hangup = Hangup()
        reflector = Reflector(
            kube=kube,
            path=NODES,
            hangup=hangup,
            listed=lambda items: self.lists.append([item["metadata"]["name"] for item in items]),
            changed=lambda kind, obj: self.changes.append((kind, obj["metadata"]["name"])),
            failed=lambda error: self.failures.append(error.message),
            recovered=self._recover,
            **more,
        )
        thread = threading.Thread(target=reflector.run)
        thread.start()
        try:
            yield
        finally:
            hangup.end()
            thread.join(10)
        assert not thread.is_alive(), "the hangup did not end it"


def node(name: str, **labels: str) -> KubeObject:
    return {"metadata": {"name": name, "labels": labels}}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_what_is_there_is_listed_and_what_comes_is_reported() -> None:
    kube, seen = FakeKube(), Seen()
    kube.show(NODES, node("a"))
    with seen.reflecting(kube):
        until(lambda: seen.lists == [["a"]])
        kube.show(NODES, node("b"))
        kube.show(NODES, node("a"))
        kube.remove(f"{NODES}/b")
        until(lambda: len(seen.changes) == 3)
    assert seen.changes == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
    assert (seen.lists, seen.failures) == ([["a"]], [])


def test_only_what_the_selectors_take_is_seen() -> None:
    kube, seen = FakeKube(), Seen()
    kube.show(NODES, node("a", zone="x"))
    kube.show(NODES, node("b", zone="y"))
    with seen.reflecting(kube, query={"labelSelector": "zone=x"}):
        until(lambda: seen.lists == [["a"]])
        kube.show(NODES, node("b", zone="y"))
        kube.show(NODES, node("a", zone="x"))
        until(lambda: bool(seen.changes))
    assert seen.changes == [("MODIFIED", "a")]


def test_a_known_version_saves_the_list() -> None:
    kube, seen = Watchless(), Seen()
    with seen.reflecting(kube, version="0"):
        kube.show(NODES, node("a"))
        until(lambda: bool(seen.changes))
    assert (kube.lists, seen.changes) == (0, [("ADDED", "a")])


def test_a_watch_that_broke_off_goes_on_where_it_was() -> None:
    kube, seen = Watchless(), Seen()
    kube.answers = [ApiError("no answer"), ApiError("no answer")]
    with seen.reflecting(kube):
        until(lambda: bool(seen.recovered))
        kube.show(NODES, node("a"))
        until(lambda: bool(seen.changes))
    assert (kube.lists, seen.failures, seen.recovered) == (1, ["no answer"], 1)


@pytest.mark.parametrize(
    ("answer", "reported"),
    [
        (ApiError("too old resource version", code=410), []),
        (ApiError("Too large resource version", code=504), ["Too large resource version"]),
        ([{"type": "ERROR", "object": {"code": 410, "message": "too old"}}], []),
        ([{"type": "ERROR", "object": {"code": 500, "message": "broken"}}], ["broken"]),
    ],
)
def test_what_may_have_been_missed_is_listed_again(answer: Any, reported: list[str]) -> None:
    kube, seen = Watchless(), Seen()
    kube.answers = [answer]
    with seen.reflecting(kube):
        until(lambda: len(seen.lists) == 2)
    assert seen.failures == reported


def test_an_absent_api_server_is_waited_for() -> None:
    kube, seen = FakeKube(), Seen()
    kube.unanswered = 3
    with seen.reflecting(kube):
        until(lambda: bool(seen.lists) and bool(seen.recovered))
    assert seen.failures == ["no answer"]
