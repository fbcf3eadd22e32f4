"""Variables from files of a volume (``fileKeyRef``)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet_node.pods.envfiles import MAX_BYTES, EnvFileError, value_of
from wasilet_node.pods.environment import EnvironmentBuilder
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.volumes.rig import Rig, make_container, make_pod

pytestmark = pytest.mark.unit

CASES = yaml.safe_load((Path(__file__).parent / "cases" / "envfiles.yaml").read_text())


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_what_a_file_says(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(EnvFileError) as caught:
            value_of(case["text"], case["key"])
        assert case["error"] in str(caught.value)
    else:
        assert value_of(case["text"], case["key"]) == case["value"]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    rig.references.start()
    yield rig
    await rig.close()


async def variable(rig: Rig, pod: dict[str, Any]) -> str | None:
    environment = await EnvironmentBuilder(rig.references, rig.volumes).build(
        pod, pod["spec"]["containers"][0], pod_ips=["10.0.0.5"], host_ips=["10.0.0.5"], allocatable={}
    )
    return environment.get("X")


def reading(volume: str = "v", path: str = "config.env", *, optional: bool | None = None) -> dict[str, Any]:
    """A pod that takes ``X`` from a file of a volume that no container mounts."""
    reference: dict[str, Any] = {"volumeName": volume, "path": path, "key": "KEY"}
    if optional is not None:
        reference["optional"] = optional
    container = make_container(env=[{"name": "X", "valueFrom": {"fileKeyRef": reference}}])
    volumes = [{"name": "v", "emptyDir": {}}, {"name": "c", "configMap": {"name": "settings"}}]
    return make_pod(volumes=volumes, containers=[container], enableServiceLinks=False)


def folder(rig: Rig) -> Path:
    return rig.pods / "pod-1" / "volumes" / "v"


async def test_a_variable_comes_from_a_file_that_an_init_container_wrote(rig: Rig) -> None:
    pod = reading(path="deep/./config.env")
    await rig.volumes.setup(pod)
    (folder(rig) / "deep").mkdir()
    (folder(rig) / "deep" / "config.env").write_text("OTHER='1'\nKEY='from a file'\n")
    assert await variable(rig, pod) == "from a file"


async def test_a_variable_comes_from_a_config_map_s_file(rig: Rig) -> None:
    rig.kube.config_map("settings", {"config.env": "KEY='published'\n"})
    pod = reading("c")
    await rig.volumes.setup(pod)
    assert await variable(rig, pod) == "published"


@pytest.mark.parametrize("text", [None, "", "OTHER='1'", "KEY=''"], ids=["no file", "empty", "no key", "no value"])
async def test_what_is_not_there_is_an_error_unless_it_is_optional(rig: Rig, text: str | None) -> None:
    await rig.volumes.setup(reading())
    if text is not None:
        (folder(rig) / "config.env").write_text(text)
    assert await variable(rig, reading(optional=True)) is None
    for pod in (reading(), reading(optional=False)):
        with pytest.raises(ContainerConfigError, match=r'key "KEY" not found in file "config\.env"'):
            await variable(rig, pod)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"KEY=1", "at line 1: value must be enclosed in single quotes"),
        (b"KEY='\xff'", "not UTF-8"),
        (b"KEY='" + b"x" * MAX_BYTES + b"'", "more than 1048576 bytes"),
    ],
    ids=["form", "not text", "too long"],
)
async def test_a_file_of_another_form_is_an_error_though_it_is_optional(rig: Rig, data: bytes, message: str) -> None:
    pod = reading(optional=True)
    await rig.volumes.setup(pod)
    (folder(rig) / "config.env").write_bytes(data)
    with pytest.raises(ContainerConfigError, match=message):
        await variable(rig, pod)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../../../secret.env", "loop"])
async def test_a_link_does_not_lead_out_of_the_volume(rig: Rig, tmp_path: Path, target: str) -> None:
    (tmp_path / "data" / "secret.env").parent.mkdir(exist_ok=True)
    (tmp_path / "data" / "secret.env").write_text("KEY='not of this pod'")
    pod = reading()
    await rig.volumes.setup(pod)
    (folder(rig) / "config.env").symlink_to(target)
    (folder(rig) / "loop").symlink_to("config.env")
    with pytest.raises(ContainerConfigError, match="cannot read"):
        await variable(rig, pod)


async def test_a_fifo_is_not_opened(rig: Rig) -> None:
    pod = reading()
    await rig.volumes.setup(pod)
    os.mkfifo(folder(rig) / "config.env")
    with pytest.raises(ContainerConfigError, match="not a regular file"):
        await variable(rig, pod)


async def test_an_unknown_volume_is_named(rig: Rig) -> None:
    await rig.volumes.setup(reading())
    with pytest.raises(ContainerConfigError, match='cannot find the volume "gone" referenced by FileKeyRef'):
        await variable(rig, reading("gone"))
