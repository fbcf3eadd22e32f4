"""How pods end: deleted, evicted, past their deadline, and what is done before the kill."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from wasilet_common import pod_fields
from wasilet_common.cri_log import layout
from wasilet_node.kube.base import ForbiddenError, NotFoundError
from wasilet_node.pods.eviction import MINIMUM_INODES, Usage, verdict
from wasilet_node.pods.nodeinfo import Pressure
from wasilet_node.pods.worker import PodWorker
from wasilet_node.runtime.protocol import ContainerState, ExecResult

from tests.unit.node.pods.fakes import Fakes, eventually, make_pod
from tests.unit.node.pods.rig import condition, container, gone, phase, running

pytestmark = pytest.mark.unit


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


async def test_deletion_stops_then_reports_then_deletes(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        folder = layout.folder_of_pod(fakes.paths.logs, fakes.kube.pod("a"))
        assert folder.is_dir()
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))
        assert fakes.kube.deletes == [("/api/v1/namespaces/default/pods/a", 0, "uid-a")]
        final = fakes.kube.patches[-1][1]
        assert final["phase"] == "Failed"
        assert final["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137
        assert fakes.events.has("Killing: Stopping container c")
        await eventually(lambda: manager.pods() == [])
        assert not folder.exists()
        assert fakes.runtime.known == {}
        assert set(fakes.references.released) == {"uid-a"}
        assert fakes.volumes.torn_down == ["uid-a"]


async def test_a_pod_deleted_while_its_image_is_pulled_never_starts(fakes: Fakes) -> None:
    fakes.images.delay["reg/hello:1"] = 60
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.images.asked)
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))
        assert fakes.runtime.configs == []
        assert fakes.kube.patches[-1][1]["phase"] == "Failed"


async def test_a_pod_deleted_in_back_off_goes_promptly(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.exit(code=1)
        await eventually(lambda: container(fakes)["restartCount"] == 1)
        fakes.runtime.exit(code=1)
        await eventually(lambda: "waiting" in container(fakes)["state"])
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))


async def test_a_forced_deletion_stops_what_runs(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.ask_deletion("a", grace=0)
        await eventually(lambda: manager.pods() == [])
        assert fakes.runtime.known == {}
        assert fakes.kube.deletes == []


async def test_a_pod_that_is_gone_is_let_go_of_whatever_the_server_answers_about_it(fakes: Fakes) -> None:
    """As a node's rights are: its patch of a pod that is no more is a 404, its look at it is forbidden."""
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        answers = {"patch": NotFoundError(404, "NotFound", "gone"), "get": ForbiddenError(403, "Forbidden", "no")}
        fakes.kube.fail = lambda verb, _path: answers.get(verb)
        fakes.kube.ask_deletion("a")
        await eventually(lambda: fakes.volumes.torn_down == ["uid-a"])
        await asyncio.sleep(0.05)
        assert len(manager.pods()) == 1
        fakes.kube._drop("/api/v1/namespaces/default/pods/a")
        await eventually(lambda: manager.pods() == [])
        assert fakes.runtime.known == {}


async def test_a_pod_made_again_under_the_same_name_does_not_wait_for_the_old_one(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod(uid="one"))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.stop_delay = 0.3
        fakes.kube.ask_deletion("a", grace=0)
        fakes.kube.add(make_pod(uid="two"))
        await eventually(lambda: phase(fakes) == "Running", seconds=0.25)
        found = manager.pod("default", "a")
        assert found is not None
        assert pod_fields.uid(found) == "two"
        await eventually(lambda: len(manager.pods()) == 1)
        assert [i.pod_uid for i in fakes.runtime.known.values()] == ["two"]


