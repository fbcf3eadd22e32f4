"""That a sandbox is a user of its own, tried by native code in a sandbox of a real supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wasilet_node.runtime import own_user, supervisor_registry, user_namespace
from wasilet_node.runtime.protocol import ContainerConfig, ContainerStatus, Mount
from wasilet_node.settings import NodePaths

from tests.attacks import hostile_sandbox
from tests.attacks.tally import Tally
from tests.unit.node.runtime.guests import SLEEPER, Rig, connected, end_supervisors, eventually

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root's sandboxes have users of their own"),
]

SECONDS = 100.0
"""For what a sandbox does, on a machine that is busy with others."""

SECRET = "a secret of another pod"


@contextlib.asynccontextmanager
async def hostile(data: Path, fences: str) -> AsyncIterator[Rig]:
    """A supervisor whose sandboxes do what their arguments say, behind these fences."""
    data.mkdir(mode=0o700)
    command = [sys.executable, "-P", hostile_sandbox.__file__, fences, f"--data-dir={data}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        await asyncio.to_thread(subprocess.run, command, env=environment, check=True, timeout=60)
        await eventually(lambda: _announced(data), timeout_seconds=30)
        async with connected(data) as rig:
            yield rig
    finally:
        await end_supervisors(NodePaths(data=data))


async def _announced(data: Path) -> bool | None:
    return supervisor_registry.current(data) is not None or None


async def started(rig: Rig, deed: str, facts: object = None, **fields: Any) -> tuple[ContainerConfig, ContainerStatus]:
    config = rig.config(rig.artifact(SLEEPER), argv=(deed, json.dumps(facts)), **fields)
    return config, await rig.client.start(config)


async def said(rig: Rig, config: ContainerConfig) -> Any:
    """The JSON that a container has written."""

    async def whole() -> list[Any] | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return [json.loads(Path(config.log_path).read_text().split(" ", 3)[3])]
        ended = [status for status in await rig.client.list() if status.id == config.id and status.finished_at_ns]
        assert not ended, ended[0].message
        return None

    return (await eventually(whole, timeout_seconds=SECONDS))[0]


@pytest.mark.parametrize("fences", ["user", "user and pids"])
async def test_what_is_anothers_is_refused_to_a_sandbox_without_landlock_and_filter(
    tmp_path: Path, tally: Tally, fences: str
) -> None:
    rows = yaml.safe_load((Path(__file__).parent / "sandbox_user.yaml").read_text())
    async with hostile(tmp_path / "data", fences) as rig:
        _, victim = await started(rig, "nothing", env=(("SECRET", SECRET),))
        outsider = await asyncio.create_subprocess_exec("sleep", "600")
        zygote = next(child for child in psutil.Process(rig.pid()).children() if child.name() == "wasilet-zygote")
        pids = {"sandbox": victim.pid, "supervisor": rig.pid(), "zygote": zygote.pid, "outsider": outsider.pid}
        try:
            pointer = supervisor_registry.current(rig.paths.data)
            assert pointer is not None
            config, _ = await started(rig, "attack", {"pids": pids, "socket": pointer.socket})
            found = await said(rig, config)
        finally:
            outsider.kill()
            await outsider.wait()
        assert [status.state.value for status in await rig.client.list() if status.id == victim.id] == ["running"]
    both = {**rows["once"], **{row.format(of): how for row, how in rows["each"].items() for of in pids}}
    expected = {row: how if isinstance(how, str) else how[fences == "user and pids"] for row, how in both.items()}
    assert found == expected
    tally.count("refused", sum(how != "ok" for how in expected.values()))


async def test_files_outside_of_its_volumes_are_not_there_for_a_sandbox_without_landlock_and_filter(
    tmp_path: Path, tally: Tally
) -> None:
    rows = yaml.safe_load((Path(__file__).parent / "sandbox_root.yaml").read_text())
    for name in ("own", "read-only", "another's"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text(SECRET)
    (tmp_path / "roots").write_text(SECRET)
    async with hostile(tmp_path / "data", "user and root") as rig:
        pointer = supervisor_registry.current(rig.paths.data)
        assert pointer is not None
        theirs = (Mount(host=str(tmp_path / "another's"), guest="/volume"),)
        neighbour, _ = await started(rig, "nothing", mounts=theirs)
        paths = {
            "root's file": str(tmp_path / "roots"),
            "the pointer": str(next(path for path, _ in supervisor_registry.pointers(rig.paths.data))),
            "the socket": pointer.socket,
            "a neighbour's volume": str(tmp_path / "another's" / "precious"),
            "a neighbour's log": neighbour.log_path,
            "a neighbour's compiled file": neighbour.artifact,
        }
        assert [name for name, path in paths.items() if not Path(path).exists()] == []
        # Where the fence fails they are really removed: none may be of this machine's.
        ours = (tmp_path, Path(pointer.socket).parent)
        assert [path for path in paths.values() if not any(Path(path).is_relative_to(each) for each in ours)] == []
        mounts = (
            Mount(host=str(tmp_path / "own"), guest="/own"),
            Mount(host=str(tmp_path / "read-only"), guest="/ro", read_only=True),
        )
        config, _ = await started(rig, "attack_files", {"paths": paths}, mounts=mounts)
        found = await said(rig, config)
    expected = {**rows["once"], **{row.format(of): how for row, how in rows["each"].items() for of in paths}}
    assert found == expected
    assert (tmp_path / "own" / "new").exists()
    tally.count("refused", sum(how != "ok" for how in expected.values()))


async def test_a_sandbox_has_so_many_threads_and_another_as_many_beside_it(tmp_path: Path) -> None:
    """Behind all fences: the filter lets it start threads. Without them, processes are counted, too."""
    async with hostile(tmp_path / "all", "all") as rig:
        for _ in range(2):  # the first one's stay
            config, _ = await started(rig, "threads")
            assert await said(rig, config) == own_user.MAX_THREADS - 1
    async with hostile(tmp_path / "user", "user") as rig:
        config, _ = await started(rig, "processes")
        assert await said(rig, config) == own_user.MAX_THREADS - 1


async def test_files_in_a_volume_are_roots_as_ever(tmp_path: Path) -> None:
    """What semantics guests know: they make root's files, and may change all that are mounted, other users' too."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "theirs").write_text("theirs")
    (tmp_path / "volume" / "theirs").chmod(0o600)
    os.chown(tmp_path / "volume" / "theirs", 12345, 12345)
    async with hostile(tmp_path / "data", "user and root") as rig:
        mounts = (Mount(host=str(tmp_path / "volume"), guest="/volume"),)
        config, status = await started(rig, "files", {"volume": "/mount0"}, mounts=mounts)
        assert await said(rig, config) == {"uid": 0, "gid": 0, "mode": 0o640, "theirs": "theirs and changed"}
        assert status.pid is not None
        uids = psutil.Process(status.pid).uids()
        assert set(uids) == {own_user.FIRST_UID + status.pid}


async def test_a_volume_that_holds_the_data_folder_shows_what_is_there(tmp_path: Path) -> None:
    """A sandbox's own root is made upon a folder of it, which the volume must not show instead."""
    async with hostile(tmp_path / "data", "all") as rig:
        mounts = (Mount(host=str(tmp_path), guest="/volume", read_only=True),)
        config, _ = await started(rig, "names", {"folder": "/mount0/data/compiled"}, mounts=mounts)
        assert await said(rig, config) == [Path(config.artifact).name]
