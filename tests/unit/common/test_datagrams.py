"""Flows of datagrams between sockets of loopback: a client, a place that is asked, and a third that meddles."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from wasilet_common.datagrams import Flow, Flows, Limits

pytestmark = pytest.mark.unit


@dataclass
class Rig:
    """Sockets that go with the test."""

    stack: ExitStack
    answers: list[bytes] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def bound(self) -> socket.socket:
        made = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made.bind(("127.0.0.1", 0))
        made.setblocking(False)  # noqa: FBT003
        return made

    def flow(
        self,
        place: tuple[str, int],
        *,
        client: str = "10.0.0.1",
        idle_seconds: float = 60.0,
        near: socket.socket | None = None,
    ) -> Flow:
        far = self.bound()
        far.connect(place)
        return Flow(
            client=client,
            far=far,
            near=near,
            answer=self.answers.append if near is None else near.send,
            idle_seconds=idle_seconds,
            refused=lambda: self.refusals.append("refused"),
        )


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - sockets have no event that a test could wait for
            await asyncio.sleep(0.005)


async def test_datagrams_go_both_ways_and_only_the_asked_place_answers(rig: Rig) -> None:
    flows, place, third = Flows(), rig.bound(), rig.bound()
    flow = rig.flow(place.getsockname())
    assert not flows.send("k", b"early")
    flows.add("k", flow)
    assert flows.send("k", b"question")
    data, asker = await asyncio.get_running_loop().sock_recvfrom(place, 100)
    assert data == b"question"
    third.sendto(b"spoofed", asker)
    place.sendto(b"answer", asker)
    await until(lambda: rig.answers)
    assert rig.answers == [b"answer"]
    flows.close()
    assert flow.far.fileno() == -1


async def test_what_comes_by_a_flows_own_socket_is_passed_on(rig: Rig) -> None:
    flows, place, client, near = Flows(), rig.bound(), rig.bound(), rig.bound()
    near.connect(client.getsockname())
    flows.add("k", rig.flow(place.getsockname(), near=near))
    client.sendto(b"more", near.getsockname())
    data, asker = await asyncio.get_running_loop().sock_recvfrom(place, 100)
    place.sendto(data.upper(), asker)
    assert await asyncio.get_running_loop().sock_recv(client, 100) == b"MORE"
    # A client that listens no longer ends the flow.
    client.close()
    place.sendto(b"late", asker)
    place.sendto(b"later", asker)
    await until(lambda: not len(flows))
    assert near.fileno() == -1


async def test_a_place_where_no_one_listens_is_reported_and_ends_the_flow(rig: Rig) -> None:
    flows, place = Flows(), rig.bound()
    address = place.getsockname()
    place.close()
    flows.add("k", rig.flow(address))
    flows.send("k", b"question")
    await until(lambda: not len(flows))
    assert rig.refusals == ["refused"]


async def test_a_silent_flow_ends_and_one_that_is_used_does_not(rig: Rig) -> None:
    flows, place = Flows(), rig.bound()
    flows.add("silent", rig.flow(place.getsockname(), idle_seconds=0.2))
    flows.add("used", rig.flow(place.getsockname(), idle_seconds=60.0))
    await until(lambda: not flows.send("silent", b"") if len(flows) == 1 else False)
    assert flows.send("used", b"x")
    flows.close()


async def test_use_puts_the_end_off(rig: Rig) -> None:
    flows, place = Flows(), rig.bound()
    flows.add("k", rig.flow(place.getsockname(), idle_seconds=0.05))
    first = flows._timers["k"]
    flows._used_at["10.0.0.1"]["k"] += 3600.0
    await until(lambda: flows._timers["k"] is not first)
    assert flows.send("k", b"still there")
    flows.close()


async def test_answers_alone_do_not_keep_a_flow_for_a_client_that_is_gone(rig: Rig) -> None:
    flows, place = Flows(Limits(unasked_seconds=0.1)), rig.bound()
    flow = rig.flow(place.getsockname(), idle_seconds=0.05)
    flows.add("k", flow)
    flows._used_at["10.0.0.1"]["k"] += 3600.0
    await until(lambda: not len(flows))


async def test_flows_that_are_in_use_are_limited_per_client_and_in_all(rig: Rig) -> None:
    flows, place = Flows(Limits(flows=3, per_client=2, in_use_seconds=3600.0)), rig.bound()
    for key in range(2):
        assert flows.make_room("10.0.0.1")
        flows.add(key, rig.flow(place.getsockname()))
    assert not flows.make_room("10.0.0.1")
    assert flows.make_room("10.0.0.2")
    flows.add(2, rig.flow(place.getsockname(), client="10.0.0.2"))
    assert not flows.make_room("10.0.0.2")
    assert len(flows) == 3
    flows.close()
    assert flows.make_room("10.0.0.1")


async def test_a_clients_longest_unused_flow_makes_room_for_its_next(rig: Rig) -> None:
    flows, place = Flows(Limits(per_client=2, in_use_seconds=0.0)), rig.bound()
    for key in ("first", "second"):
        flows.add(key, rig.flow(place.getsockname()))
    flows.send("first", b"used again")
    assert flows.make_room("10.0.0.1")
    assert not flows.send("second", b"x")
    assert flows.send("first", b"x")
    flows.close()


async def test_when_all_places_are_taken_who_has_most_gives_one_to_who_has_fewer(rig: Rig) -> None:
    flows, place = Flows(Limits(flows=3, per_client=3, in_use_seconds=3600.0)), rig.bound()
    for key in range(3):
        flows.add(key, rig.flow(place.getsockname()))
    assert flows.make_room("10.0.0.2")
    flows.add("other", rig.flow(place.getsockname(), client="10.0.0.2"))
    assert not flows.send(0, b"x")
    assert not flows.make_room("10.0.0.2"), "it would have as many then as who has most now"
    assert len(flows) == 3
    flows.close()
