"""The status of a pod, its conditions, and the patch that carries it."""

from __future__ import annotations

import asyncio
import copy
import time
from typing import Any

import pytest
from wasilet_node.kube.base import ApiUnavailableError, ConflictError, ForbiddenError, KubeObject, NotFoundError
from wasilet_node.pods import status as status_of
from wasilet_node.pods.conditions import with_transition_times
from wasilet_node.pods.nodeinfo import NodeInfo
from wasilet_node.pods.recovery import instances_of
from wasilet_node.pods.resources import ANNOTATION_RESOURCES, Requests, enforced_limit, pod_requests, qos_class
from wasilet_node.pods.results import ProbeKind, ProbeResults, Result
from wasilet_node.pods.status import Facts, Verdict, Waiting, compute
from wasilet_node.pods.status_pace import StatusPace
from wasilet_node.pods.status_writer import StatusWriter, diff
from wasilet_node.runtime.protocol import ContainerState

from tests.unit.node.pods.fakes import PodKube, _merge_status, eventually, make_instance, make_pod

pytestmark = pytest.mark.unit

NODE = NodeInfo(name="n", addresses=("192.0.2.1", "2001:db8::1"))
NOW = "2026-01-01T00:00:10Z"


def facts(pod: dict[str, Any] | None = None, **fields: Any) -> Facts:
    pod = pod or make_pod()
    base: dict[str, Any] = {
        "pod": pod,
        "old": pod["status"],
        "instances": {},
        "probes": ProbeResults(),
        "node": NODE,
        "now": NOW,
        "sandbox_ready": True,
    }
    return Facts(**(base | fields))


