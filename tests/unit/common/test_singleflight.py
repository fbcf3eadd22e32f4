"""Shared work: who is cancelled when."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from wasilet_common.singleflight import SingleFlight
from wasilet_node.images.uninterrupted import uninterrupted

pytestmark = pytest.mark.unit


class Work:
    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.started += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.started


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_of_one_key_share_one_task_and_others_do_not() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(flights.do(key, work)) for key in ("a", "a", "a", "b")]
    await turn()
    assert (work.started, len(flights)) == (2, 2)
    work.go.set()
    await asyncio.gather(*callers)
    assert len(flights) == 0


async def test_a_cancelled_caller_leaves_the_others_their_work() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    first, second = (asyncio.create_task(flights.do("a", work)) for _ in range(2))
    await turn()
    first.cancel()
    await turn()
    assert first.cancelled()
    work.go.set()
    assert await second == 1
    assert work.cancelled == 0


async def test_the_last_cancelled_caller_cancels_the_work_and_the_next_one_starts_again() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(flights.do("a", work)) for _ in range(2)]
    await turn()
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    late = asyncio.create_task(flights.do("a", work))
    await turn()
    assert (work.cancelled, work.started) == (1, 2)
    work.go.set()
    assert await late == 2


async def test_an_error_reaches_every_caller() -> None:
    async def fail() -> int:
        await asyncio.sleep(0)
        raise ValueError("no")

    flights: SingleFlight[str, int] = SingleFlight()
    outcomes = await asyncio.gather(*(flights.do("a", fail) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert len(flights) == 0


async def test_closing_ends_what_is_under_way() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    caller = asyncio.create_task(flights.do("a", work))
    await turn()
    await flights.close()
    await asyncio.gather(caller, return_exceptions=True)
    assert caller.cancelled()
    assert work.cancelled == 1


async def test_a_cancelled_caller_of_a_thread_goes_only_when_the_thread_has_ended() -> None:
    release, ended = threading.Event(), threading.Event()

    def block() -> None:
        release.wait(5)
        time.sleep(0.02)
        ended.set()

    caller = asyncio.create_task(uninterrupted(block))
    await asyncio.sleep(0.01)
    caller.cancel()
    await turn()
    assert not caller.done()
    release.set()
    await asyncio.gather(caller, return_exceptions=True)
    assert caller.cancelled()
    assert ended.is_set()


async def test_work_whose_result_is_kept_goes_on_without_callers() -> None:
    flights: SingleFlight[str, int] = SingleFlight(finish=True)
    work = Work()
    caller = asyncio.create_task(flights.do("a", work))
    await turn()
    caller.cancel()
    await turn()
    assert (work.cancelled, len(flights)) == (0, 1)
    work.go.set()
    await turn()
    assert len(flights) == 0
