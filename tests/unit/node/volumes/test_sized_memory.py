"""Memory volumes with a size: held by the kernel where root, looked at often where not; nothing stays mounted."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime import linux
from wasilet_node.volumes import empty_dir, sized_memory

from tests.unit.node.volumes.rig import Guest, Rig
from tests.unit.node.volumes.test_kinds import pod_with

pytestmark = pytest.mark.unit
CAP_SYS_ADMIN = 21
may_mount = pytest.mark.skipif(
    not linux.effective_capabilities() >> CAP_SYS_ADMIN & 1, reason="only root mounts file systems"
)

MIB = 2**20
NO_SPACE = 51
"""WASI's errno NOSPC."""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, ttl_seconds=0.0)
    yield rig
    await rig.volumes.teardown("pod-1")
    await rig.close()


def memory_pod(limit: str | None = "1Mi") -> dict[str, Any]:
    source = {"medium": "Memory"} | ({"sizeLimit": limit} if limit else {})
    return pod_with({"emptyDir": source})


def mounted(rig: Rig) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split(" ")[4]).startswith(str(rig.memory))]


async def guest_of(rig: Rig, pod: dict[str, Any], *, attempt: int = 0) -> Guest:
    return Guest(list((await rig.mounts(pod, attempt=attempt)).values()))


def fill(guest: Guest, files: int, data: bytes) -> None:
    for number in range(files):
        guest.write(f"/v/{number}", data)


@may_mount
async def test_a_guest_cannot_write_more_than_the_size(rig: Rig) -> None:
    pod = memory_pod()
    guest = await guest_of(rig, pod)
    with pytest.raises(OSError, match=f"WASI errno {NO_SPACE}"):
        fill(guest, 100, b"x" * 50_000)
    folder = Path((await rig.mounts(pod))["/v"].host)
    assert MIB * 0.8 < sum(path.stat().st_size for path in folder.iterdir()) <= MIB
    assert await rig.volumes.loose_usage(pod) == {}
    assert folder.stat().st_mode & 0o777 == 0o700


@may_mount
async def test_empty_files_have_a_limit_too(rig: Rig) -> None:
    guest = await guest_of(rig, memory_pod())
    with pytest.raises(OSError, match=f"WASI errno {NO_SPACE}"):
        fill(guest, 3000, b"")


@may_mount
async def test_what_was_written_outlives_container_and_agent(rig: Rig) -> None:
    pod = memory_pod()
    (await guest_of(rig, pod)).write("/v/file", b"kept")
    rig.volumes.close()
    rig.volumes = rig.manager()
    assert (await guest_of(rig, pod, attempt=1)).read("/v/file") == b"kept"
    assert len(mounted(rig)) == 1


@may_mount
async def test_nothing_stays_mounted_behind_a_pod_or_a_node(rig: Rig) -> None:
    await guest_of(rig, memory_pod())
    assert len(mounted(rig)) == 1
    await rig.volumes.teardown("pod-1")
    assert mounted(rig) == []
    await guest_of(rig, memory_pod())
    rig.volumes._pod_dirs.clear_memory()
    assert mounted(rig) == []
    assert list(rig.memory.iterdir()) == []


async def test_a_volume_without_a_size_is_a_folder(rig: Rig) -> None:
    pod = memory_pod(None)
    (await guest_of(rig, pod)).write("/v/file", b"x")
    assert mounted(rig) == []
    assert await rig.volumes.loose_usage(pod) == {}
    assert rig.volumes.loose_pods() == []


async def test_who_may_not_mount_gets_a_folder_that_is_looked_at(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(empty_dir, "hold_size", lambda _folder, _size: False)
    pod = memory_pod()
    (await guest_of(rig, pod)).write("/v/file", b"x" * 20_000)
    assert mounted(rig) == []
    assert (await rig.volumes.loose_usage(pod))["vol"].bytes >= 20_000
    assert rig.volumes.loose_pods() == [pod["metadata"]["uid"]]
    await rig.volumes.teardown(pod["metadata"]["uid"])
    assert rig.volumes.loose_pods() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may mount")
def test_an_ordinary_user_is_told_that_it_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    assert sized_memory.hold_size(folder, MIB) is False