def conditions(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {condition["type"]: condition for condition in status["conditions"]}


def test_both_address_families_are_told() -> None:
    status = compute(facts())
    assert status["podIPs"] == status["hostIPs"] == [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]


def test_a_pod_has_no_address_before_its_volumes_are_ready() -> None:
    status = compute(facts(sandbox_ready=False))
    assert "podIP" not in status
    condition = conditions(status)["PodReadyToStartContainers"]
    assert condition["status"] == "False"
    assert (condition["reason"], condition["message"]) == ("PodSandboxNotReady", "no pod sandbox exists")


def test_a_final_phase_never_changes() -> None:
    pod = make_pod()
    pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": "no room"}
    status = compute(facts(pod, instances={"c": [make_instance()]}))
    assert (status["phase"], status["reason"], status["message"]) == ("Failed", "Evicted", "no room")


def test_a_verdict_waits_until_the_last_container_is_dead() -> None:
    verdict = Verdict(reason="Evicted", message="m", disruption="TerminationByKubelet")
    pod = make_pod()
    pod["status"]["phase"] = "Running"
    status = compute(facts(pod, instances={"c": [make_instance()]}, verdict=verdict))
    assert status["phase"] == "Running"
    assert "DisruptionTarget" not in conditions(status)
    ended = make_instance(state="exited", exit_code=137)
    status = compute(facts(pod, instances={"c": [ended]}, verdict=verdict, terminal=True, terminated=True))
    assert (status["phase"], status["reason"]) == ("Failed", "Evicted")
    assert conditions(status)["DisruptionTarget"]["reason"] == "TerminationByKubelet"


def test_a_stopped_pod_that_never_ran_is_failed_with_unknown_containers() -> None:
    status = compute(facts(terminal=True, terminated=True))
    assert status["phase"] == "Failed"
    ended = status["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "ContainerStatusUnknown")


def test_a_container_that_will_not_run_again_has_ended_and_does_not_wait() -> None:
    waiting = {"c": Waiting(reason="RunContainerError", message="m")}
    ended = make_instance(state="exited", exit_code=128, reason="StartError")
    never = compute(facts(make_pod(restartPolicy="Never"), instances={"c": [ended]}, waiting=waiting))
    assert never["containerStatuses"][0]["state"]["terminated"]["reason"] == "StartError"
    always = compute(facts(instances={"c": [ended]}, waiting=waiting))
    only = always["containerStatuses"][0]
    assert only["state"] == {"waiting": {"reason": "RunContainerError", "message": "m"}}
    assert only["lastState"]["terminated"]["exitCode"] == 128


def test_the_last_state_is_the_instance_before() -> None:
    known = [make_instance(attempt=2), make_instance(attempt=1, state="exited", exit_code=5)]
    only = compute(facts(instances={"c": known}))["containerStatuses"][0]
    assert only["restartCount"] == 2
    assert only["lastState"]["terminated"]["exitCode"] == 5


def test_the_last_state_survives_the_loss_of_its_record() -> None:
    pod = make_pod()
    terminated = {"exitCode": 9, "reason": "Error", "containerID": "wasmtime://gone"}
    pod["status"]["containerStatuses"] = [{"name": "c", "state": {}, "lastState": {"terminated": terminated}}]
    only = compute(facts(pod, instances={"c": [make_instance(attempt=1)]}))["containerStatuses"][0]
    assert only["lastState"] == {"terminated": terminated}


def test_an_unstarted_container_is_not_ready_whatever_readiness_says() -> None:
    probes = ProbeResults()
    probes.by_instance["c-0", ProbeKind.READINESS] = Result.SUCCESS
    probes.by_instance["c-0", ProbeKind.STARTUP] = Result.UNKNOWN
    pod = make_pod(containers=[{"name": "c", "image": "x", "startupProbe": {}, "readinessProbe": {}}])
    only = compute(facts(pod, instances={"c": [make_instance()]}, probes=probes))["containerStatuses"][0]
    assert only["started"] is only["ready"] is False


def test_what_runs_has_the_resources_that_it_is_held_to() -> None:
    wanted = {"limits": {"cpu": "2"}, "requests": {"cpu": "2"}}
    pod = make_pod(containers=[{"name": "c", "image": "x", "resources": wanted}])
    running = make_instance(annotations={ANNOTATION_RESOURCES: '{"limits":{"cpu":"1"}}'})
    status = compute(facts(pod, instances={"c": [running]}))["containerStatuses"][0]
    assert status["resources"] == {"limits": {"cpu": "1"}}
    assert status["allocatedResources"] == {"cpu": "2"}


POD_RESOURCES = [
    ({}, [{}], {}),
    ({}, [{"requests": {"cpu": "100m"}}, {"requests": {"cpu": "250m"}}], {"requests": {"cpu": "350m"}}),
    (
        {"limits": {"memory": "1Gi"}, "requests": {"cpu": "1"}},
        [{"requests": {"cpu": "2", "memory": "64Mi"}, "limits": {"cpu": "1500m"}}, {"limits": {"cpu": "500m"}}],
        {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "64Mi"}},
    ),
]


@pytest.mark.parametrize(("own", "containers", "whole"), POD_RESOURCES)
def test_a_pod_tells_its_resources_as_a_whole(own: Any, containers: Any, whole: Any) -> None:
    pod = make_pod(
        containers=[{"name": f"c{i}", "image": "x", "resources": each} for i, each in enumerate(containers)],
        resources=own,
    )
    status = compute(facts(pod))
    assert status.get("resources", {}) == whole
    assert status.get("allocatedResources", {}) == whole.get("requests", {})


def test_an_ephemeral_container_has_neither_started_nor_become_ready() -> None:
    pod = make_pod(ephemeralContainers=[{"name": "e", "image": "x"}], initContainers=[{"name": "i", "image": "x"}])
    waiting = compute(facts(pod))["ephemeralContainerStatuses"][0]
    assert waiting["state"] == {"waiting": {"reason": "PodInitializing"}}
    runs = compute(facts(pod, instances={"e": [make_instance("e")]}))["ephemeralContainerStatuses"][0]
    assert "running" in runs["state"]
    assert runs["ready"] is False
    assert "started" not in runs


def test_resources_are_told_of_instances_even_when_they_have_none() -> None:
    assert "resources" not in compute(facts())["containerStatuses"][0]
    only = compute(facts(instances={"c": [make_instance()]}))["containerStatuses"][0]
    assert only["resources"] == {}
    assert "allocatedResources" not in only


def test_a_read_only_mount_is_recursively_so_for_any_caller() -> None:
    mounts = [
        {"name": "v", "mountPath": "/rw"},
        {"name": "v", "mountPath": "/ro", "readOnly": True},
        {"name": "v", "mountPath": "/rro", "readOnly": True, "recursiveReadOnly": "IfPossible"},
    ]
    status = compute(facts(make_pod(containers=[{"name": "c", "image": "x", "volumeMounts": mounts}])))
    assert [mount.get("recursiveReadOnly") for mount in status["containerStatuses"][0]["volumeMounts"]] == [
        None,
        "Disabled",
        "Enabled",
    ]


def test_a_reason_that_somebody_else_wrote_stays_while_the_phase_does() -> None:
    pod = make_pod()
    pod["status"] |= {"phase": "Running", "reason": "Theirs", "message": "by hand"}
    old = {"phase": "Running"}
    status = compute(facts(pod, old=old, instances={"c": [make_instance()]}))
    assert (status["reason"], status["message"]) == ("Theirs", "by hand")
    ended = compute(facts(pod, old=old, terminal=True, instances={"c": [make_instance(state="exited")]}))
    assert ended["phase"] == "Succeeded"
    assert "reason" not in ended


def test_transition_times_move_only_with_the_status() -> None:
    old = [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    new = [{"type": "Ready", "status": "False", "reason": "Other"}]
    assert with_transition_times(new, old, NOW)[0]["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    assert with_transition_times([{"type": "Ready", "status": "True"}], old, NOW)[0]["lastTransitionTime"] == NOW


def test_what_the_status_knows_of_a_lost_container_is_kept() -> None:
    pod = make_pod()
    pod["status"]["containerStatuses"] = [
        {
            "name": "c",
            "restartCount": 3,
            "containerID": "wasmtime://old",
            "image": "reg/hello:1",
            "state": {"terminated": {"exitCode": 7, "reason": "Error", "containerID": "wasmtime://old"}},
        }
    ]
    (lost,) = instances_of(pod, [])["c"]
    assert (lost.id, lost.attempt, lost.exit_code, lost.state) == ("old", 3, 7, ContainerState.EXITED)
    newer = make_instance(attempt=4)
    assert instances_of(pod, [newer])["c"] == [newer]


def test_an_end_that_was_told_stays_as_it_was_told_when_the_runtime_has_forgotten_it() -> None:
    """The exit record was not on disk when the machine lost its power."""
    forgotten = make_instance(state=ContainerState.EXITED, exit_code=137, reason="ContainerStatusUnknown")
    pod = make_pod()
    assert instances_of(pod, [forgotten])["c"] == [forgotten]
    told = {"exitCode": 7, "reason": "Error", "message": "m", "containerID": f"wasmtime://{forgotten.id}"}
    entry = {"name": "c", "restartCount": 0, "containerID": told["containerID"]}
    for where in ({"state": {"terminated": told}}, {"state": {"waiting": {}}, "lastState": {"terminated": told}}):
        pod["status"]["containerStatuses"] = [{**entry, **where}]
        (found,) = instances_of(pod, [forgotten])["c"]
        assert (found.exit_code, found.reason, found.message) == (7, "Error", "m")
    running = {"state": {"running": {"startedAt": "2026-01-01T00:00:05Z"}}}
    pod["status"]["containerStatuses"] = [{**entry, **running}]
    (found,) = instances_of(pod, [forgotten])["c"]
    assert (found.exit_code, found.started_at_ns) == (137, 1767225605 * 10**9)


# ---- patches


def test_applying_the_difference_gives_the_new_status() -> None:
    old = compute(facts(sandbox_ready=False))
    old["conditions"].append({"type": "example.com/x", "status": "True"})
    new = compute(facts(old=old, instances={"c": [make_instance()]}))
    merged = copy.deepcopy(old)
    _merge_status(merged, diff(old, new))
    merged["conditions"] = [{k: v for k, v in c.items() if v is not None} for c in merged["conditions"]]
    by_type = conditions(merged)
    assert by_type.pop("example.com/x")
    assert by_type == {k: v for k, v in conditions(new).items() if k != "example.com/x"}
    assert {k: v for k, v in merged.items() if k != "conditions"} == {k: v for k, v in new.items() if k != "conditions"}


def test_an_equal_status_needs_no_patch() -> None:
    status = compute(facts(instances={"c": [make_instance()]}))
    again = copy.deepcopy(status)
    for condition in again["conditions"]:
        condition["lastProbeTime"] = None
    assert diff(again, status) == {}


def test_a_reason_that_is_over_is_taken_out_by_name() -> None:
    old = {"conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "m"}]}
    new = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert diff(old, new) == {"conditions": [{"type": "Ready", "status": "True", "reason": None, "message": None}]}


def test_conditions_of_others_are_never_sent() -> None:
    old = {"conditions": [{"type": "example.com/x", "status": "True"}]}
    assert diff(old, {"conditions": []}) == {}
    assert diff({}, {"conditions": [{"type": "example.com/x", "status": "True"}]}) == {}


def test_a_resize_condition_that_is_over_is_deleted() -> None:
    old = {"conditions": [{"type": "PodResizePending", "status": "True"}]}
    assert diff(old, {"conditions": []}) == {"conditions": [{"$patch": "delete", "type": "PodResizePending"}]}


async def test_newer_statuses_replace_those_that_wait() -> None:
    kube = PodKube()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    for phase in ("Pending", "Running", "Succeeded"):
        patcher.submit({"phase": phase})
    await patcher.flush()
    assert [patch["phase"] for _, patch in kube.patches] == ["Succeeded"]
    await patcher.close()


@pytest.mark.parametrize("turns", range(12))
async def test_a_status_reaches_the_server_in_whatever_turn_of_the_loop_it_is_submitted(turns: int) -> None:
    """Also in the one in which the task that sent the one before has ended, and not been taken away yet."""
    kube = PodKube()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Pending", "podIP": "10.9.0.7"})
    for _ in range(turns):
        await asyncio.sleep(0)
    patcher.submit({"phase": "Running", "podIP": "10.9.0.7"})
    await eventually(lambda: kube.pod("a")["status"].get("phase") == "Running")
    await patcher.close()


CREATING = {"phase": "Pending", "podIP": ""}


async def test_what_is_out_of_date_in_a_moment_is_never_sent() -> None:
    kube = PodKube()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    for address in ("", "10.9.0.7"):
        patcher.submit({"phase": "Pending", "podIP": address}, urgent=False)
        await asyncio.sleep(0)
    patcher.submit({"phase": "Running", "podIP": "10.9.0.7"})
    await eventually(lambda: bool(kube.patches))
    await patcher.flush()
    assert [patch["phase"] for _, patch in kube.patches] == ["Running"]
    await patcher.close()


async def test_between_two_patches_too_a_status_that_may_wait_is_held_back() -> None:
    kube = PodKube()
    kube.add(make_pod())
    held: list[float] = []

    class Pace(StatusPace):
        def delay_seconds(self) -> float:
            held.append(0.0)
            return 0.0

    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=Pace(time.monotonic))

    def meanwhile(verb: str, _path: str) -> None:
        if verb == "patch" and not kube.patches:
            patcher.submit({"phase": "Pending", "podIP": "10.9.0.7"}, urgent=False)

    kube.fail = meanwhile
    patcher.submit({"phase": "Pending"}, urgent=False)
    await eventually(lambda: len(kube.patches) == 2)
    assert len(held) == 2
    await patcher.close()


async def test_what_may_wait_is_sent_all_the_same() -> None:
    kube = PodKube()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    patcher.submit(CREATING, urgent=False)
    await eventually(lambda: kube.pod("a")["status"].get("podIP") == "")
    await patcher.close()


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({"observedGeneration": 2, "conditions": [{"type": "Ready", "status": "True", "observedGeneration": 2}]}, True),
        (
            {"observedGeneration": 2, "conditions": [{"type": "Ready", "status": "False", "observedGeneration": 2}]},
            False,
        ),
        ({"observedGeneration": 2, "phase": "Failed"}, False),
        ({"observedGeneration": 2, "conditions": [{"type": "Ready", "status": "True", "reason": "x"}]}, False),
    ],
)
async def test_a_generation_that_was_seen_waits_for_what_it_led_to(status: dict[str, Any], *, waits: bool) -> None:
    kube = PodKube()
    pod = make_pod()
    ready = {"type": "Ready", "status": "True", "observedGeneration": 1}
    pod["status"] = {"observedGeneration": 1, "phase": "Running", "conditions": [ready]}
    kube.add(pod)
    asked: list[bool] = []

    class Pace(StatusPace):
        def delay_seconds(self) -> float:
            asked.append(True)
            return 0.0

    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=Pace(time.monotonic))
    patcher.submit({"phase": "Running", "conditions": [ready], **status})
    await eventually(lambda: bool(kube.patches))
    assert bool(asked) is waits
    await patcher.close()


