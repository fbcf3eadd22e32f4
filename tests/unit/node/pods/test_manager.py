"""The pod manager and its workers while pods live, against stand-ins."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from wasilet_common.pod_fields import Pod
from wasilet_node.images.model import ImageError
from wasilet_node.network.attachment import Attachment, MachineNetwork
from wasilet_node.pods import resources
from wasilet_node.runtime.protocol import ExecResult, GuestKind, RuntimeCapabilities
from wasilet_node.volumes.base import ContainerConfigError, VolumeError, VolumeRefusedError

from tests.unit.node.pods.fakes import Fakes, eventually, make_pod
from tests.unit.node.pods.rig import condition, container, gone, phase, running

pytestmark = pytest.mark.unit


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


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
        await asyncio.sleep(0.4)
        assert len(fakes.kube.patches) == 1
        fakes.kube.ask_deletion("a")
        await eventually(lambda: gone(fakes))
        assert [patch.get("phase") for _, patch in fakes.kube.patches[1:]] == ["Failed"]


async def test_what_a_pod_asks_for_is_counted_again_only_when_its_spec_changes(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new pod is compared with all that are there: else a burst would cost its square."""
    counted: list[str] = []
    count = resources.pod_requests

    def counting(pod: dict[str, Any]) -> resources.Requests:
        counted.append(pod["metadata"]["name"])
        return count(pod)

    monkeypatch.setattr(resources, "pod_requests", counting)
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "y"}))
        fakes.kube.add(make_pod("b"))
        await eventually(lambda: phase(fakes, "b") == "Running")
        fakes.kube.change("a", lambda pod: pod["metadata"].update(labels={"x": "z"}))
        fakes.kube.add(make_pod("c"))
        await eventually(lambda: phase(fakes, "c") in ("Running", "Failed"))
        # At its own admission, and once as the others' neighbour.
        assert counted.count("a") == 2


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
        assert condition(fakes, "PodReadyToStartContainers")["status"] == "True", "it says nothing of images"
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


async def test_a_start_error_waits_with_its_message(fakes: Fakes) -> None:
    fakes.runtime.start_error["c"] = "no export named _start"
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: "state" in container(fakes))
        assert container(fakes)["state"]["waiting"] == {
            "reason": "RunContainerError",
            "message": "no export named _start",
        }


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


MISSING = "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (missing);"


async def test_pull_secrets_are_brought_and_a_missing_one_hinders_nothing(fakes: Fakes) -> None:
    fakes.references.secrets["have"] = {"registry": "reg"}
    async with running(fakes):
        fakes.kube.add(make_pod(imagePullSecrets=[{"name": "have"}, {"name": "missing"}]))
        await eventually(lambda: phase(fakes) == "Running")
        assert [credential.registry for credential in fakes.images.asked[0][1]] == ["reg"]
        assert not fakes.events.has(MISSING)


async def test_a_missing_pull_secret_is_reported_when_a_pull_has_failed(fakes: Fakes) -> None:
    fakes.images.errors["reg/hello:1"] = ImageError("ImagePullBackOff", "put off")
    async with running(fakes):
        fakes.kube.add(make_pod(imagePullSecrets=[{"name": "missing"}]))
        await eventually(lambda: len(fakes.images.asked) > 1)
        assert not fakes.events.has(MISSING), "no pull was tried"
        fakes.images.errors["reg/hello:1"] = ImageError("ErrImagePull", "unauthorized")
        await eventually(lambda: fakes.events.has(MISSING))


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
    monkeypatch.setattr("wasilet_node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: fakes.images.in_use == frozenset({"sha256:2"}))


async def test_volumes_and_network_are_prepared_side_by_side(fakes: Fakes) -> None:
    """A token's way to the API server and back is the longest wait of a start."""
    order: list[str] = []
    both = asyncio.Event()

    async def begun(name: str) -> None:
        order.append(name)
        if len(order) == 2:
            both.set()
        async with asyncio.timeout(5):
            await both.wait()

    class Networks(MachineNetwork):
        async def attach(self, pod: Pod, guest: GuestKind | None = None) -> Attachment | None:
            await begun("network")
            return None

    async def setup(pod: Pod) -> None:
        await begun("volumes")

    fakes.networks = Networks()
    fakes.volumes.setup = setup  # type: ignore[method-assign]
    async with running(fakes):
        fakes.kube.add(make_pod())
        await eventually(lambda: phase(fakes) == "Running")
    assert sorted(order[:2]) == ["network", "volumes"]
