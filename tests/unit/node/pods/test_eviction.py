"""Who is evicted for what it writes to the node's disk, with the kubelet's messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wasilet_common.cri_log import layout
from wasilet_common.pod_fields import Pod
from wasilet_node.pods import resources
from wasilet_node.pods.ephemeral_storage import RESOURCE, StorageUsage, exceeded, is_limited
from wasilet_node.volumes.removal import Usage, usage

from tests.unit.node.pods.fakes import Fakes, FakeVolumes, eventually, make_pod
from tests.unit.node.pods.rig import condition, phase, running

pytestmark = pytest.mark.unit

MIB = 1 << 20


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(data=tmp_path)


def limited(name: str, limit: str | None, **fields: Any) -> Pod:
    listed = {"limits": {RESOURCE: limit}} if limit is not None else {}
    return {"name": name, "image": "reg/hello:1", "resources": listed, **fields}


def message(pod: Pod, **used: Mapping[str, int]) -> str:
    verdict = exceeded(pod, StorageUsage(**used))
    if verdict is None:
        return ""
    assert (verdict.reason, verdict.disruption) == ("Evicted", "")
    return verdict.message


def test_an_empty_dir_that_outgrew_its_limit() -> None:
    pod = make_pod(volumes=[{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}])
    assert is_limited(pod)
    assert message(pod, volumes={"v": MIB}) == ""
    assert message(pod, volumes={"v": MIB + 1}) == 'Usage of EmptyDir volume "v" exceeds the limit "1Mi". '
    pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] = "0"
    assert message(pod, volumes={"v": MIB}) == ""


def test_a_container_that_wrote_more_than_it_may() -> None:
    pod = make_pod(containers=[limited("a", "1Mi"), limited("b", "3Mi")])
    assert message(pod, containers={"a": MIB, "b": 3 * MIB}) == ""
    assert (
        message(pod, containers={"a": MIB + 1, "b": MIB})
        == 'Container a exceeded its local ephemeral storage limit "1Mi". '
    )


def test_a_sidecar_has_a_limit_of_its_own_but_no_init_container_that_ends() -> None:
    sidecar, ends = limited("s", "1Mi") | {"restartPolicy": "Always"}, limited("i", "1Mi")
    pod = make_pod(containers=[limited("a", "9Mi")], initContainers=[ends, sidecar])
    assert message(pod, containers={"i": 2 * MIB}) == ""
    assert message(pod, containers={"s": 2 * MIB}) == 'Container s exceeded its local ephemeral storage limit "1Mi". '


def test_all_containers_and_volumes_together_against_the_sum_of_the_limits() -> None:
    volumes = [
        {"name": "scratch", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "config", "configMap": {"name": "x"}},
        {"name": "secret", "secret": {"secretName": "x"}},
    ]
    pod = make_pod(containers=[limited("a", "1Mi"), limited("b", "3Mi"), limited("c", None)], volumes=volumes)
    own = {"a": MIB, "b": MIB, "c": MIB}
    beside = {"memory": 9 * MIB, "secret": 9 * MIB}
    assert message(pod, containers=own, volumes={**beside, "scratch": MIB}) == ""
    assert (
        message(pod, containers=own, volumes={**beside, "scratch": MIB, "config": 1})
        == "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "
    )


def test_a_pod_without_limits_may_write_what_the_disk_holds() -> None:
    pod = make_pod(volumes=[{"name": "v", "emptyDir": {}}])
    assert not is_limited(pod)
    assert message(pod, containers={"c": 1 << 50}, volumes={"v": 1 << 50}) == ""


@pytest.mark.parametrize(
    ("regular", "init", "overhead", "total"),
    [
        (["1Gi", "512Mi"], [], None, "1536Mi"),
        (["0", "1M"], [], None, "1M"),
        (["1Gi"], [("3Gi", None)], None, "3Gi"),
        (["1Gi"], [("1Gi", "Always"), ("3Gi", None)], None, "4Gi"),
        (["2Gi"], [("1Gi", "Always"), ("1Gi", None)], None, "3Gi"),
        (["1Gi"], [], "1Gi", "2Gi"),
        ([None], [("1Gi", None)], None, "1Gi"),
        ([None], [], "1Gi", None),
    ],
)
def test_the_limit_of_a_pod_is_counted_as_the_scheduler_counts(
    regular: list[str | None], init: list[tuple[str, str | None]], overhead: str | None, total: str | None
) -> None:
    pod = make_pod(containers=[limited(f"c{i}", limit) for i, limit in enumerate(regular)])
    pod["spec"]["initContainers"] = [
        limited(f"i{i}", limit, **({"restartPolicy": policy} if policy else {}))
        for i, (limit, policy) in enumerate(init)
    ]
    if overhead is not None:
        pod["spec"]["overhead"] = {RESOURCE: overhead}
    assert resources.pod_limit(pod, RESOURCE) == total


class MeasuredVolumes(FakeVolumes):
    """Folders beneath ``root``, as the volume manager has them."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def instance_folder(self, pod: Pod, container: str, attempt: int) -> Path:
        return self.root / str(pod["metadata"]["uid"]) / "containers" / f"{container}.{attempt}"

    async def usage(self, pod: Pod) -> dict[str, Usage]:
        folder = self.root / pod["metadata"]["uid"] / "volumes"
        return {each.name: usage(each) for each in folder.iterdir()} if folder.is_dir() else {}