async def test_a_flush_waits_for_no_pace() -> None:
    kube = PodKube()
    kube.add(make_pod())

    class Slow(StatusPace):
        def delay_seconds(self) -> float:
            return 3600.0

    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=Slow(time.monotonic))
    patcher.submit(CREATING, urgent=False)
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await patcher.flush()
    assert len(kube.patches) == 1
    await patcher.close()


def test_in_a_burst_statuses_that_may_wait_go_one_after_another_but_none_waits_for_long() -> None:
    pace = StatusPace(lambda: 100.0)
    delays = [pace.delay_seconds() for _ in range(200)]
    assert delays[:3] == [pytest.approx(0.25), pytest.approx(0.35), pytest.approx(0.45)]
    assert max(delays) == pytest.approx(5.0)


async def test_a_server_that_writes_a_value_in_its_own_way_is_not_patched_again() -> None:
    class OwnWay(PodKube):
        async def patch(self, path: str, body: KubeObject, **more: Any) -> KubeObject:
            await super().patch(path, body, **more)
            self.change("a", lambda pod: pod["status"]["containerStatuses"][0].update(imageID=""))
            return copy.deepcopy(self.pod("a"))

    kube = OwnWay()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    wanted = {"phase": "Running", "containerStatuses": [{"name": "c", "image": ""}]}
    patcher.submit(wanted)
    await patcher.flush()
    patcher.observed(copy.deepcopy(kube.pod("a")))
    patcher.submit(copy.deepcopy(wanted))
    await patcher.flush()
    assert len(kube.patches) == 1
    await patcher.close()


