"""Image volumes of pods."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_common.oci.file_tree import Merger
from wasilet_common.oci.tarball import Budget
from wasilet_node.volumes.base import ContainerConfigError, VolumeError

from tests.unit.node.volumes.rig import Guest, Rig, make_container, make_pod

pytestmark = pytest.mark.unit


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    await rig.close()


def archive(folder: Path, **files: str) -> Path:
    path = folder / "archive.tar"
    with path.open("wb") as out:
        merger = Merger(out, budget=Budget(total_bytes=1 << 20))
        for name, content in files.items():
            (folder / "blob").write_text(content)
            merger.file(f"data/{name}", folder / "blob")
        merger.finish()
    return path


def pod_with(**mount: Any) -> dict[str, Any]:
    return make_pod(
        volumes=[{"name": "v", "image": {"reference": "reg/data:1"}}],
        containers=[make_container({"name": "v", "mountPath": "/v", **mount})],
    )


async def test_a_module_reads_the_files_and_writes_none(rig: Rig, tmp_path: Path) -> None:
    pod = pod_with()
    rig.volumes.check(pod)
    await rig.volumes.setup(pod)
    await rig.volumes.place_image(pod, "v", archive(tmp_path, x="hello"), "sha256:aa")
    guest = Guest(list((await rig.mounts(pod)).values()))
    assert guest.read("/v/data/x") == b"hello"
    with pytest.raises(OSError, match="errno") as caught:
        guest.write("/v/data/new", b"no")
    assert caught.value.errno != errno.ENOENT
    await rig.volumes.teardown(pod["metadata"]["uid"])
    assert not (rig.pods / pod["metadata"]["uid"]).exists()


async def test_a_sub_path_of_an_image_is_there_or_refused(rig: Rig, tmp_path: Path) -> None:
    pod = pod_with(subPath="data")
    await rig.volumes.place_image(pod, "v", archive(tmp_path, x="hello"), "sha256:aa")
    assert Guest(list((await rig.mounts(pod)).values())).read("/v/x") == b"hello"
    with pytest.raises(ContainerConfigError, match='failed to prepare subPath for volumeMount "v"'):
        await rig.mounts(pod_with(subPath="none/such"))


async def test_another_image_is_another_folder_and_what_is_there_is_not_made_twice(rig: Rig, tmp_path: Path) -> None:
    pod = pod_with()
    first = archive(tmp_path, x="1")
    await rig.volumes.place_image(pod, "v", first, "sha256:aa")
    first.unlink()
    again = rig.manager()
    await again.place_image(pod, "v", first, "sha256:aa")
    again.close()
    await rig.volumes.place_image(pod, "v", archive(tmp_path, x="2"), "sha256:bb")
    assert Guest(list((await rig.mounts(pod)).values())).read("/v/data/x") == b"2"


async def test_an_archive_that_is_gone_or_damaged_leaves_nothing_half_made(rig: Rig, tmp_path: Path) -> None:
    pod = pod_with()
    damaged = archive(tmp_path, x="hello")
    damaged.write_bytes(damaged.read_bytes()[:700])
    for path in (damaged, tmp_path / "gone"):
        with pytest.raises(VolumeError, match="failed to mount image volume: "):
            await rig.volumes.place_image(pod, "v", path, "sha256:aa")
    assert list((rig.pods / pod["metadata"]["uid"] / "volumes" / "v").iterdir()) == []
    with pytest.raises(ContainerConfigError, match='cannot find volume "v"'):
        await rig.mounts(pod)
