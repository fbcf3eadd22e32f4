"""Slots that owners share in turn."""

from __future__ import annotations

import asyncio

import pytest
from wasilet_node.runtime.fair_slots import FairSlots

pytestmark = pytest.mark.unit


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_owners_take_turns_and_one_with_many_does_not_keep_out_another() -> None:
    slots = FairSlots(1)
    order: list[str] = []

    async def work(owner: str) -> None:
        async with slots.slot(owner):
            order.append(owner)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work("many")) for _ in range(5)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(work(owner)) for owner in ("few", "few", "one")]
    await asyncio.gather(*tasks)
    assert order[:1] == ["many"]
    assert order.index("one") <= 4
    assert order.index("few") <= 3
    assert sorted(order) == ["few"] * 2 + ["many"] * 5 + ["one"]


async def test_who_gives_up_waiting_costs_nobody_a_slot() -> None:
    slots = FairSlots(1)
    async with slots.slot("a"):
        waiting = [asyncio.create_task(slots._take(owner)) for owner in ("b", "b", "c")]
        await settled()
        waiting[0].cancel()
        await settled()
    await settled()
    assert [task.done() for task in waiting] == [True, True, False]
    waiting[2].cancel()
    await settled()
    slots._give_back()
    async with asyncio.timeout(1), slots.slot("d"):
        pass


async def test_one_cancelled_as_it_is_handed_a_slot_hands_it_on() -> None:
    slots = FairSlots(1)
    await slots._take("a")
    first, second = (asyncio.create_task(slots._take(owner)) for owner in ("b", "c"))
    await settled()
    slots._give_back()
    first.cancel()
    async with asyncio.timeout(1):
        await second
    assert first.cancelled() or first.done()