def write(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_bytes(b"x" * size)


@pytest.mark.parametrize("where", ["log", "root"])
async def test_a_container_over_its_limit_ends_its_pod_and_no_other(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("wasilet_node.pods.manager.HOUSEKEEPING_SECONDS", 0.05)
    volumes = fakes.volumes = MeasuredVolumes(fakes.data / "pods")
    async with running(fakes):
        fakes.kube.add(make_pod("a", containers=[limited("c", "1Mi"), limited("roomy", "9Mi")]))
        fakes.kube.add(make_pod("b", containers=[limited("c", "1Mi")]))
        fakes.kube.add(make_pod("critical", containers=[limited("c", "1Mi")], priority=2_000_001_000))
        await eventually(lambda: len(fakes.runtime.running()) == 4)
        dependencies = fakes.dependencies()
        for name, size in (("a", 2 * MIB), ("b", MIB // 2), ("critical", 5 * MIB)):
            pod = fakes.kube.pod(name)
            folders = {
                "log": layout.folder_of_pod(dependencies.paths.logs, pod) / "c",
                "root": volumes.instance_folder(pod, "c", 0),
            }
            write(folders[where], size)
        await eventually(lambda: phase(fakes) == "Failed")
        await asyncio.sleep(0.2)
        assert phase(fakes, "b") == phase(fakes, "critical") == "Running"
        status = fakes.kube.pod("a")["status"]
        text = 'Container c exceeded its local ephemeral storage limit "1Mi". '
        assert (status["reason"], status["message"]) == ("Evicted", text)
        assert fakes.events.has(f"Evicted: {text}")
        with pytest.raises(StopIteration):
            condition(fakes, "DisruptionTarget")
        assert len([line for line in fakes.events.said if line.startswith("Evicted")]) == 1


class LooseVolumes(MeasuredVolumes):
    """Memory volumes whose size the kernel does not hold."""

    def loose_pods(self) -> list[str]:
        return [folder.name for folder in self.root.iterdir()]

    async def loose_usage(self, pod: Pod) -> dict[str, Usage]:
        return await self.usage(pod)


async def test_a_memory_volume_that_nobody_holds_is_looked_at_between_the_rounds(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasilet_node.pods.manager.HOUSEKEEPING_SECONDS", 3600.0)
    monkeypatch.setattr("wasilet_node.pods.manager.MEMORY_VOLUMES_SECONDS", 0.02)
    volumes = fakes.volumes = LooseVolumes(fakes.data / "pods")
    memory = [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]
    async with running(fakes):
        fakes.kube.add(make_pod("a", volumes=memory))
        fakes.kube.add(make_pod("b", volumes=memory))
        await eventually(lambda: len(fakes.runtime.running()) == 2)
        for name, size in (("a", 2 * MIB), ("b", MIB // 2)):
            write(volumes.root / fakes.kube.pod(name)["metadata"]["uid"] / "volumes" / "v", size)
        await eventually(lambda: phase(fakes, "a") == "Failed")
        assert fakes.kube.pod("a")["status"]["reason"] == "Evicted"
        assert fakes.kube.pod("a")["status"]["message"] == 'Usage of EmptyDir volume "v" exceeds the limit "1Mi". '
        assert phase(fakes, "b") == "Running"
