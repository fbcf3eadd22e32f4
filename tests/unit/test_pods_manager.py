"""The pod manager and its workers, from the watch to the last DELETE, against stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node.images.model import ImageError
from node.kube.base import ApiUnavailableError, ForbiddenError, NotFoundError
from node.pods import logtail, spec
from node.pods.eviction import Usage, verdict
from node.pods.manager import PodManager
from node.pods.nodeinfo import Pressure
from node.pods.worker import PodWorker
from node.runtime.protocol import ContainerState, ExecResult, RuntimeCapabilities
from node.settings import NodeSettings
from node.volumes.base import ContainerConfigError, VolumeError, VolumeRefusedError
from tests.unit.pods_fakes import Fakes, eventually, make_instance, make_pod

pytestmark = pytest.mark.unit


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


@contextlib.asynccontextmanager
async def running(fakes: Fakes) -> AsyncIterator[PodManager]:
    services = fakes.collaborators()
    manager = PodManager(
        kube=services.kube,
        runtime=services.runtime,
        images=services.images,
        volumes=services.volumes,
        events=services.events,
        settings=NodeSettings(node_name="n", paths=services.paths),
        environment=services.environments,
        references=services.references,
        parse_credentials=services.parse_credentials,
        node=services.node,
        timing=fakes.timing,
    )
    manager._services = services
    task = asyncio.create_task(manager.run())
    try:
        await eventually(manager.synced.is_set)
        yield manager
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def phase(fakes: Fakes, name: str = "a") -> str:
    return str(fakes.kube.pod(name)["status"]["phase"])


def container(fakes: Fakes, name: str = "c", pod: str = "a") -> dict[str, Any]:
    status = fakes.kube.pod(pod)["status"]
    listed = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return next((each for each in listed if each["name"] == name), {})


def condition(fakes: Fakes, type_: str) -> dict[str, Any]:
    return next(c for c in fakes.kube.pod("a")["status"]["conditions"] if c["type"] == type_)


def gone(fakes: Fakes, name: str = "a") -> bool:
    return f"/api/v1/namespaces/default/pods/{name}" not in fakes.kube.objects


async def test_a_pod_runs_and_is_ready(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        status = fakes.kube.pod("a")["status"]
        assert status["podIP"] == status["hostIP"] == "192.0.2.1"
        assert status["observedGeneration"] == 1
        only = container(fakes)
        assert only["ready"] is only["started"] is True
        assert only["containerID"].startswith("wasmtime://")
        assert only["imageID"] == "reg/hello:1@sha256:1"
        assert condition(fakes, "Ready")["status"] == "True"
        assert manager.pod("default", "a") is not None
        assert fakes.events.said == ["Created: Created container: c", "Started: Started container c"]
        assert fakes.events.paths == ["spec.containers{c}"] * 2


async def test_a_pod_that_starts_at_once_takes_one_patch(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        await asyncio.sleep(0.15)
        assert len(fakes.kube.patches) == 1


async def test_a_slow_image_shows_as_container_creating(fakes: Fakes) -> None:
    fakes.images.delay["reg/hello:1"] = 0.4
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: container(fakes).get("state") == {"waiting": {"reason": "ContainerCreating"}})
        assert condition(fakes, "PodReadyToStartContainers")["status"] == "True"
        await eventually(lambda: phase(fakes) == "Running")


async def test_a_job_pod_succeeds_and_frees_its_volumes(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.exit(code=0)
        await eventually(lambda: phase(fakes) == "Succeeded")
        ended = container(fakes)["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
        assert condition(fakes, "Ready")["reason"] == "PodCompleted"
        await eventually(lambda: fakes.volumes.torn_down == ["uid-a"])
        await asyncio.sleep(0.05)
        assert len(fakes.runtime.configs) == 1


async def test_a_failed_container_is_restarted_at_once_and_then_backs_off(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.exit(code=3)
        await eventually(lambda: container(fakes)["restartCount"] == 1)
        await eventually(lambda: "running" in container(fakes)["state"])
        assert container(fakes)["lastState"]["terminated"]["exitCode"] == 3
        fakes.runtime.exit(code=4)
        await eventually(lambda: "waiting" in container(fakes)["state"])
        assert container(fakes)["state"]["waiting"] == {
            "reason": "CrashLoopBackOff",
            "message": "back-off 10s restarting failed container=c pod=a_default(uid-a)",
        }
        assert container(fakes)["lastState"]["terminated"]["exitCode"] == 4
        assert phase(fakes) == "Running"
        assert fakes.events.has("BackOff: Back-off restarting failed container c in pod a_default(uid-a)")
        fakes.offset = 11.0
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "y"}))
        await eventually(lambda: container(fakes)["restartCount"] == 2)
        await eventually(lambda: "running" in container(fakes)["state"])
        assert len(fakes.runtime.removed) == 1, "only the newest two instances are kept"


async def test_deletion_stops_then_reports_then_deletes(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        folder = logtail.pod_folder(fakes.paths, fakes.kube.pod("a"))
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


async def test_a_pod_made_anew_under_the_same_name_does_not_wait_for_the_old_one(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        fakes.kube.add(make_pod(uid="one"))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.stop_delay = 0.3
        fakes.kube.ask_deletion("a", grace=0)
        fakes.kube.add(make_pod(uid="two"))
        await eventually(lambda: phase(fakes) == "Running", seconds=0.25)
        found = manager.pod("default", "a")
        assert found is not None
        assert spec.uid(found) == "two"
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


async def test_init_containers_run_in_order_before_the_others(fakes: Fakes) -> None:
    init = [{"name": "i1", "image": "x"}, {"name": "i2", "image": "x"}]
    async with running(fakes):
        fakes.kube.add(make_pod(initContainers=init))
        await eventually(lambda: fakes.runtime.running() == ["i1"])
        await eventually(lambda: "running" in container(fakes, "i1").get("state", {}))
        assert container(fakes)["state"] == {"waiting": {"reason": "PodInitializing"}}
        assert condition(fakes, "Initialized")["message"] == "containers with incomplete status: [i1 i2]"
        fakes.runtime.exit("i1")
        await eventually(lambda: fakes.runtime.running() == ["i2"])
        fakes.runtime.exit("i2")
        await eventually(lambda: fakes.runtime.running() == ["c"])
        await eventually(lambda: phase(fakes) == "Running")
        assert condition(fakes, "Initialized")["status"] == "True"


async def test_a_failed_init_container_fails_a_pod_that_never_restarts(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", initContainers=[{"name": "i", "image": "x"}]))
        await eventually(lambda: fakes.runtime.running() == ["i"])
        fakes.runtime.exit("i", 2)
        await eventually(lambda: phase(fakes) == "Failed")
        assert container(fakes)["state"] == {"waiting": {"reason": "PodInitializing"}}


async def test_sidecars_start_first_and_end_last_in_reverse(fakes: Fakes) -> None:
    sidecars = [{"name": f"s{i}", "image": "x", "restartPolicy": "Always"} for i in (1, 2)]
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never", initContainers=sidecars))
        await eventually(lambda: len(fakes.runtime.running()) == 3)
        assert [config.container_name for config in fakes.runtime.configs] == ["s1", "s2", "c"]
        fakes.runtime.exit("c")
        await eventually(lambda: phase(fakes) == "Succeeded")
        assert fakes.runtime.stopped == ["s2", "s1"]


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


async def test_an_image_that_cannot_be_had_is_tried_again(fakes: Fakes) -> None:
    fakes.images.errors["reg/hello:1"] = ImageError("ErrImagePull", "wrong architecture: linux/amd64")
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: "state" in container(fakes))
        assert container(fakes)["state"]["waiting"] == {
            "reason": "ErrImagePull",
            "message": "wrong architecture: linux/amd64",
        }
        assert phase(fakes) == "Pending"
        fakes.images.errors.clear()
        await eventually(lambda: phase(fakes) == "Running")


async def test_another_image_is_tried_at_once(fakes: Fakes) -> None:
    fakes.timing = dataclasses.replace(fakes.timing, image_retry=3600)
    fakes.images.errors["reg/hello:1"] = ImageError("ErrImagePull", "no such image")
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: "waiting" in container(fakes).get("state", {}))
        fakes.kube.change("a", lambda pod: pod["spec"]["containers"][0].update(image="reg/hello:2"))
        await eventually(lambda: phase(fakes) == "Running")
        assert [reference for reference, _ in fakes.images.asked] == ["reg/hello:1", "reg/hello:2"]


async def test_a_missing_reference_waits_and_is_tried_again(fakes: Fakes) -> None:
    fakes.environments.error = ContainerConfigError('configmap "x" not found')
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: "state" in container(fakes))
        assert container(fakes)["state"]["waiting"]["reason"] == "CreateContainerConfigError"
        assert fakes.events.has('Failed: Error: configmap "x" not found')
        fakes.environments.error = None
        await eventually(lambda: phase(fakes) == "Running")


async def test_a_bad_annotation_fails_the_container_with_the_parsers_message(fakes: Fakes) -> None:
    pod = make_pod()
    pod["metadata"]["annotations"] = {"alpha.wasi.krustlet.dev/allowed-domains": "[oops"}
    async with running(fakes):
        fakes.kube.add(pod)
        await eventually(lambda: "state" in container(fakes))
        waiting = container(fakes)["state"]["waiting"]
        assert waiting["reason"] == "CreateContainerConfigError"
        assert "allowed-domains is not a JSON array" in waiting["message"]


async def test_a_volume_that_cannot_be_set_up_is_an_event_and_tried_again(fakes: Fakes) -> None:
    fakes.volumes.setup_error = VolumeError('MountVolume.SetUp failed for volume "v" : no such thing')
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.events.has('FailedMount: MountVolume.SetUp failed for volume "v"'))
        fakes.volumes.setup_error = None
        await eventually(lambda: phase(fakes) == "Running")


async def test_a_full_name_that_no_kernel_takes_keeps_the_pod_pending(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(hostname="h" * 60, subdomain="t", setHostnameAsFQDN=True))
        await eventually(
            lambda: fakes.events.has(
                f"FailedCreatePodSandBox: Failed to create pod sandbox: failed to construct FQDN from pod hostname and "
                f"cluster domain, FQDN {'h' * 60}.t.default.svc.cluster.local is too long (64 characters is the max, "
                "88 characters requested)"
            )
        )
        await eventually(lambda: fakes.kube.pod("a")["status"].get("conditions"))
        assert condition(fakes, "PodReadyToStartContainers")["status"] == "False"
        assert phase(fakes) == "Pending"
        assert fakes.runtime.configs == []


async def test_a_volume_of_an_unsupported_kind_fails_a_bare_pod(fakes: Fakes) -> None:
    fakes.volumes.refuse = VolumeRefusedError("volume v: nfs is not supported")
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Failed")
        status = fakes.kube.pod("a")["status"]
        assert status["message"] == "Pod was rejected: volume v: nfs is not supported"
        assert "containerStatuses" not in status
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))


async def test_a_volume_of_an_unsupported_kind_holds_a_controllers_pod(fakes: Fakes) -> None:
    fakes.volumes.refuse = VolumeRefusedError("volume v: nfs is not supported")
    pod = make_pod()
    pod["metadata"]["ownerReferences"] = [{"kind": "DaemonSet", "controller": True}]
    async with running(fakes):
        fakes.kube.add(pod)
        await eventually(lambda: "state" in container(fakes))
        assert phase(fakes) == "Pending"
        assert container(fakes)["state"]["waiting"]["message"] == "volume v: nfs is not supported"
        patches, events = len(fakes.kube.patches), len(fakes.events.said)
        await asyncio.sleep(0.1)
        assert (len(fakes.kube.patches), len(fakes.events.said)) == (patches, events)
        assert fakes.images.asked == []
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))


async def test_over_capacity_is_refused_in_kubelets_words(fakes: Fakes) -> None:
    heavy = {"name": "c", "image": "x", "resources": {"requests": {"cpu": "1500m"}}}
    async with running(fakes):
        fakes.kube.add(make_pod("b", containers=[heavy]))
        await eventually(lambda: phase(fakes, "b") == "Running")
        fakes.kube.add(make_pod(containers=[heavy]))
        await eventually(lambda: phase(fakes) == "Failed")
        status = fakes.kube.pod("a")["status"]
        assert status["reason"] == "OutOfcpu"
        assert status["message"] == (
            "Pod was rejected: Node didn't have enough resource: cpu, requested: 1500, used: 1500, capacity: 2000"
        )


async def test_a_pod_past_its_deadline_is_stopped_and_failed(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(activeDeadlineSeconds=60))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.offset = 61
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "y"}))
        await eventually(lambda: phase(fakes) == "Failed")
        assert fakes.kube.pod("a")["status"]["reason"] == "DeadlineExceeded"
        assert fakes.runtime.running() == []


async def test_an_image_change_restarts_the_container(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running")

        def change(pod: dict[str, Any]) -> None:
            pod["spec"]["containers"][0]["image"] = "reg/hello:2"
            pod["metadata"]["generation"] = 2

        fakes.kube.change("a", change)
        await eventually(lambda: container(fakes)["image"] == "reg/hello:2")
        assert fakes.events.has("Killing: Container c definition changed, will be restarted")
        assert container(fakes)["restartCount"] == 1
        await eventually(lambda: condition(fakes, "Ready").get("observedGeneration") == 2)
        assert phase(fakes) == "Running"


async def test_a_liveness_failure_restarts_the_container(fakes: Fakes) -> None:
    probe = {"exec": {"command": ["check"]}, "periodSeconds": 1, "failureThreshold": 1}
    fakes.runtime.exec_result = lambda _argv: ExecResult(exit_code=1, output=b"no")
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[{"name": "c", "image": "x", "livenessProbe": probe}]))
        await eventually(lambda: container(fakes).get("restartCount") == 1)
        assert fakes.events.has("Unhealthy: Liveness probe failed: no")
        assert fakes.events.has("Killing: Container c failed liveness probe, will be restarted")


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


async def test_readiness_follows_its_probe(fakes: Fakes) -> None:
    probe = {"exec": {"command": ["check"]}, "periodSeconds": 1, "failureThreshold": 1}
    answers = [1, 0]
    fakes.runtime.exec_result = lambda _argv: ExecResult(exit_code=answers.pop(0) if answers else 0, output=b"")
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[{"name": "c", "image": "x", "readinessProbe": probe}]))
        await eventually(lambda: phase(fakes) == "Running")
        assert condition(fakes, "Ready")["message"] == "containers with unready status: [c]"
        await eventually(lambda: condition(fakes, "Ready")["status"] == "True")


async def test_a_readiness_gate_is_waited_for_and_never_written(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(readinessGates=[{"conditionType": "example.com/up"}]))
        await eventually(lambda: phase(fakes) == "Running")
        assert condition(fakes, "Ready")["reason"] == "ReadinessGatesNotReady"
        mark = len(fakes.kube.patches)
        fakes.kube.change(
            "a", lambda pod: pod["status"]["conditions"].append({"type": "example.com/up", "status": "True"})
        )
        await eventually(lambda: condition(fakes, "Ready")["status"] == "True")
        changed = [c["type"] for _, patch in fakes.kube.patches[mark:] for c in patch.get("conditions", [])]
        assert changed == ["Ready"]


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


async def test_the_termination_message_joins_the_traps(fakes: Fakes) -> None:
    fakes.volumes.message = "I am done"
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.exit(code=134, message="wasm trap: unreachable")
        await eventually(lambda: phase(fakes) == "Failed")
        assert container(fakes)["state"]["terminated"]["message"] == "wasm trap: unreachable: I am done"


async def test_pods_without_an_identity_are_left_alone(fakes: Fakes) -> None:
    async with running(fakes) as manager:
        for metadata in ({}, {"name": "a"}, {"uid": "u"}, {"name": 1, "uid": "u"}):
            fakes.kube._tell("ADDED", {"kind": "Pod", "metadata": metadata})
            fakes.kube._tell("DELETED", {"kind": "Pod", "metadata": metadata})
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        assert len(manager.pods()) == 1


async def test_an_update_that_cannot_be_read_leaves_the_watch_alive(fakes: Fakes) -> None:
    def spoil(pod: dict[str, Any]) -> None:
        pod["metadata"]["generation"] = 2
        pod["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "much"}}

    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.change("a", spoil)
        fakes.kube.add(make_pod("other"))
        await eventually(lambda: phase(fakes, "other") == "Running")


async def test_a_termination_message_that_hangs_holds_up_its_own_pod_alone(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def message(*_: object, **__: object) -> str:
        answer.wait(10)
        return "at last"

    monkeypatch.setattr(fakes.volumes, "termination_message", message)
    try:
        async with running(fakes):
            fakes.kube.add(make_pod(restartPolicy="Never"))
            await eventually(lambda: phase(fakes) == "Running")
            fakes.runtime.exit(code=1)
            await asyncio.sleep(0.05)
            assert phase(fakes) == "Running"
            assert fakes.volumes.torn_down == [], "the message would go with the volumes"
            fakes.kube.add(make_pod("other"))
            await eventually(lambda: phase(fakes, "other") == "Running")
            answer.set()
            await eventually(lambda: phase(fakes) == "Failed")
            assert container(fakes)["state"]["terminated"]["message"] == "at last"
    finally:
        answer.set()


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
    folder = logtail.pods_root(fakes.paths) / "default_b_uid-gone"
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


async def test_a_start_error_waits_with_its_message(fakes: Fakes) -> None:
    fakes.runtime.start_error["c"] = "no export named _start"
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: "state" in container(fakes))
        assert container(fakes)["state"]["waiting"] == {
            "reason": "RunContainerError",
            "message": "no export named _start",
        }


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


async def test_a_cpu_limit_that_is_not_kept_is_said_once(fakes: Fakes) -> None:
    fakes.runtime.capabilities = RuntimeCapabilities(cpu_limits=False, memory_cgroup=False, wasmtime_version="1")
    limited = {"name": "c", "image": "x", "resources": {"limits": {"cpu": "100m"}}}
    async with running(fakes):
        fakes.kube.add(make_pod(containers=[limited]))
        await eventually(lambda: phase(fakes) == "Running")
        fakes.runtime.exit(code=1)
        await eventually(lambda: container(fakes)["restartCount"] == 1)
        told = [line for line in fakes.events.said if line.startswith("CPULimitNotEnforced")]
        assert len(told) == 1
        assert "The cpu limit of 100m is not enforced" in told[0]


async def test_pull_secrets_are_brought_and_a_missing_one_is_told(fakes: Fakes) -> None:
    fakes.references.secrets["have"] = {"registry": "reg"}
    async with running(fakes):
        fakes.kube.add(make_pod(imagePullSecrets=[{"name": "have"}, {"name": "missing"}]))
        await eventually(lambda: phase(fakes) == "Running")
        assert [credential.registry for credential in fakes.images.asked[0][1]] == ["reg"]
        assert fakes.events.has(
            "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (missing);"
        )


async def test_labels_that_change_reach_downward_volumes_at_once(fakes: Fakes) -> None:
    async with running(fakes):
        fakes.kube.add(make_pod(volumes=[{"name": "v", "downwardAPI": {}}]))
        await eventually(lambda: phase(fakes) == "Running")
        assert fakes.volumes.refreshed == []
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "y"}))
        await eventually(lambda: fakes.volumes.refreshed == ["uid-a"])


async def test_the_modules_of_known_containers_are_reported_as_in_use(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.images.in_use == frozenset({"sha256:2"}))


async def test_pressure_evicts_one_pod_that_would_help(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
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


async def test_a_pod_deleted_while_it_starts_leaves_no_instance(fakes: Fakes) -> None:
    fakes.runtime.start_delay = 0.2
    async with running(fakes) as manager:
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.runtime.configs)
        fakes.kube.ask_deletion("a")
        await eventually(lambda: manager.pods() == [])
        assert fakes.runtime.stopped == ["c"]
        assert fakes.runtime.known == {}


async def test_an_agent_that_ends_while_a_container_starts_lets_it_run(fakes: Fakes) -> None:
    fakes.runtime.start_delay = 0.1
    async with running(fakes):
        fakes.kube.add(make_pod(restartPolicy="Never"))
        await eventually(lambda: fakes.runtime.configs)
    assert fakes.runtime.running() == ["c"]
    async with running(fakes):
        await eventually(lambda: phase(fakes) == "Running")
        assert len(fakes.runtime.configs) == 1
