"""Resizing pods in place: what is accepted, made, put off or refused, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.pods.resize import summary
from wasilet_node.pods.resources import ANNOTATION_RESOURCES
from wasilet_node.runtime.protocol import ResizeError, Resources, RuntimeCapabilities

from tests.unit.node.pods.fakes import Fakes, Pod, eventually, make_instance, make_pod
from tests.unit.node.pods.rig import condition, container, running

pytestmark = pytest.mark.unit

ALL = RuntimeCapabilities(cpu_limits=True, memory_cgroup=True, wasmtime_version="1")
NONE = RuntimeCapabilities(cpu_limits=False, memory_cgroup=False, wasmtime_version="1")
BEFORE = {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m", "memory": "32Mi"}}


def resources(**changes: str) -> dict[str, dict[str, str]]:
    """``BEFORE`` with ``limits_cpu="1"`` and its like."""
    found = {field: dict(values) for field, values in BEFORE.items()}
    for name, value in changes.items():
        field, _, resource = name.partition("_")
        found[field][resource] = value
    return found


def pod_of(container: Pod | None = None, **spec: Any) -> Pod:
    return make_pod(
        containers=[{"name": "c", "image": "reg/hello:1", "resources": BEFORE, **(container or {})}], **spec
    )


def change(fakes: Fakes, wanted: Any, generation: int = 2) -> None:
    """What the subresource ``resize`` does."""

    def to(pod: Pod) -> None:
        pod["spec"]["containers"][0]["resources"] = wanted
        pod["metadata"]["generation"] = generation

    fakes.kube.change("a", to)


def conditions(fakes: Fakes) -> set[str]:
    return {c["type"] for c in fakes.kube.pod("a")["status"].get("conditions", []) if c["type"].startswith("PodResize")}


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    found = Fakes(data=tmp_path)
    found.runtime.capabilities = ALL
    return found


def held_to(memory_mi: int, cpu_limit: int, cpu_request: int) -> Resources:
    return Resources(
        memory_limit_bytes=memory_mi << 20, cpu_limit_millicores=cpu_limit, cpu_request_millicores=cpu_request
    )


MOVES = [
    (resources(limits_cpu="1"), held_to(64, 1000, 250)),
    (resources(requests_cpu="300m"), held_to(64, 500, 300)),
    (resources(limits_memory="96Mi"), held_to(96, 500, 250)),
    (resources(requests_memory="48Mi"), held_to(64, 500, 250)),
]


@pytest.mark.parametrize(("wanted", "held"), MOVES)
async def test_limits_move_without_a_restart(fakes: Fakes, wanted: Any, held: Resources) -> None:
    fakes.kube.add(pod_of())
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        first = container(fakes)["containerID"]
        change(fakes, wanted)
        await eventually(lambda: container(fakes)["resources"] == wanted)
        await eventually(lambda: not conditions(fakes))
        assert container(fakes)["containerID"] == first
        assert container(fakes)["allocatedResources"] == wanted["requests"]
        assert fakes.kube.pod("a")["status"]["observedGeneration"] == 2
    assert fakes.runtime.resized == [held]
    assert fakes.events.has('ResizeStarted: Pod resize started: {"containers":[{"name":"c","resources":{"limits":')
    assert fakes.events.has("ResizeCompleted: Pod resize completed: ")


async def test_a_value_that_is_written_otherwise_moves_nothing(fakes: Fakes) -> None:
    fakes.kube.add(pod_of())
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        wanted = resources(limits_cpu="0.5")
        change(fakes, wanted)
        await eventually(lambda: fakes.kube.pod("a")["status"].get("observedGeneration") == 2)
    assert fakes.runtime.resized == []
    assert not any("Resize" in line for line in fakes.events.said)


async def test_a_container_whose_policy_says_so_is_restarted_with_the_new_limits(fakes: Fakes) -> None:
    policy = [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]
    fakes.kube.add(pod_of({"resizePolicy": policy}))
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        change(fakes, resources(limits_memory="96Mi"))
        await eventually(lambda: container(fakes)["restartCount"] == 1 and not conditions(fakes))
        assert fakes.runtime.configs[-1].memory_limit_bytes == 96 << 20
        change(fakes, resources(limits_memory="96Mi", limits_cpu="1"), generation=3)
        await eventually(lambda: container(fakes)["resources"]["limits"]["cpu"] == "1")
        assert container(fakes)["restartCount"] == 1
    assert fakes.events.has("Killing: Container c resize requires restart")


INFEASIBLE = [
    (NONE, BEFORE, resources(limits_memory="96Mi"), "no control groups to move memory limits by"),
    (NONE, BEFORE, resources(limits_cpu="1"), "no control groups to move cpu limits by"),
    (ALL, {"requests": {"cpu": "1"}}, {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}}, "comes and goes only"),
]


@pytest.mark.parametrize(("capabilities", "before", "wanted", "why"), INFEASIBLE)
async def test_what_the_node_cannot_do_is_infeasible_and_taken_back_by_the_spec(
    fakes: Fakes, capabilities: RuntimeCapabilities, before: Any, wanted: Any, why: str
) -> None:
    fakes.runtime.capabilities = capabilities
    fakes.kube.add(pod_of({"resources": before}))
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        change(fakes, wanted)
        await eventually(lambda: "PodResizePending" in conditions(fakes))
        pending = condition(fakes, "PodResizePending")
        assert (pending["reason"], pending["observedGeneration"]) == ("Infeasible", 2)
        assert why in pending["message"]
        assert container(fakes)["resources"] == before
        change(fakes, before, generation=3)
        await eventually(lambda: not conditions(fakes))
    assert fakes.runtime.resized == []
    assert (
        len([line for line in fakes.events.said if line.startswith("ResizeInfeasible: Pod resize Infeasible: ")]) == 1
    )


async def test_what_does_not_fit_is_deferred_until_another_pod_goes(fakes: Fakes) -> None:
    fakes.kube.add(pod_of())
    other = make_pod("b", containers=[{"name": "c", "image": "x", "resources": {"requests": {"cpu": "1"}}}])
    fakes.kube.add(other)
    async with running(fakes) as manager:
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        await eventually(lambda: "running" in container(fakes, pod="b").get("state", {}))
        wanted = resources(requests_cpu="1500m", limits_cpu="2")
        change(fakes, wanted)
        await eventually(lambda: "PodResizePending" in conditions(fakes))
        pending = condition(fakes, "PodResizePending")
        assert pending["reason"] == "Deferred"
        assert pending["message"] == (
            "Node didn't have enough resource: cpu, requested: 1500, used: 1000, capacity: 2000"
        )
        assert container(fakes)["resources"] == BEFORE
        assert container(fakes)["allocatedResources"] == BEFORE["requests"]
        fakes.kube.ask_deletion("b", grace=0)
        await eventually(lambda: len(manager.pods()) == 1)
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"look": "again"}))
        await eventually(lambda: container(fakes)["resources"] == wanted)
        await eventually(lambda: not conditions(fakes))


async def test_a_refusal_of_the_runtime_is_an_error_of_the_resize(fakes: Fakes) -> None:
    fakes.runtime.resize_error = ResizeError("below current usage")
    fakes.kube.add(pod_of())
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        change(fakes, resources(limits_memory="33Mi"))
        await eventually(
            lambda: condition(fakes, "PodResizeInProgress").get("reason") == "Error" if conditions(fakes) else None
        )
        assert condition(fakes, "PodResizeInProgress")["message"] == "below current usage"
        assert container(fakes)["resources"] == BEFORE
        fakes.runtime.resize_error = None
        fakes.offset = 60.0
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"look": "again"}))
        await eventually(lambda: not conditions(fakes))
        assert container(fakes)["resources"]["limits"]["memory"] == "33Mi"
    assert fakes.events.has("ResizeError: Pod resize error: ")


async def test_the_pods_own_limit_moves_the_containers_that_have_none(fakes: Fakes) -> None:
    fakes.kube.add(make_pod(resources={"limits": {"cpu": "1", "memory": "64Mi"}}))
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))

        def to(pod: Pod) -> None:
            pod["spec"]["resources"] = {"limits": {"cpu": "1", "memory": "128Mi"}}
            pod["metadata"]["generation"] = 2

        fakes.kube.change("a", to)
        await eventually(lambda: fakes.runtime.resized)
        await eventually(lambda: not conditions(fakes))
        assert fakes.kube.pod("a")["status"]["resources"]["limits"]["memory"] == "128Mi"
    assert fakes.runtime.resized[0].memory_limit_bytes == 128 << 20


async def test_an_agent_that_starts_again_knows_what_instances_are_held_to(fakes: Fakes) -> None:
    fakes.kube.add(pod_of({"resources": resources(limits_cpu="1")}))
    held = {ANNOTATION_RESOURCES: json.dumps(BEFORE)}
    instance = make_instance(annotations=held)
    fakes.runtime.known[instance.id] = instance
    async with running(fakes):
        await eventually(lambda: fakes.runtime.resized)
        await eventually(lambda: container(fakes)["resources"] == resources(limits_cpu="1"))
    assert fakes.runtime.configs == []


def test_the_events_say_what_kubelets_do() -> None:
    pod = make_pod(
        containers=[{"name": "c1", "image": "x", "resources": {"requests": {"memory": "100", "cpu": "200m"}}}],
        initContainers=[{"name": "c0", "image": "x", "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}}}],
    )
    assert summary(pod, "why") == (
        '{"initContainers":[{"name":"c0","resources":{"limits":{"cpu":"2"},"requests":{"cpu":"1"}}}],'
        '"containers":[{"name":"c1","resources":{"requests":{"cpu":"200m","memory":"100"}}}],"generation":1,"error":"why"}'
    )
