"""Image volumes as pods meet them: pulled before the container that mounts them, whose waiting they explain."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet_node.images.model import ImageError
from wasilet_node.volumes.base import VolumeError

from tests.unit.node.pods.fakes import Fakes, Pod, eventually, make_pod
from tests.unit.node.pods.rig import container, running

pytestmark = pytest.mark.unit


def pod_with_image_volumes() -> Pod:
    mounts = [{"name": "data", "mountPath": "/data"}]
    return make_pod(
        containers=[
            {"name": "c", "image": "reg/hello:1", "volumeMounts": mounts},
            {"name": "d", "image": "reg/hello:1"},
        ],
        volumes=[
            {"name": "data", "image": {"reference": "reg/data:1", "pullPolicy": "Always"}},
            {"name": "unused", "image": {"reference": "reg/unused:1"}},
        ],
    )


async def test_an_image_volume_is_had_before_the_container_that_mounts_it(tmp_path: Path) -> None:
    fakes = Fakes(data=tmp_path)
    fakes.kube.add(pod_with_image_volumes())
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes).get("state", {}))
        await eventually(lambda: "running" in container(fakes, "d").get("state", {}))
    assert fakes.volumes.placed == [("data", "sha256:2")]
    asked = [reference for reference, _ in fakes.images.asked]
    assert asked.index("reg/data:1") < asked.index("reg/hello:1")
    assert "reg/unused:1" not in asked


FAILING_VOLUMES: list[tuple[Exception, str, str]] = [
    (ImageError("ImagePullBackOff", "Back-off pulling"), "ImagePullBackOff", "Back-off pulling"),
    (VolumeError("no space left"), "CreateContainerError", 'volume "data": no space left'),
]


@pytest.mark.parametrize(("error", "reason", "message"), FAILING_VOLUMES)
async def test_without_its_image_volume_only_that_container_waits(
    tmp_path: Path, error: Exception, reason: str, message: str
) -> None:
    fakes = Fakes(data=tmp_path)
    if isinstance(error, ImageError):
        fakes.images.errors["reg/data:1"] = error
    else:
        fakes.volumes.image_error = error
    fakes.kube.add(pod_with_image_volumes())
    async with running(fakes):
        await eventually(lambda: "running" in container(fakes, "d").get("state", {}))
        await eventually(lambda: container(fakes)["state"].get("waiting", {}).get("reason") == reason)
        assert container(fakes)["state"]["waiting"]["message"] == message
