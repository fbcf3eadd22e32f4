"""What pods are after the agent, the supervisor, the API server or a record has been away."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest
from wasilet_common.cri_log import layout
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.runtime.protocol import ContainerState
from wasilet_node.volumes.base import VolumeRefusedError

from tests.unit.node.pods.fakes import Fakes, eventually, make_instance, make_pod
from tests.unit.node.pods.rig import container, phase, running

pytestmark = pytest.mark.unit


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


async def test_an_id_that_only_the_status_knows_is_not_removed(fakes: Fakes) -> None:
    pod = make_pod(restartPolicy="Never")
    running_state = {"running": {"startedAt": "2025-01-01T00:00:00Z"}}
    foreign = {"name": "c", "containerID": "wasmtime://another-pods", "restartCount": 7, "state": running_state}
    pod["status"] = {"phase": "Running", "containerStatuses": [foreign]}
    async with running(fakes) as manager:
        fakes.kube.add(pod)
        await eventually(lambda: phase(fakes) == "Failed")
        fakes.kube.ask_deletion("a")
        await eventually(lambda: not manager.pods())
    assert "another-pods" not in fakes.runtime.removed


async def test_a_restarted_agent_takes_over_what_runs(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
    patches = len(fakes.kube.patches)
    async with running(fakes) as manager:
        await eventually(lambda: len(manager.pods()) == 1)
        await asyncio.sleep(0.15)
        assert len(fakes.runtime.configs) == 1
        assert len(fakes.kube.patches) == patches, "nothing has changed, so nothing is sent"
        fakes.runtime.exit(code=1)
        await eventually(lambda: container(fakes)["restartCount"] == 1)


async def test_what_ended_while_the_agent_was_away_does_not_run_again(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running")
    fakes.runtime.exit(code=0)
    async with running(fakes):
        await eventually(lambda: phase(fakes) == "Succeeded")
        assert len(fakes.runtime.configs) == 1


async def test_a_container_whose_record_is_lost_ended_unknown(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running")
    fakes.runtime.known.clear()
    async with running(fakes):
        await eventually(lambda: phase(fakes) == "Failed")
        ended = container(fakes)["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (137, "ContainerStatusUnknown")
        assert len(fakes.runtime.configs) == 1


async def test_orphans_are_removed_once_the_list_is_known(fakes: Fakes) -> None:
    stranger = make_instance(id="x", pod_uid="uid-gone")
    fakes.runtime.known["x"] = stranger
    fakes.volumes.on_disk = ["uid-gone", "uid-a"]
    folder = layout.pods_root(fakes.paths.logs) / "default_b_uid-gone"
    (folder / "c").mkdir(parents=True)
    fakes.kube.add(make_pod())
    async with running(fakes):
        await eventually(lambda: "x" in fakes.runtime.removed)
        await eventually(lambda: not folder.exists())
        assert fakes.volumes.torn_down == ["uid-gone"]
        await eventually(lambda: phase(fakes) == "Running")


async def test_an_absent_api_server_delays_the_status_only(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.fail = lambda verb, _path: ApiUnavailableError("gone") if verb == "patch" else None
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.runtime.running() == ["c"])
        assert phase(fakes) == "Pending"
        fakes.kube.fail = lambda _verb, _path: None
        await eventually(lambda: phase(fakes) == "Running")


async def test_a_start_time_stays_when_another_supervisor_takes_over(fakes: Fakes) -> None:
    """It knows only when the container was created."""
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: container(fakes).get("state", {}).get("running"))
        started = container(fakes).get("state", {})["running"]["startedAt"]
        instance = fakes.runtime.latest()
        created = instance.started_at_ns - 5 * 10**9
        fakes.runtime._change(
            dataclasses.replace(
                instance,
                state=ContainerState.EXITED,
                exit_code=137,
                reason="ContainerStatusUnknown",
                created_at_ns=created,
                started_at_ns=created,
                finished_at_ns=time.time_ns(),
            )
        )
        await eventually(lambda: container(fakes).get("state", {}).get("terminated"))
        assert container(fakes).get("state", {})["terminated"]["startedAt"] == started


@pytest.mark.parametrize("lost", [1, 6])
async def test_a_start_whose_answer_is_lost_does_not_run_twice(fakes: Fakes, lost: int) -> None:
    fakes.runtime.lost_answers = lost
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running", seconds=10)
        assert len(fakes.runtime.configs) == 1
        assert container(fakes)["restartCount"] == 0


async def test_a_held_pod_stays_held_after_a_restart_of_the_agent(fakes: Fakes) -> None:
    fakes.volumes.refuse = VolumeRefusedError("volume v: nfs is not supported")
    pod = make_pod()
    pod["metadata"]["ownerReferences"] = [{"kind": "ReplicaSet", "controller": True}]
    async with running(fakes):
        fakes.kube.add(pod)
        await eventually(lambda: "state" in container(fakes))
    events = len(fakes.events.said)
    async with running(fakes):
        await asyncio.sleep(0.15)
        assert phase(fakes) == "Pending"
        assert fakes.images.asked == []
        assert len(fakes.events.said) == events


async def test_an_agent_that_ends_while_a_container_starts_lets_it_run(fakes: Fakes) -> None:
    fakes.runtime.start_delay = 0.1
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: fakes.runtime.configs)
    assert fakes.runtime.running() == ["c"]
    async with running(fakes):
        await eventually(lambda: phase(fakes) == "Running")
        assert len(fakes.runtime.configs) == 1
