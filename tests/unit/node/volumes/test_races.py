"""A guest that swaps every name in its volume as fast as it can, while the mounts of its next instance are prepared.

Whatever it swaps in (links out of the volume, files, pipes, folders), nothing outside is made, linked, copied or read.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime.safe_path import open_directory
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.volumes.rig import Rig, make_container, make_pod

pytestmark = pytest.mark.unit

SECONDS = 2.0
SECRET = "not for guests"
NAMES = ("a", "a", "a", "a/sub", "a/f", "a/msg", "a/work", "a/msg/file", "a/work/deep")
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Swapper:
    """Acts inside the volume only, so that whatever appears outside is the node's doing."""

    def __init__(self, volume: Path, outside: Path, seed: int) -> None:
        self._volume = volume
        self._targets = (str(outside), str(outside / "f"), "../" * 12 + str(outside).lstrip("/"))
        self._random = random.Random(seed)

    def swap(self) -> None:
        """Put something else under one of the names."""
        *above, name = self._random.choice(NAMES).split("/")
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            at = self._open(stack, self._volume, None)
            for part in above:
                at = self._open(stack, part, at)
            self._remove(name, at)
            match self._random.randrange(6):
                case 0 | 1:
                    os.symlink(self._random.choice(self._targets), name, dir_fd=at)
                case 2:
                    os.mkfifo(name, dir_fd=at)
                case 3:
                    os.close(os.open(name, FILE, 0o600, dir_fd=at))
                case _:
                    os.mkdir(name, dir_fd=at)
                    inner = self._open(stack, name, at)
                    os.mkdir("sub", dir_fd=inner)
                    os.close(os.open("f", FILE, 0o600, dir_fd=inner))

    @staticmethod
    def _open(stack: contextlib.ExitStack, name: str | Path, at: int | None) -> int:
        fd = os.open(name, FOLDER, dir_fd=at)
        stack.callback(os.close, fd)
        return fd

    def _remove(self, name: str, at: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=at)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = self._open(stack, name, at)
            for inner in list(stack.enter_context(os.scandir(fd))):
                self._remove(inner.name, fd)
            os.rmdir(name, dir_fd=at)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    for name in ("f", "sub/f"):
        (folder / name).write_text(SECRET)
    return folder


@contextlib.contextmanager
def swapping(volume: Path, outside: Path) -> Iterator[None]:
    done = threading.Event()

    def swap(swapper: Swapper) -> None:
        # The pause leaves the interpreter to the one who prepares, in the middle of it.
        while not done.wait(0.0002):
            swapper.swap()

    threads = [threading.Thread(target=swap, args=(Swapper(volume, outside, seed),)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


async def test_a_guest_that_swaps_names_gets_nothing_from_outside_and_makes_nothing_there(
    tmp_path: Path, outside: Path
) -> None:
    rig = Rig(tmp_path)
    mounts: list[dict[str, Any]] = [
        {"name": "e", "mountPath": "/v"},
        {"name": "e", "mountPath": "/w", "subPath": "a/sub"},
        {"name": "e", "mountPath": "/x/f", "subPath": "a/f"},
        {"name": "e", "mountPath": "/y/f", "subPath": "a/f", "readOnly": True},
    ]
    containers = [
        make_container(*mounts, name="subpaths"),
        make_container(mounts[0], name="folder", workingDir="/v/a/work/deep"),
        make_container(mounts[0], name="message", terminationMessagePath="/v/a/msg/file"),
    ]
    pod = make_pod(volumes=[{"name": "e", "emptyDir": {}}], containers=containers)
    await rig.volumes.setup(pod)
    volume = rig.pods / pod["metadata"]["uid"] / "volumes" / "e"
    before = below(outside)
    prepared = refused = 0
    until = time.monotonic() + SECONDS
    try:
        with swapping(volume, outside):
            while time.monotonic() < until:
                attempt = prepared + refused
                container = containers[attempt % len(containers)]
                try:
                    found = rig.volumes.mounts(pod, container, {}, attempt=attempt)
                except ContainerConfigError:
                    refused += 1
                else:
                    prepared += 1
                    for mount in found:
                        with contextlib.suppress(OSError):
                            fd = open_directory(mount.root or mount.host, mount.host)
                            assert not Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(outside)
                            os.close(fd)
                for file in (rig.pods / pod["metadata"]["uid"] / "containers").rglob("*"):
                    if file.is_file() and not file.is_symlink():
                        assert SECRET not in file.read_text()
                assert SECRET not in rig.volumes.termination_message(pod, container, attempt=attempt)
        await rig.volumes.teardown(pod["metadata"]["uid"])
    finally:
        await rig.close()
    assert prepared
    assert refused
    assert below(outside) == before
    assert not volume.exists()