async def test_an_older_watch_event_does_not_bring_an_old_status_back() -> None:
    kube = PodKube()
    kube.add(make_pod())
    before = copy.deepcopy(kube.pod("a"))
    patcher = StatusWriter(kube, before, on_gone=lambda: None, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    assert patcher.observed(before) is False
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    assert len(kube.patches) == 1
    await patcher.close()


@pytest.mark.parametrize(
    ("change", "echo"),
    [
        pytest.param({}, True, id="what was sent"),
        pytest.param({"metadata": {"managedFields": []}}, True, id="bookkeeping"),
        pytest.param({"metadata": {"labels": {"a": "b"}}}, False, id="a label"),
        pytest.param({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, False, id="a deletion"),
        pytest.param({"status": {"conditions": [{"type": "Mine", "status": "True"}]}}, False, id="someone's condition"),
        pytest.param({"status": {"nominatedNodeName": "n"}}, False, id="a field of the scheduler"),
        pytest.param({"status": {"phase": "Pending"}}, False, id="a status that was overwritten"),
        pytest.param({"status": {"phase": "Failed"}}, False, id="the end"),
    ],
)
async def test_what_only_brings_back_a_sent_status_is_no_news(change: dict[str, Any], *, echo: bool) -> None:
    kube = PodKube()
    kube.add(make_pod())
    before = copy.deepcopy(kube.pod("a"))
    patcher = StatusWriter(kube, before, on_gone=lambda: None, pace=StatusPace(time.monotonic))
    assert not patcher.is_echo(before, before), "nothing was sent yet"
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    after = copy.deepcopy(kube.pod("a"))
    for part, fields in change.items():
        after[part] |= fields
    assert patcher.observed(after)
    assert patcher.is_echo(before, after) is echo
    await patcher.close()


async def test_an_absent_server_is_asked_again() -> None:
    kube = PodKube()
    kube.add(make_pod())
    failures = [ApiUnavailableError("x"), ConflictError(409, "Conflict", "changed")]
    kube.fail = lambda verb, _path: failures.pop(0) if failures and verb == "patch" else None
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    assert kube.pod("a")["status"]["phase"] == "Running"
    await patcher.close()


async def test_a_whole_list_counts_even_if_its_versions_are_lower() -> None:
    """As after an etcd was restored from a backup: the pod would be blind until the versions have caught up."""
    kube = PodKube()
    kube.add(make_pod())
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lambda: None, pace=StatusPace(time.monotonic))
    restored = make_pod()
    restored["metadata"]["resourceVersion"] = "3"
    assert patcher.observed(restored) is False
    assert patcher.observed(restored, listed=True) is True
    restored["metadata"]["resourceVersion"] = "4"
    assert patcher.observed(restored) is True
    await patcher.close()


async def test_one_404_is_not_the_end_of_a_pod() -> None:
    kube = PodKube()
    kube.add(make_pod())
    failures: list[Exception] = [NotFoundError(404, "Not Found", "404 page not found")]
    kube.fail = lambda verb, _path: failures.pop(0) if failures and verb == "patch" else None
    lost = asyncio.Event()
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lost.set, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    assert kube.pod("a")["status"]["phase"] == "Running"
    assert not lost.is_set()
    await patcher.close()


@pytest.mark.parametrize("verb", ["patch", "get"])
async def test_an_answer_about_something_else_is_not_believed(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = PodKube()
    kube.add(make_pod())
    real = getattr(kube, verb)
    lies: list[dict[str, Any]] = [{"kind": "Pod", "metadata": {}}]

    async def answer(*arguments: Any, **more: Any) -> dict[str, Any]:
        return lies.pop() if lies else dict(await real(*arguments, **more))

    monkeypatch.setattr(kube, verb, answer)
    failures = [ConflictError(409, "Conflict", "changed")]
    kube.fail = lambda called, _path: failures.pop() if failures and called == "patch" and verb == "get" else None
    lost = asyncio.Event()
    patcher = StatusWriter(kube, kube.pod("a"), on_gone=lost.set, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    await patcher.flush()
    assert kube.pod("a")["status"]["phase"] == "Running"
    assert not lost.is_set()
    assert not lies
    await patcher.close()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_pod_that_is_gone_or_replaced_ends_the_patching(replaced: bool) -> None:  # noqa: FBT001
    kube = PodKube()
    if replaced:
        kube.add(make_pod(uid="another"))
    lost = asyncio.Event()
    patcher = StatusWriter(kube, make_pod(), on_gone=lost.set, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    await eventually(lost.is_set)
    await patcher.flush()
    assert kube.patches == []
    await patcher.close()


@pytest.mark.parametrize(
    ("message", "gone"),
    [
        ("User \"system:node:n\" cannot get ...: no relationship found between node 'n' and this object", True),
        ('User "system:node:n" cannot get resource "pods"', False),
    ],
)
async def test_a_pod_that_the_node_may_no_longer_read_is_gone(message: str, gone: bool) -> None:  # noqa: FBT001
    """The node authorizer refuses what is not on the node before anybody looks whether it is there."""
    kube = PodKube()
    kube.fail = lambda verb, _path: ForbiddenError(403, "Forbidden", message) if verb == "get" else None
    lost = asyncio.Event()
    patcher = StatusWriter(kube, make_pod(), on_gone=lost.set, pace=StatusPace(time.monotonic))
    patcher.submit({"phase": "Running"})
    if gone:
        await eventually(lost.is_set)
    else:
        await asyncio.sleep(0.3)
        assert not lost.is_set()
    await patcher.close()


# ---- resources


def test_a_container_without_a_limit_is_held_to_the_pods() -> None:
    pod = make_pod(resources={"limits": {"cpu": "2", "memory": "1Gi"}})
    own = resources(limits={"memory": "64Mi", "cpu": "0"})
    assert enforced_limit(pod, own, "memory") == 64 * 2**20
    assert enforced_limit(pod, own, "cpu") == 2000
    assert enforced_limit(make_pod(), resources(), "memory") is None


def resources(requests: dict[str, str] | None = None, limits: dict[str, str] | None = None) -> dict[str, Any]:
    return {"name": "c", "image": "x", "resources": {"requests": requests or {}, "limits": limits or {}}}


def test_requests_are_the_larger_of_running_and_initializing() -> None:
    sidecar = resources({"cpu": "100m"}) | {"name": "s", "restartPolicy": "Always"}
    heavy = resources({"cpu": "1"}) | {"name": "i"}
    pod = make_pod(
        containers=[resources({"cpu": "250m", "memory": "1Mi"})],
        initContainers=[sidecar, heavy],
        overhead={"cpu": "1m"},
    )
    assert pod_requests(pod) == Requests(1101, 2**20, 0)


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (resources(), "BestEffort"),
        (resources({"cpu": "1"}), "Burstable"),
        (resources({"cpu": "1", "memory": "1Gi"}, {"cpu": "1000m", "memory": "1024Mi"}), "Guaranteed"),
        (resources({"cpu": "1", "memory": "1Gi"}, {"cpu": "2", "memory": "1Gi"}), "Burstable"),
        (resources({"example.com/gpu": "1"}), "BestEffort"),
    ],
)
def test_quality_of_service(container: dict[str, Any], expected: str) -> None:
    pod = make_pod(containers=[container])
    assert qos_class(pod) == expected
    pod["spec"]["resources"] = {"limits": {}, "requests": {}}
    assert qos_class(pod) == expected, "resources of the pod that name none say nothing"


def test_a_rejected_pod_keeps_the_conditions_it_had() -> None:
    pod = make_pod()
    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
    status = status_of.rejected(pod, Verdict(reason="OutOfpods", message="m"), NOW)
    assert (status["phase"], status["message"]) == ("Failed", "Pod was rejected: m")
    assert status["conditions"] == pod["status"]["conditions"]


def ended_with(messages: dict[str, str], *, init: int = 0, ephemeral: int = 0) -> list[str]:
    """The messages that the status has of containers that ended with these, in their order."""
    names = sorted(messages)
    listed = [{"name": name, "image": "i"} for name in names]
    regular = listed[init : len(listed) - ephemeral]
    pod = make_pod(
        containers=regular, initContainers=listed[:init], ephemeralContainers=listed[len(listed) - ephemeral :]
    )
    instances = {
        name: [make_instance(name, state="exited", exit_code=0, message=text)] for name, text in messages.items()
    }
    status = compute(facts(pod, instances=instances))
    fields = ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")
    every = {each["name"]: each for field in fields for each in status.get(field, ())}
    return [every[name]["state"]["terminated"]["message"] for name in names]


@pytest.mark.parametrize(
    ("count", "init", "ephemeral", "bytes_each"),
    [(1, 0, 0, 4096), (3, 0, 0, 4096), (4, 0, 0, 3072), (7, 0, 0, 1755), (7, 2, 1, 1755), (48, 16, 16, 256)],
)
def test_the_messages_of_a_pod_share_12_kib(count: int, init: int, ephemeral: int, bytes_each: int) -> None:
    messages = ended_with({f"c{n:02}": "0123456789" * 1300 for n in range(count)}, init=init, ephemeral=ephemeral)
    assert [len(message) for message in messages] == [bytes_each] * count
    assert all(message.startswith("0123456789") for message in messages)


@pytest.mark.parametrize(
    "text", ["\N{REPLACEMENT CHARACTER}" * 4096, "x" + "\N{EURO SIGN}" * 4096, "\N{WATER WAVE}" * 4096]
)
def test_a_message_is_cut_between_characters(text: str) -> None:
    [message] = ended_with({"c": text})
    assert 4093 <= len(message.encode()) <= 4096
    assert text.startswith(message)


def test_a_message_of_the_instance_before_is_cut_too_and_the_server_keeps_its_own() -> None:
    pod = make_pod()
    terminated: dict[str, Any] = {"exitCode": 1, "message": "m" * 9000, "containerID": "wasmtime://before"}
    old = {"containerStatuses": [{"name": "c", "state": {}, "lastState": {"terminated": terminated}}]}
    status = compute(facts(pod, old=old, instances={"c": [make_instance(attempt=1)]}))
    assert len(status["containerStatuses"][0]["lastState"]["terminated"]["message"]) == 4096
    assert len(terminated["message"]) == 9000
