"""A pod whose sandbox is gone begins again; an agent's restart alone restarts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.pods.sandboxes import ANNOTATION_SANDBOX, CHANGED_MESSAGE, PodSandbox, begins_again
from wasilet_node.runtime.protocol import RuntimeUnavailableError

from tests.unit.node.pods.fakes import Fakes, eventually, make_instance, make_pod
from tests.unit.node.pods.rig import container, phase, running

pytestmark = pytest.mark.unit

REGULAR = {"name": "c", "image": "reg/hello:1"}
FILL = {"name": "fill", "image": "reg/fill:1"}
SIDECAR = {"name": "side", "image": "reg/side:1", "restartPolicy": "Always"}


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


def started(fakes: Fakes, since: int = 0) -> list[str]:
    return [config.container_name for config in fakes.runtime.configs[since:]]


def changes(fakes: Fakes) -> int:
    return sum(CHANGED_MESSAGE in str(said) for said in fakes.events.said)


async def up(fakes: Fakes, *, init: int) -> None:
    """Let ``init`` init containers succeed one after the other, then wait until the regular one runs."""
    for number in range(init):
        await eventually(lambda number=number: len(fakes.runtime.configs) > number)  # type: ignore[misc]
        name = fakes.runtime.configs[number].container_name
        await eventually(lambda name=name: name in fakes.runtime.running())  # type: ignore[misc]
        if name != "side":
            fakes.runtime.exit(name, 0)
    await eventually(lambda: phase(fakes) == "Running")


async def test_a_lost_sandbox_begins_with_the_first_init_container(fakes: Fakes) -> None:
    second = {"name": "then", "image": "reg/then:1"}
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=[FILL, second]))
        await up(fakes, init=2)
    fakes.runtime.lose()
    async with running(fakes):
        await eventually(lambda: started(fakes, 3) == ["fill"])
        assert container(fakes)["state"].get("running") is None
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: started(fakes, 3) == ["fill", "then"])
        fakes.runtime.exit("then", 0)
        await eventually(lambda: started(fakes, 3) == ["fill", "then", "c"])
        await eventually(lambda: phase(fakes) == "Running")
        names = ("fill", "then", "c")
        await eventually(lambda: [container(fakes, name)["restartCount"] for name in names] == [1, 1, 1])
        assert changes(fakes) == 1


async def test_a_restart_of_the_agent_alone_restarts_nothing(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=[SIDECAR, FILL]))
        await up(fakes, init=2)
    for _ in range(2):
        async with running(fakes):
            await asyncio.sleep(0.15)
    assert started(fakes) == ["side", "fill", "c"]
    assert changes(fakes) == 0


async def test_a_restart_of_the_agent_in_the_midst_of_beginning_again_goes_on_where_it_was(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=[FILL]))
        await up(fakes, init=1)
    fakes.runtime.lose()
    async with running(fakes):
        await eventually(lambda: started(fakes, 2) == ["fill"])
        await eventually(lambda: "fill" in fakes.runtime.running())
    fakes.runtime.exit("fill", 0)
    async with running(fakes):
        await eventually(lambda: started(fakes, 2) == ["fill", "c"])
    assert changes(fakes) == 1


async def test_a_supervisor_lost_under_a_living_agent_begins_the_pod_again(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod(initContainers=[FILL]))
        await up(fakes, init=1)
        fakes.runtime.lose()
        await manager._relist()
        await eventually(lambda: started(fakes, 2) == ["fill"])
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: started(fakes, 2) == ["fill", "c"])


async def test_what_was_started_between_the_loss_and_its_discovery_is_stopped(fakes: Fakes) -> None:
    """A second container was restarted by the next supervisor before anyone saw that the first one is gone."""
    other = {"name": "d", "image": "reg/hello:1"}
    async with running(fakes) as manager:
        fakes.kube.add(make_pod(containers=[REGULAR, other], initContainers=[FILL]))
        await up(fakes, init=1)
        await eventually(lambda: sorted(fakes.runtime.running()) == ["c", "d"])
        fakes.runtime.exit("d", 1)
        fakes.runtime.lose()
        await eventually(lambda: started(fakes, 3) == ["d"])
        await eventually(lambda: "d" in fakes.runtime.running())
        await manager._relist()
        await eventually(lambda: started(fakes, 3) == ["d", "fill"])
        assert fakes.runtime.stopped == ["d"]


async def test_sidecars_begin_in_their_order_with_their_startup_probes(fakes: Fakes) -> None:
    probed = {**SIDECAR, "startupProbe": {"exec": {"command": ["ready"]}, "periodSeconds": 1}}
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=[probed, FILL]))
        await up(fakes, init=2)
    fakes.runtime.lose()

    def no_answer(_argv: Any) -> Any:
        raise RuntimeUnavailableError("not yet")

    answer, fakes.runtime.exec_result = fakes.runtime.exec_result, no_answer
    async with running(fakes):
        await eventually(lambda: started(fakes, 3) == ["side"])
        await asyncio.sleep(0.1)
        assert started(fakes, 3) == ["side"], "its startup probe has not succeeded"
        fakes.runtime.exec_result = answer
        await eventually(lambda: started(fakes, 3) == ["side", "fill"], seconds=10)


async def test_under_never_a_lost_sandbox_is_the_end(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", initContainers=[FILL]))
        await up(fakes, init=1)
    fakes.runtime.lose()
    async with running(fakes):
        await eventually(lambda: phase(fakes) == "Failed")
        assert started(fakes) == ["fill", "c"]
        assert changes(fakes) == 0


async def test_the_status_alone_is_enough_to_begin_again(fakes: Fakes) -> None:
    """The data folder was emptied: of the containers only the API server knows."""
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=[FILL]))
        await up(fakes, init=1)
    fakes.runtime.known.clear()
    async with running(fakes):
        await eventually(lambda: started(fakes, 2) == ["fill"])
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: started(fakes, 2) == ["fill", "c"])


def in_sandbox(name: str, sandbox: str, **fields: Any) -> Any:
    return make_instance(name, annotations={ANNOTATION_SANDBOX: sandbox} if sandbox else {}, **fields)


def test_a_sandbox_is_that_of_the_newest_instance_and_lost_with_any_of_its_own() -> None:
    old = in_sandbox("c", "one", state="exited", inherited=True)
    new = in_sandbox("c", "two", attempt=1)
    sandbox = PodSandbox([old, new])
    assert (sandbox.label, sandbox.holds(old), sandbox.is_lost([old, new])) == ("two.0", False, False)
    lost = in_sandbox("i", "two", state="exited", inherited=True)
    assert sandbox.is_lost([old, new, lost])
    sandbox.replace()
    assert not sandbox.is_lost([old, new, lost])


def test_a_clock_that_was_set_back_does_not_bring_a_former_sandbox_back() -> None:
    old = in_sandbox("c", "one.2", state="exited", inherited=True, created_at_ns=2_000)
    first = in_sandbox("i", "two.0", state="exited", created_at_ns=1_500)
    second = in_sandbox("c", "two.1", attempt=1, created_at_ns=1_000)
    sandbox = PodSandbox([old, first, second])
    assert sandbox.label == "two.1"
    assert not sandbox.is_lost([old, first, second])


def test_instances_of_a_node_that_knew_no_sandboxes_have_one_all_the_same() -> None:
    known = make_instance()
    sandbox = PodSandbox([known])
    assert sandbox.holds(known)
    assert not sandbox.is_lost([known])
    assert PodSandbox([]).label != PodSandbox([]).label


@pytest.mark.parametrize(
    ("policy", "ended", "expected"),
    [
        ("Always", {"c": 0}, True),
        ("OnFailure", {"c": 0}, False),
        ("OnFailure", {"c": 1}, True),
        ("OnFailure", {"c": 0, "d": 137}, True),
        ("OnFailure", {"fill": 0}, True),
        ("OnFailure", {"c": 0, "fill": 0}, False),
        ("Never", {"fill": 0}, False),
        ("Never", {"c": 0}, False),
        ("Never", {}, True),
    ],
)
def test_which_pods_begin_again(policy: str, ended: Mapping[str, int], expected: bool) -> None:  # noqa: FBT001
    names = [name for name in ("c", "d") if name == "c" or name in ended]
    pod = make_pod(
        restartPolicy=policy, containers=[{**REGULAR, "name": name} for name in names], initContainers=[FILL]
    )
    latest = {name: make_instance(name, state="exited", exit_code=code, inherited=True) for name, code in ended.items()}
    assert begins_again(pod, latest) is expected
