"""What a pod's worker believes of its instances when it is told late, twice, or not at all."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from wasilet_node.pods.instances import Instances
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus

from tests.unit.node.pods.fakes import make_instance

pytestmark = pytest.mark.unit


@dataclasses.dataclass
class Told:
    news: int = 0
    ended: list[tuple[str, bool]] = dataclasses.field(default_factory=list)

    def about(self, *known: ContainerStatus) -> Instances:
        by_container: dict[str, list[ContainerStatus]] = {}
        for instance in known:
            by_container.setdefault(instance.container_name, []).append(instance)
        return Instances(by_container, changed=self._changed, ended=self._ended)

    def _changed(self) -> None:
        self.news += 1

    def _ended(self, instance: ContainerStatus, newest: bool) -> None:  # noqa: FBT001
        self.ended.append((instance.id, newest))


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_an_instance_never_goes_back_to_an_earlier_state() -> None:
    told = Told()
    instances = told.about()
    instances.observe(make_instance(state="exited", exit_code=3))
    news = told.news
    instances.observe(make_instance(state="running"))
    assert instances.latest()["c"].exit_code == 3
    assert told.news == news
    assert told.ended == [("c-0", True)]


async def test_the_newest_attempt_stands_first_whenever_it_was_heard_of() -> None:
    told = Told()
    instances = told.about()
    instances.observe(make_instance(attempt=1))
    instances.observe(make_instance(attempt=0, state="exited"))
    assert [instance.attempt for instance in instances.of("c")] == [1, 0]
    assert told.ended == [("c-0", False)]
    assert list(instances.running()) == ["c"]


async def test_what_a_list_lacks_has_ended_in_an_unknown_way() -> None:
    instances = Told().about(make_instance())
    instances.relisted({}, asked_at=now() + 1)
    lost = instances.latest()["c"]
    assert (lost.state, lost.exit_code, lost.reason) == (ContainerState.EXITED, 137, "ContainerStatusUnknown")
    assert instances.live() == {}


async def test_a_list_that_was_asked_for_before_the_start_says_nothing_of_it() -> None:
    instances = Told().about()
    asked_at = now()
    await asyncio.sleep(0.01)
    instances.started(make_instance())
    instances.relisted({}, asked_at=asked_at)
    assert list(instances.live()) == ["c"]


async def test_a_list_tells_what_events_did_not() -> None:
    told = Told()
    instances = told.about(make_instance())
    instances.relisted(
        {"c-0": make_instance(state="exited", exit_code=1), "d-0": make_instance("d")}, asked_at=now() + 1
    )
    assert instances.latest()["c"].exit_code == 1
    assert list(instances.live()) == ["d"]
    news = told.news
    instances.relisted({"c-0": make_instance(state="exited", exit_code=1), "d-0": make_instance("d")}, asked_at=now())
    assert told.news == news


async def test_a_stopped_instance_is_dead_even_if_nobody_can_say_how_it_ended() -> None:
    instances = Told().about(make_instance())
    instances.assume_dead(instances.latest()["c"])
    assert instances.live() == {}
    instances.observe(make_instance(state="exited", exit_code=0))
    assert instances.latest()["c"].exit_code == 0


async def test_the_newest_and_the_one_before_are_kept() -> None:
    instances = Told().about(
        make_instance(attempt=2), make_instance(attempt=1, state="exited"), make_instance(attempt=0, state="exited")
    )
    oldest = instances.outdated("c")
    assert oldest is not None
    assert oldest.attempt == 0
    # While its record was being removed, somebody told of it once more.
    instances.observe(dataclasses.replace(oldest, message="late"))
    instances.forget(oldest)
    assert instances.outdated("c") is None
    assert [instance.attempt for instance in instances] == [2, 1]