async def test_a_finalizer_keeps_the_object_but_nothing_on_the_node(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        pod = make_pod()
        pod["metadata"]["finalizers"] = ["example.com/x"]
        fakes.kube.add(pod)
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.ask_deletion("a")
        await eventually(lambda: fakes.kube.deletes)
        await eventually(lambda: fakes.runtime.known == {})
        await asyncio.sleep(0.05)
        assert len(fakes.kube.deletes) == 1
        assert len(manager.pods()) == 1
        fakes.kube.change("a", lambda each: each["metadata"].pop("finalizers"))
        fakes.kube._drop("/api/v1/namespaces/default/pods/a")
        await eventually(lambda: manager.pods() == [])


async def test_500_pods_deleted_at_once_leave_nothing(fakes: Fakes) -> None:
    fakes.node = dataclasses.replace(fakes.node, allocatable={})
    async with running(fakes) as manager:
        for i in range(500):
            fakes.kube.add(make_pod(f"p{i}"))
        await eventually(lambda: len(fakes.runtime.running()) == 500, seconds=20)
        for i in range(500):
            fakes.kube.ask_deletion(f"p{i}")
        await eventually(lambda: manager.pods() == [], seconds=20)
        assert fakes.runtime.known == {}
        assert fakes.kube.objects == {}
        assert manager._tasks == {}
        assert len(asyncio.all_tasks()) < 12


async def test_a_deleted_pod_stops_its_sidecars_after_the_rest(fakes: Fakes) -> None:
    sidecars = [{"name": f"s{i}", "image": "x", "restartPolicy": "Always"} for i in (1, 2)]
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=sidecars))
        await eventually(lambda: len(fakes.runtime.running()) == 3)
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))
        assert fakes.runtime.stopped == ["c", "s2", "s1"]


async def test_sidecars_do_not_outlast_the_grace_that_a_hook_uses_up(fakes: Fakes) -> None:
    sidecars = [{"name": f"s{i}", "image": "x", "restartPolicy": "Always"} for i in (1, 2)]
    main = {"name": "c", "image": "x", "lifecycle": {"preStop": {"sleep": {"seconds": 25}}}}
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=sidecars, containers=[main]))
        await eventually(lambda: len(fakes.runtime.running()) == 3)
        fakes.kube.ask_deletion("a", grace=1)
        await asyncio.sleep(0.3)
        assert fakes.runtime.stopped == []
        await eventually(lambda: gone(fakes))
        assert sorted(fakes.runtime.stopped) == ["c", "s1", "s2"]


async def test_a_pod_past_its_deadline_is_stopped_and_failed(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(activeDeadlineSeconds=60))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.offset = 61
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "y"}))
        await eventually(lambda: phase(fakes) == "Failed")
        assert fakes.kube.pod("a")["status"]["reason"] == "DeadlineExceeded"
        assert fakes.runtime.running() == []


async def test_a_failed_probes_own_grace_limits_pre_stop(fakes: Fakes) -> None:
    probe = {"exec": {"command": ["check"]}, "failureThreshold": 1, "terminationGracePeriodSeconds": 1}
    hook = {"preStop": {"sleep": {"seconds": 25}}}
    fakes.runtime.exec_result = lambda _argv: ExecResult(exit_code=1, output=b"no")
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[{"name": "c", "image": "x", "livenessProbe": probe, "lifecycle": hook}]))
        await eventually(lambda: fakes.events.has("Killing"))
        await asyncio.sleep(0.1)
        assert fakes.runtime.running() == ["c"]
        await eventually(lambda: container(fakes).get("restartCount") == 1)


async def test_pre_stop_runs_before_the_kill_and_within_the_grace(fakes: Fakes) -> None:
    hook = {"preStop": {"exec": {"command": ["bye"]}}}
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[{"name": "c", "image": "x", "lifecycle": hook}]))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))
        assert [argv for _, argv in fakes.runtime.execs] == [("bye",)]


async def test_a_shorter_grace_cuts_a_running_pre_stop_hook(fakes: Fakes) -> None:
    hook = {"preStop": {"sleep": {"seconds": 25}}}
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[{"name": "c", "image": "x", "lifecycle": hook}]))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.ask_deletion("a")
        await eventually(lambda: fakes.events.has("Killing"))
        await asyncio.sleep(0.05)
        assert fakes.runtime.running() == ["c"]
        fakes.kube.ask_deletion("a", grace=0)
        await eventually(lambda: fakes.runtime.running() == [])


