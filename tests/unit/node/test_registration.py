from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import wasilet_node.identity
import wasilet_node.registration
from wasilet_node.certificates_store import NodeNames
from wasilet_node.conditions import Conditions, Verdict, disk_threshold_bytes, pressures, with_times
from wasilet_node.identity import ANNOTATION, instance_id
from wasilet_node.kube.base import ApiStatusError, ApiUnavailableError
from wasilet_node.lease import LeaseKeeper
from wasilet_node.machine import Levels
from wasilet_node.registration import NodeTakenError, Pace, Registration
from wasilet_node.settings import NodePaths, NodeSettings

from tests.unit.node.rig import NodeKube, Recorded

pytestmark = pytest.mark.unit

NODE = "/api/v1/nodes/n1"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n1"
GIB = 1024**3
PLENTY = Levels(
    memory_available_bytes=4 * GIB,
    disk_bytes=100 * GIB,
    disk_available_bytes=50 * GIB,
    inodes=1_000_000,
    inodes_free=900_000,
    pids=30_000,
    pids_free=29_000,
)


class Rig:
    """A registration and what it was told and told others."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.store = NodeKube()
        self.events = Recorded()
        self.names: list[NodeNames] = []
        self.unauthorized = 0
        self.problem: str | None = None
        self.worlds: dict[str, str] = {}
        self.instance_id = "a" * 32
        self.address = "192.0.2.7"
        self.settings = NodeSettings(
            **{
                "node_name": "n1",
                "paths": NodePaths(data=data),
                "node_ip": "192.0.2.7",
                "hostname": "host1",
                "status_interval_seconds": 0.05,
                **settings,
            }
        )

    def make(self) -> Registration:
        async def images() -> Sequence[dict[str, object]]:
            return [{"names": ["registry/app@sha256:0"], "sizeBytes": 5}] * 60

        def count() -> None:
            self.unauthorized += 1

        return Registration(
            kube=self.store,
            events=self.events,
            settings=self.settings,
            server="https://127.0.0.1:6443",
            port=lambda: 10250,
            hostname="host1",
            agent_version="0.1.0",
            instance_id=self.instance_id,
            runtime_version="50.0.1",
            problem=lambda: self.problem,
            images=images,
            worlds=lambda: self.worlds,
            on_names=self.names.append,
            on_unauthorized=count,
            find_address=lambda _: self.address,
            pace=Pace(first_retry_seconds=0.01, report_gap_seconds=0.0, lease_look_seconds=0.01),
        )

    @property
    def node(self) -> dict[str, Any]:
        return self.store.objects[NODE]

    def condition(self, type_: str) -> dict[str, Any]:
        (found,) = [each for each in self.node["status"]["conditions"] if each["type"] == type_]
        return dict(found)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(wasilet_node.registration, "levels", lambda _: PLENTY)
    return Rig(tmp_path)


@asynccontextmanager
async def running(registration: Registration) -> AsyncIterator[None]:
    await registration.register()
    task = asyncio.create_task(registration.run())
    try:
        yield
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.01)


async def test_a_new_node_says_what_it_is(rig: Rig) -> None:
    rig.store.objects["/version"] = {"major": "1", "minor": "36"}
    registration = rig.make()
    await registration.register()

    assert rig.node["metadata"]["labels"] == {
        "kubernetes.io/arch": "wasm32-wasi",
        "kubernetes.io/os": "wasm32-wasi",
        "beta.kubernetes.io/arch": "wasm32-wasi",
        "beta.kubernetes.io/os": "wasm32-wasi",
        "kubernetes.io/hostname": "host1",
        "type": "wasilet",
    }
    status = rig.node["status"]
    assert status["nodeInfo"]["architecture"] == "wasm-wasi"
    assert status["nodeInfo"]["containerRuntimeVersion"] == "wasmtime://50.0.1"
    assert re.fullmatch(r"v1\.36\.\d+\+wasilet-0\.1\.0", status["nodeInfo"]["kubeletVersion"])
    assert all(status["nodeInfo"][key] for key in ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage"))
    assert status["addresses"] == [
        {"type": "InternalIP", "address": "192.0.2.7"},
        {"type": "Hostname", "address": "host1"},
    ]
    assert status["daemonEndpoints"] == {"kubeletEndpoint": {"Port": 10250}}
    assert status["capacity"]["pods"] == "110"
    assert len(status["images"]) == 50
    assert status["declaredFeatures"] == sorted(status["declaredFeatures"])
    assert "RestartAllContainersOnContainerExits" in status["declaredFeatures"]
    assert {each["type"]: each["status"] for each in status["conditions"]} == {
        "MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False", "Ready": "True",
    }  # fmt: skip
    assert rig.names == [NodeNames(dns=frozenset({"n1"}), ips=frozenset({"192.0.2.7"}))]
    assert registration.uid() == rig.node["metadata"]["uid"]


async def test_the_worlds_that_run_here_are_labels_that_follow_what_is_there(tmp_path: Path, rig: Rig) -> None:
    rig.worlds = {"wasilet.dev/wasi-http-0.2": "false"}
    async with running(rig.make()):
        assert rig.node["metadata"]["labels"]["wasilet.dev/wasi-http-0.2"] == "false"
        rig.worlds = {"wasilet.dev/wasi-http-0.2": "true"}
        await until(lambda: rig.node["metadata"]["labels"]["wasilet.dev/wasi-http-0.2"] == "true")
        assert rig.node["metadata"]["labels"]["type"] == "wasilet"


async def test_a_label_of_the_operator_goes_before_what_runs_here(tmp_path: Path) -> None:
    rig = Rig(tmp_path, labels={"wasilet.dev/wasi-http-0.2": "never"})
    rig.worlds = {"wasilet.dev/wasi-http-0.2": "true"}
    registration = rig.make()
    await registration.register()
    await registration.report()
    assert rig.node["metadata"]["labels"]["wasilet.dev/wasi-http-0.2"] == "never"


async def test_labels_taints_and_provider_id_are_given_at_creation(rig: Rig) -> None:
    rig.settings = replace(
        rig.settings,
        labels={"zone": "a", "kubernetes.io/os": "wasi"},
        taints=("kubernetes.io/arch=wasm32-wasi:NoSchedule", "gone:NoExecute"),
        provider_id="kind://x",
    )
    await rig.make().register()
    assert rig.node["metadata"]["labels"]["zone"] == "a"
    assert rig.node["metadata"]["labels"]["kubernetes.io/os"] == "wasi"
    assert rig.node["spec"] == {
        "taints": [
            {"key": "kubernetes.io/arch", "value": "wasm32-wasi", "effect": "NoSchedule"},
            {"key": "gone", "effect": "NoExecute"},
        ],
        "providerID": "kind://x",
    }


async def test_allocatable_leaves_room_before_pressure_begins(rig: Rig) -> None:
    await rig.make().register()
    status = rig.node["status"]
    memory = [int(status[key]["memory"].removesuffix("Ki")) for key in ("capacity", "allocatable")]
    assert memory[0] - memory[1] == 100 * 1024
    assert int(status["allocatable"]["ephemeral-storage"]) == 95 * GIB
    assert int(status["capacity"]["ephemeral-storage"]) == 100 * GIB, "a plain number of bytes, as what is allocatable"


async def test_an_existing_node_is_brought_up_to_date_and_keeps_what_others_gave_it(rig: Rig) -> None:
    rig.store.put(
        NODE,
        {
            "metadata": {"name": "n1", "labels": {"type": "krustlet", "admin": "x"}},
            "spec": {"taints": [{"key": "admin", "effect": "NoSchedule"}]},
            "status": {
                "nodeInfo": {"architecture": "wasm-wasi", "containerRuntimeVersion": "mvp", "bootID": "older"},
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
            },
        },
    )
    rig.settings = replace(rig.settings, taints=("own:NoSchedule",))
    await rig.make().register()

    assert rig.node["metadata"]["labels"]["admin"] == "x"
    assert rig.node["metadata"]["labels"]["type"] == "wasilet"
    assert rig.node["spec"]["taints"] == [{"key": "admin", "effect": "NoSchedule"}]
    assert rig.node["status"]["addresses"][0]["address"] == "192.0.2.7"
    assert rig.condition("Ready")["status"] == "True"
    assert "Rebooted" in rig.events.reasons
    metadata_patch = next(body for verb, path, body in rig.store.calls if (verb, path) == ("PATCH", NODE))
    assert "taints" not in metadata_patch.get("spec", {}), "a node may not change its own taints"


async def test_the_node_of_another_kubelet_is_not_taken(rig: Rig) -> None:
    rig.store.put(
        NODE,
        {
            "metadata": {"name": "n1"},
            "status": {"nodeInfo": {"architecture": "amd64", "containerRuntimeVersion": "containerd://1.7"}},
        },
    )
    with pytest.raises(NodeTakenError, match=r"runs containerd://1\.7; choose another name with --node-name"):
        await rig.make().register()
    assert rig.store.count("PATCH", NODE) == 0


def leased(rig: Rig, *, age_seconds: float, duration_seconds: int = 40) -> str:
    """A Node of another instance, and its lease."""
    rig.store.put(NODE, {"metadata": {"name": "n1", "annotations": {ANNOTATION: "b" * 32}}, "status": {}})
    renewed = (datetime.now(UTC) - timedelta(seconds=age_seconds)).isoformat()
    spec = {"renewTime": renewed, "leaseDurationSeconds": duration_seconds}
    rig.store.put(LEASE, {"metadata": {"name": "n1"}, "spec": spec})
    return renewed


async def test_a_live_node_of_another_instance_is_not_taken(rig: Rig) -> None:
    leased(rig, age_seconds=1)

    async def renew() -> None:
        await until(lambda: rig.store.count("GET", LEASE) >= 2)
        leased(rig, age_seconds=0)

    renewing = asyncio.create_task(renew())
    with pytest.raises(NodeTakenError, match="n1 is alive: another agent, with another data folder"):
        await rig.make().register()
    await renewing
    assert rig.store.count("PATCH", NODE) == 0
    assert rig.store.count("PATCH", f"{NODE}/status") == 0


@pytest.mark.parametrize(("age", "duration"), [(60.0, 40), (0.0, 1), (-30.0, 1)])
async def test_a_dead_node_of_another_instance_is_taken_over(rig: Rig, age: float, duration: int) -> None:
    leased(rig, age_seconds=age, duration_seconds=duration)
    await rig.make().register()
    assert rig.node["metadata"]["annotations"][ANNOTATION] == "a" * 32


async def test_a_node_without_a_lease_or_of_the_same_instance_is_brought_up_to_date_at_once(rig: Rig) -> None:
    rig.store.put(NODE, {"metadata": {"name": "n1", "annotations": {ANNOTATION: "b" * 32}}, "status": {}})
    await rig.make().register()
    leased(rig, age_seconds=0)
    rig.instance_id = "b" * 32
    await rig.make().register()
    assert rig.store.count("GET", LEASE) == 1, "a lease matters only where the instance is another"


def test_the_id_of_a_data_folder_stays_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    first = instance_id(tmp_path)
    assert instance_id(tmp_path) == first
    assert (tmp_path / "instance-id").stat().st_mode & 0o777 == 0o600
    (tmp_path / "instance-id").write_bytes(b"\xff")
    assert instance_id(tmp_path) not in {first, ""}


async def test_an_api_server_that_is_away_is_waited_for(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.store.failures = [ApiUnavailableError("away")] * 3
    await rig.make().register()
    assert rig.node
    assert caplog.text.count("not registered yet") == 1


async def test_a_401_is_passed_on(rig: Rig) -> None:
    rig.store.failures = [ApiStatusError(401, "Unauthorized", "who?")]
    await rig.make().register()
    assert rig.unauthorized == 1


async def test_a_quiet_node_is_not_patched(rig: Rig) -> None:
    async with running(rig.make()):
        await asyncio.sleep(0.3)
    assert rig.store.count("PATCH", f"{NODE}/status") == 0


async def test_the_status_is_reported_in_any_case_after_the_report_interval(rig: Rig) -> None:
    rig.settings = replace(rig.settings, status_report_interval_seconds=0.1)
    async with running(rig.make()):
        await until(lambda: rig.store.count("PATCH", f"{NODE}/status") >= 2)


async def test_a_deleted_node_is_made_again(rig: Rig) -> None:
    registration = rig.make()
    async with running(registration):
        first = registration.uid()
        rig.store.drop(NODE)
        await until(lambda: NODE in rig.store.objects)
        await until(lambda: registration.uid() not in (None, first))


async def test_a_node_that_was_deleted_while_the_watch_was_away_is_made_again(rig: Rig) -> None:
    registration = rig.make()
    await registration.register()
    del rig.store.objects[NODE]
    task = asyncio.create_task(registration.run())
    await until(lambda: NODE in rig.store.objects)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_the_node_controller_wrote_is_put_right(rig: Rig) -> None:
    async with running(rig.make()):
        await asyncio.sleep(0.05)
        late = rig.store.objects[NODE]
        for condition in late["status"]["conditions"]:
            condition["status"] = "Unknown"
        rig.store.put(NODE, late)
        await until(lambda: rig.condition("Ready")["status"] == "True")


async def test_a_runtime_that_went_is_reported_at_once_and_its_return_too(rig: Rig) -> None:
    rig.settings = replace(rig.settings, status_interval_seconds=3600.0)
    registration = rig.make()
    async with running(registration):
        rig.problem = "container runtime is down: x"
        registration.wake()
        await until(lambda: rig.condition("Ready")["status"] == "False")
        assert rig.condition("Ready")["reason"] == "KubeletNotReady"
        assert rig.condition("Ready")["message"] == "container runtime is down: x"
        rig.problem = None
        registration.wake()
        await until(lambda: rig.condition("Ready")["status"] == "True")
    assert rig.events.reasons[-2:] == ["NodeNotReady", "NodeReady"]


async def test_another_address_is_reported_before_a_certificate_is_asked_for_it(rig: Rig) -> None:
    rig.settings = replace(rig.settings, node_ip=None)
    registration = rig.make()
    async with running(registration):
        rig.address = "192.0.2.8"
        await until(lambda: rig.names[-1].ips == {"192.0.2.8"})
        assert rig.node["status"]["addresses"] == [
            {"type": "InternalIP", "address": "192.0.2.8"},
            {"type": "Hostname", "address": "host1"},
        ]
    assert registration.info().addresses == ("192.0.2.8",)


async def test_an_unchanged_condition_keeps_its_transition_time(rig: Rig) -> None:
    registration = rig.make()
    await registration.register()
    for condition in rig.node["status"]["conditions"]:
        condition["lastTransitionTime"] = "2020-01-01T00:00:00Z"
    restarted = rig.make()
    await restarted.register()
    await restarted.report(force=True)
    assert rig.condition("Ready")["lastTransitionTime"] == "2020-01-01T00:00:00Z"


async def test_pods_see_the_labels_that_an_admin_adds_and_the_pressures(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    registration = rig.make()
    async with running(registration):
        await asyncio.sleep(0.05)
        changed = rig.store.objects[NODE]
        changed["metadata"]["labels"]["admin"] = "x"
        changed["spec"]["taints"] = [{"key": "closed", "effect": "NoExecute"}]
        rig.store.put(NODE, changed)
        await until(lambda: registration.info().labels.get("admin") == "x")
        assert registration.info().taints == ({"key": "closed", "effect": "NoExecute"},)
        low = replace(PLENTY, memory_available_bytes=1)
        monkeypatch.setattr(wasilet_node.registration, "levels", lambda _: low)
        await until(lambda: [each.resource for each in registration.info().pressures] == ["memory"])
        await until(lambda: rig.condition("MemoryPressure")["status"] == "True")


def judged(levels: Levels) -> dict[str, str]:
    return {verdict.type: verdict.status for verdict in Conditions(lambda: 0.0).judge(levels, None)}


@pytest.mark.parametrize(
    ("change", "pressed"),
    [
        ({}, set()),
        ({"memory_available_bytes": 99 * 1024 * 1024}, {"MemoryPressure"}),
        ({"disk_available_bytes": 4 * GIB}, {"DiskPressure"}),
        ({"disk_available_bytes": 6 * GIB}, set()),
        ({"disk_bytes": 10 * GIB, "disk_available_bytes": 2 * GIB}, set()),
        ({"disk_bytes": 10 * GIB, "disk_available_bytes": GIB - 1}, {"DiskPressure"}),
        ({"inodes_free": 10_000}, {"DiskPressure"}),
        ({"inodes_free": 0}, {"DiskPressure"}),
        ({"inodes": 0, "inodes_free": 0}, set()),
        ({"pids_free": 100}, {"PIDPressure"}),
    ],
)
def test_pressures_are_true_to_the_machine(change: dict[str, int], pressed: set[str]) -> None:
    found = judged(replace(PLENTY, **change))
    assert {type_ for type_, status in found.items() if status == "True"} - {"Ready"} == pressed


def test_a_pressure_is_taken_back_only_when_it_has_been_gone_for_a_while() -> None:
    now = [0.0]
    conditions = Conditions(lambda: now[0])

    def memory(levels: Levels) -> str:
        return {verdict.type: verdict.status for verdict in conditions.judge(levels, None)}["MemoryPressure"]

    assert memory(replace(PLENTY, memory_available_bytes=1)) == "True"
    now[0] = 59.0
    assert memory(PLENTY) == "True"
    now[0] = 60.0
    assert memory(PLENTY) == "False"


def test_pressures_name_the_figures() -> None:
    (pressure,) = pressures(replace(PLENTY, disk_available_bytes=1))
    assert (pressure.resource, pressure.threshold_bytes, pressure.available_bytes) == ("ephemeral-storage", 5 * GIB, 1)
    assert disk_threshold_bytes(10 * GIB) == GIB


def test_a_changed_condition_gets_a_new_transition_time() -> None:
    verdict = Verdict(type="Ready", status="True", reason="r", message="m")
    before = [{"type": "Ready", "status": "False", "lastTransitionTime": "old"}]
    (condition,) = with_times([verdict], before, "now")
    assert condition["lastTransitionTime"] == "now"
    (condition,) = with_times([verdict], [{**before[0], "status": "True"}], "now")
    assert (condition["lastTransitionTime"], condition["lastHeartbeatTime"]) == ("old", "now")


def keeper(store: NodeKube, **more: Any) -> LeaseKeeper:
    return LeaseKeeper(
        **{
            "kube": store,
            "node_name": "n1",
            "node_uid": lambda: "uid-1",
            "duration_seconds": 40,
            "renew_interval_seconds": 0.02,
            "on_unauthorized": lambda: None,
            "retry_seconds": 0.01,
            **more,
        }
    )


async def test_the_lease_is_made_owned_by_the_node_and_renewed() -> None:
    store = NodeKube()
    task = asyncio.create_task(keeper(store).run())
    await until(lambda: store.count("PATCH", LEASE) >= 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    lease = store.objects[LEASE]
    assert lease["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "uid-1"}]
    assert lease["spec"]["leaseDurationSeconds"] == 40
    assert lease["spec"]["holderIdentity"] == "n1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", lease["spec"]["renewTime"])


async def test_a_new_node_owns_the_old_lease() -> None:
    store = NodeKube()
    uid = ["uid-1"]
    made = keeper(store, node_uid=lambda: uid[0])
    await made.renew()
    uid[0] = "uid-2"
    await made.renew()
    assert [each["uid"] for each in store.objects[LEASE]["metadata"]["ownerReferences"]] == ["uid-2"]


async def test_cordoning_is_told_as_kubelet_tells_it(rig: Rig) -> None:
    registration = rig.make()
    async with running(registration):
        rig.store.put(NODE, {**rig.node, "spec": {"unschedulable": True}})
        await until(lambda: "NodeNotSchedulable" in rig.events.reasons)
        rig.store.put(NODE, {**rig.node, "metadata": {**rig.node["metadata"], "labels": {"a": "b"}}})
        rig.store.put(NODE, {**rig.node, "spec": {}})
        await until(lambda: "NodeSchedulable" in rig.events.reasons)
    assert rig.events.uids[rig.events.reasons.index("NodeNotSchedulable")] == rig.node["metadata"]["uid"]
    assert rig.events.reasons.count("NodeNotSchedulable") == rig.events.reasons.count("NodeSchedulable") == 1


async def test_an_answer_without_a_uid_is_survived(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = rig.make()
    await registration.register()

    async def patch(*_arguments: Any, **_more: Any) -> dict[str, Any]:
        return {"kind": "Node", "metadata": {}}

    with monkeypatch.context() as lying:
        lying.setattr(rig.store, "patch", patch)
        await registration.report(force=True)
        assert registration.uid() is None
    await registration.report(force=True)
    assert registration.uid() == rig.node["metadata"]["uid"]


async def test_an_outage_is_survived_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = NodeKube()
    store.failures = [ApiUnavailableError("away"), ApiStatusError(401, "Unauthorized", "who?")]
    told: list[bool] = []
    task = asyncio.create_task(keeper(store, on_unauthorized=lambda: told.append(True)).run())
    await until(lambda: LEASE in store.objects)
    await until(lambda: "is renewed again" in caplog.text)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert caplog.text.count("was not renewed") == 1
    assert told == [True]


async def test_a_node_without_pod_network_states_the_reason_that_it_was_given(rig: Rig) -> None:
    rig.settings = replace(rig.settings, network_absent="it needs root")
    await rig.make().register()
    condition = rig.condition("NetworkUnavailable")
    assert (condition["status"], condition["reason"]) == ("False", "NoPodNetwork")
    assert condition["message"] == "pods share the machine's network: it needs root"
