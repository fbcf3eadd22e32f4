"""Trees that guests made are removed whole, and nothing beside them."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime.safe_path import opened
from wasilet_node.volumes import removal
from wasilet_node.volumes.removal import remove_tree, usage

pytestmark = pytest.mark.unit


def make_deep(folder: Path, levels: int) -> None:
    """A tree far deeper than any path may be long."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d" * 40, dir_fd=fd)
        child = os.open("d" * 40, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_a_tree_deeper_than_any_path_is_removed_with_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    make_deep(tmp_path / "pod", 2000)
    assert usage(tmp_path / "pod").inodes == 2002
    remove_tree(tmp_path, "pod")
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    pod = tmp_path / "pods/pod"
    pod.mkdir(parents=True)
    (pod / "to-folder").symlink_to(outside)
    (pod / "to-file").symlink_to(outside / "precious")
    (pod / "up").symlink_to("../..")
    (pod / "hard").hardlink_to(outside / "precious")
    remove_tree(tmp_path / "pods", "pod")
    assert (outside / "precious").read_text() == "x"
    assert list((tmp_path / "pods").iterdir()) == []


def test_a_pod_folder_that_is_a_link_loses_only_the_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods/pod").symlink_to(tmp_path / "outside")
    remove_tree(tmp_path / "pods", "pod")
    assert (tmp_path / "outside").is_dir()
    assert not (tmp_path / "pods/pod").is_symlink()


def test_odd_names_permissions_and_kinds_are_no_obstacle(tmp_path: Path) -> None:
    pod = tmp_path / "pod"
    pod.mkdir()
    (pod / "inner").mkdir()
    (pod / "inner/file").write_text("x")
    (pod / "inner/shut").mkdir()
    (pod / "inner/shut/file").write_text("x")
    (pod / "inner/shut").chmod(0)
    (pod / "inner").chmod(0o100)
    os.mkfifo(pod / "fifo")
    (pod / ("n" * 255)).write_text("x")
    (pod / "new\nline").write_text("x")
    os.close(os.open(os.fsencode(pod) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY))
    (pod / "empty").mkdir(mode=0)
    remove_tree(tmp_path, "pod")
    assert list(tmp_path.iterdir()) == []


def test_removal_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    pod = tmp_path / "pod"
    (pod / "..removing-0-abc/deep/deeper").mkdir(parents=True)
    (pod / "volumes").mkdir()
    remove_tree(tmp_path, "pod")
    remove_tree(tmp_path, "pod")
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_goes_on_writing_does_not_lead_removal_astray(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    pods = tmp_path / "pods"
    (pods / "pod/volume").mkdir(parents=True)
    done = threading.Event()

    def swap() -> None:
        number = 0
        while not done.is_set():
            number += 1
            name = pods / "pod/volume" / f"x{number % 7}"
            try:
                name.mkdir(exist_ok=True)
                (name / "f").write_text("x")
                (name / "f").unlink()
                name.rmdir()
                name.symlink_to(outside)
                name.unlink()
            except OSError:
                continue

    guest = threading.Thread(target=swap)
    guest.start()
    for _ in range(20):
        try:
            remove_tree(pods, "pod")
        except OSError:
            continue
        finally:
            (pods / "pod/volume").mkdir(parents=True, exist_ok=True)
    done.set()
    guest.join()
    remove_tree(pods, "pod")
    assert (outside / "precious").read_text() == "x"
    assert list(pods.iterdir()) == []


def test_a_folder_swapped_for_a_link_at_the_last_moment_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    victim = tmp_path / "pods/pod/volume/victim"
    victim.mkdir(parents=True)
    rename = os.rename

    def swap_first(source: str, target: str, **more: Any) -> None:
        if source == "victim" and not victim.is_symlink():
            victim.rmdir()
            victim.symlink_to(outside)
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", swap_first)
    remove_tree(tmp_path / "pods", "pod")
    assert (outside / "precious").read_text() == "x"
    assert list((tmp_path / "pods").iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\0b"])
def test_only_a_plain_name_can_be_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="not a name"):
        remove_tree(tmp_path / "x", name)
    assert (tmp_path / "x").is_dir()


def test_usage_counts_blocks_and_hard_links_once_and_nothing_behind_links(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x" * 10_000_000)
    folder = tmp_path / "volume"
    folder.mkdir()
    empty = usage(folder)
    (folder / "file").write_bytes(b"x" * 1_000_000)
    (folder / "hard").hardlink_to(folder / "file")
    (folder / "link").symlink_to(tmp_path / "outside")
    with (folder / "sparse").open("wb") as sparse:
        sparse.truncate(50_000_000)
    found = usage(folder)
    assert 1_000_000 <= found.bytes - empty.bytes < 1_200_000
    assert found.inodes == 4


def test_an_ordinary_user_removes_folders_that_are_shut() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    pod = folder / "pod"
    (pod / "a/b/c").mkdir(parents=True)
    (pod / "a/b/c/file").write_text("x")
    shut = [pod / "a/b/c", pod / "a/b", pod / "a", pod]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                for path in [*shut, pod / "a/b/c/file", folder]:
                    os.chown(path, 65534, 65534)
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            for path in shut:
                path.chmod(0o000 if path != pod else 0o500)
            remove_tree(folder, "pod")
            code = 0 if list(folder.iterdir()) == [] else 2
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(folder)


def test_a_folder_of_very_many_names_is_removed_without_holding_them(tmp_path: Path) -> None:
    root = tmp_path / "pod"
    for number in range(150):
        (root / f"d{number}" / "in" / "deeper").mkdir(parents=True)
        (root / f"f{number}").touch()
    for number in range(150):
        (root / "d0" / f"x{number}").mkdir()
    with opened(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as root_fd:
        assert len(removal.empty_root(root_fd, root.stat().st_dev, 16)) == 16
    remove_tree(tmp_path, "pod", most_pending=16)
    assert not root.exists()