async def test_a_failed_post_start_hook_kills_the_container(fakes: Fakes) -> None:
    hook = {"postStart": {"exec": {"command": ["no"]}}}
    fakes.runtime.exec_result = lambda _argv: ExecResult(exit_code=1, output=b"")
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", containers=[{"name": "c", "image": "x", "lifecycle": hook}]))
        await eventually(lambda: phase(fakes) == "Failed")
        assert fakes.events.has("FailedPostStartHook: PostStartHook failed")
        assert container(fakes)["state"]["terminated"]["exitCode"] == 137


async def test_a_failed_post_start_hook_runs_pre_stop_before_the_kill(fakes: Fakes) -> None:
    hooks = {"postStart": {"exec": {"command": ["no"]}}, "preStop": {"exec": {"command": ["bye"]}}}
    fakes.runtime.exec_result = lambda argv: ExecResult(exit_code=int(list(argv) == ["no"]), output=b"")
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", containers=[{"name": "c", "image": "x", "lifecycle": hooks}]))
        await eventually(lambda: phase(fakes) == "Failed")
        assert [argv for _, argv in fakes.runtime.execs] == [("no",), ("bye",)]
        assert fakes.events.said[-2:] == ["FailedPostStartHook: PostStartHook failed", "Killing: FailedPostStartHook"]


async def test_an_evicted_pod_is_failed_with_its_reason(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        worker: PodWorker = manager._workers["uid-a"]
        pressure = Pressure(resource="memory", threshold_bytes=100 * 2**20, available_bytes=50 * 2**20)
        worker.end(verdict(Usage(pod=worker.pod, by_container={"c": 2**20}), pressure), grace_seconds=0)
        await eventually(lambda: phase(fakes) == "Failed")
        status = fakes.kube.pod("a")["status"]
        assert status["reason"] == "Evicted"
        assert status["message"] == (
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container c was using "
            "1Mi, request is 0, has larger consumption of memory. "
        )
        assert condition(fakes, "DisruptionTarget")["reason"] == "TerminationByKubelet"
        assert fakes.runtime.latest().state is ContainerState.EXITED


async def test_pressure_evicts_one_pod_that_would_help(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasilet_node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
    async with running(fakes):
        fakes.kube.add(make_pod("a"))
        fakes.kube.add(make_pod("b"))
        await eventually(lambda: len(fakes.runtime.running()) == 2)
        fakes.runtime.memory = {"a": 2**20, "b": 2**30}
        short = Pressure(resource="memory", threshold_bytes=100 * 2**20, available_bytes=2**20)
        fakes.node = dataclasses.replace(fakes.node, pressures=(short,))
        await eventually(lambda: phase(fakes, "b") == "Failed")
        fakes.node = dataclasses.replace(fakes.node, pressures=())
        assert phase(fakes, "a") == "Running"
        assert fakes.events.has("Evicted: The node was low on resource: memory.")


async def test_a_pod_that_took_the_inodes_is_evicted(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasilet_node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
    async with running(fakes):
        fakes.kube.add(make_pod("a"))
        fakes.kube.add(make_pod("b"))
        await eventually(lambda: len(fakes.runtime.running()) == 2)
        folder = fakes.paths.pods / "uid-b" / "volumes" / "v"
        folder.mkdir(parents=True)
        for number in range(MINIMUM_INODES):
            (folder / str(number)).touch()
        short = Pressure(resource="inodes", threshold_bytes=50_000, available_bytes=0)
        fakes.node = dataclasses.replace(fakes.node, pressures=(short,))
        await eventually(lambda: phase(fakes, "b") == "Failed")
        fakes.node = dataclasses.replace(fakes.node, pressures=())
        assert phase(fakes, "a") == "Running"
        assert fakes.events.has("Evicted: The node was low on resource: inodes.")


async def test_a_pod_deleted_while_it_starts_leaves_no_instance(fakes: Fakes) -> None:
    fakes.runtime.start_delay = 0.2
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.runtime.configs)
        fakes.kube.ask_deletion("a")
        await eventually(lambda: manager.pods() == [])
        assert fakes.runtime.stopped == ["c"]
        assert fakes.runtime.known == {}
