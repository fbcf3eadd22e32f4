"""A container whose end restarts all of its pod's containers (``RestartAllContainers``)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from wasilet_common import pod_fields

from tests.unit.node.pods.fakes import Fakes, eventually, make_pod
from tests.unit.node.pods.rig import condition, container, phase, running

pytestmark = pytest.mark.unit

FILL = {"name": "fill", "image": "reg/fill:1"}
OTHER = {"name": "d", "image": "reg/hello:1"}


def rule(action: str, *codes: int, operator: str = "In") -> dict[str, Any]:
    return {"action": action, "exitCodes": {"operator": operator, "values": list(codes)}}


def watched(*rules: dict[str, Any], policy: str = "Never", name: str = "c") -> dict[str, Any]:
    return {
        "name": name,
        "image": "reg/hello:1",
        "restartPolicy": policy,
        "restartPolicyRules": list(rules or (rule(pod_fields.RESTART_ALL, 42),)),
    }


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


def started(fakes: Fakes, since: int = 0) -> list[str]:
    return [config.container_name for config in fakes.runtime.configs[since:]]


async def up(fakes: Fakes, pod: dict[str, Any]) -> None:
    """Let the init container ``fill`` succeed, then wait until the regular ones run."""
    fakes.kube.add(pod)
    await filled(fakes)


async def filled(fakes: Fakes) -> None:
    await eventually(lambda: "fill" in fakes.runtime.running())
    fakes.runtime.exit("fill", 0)
    names = sorted(each["name"] for each in fakes.kube.pod("a")["spec"]["containers"])
    await eventually(lambda: sorted(fakes.runtime.running()) == names)


def conditions_told(fakes: Fakes) -> list[str]:
    """What was told of AllContainersRestarting, in order and without repetitions."""
    told: list[str] = []
    for _path, patch in fakes.kube.patches:
        for each in patch.get("conditions", ()):
            if each["type"] == "AllContainersRestarting" and "status" in each and told[-1:] != [each["status"]]:
                told.append(each["status"])
    return told


@pytest.mark.parametrize("policy", ["Never", "OnFailure", "Always"])
async def test_all_containers_begin_again_with_the_first_init_container(fakes: Fakes, policy: str) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy=policy, containers=[watched(), OTHER], initContainers=[FILL]))
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["fill"])
        assert fakes.runtime.stopped == ["d"]
        await eventually(lambda: "running" in container(fakes, "fill")["state"])
        assert condition(fakes, "Initialized")["status"] == "True"
        await filled(fakes)
        names = ("fill", "c", "d")
        await eventually(lambda: [container(fakes, name)["restartCount"] for name in names] == [1, 1, 1])
        await eventually(lambda: phase(fakes) == "Running")
        assert container(fakes)["lastState"]["terminated"]["exitCode"] == 42
        assert container(fakes, "d")["lastState"]["terminated"]["exitCode"] == 137
        await eventually(lambda: condition(fakes, "AllContainersRestarting")["status"] == "False")
        assert conditions_told(fakes) == ["False", "True", "False"]
        assert condition(fakes, "Initialized")["status"] == "True"


async def test_a_container_that_has_done_its_work_begins_again_too(fakes: Fakes) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched(), OTHER], initContainers=[FILL]))
        fakes.runtime.exit("d", 0)
        await eventually(lambda: container(fakes, "d")["state"].get("terminated"))
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["fill"])
        await eventually(lambda: container(fakes, "d")["state"].get("waiting"))
        assert container(fakes, "d")["state"]["waiting"]["reason"] == "RestartingAllContainers"
        assert phase(fakes) != "Failed"
        await filled(fakes)


async def test_another_code_ends_the_pod_as_its_policy_says(fakes: Fakes) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched()], initContainers=[FILL]))
        fakes.runtime.exit("c", 1)
        await eventually(lambda: phase(fakes) == "Failed")
        assert started(fakes) == ["fill", "c"]
        told = condition(fakes, "AllContainersRestarting")
        assert (told["status"], told["reason"]) == ("False", "PodFailed")


async def test_the_first_rule_that_matches_counts(fakes: Fakes) -> None:
    rules = (rule("Restart", 42), rule(pod_fields.RESTART_ALL, 42, 43))
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched(*rules), OTHER], initContainers=[FILL]))
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["c"])
        assert fakes.runtime.stopped == []


async def test_an_init_container_may_restart_all(fakes: Fakes) -> None:
    second = watched(rule(pod_fields.RESTART_ALL, 0, 1, operator="NotIn"), name="check")
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", initContainers=[FILL, second]))
        await eventually(lambda: "fill" in fakes.runtime.running())
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: "check" in fakes.runtime.running())
        fakes.runtime.exit("check", 7)
        await eventually(lambda: started(fakes) == ["fill", "check", "fill"])
        await eventually(lambda: "fill" in fakes.runtime.running())
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: started(fakes) == ["fill", "check", "fill", "check"])
        await eventually(lambda: "check" in fakes.runtime.running())
        fakes.runtime.exit("check", 0)
        await eventually(lambda: phase(fakes) == "Running")


async def test_a_second_time_waits_as_after_a_crash(fakes: Fakes) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched(), OTHER], initContainers=[FILL]))
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["fill"])
        await filled(fakes)
        fakes.runtime.exit("c", 42)
        await eventually(lambda: (container(fakes)["state"].get("waiting") or {}).get("reason") == "CrashLoopBackOff")
        assert fakes.runtime.running() == ["d"], "the others run on meanwhile"


async def test_a_restart_of_the_agent_in_the_midst_goes_on_where_it_was(fakes: Fakes) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched(), OTHER], initContainers=[FILL]))
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["fill"])
        await eventually(lambda: "fill" in fakes.runtime.running())
    fakes.runtime.exit("fill", 0)
    async with running(fakes):
        await eventually(lambda: sorted(started(fakes, 4)) == ["c", "d"])
        await asyncio.sleep(0.1)
        assert sorted(started(fakes, 4)) == ["c", "d"]


async def test_an_end_that_the_agent_did_not_see_restarts_all(fakes: Fakes) -> None:
    async with running(fakes):
        await up(fakes, make_pod(restartPolicy="Never", containers=[watched(), OTHER], initContainers=[FILL]))
    fakes.runtime.exit("c", 42)
    async with running(fakes):
        await eventually(lambda: started(fakes, 3) == ["fill"])
        assert fakes.runtime.stopped == ["d"]


async def test_an_ephemeral_container_is_left_alone(fakes: Fakes) -> None:
    pod = make_pod(containers=[watched(policy="Always")], initContainers=[FILL])
    pod["spec"]["ephemeralContainers"] = [{"name": "debug", "image": "reg/hello:1"}]
    async with running(fakes):
        fakes.kube.add(pod)
        await eventually(lambda: sorted(fakes.runtime.running()) == ["debug", "fill"])
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: sorted(fakes.runtime.running()) == ["c", "debug"])
        fakes.runtime.exit("c", 42)
        await eventually(lambda: started(fakes, 3) == ["fill"])
        assert "debug" in fakes.runtime.running()
        fakes.runtime.exit("fill", 0)
        await eventually(lambda: sorted(fakes.runtime.running()) == ["c", "debug"])


async def test_a_pod_without_such_a_rule_has_no_such_condition(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[watched(rule("Restart", 42))]))
        await eventually(lambda: phase(fakes) == "Running")
        assert conditions_told(fakes) == []
