"""Delays: crash loops, image pulls, plain retries, and clocks that are set back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.backoff import CrashLoopBackoff, ImagePullBackoff, NotBefore, RetryBackoff

pytestmark = pytest.mark.unit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_delays_double_from_10_to_300_seconds() -> None:
    clock = Clock()
    backoff = ImagePullBackoff(clock=clock)
    key = ("uid", "image")
    delays = []
    for number in range(7):
        assert backoff.waiting(key) is None
        backoff.failed(key, f"error {number}")
        began = clock.now
        while backoff.waiting(key) == f"error {number}":
            clock.now += 1
        delays.append(clock.now - began)
    assert delays == [10, 20, 40, 80, 160, 300, 300]


def test_an_entry_left_alone_for_ten_minutes_starts_from_the_beginning() -> None:
    clock = Clock()
    backoff = ImagePullBackoff(clock=clock)
    for _ in range(5):
        backoff.failed(("uid", "image"), "error")
    clock.now += 601
    backoff.failed(("uid", "image"), "error")
    clock.now += 10
    assert backoff.waiting(("uid", "image")) is None


def test_another_pod_does_not_wait() -> None:
    backoff = ImagePullBackoff(clock=Clock())
    backoff.failed(("uid", "image"), "error")
    assert backoff.waiting(("other", "image")) is None
    assert backoff.waiting(("uid", "other")) is None


def test_expired_entries_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    backoff = ImagePullBackoff(clock=clock)
    backoff.failed(("old", "image"), "error")
    clock.now += 601
    backoff.failed(("new", "image"), "error")
    backoff.forget_expired()
    assert list(backoff._entries) == [("new", "image")]


def test_the_first_restart_is_immediate_then_delays_double_to_five_minutes() -> None:
    backoff = CrashLoopBackoff()
    now = 1000.0
    delays = []
    for _ in range(8):
        wait = backoff.remaining("c", finished_at=now, now=now)
        delays.append(wait)
        backoff.next("c", finished_at=now, now=now + wait)
        now += wait + 1
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]


def test_ten_minutes_of_running_reset_the_back_off() -> None:
    backoff = CrashLoopBackoff()
    for _ in range(4):
        backoff.next("c", finished_at=100, now=100)
    assert backoff.remaining("c", finished_at=699, now=699) == 80
    assert backoff.remaining("c", finished_at=701, now=701) == 0
    backoff.next("c", finished_at=701, now=701)
    assert backoff.delay("c") == 10


def test_a_restarted_agent_goes_on_where_the_back_off_was() -> None:
    backoff = CrashLoopBackoff()
    backoff.seed("c", restarts=3, started_at=1000)
    assert backoff.remaining("c", finished_at=1001, now=1001) == 40
    fresh = CrashLoopBackoff()
    fresh.seed("c", restarts=0, started_at=1000)
    assert fresh.remaining("c", finished_at=1001, now=1001) == 0


@given(st.floats(0, 1e10), st.floats(-1e5, 1e5))
def test_no_clock_makes_a_wait_longer_than_the_delay(finished_at: float, drift: float) -> None:
    backoff = CrashLoopBackoff()
    backoff.next("c", finished_at=finished_at, now=finished_at)
    assert 0 <= backoff.remaining("c", finished_at=finished_at, now=finished_at + drift) <= 10


def test_retries_double_up_to_their_limit() -> None:
    retry = RetryBackoff(initial=1, maximum=5)
    assert [retry.next() for _ in range(4)] == [1, 2, 4, 5]
    retry.reset()
    assert retry.next() == 1


def test_a_clock_that_is_set_back_ends_a_wait() -> None:
    wait = NotBefore(since=1000.0, seconds=10.0)
    assert [wait.left(now) for now in (1000.0, 1004.0, 1010.0, 2000.0)] == [10.0, 6.0, 0.0, 0.0]
    assert wait.left(999.0) == 0.0


def test_a_delay_of_at_least_goes_on_doubling_from_there() -> None:
    retry = RetryBackoff(1.0, 60.0)
    assert [retry.next(), retry.next(at_least=20.0), retry.next(), retry.next(), retry.next(at_least=90.0)] == [
        1.0,
        20.0,
        40.0,
        60.0,
        90.0,
    ]
    assert retry.next() == 60.0
    retry.reset()
    assert retry.next() == 1.0
