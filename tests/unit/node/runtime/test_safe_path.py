"""No path leads out of its root, whatever links, names and swaps a guest comes up with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wasilet_node.runtime.safe_path import (
    EscapeError,
    components,
    make_directories,
    open_directory,
    open_root,
    opened,
    read_tail,
    resolve,
    walk,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/file").write_text("0123456789")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    (folder / "to-a").symlink_to("a")
    (folder / "a/back").symlink_to("../a/b")
    (folder / "a/out").symlink_to("../../outside")
    (folder / "absolute").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("a/new")
    return folder


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    with opened(open_root(root)) as fd:
        yield fd


@pytest.mark.parametrize("path", ["/a", "..", "a/..", "a/../b", "a\0b", "../outside"])
def test_names_that_climb_are_refused(path: str) -> None:
    with pytest.raises(EscapeError):
        components(path)


def test_what_is_longer_than_any_path_is_no_path() -> None:
    assert len(components("a/" * 2047)) == 2047
    with pytest.raises(OSError, match="too long") as caught:
        components("a/" * 2048)
    assert len(str(caught.value)) < 100, "the path itself would flood a status"


def test_a_path_of_many_names_is_resolved_in_as_many_steps(root_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("d",) * 500
    make_directories(root_fd, names, 0o755)
    calls = 0
    real = os.open

    def counted(*arguments: Any, **named: Any) -> int:
        nonlocal calls
        calls += 1
        return real(*arguments, **named)

    monkeypatch.setattr(os, "open", counted)
    assert resolve(root_fd, "d/" * 500) == (names, None)
    assert calls < 1500


def test_links_that_climb_and_descend_without_end_are_given_up_on(root: Path, root_fd: int) -> None:
    (root / "long").symlink_to("a/../" * 700 + "a")
    with pytest.raises(OSError, match="too long"):
        resolve(root_fd, "long/long")
    with pytest.raises(OSError, match="too long"):
        resolve(root_fd, "d/" * 1025)


def test_a_walk_follows_no_link(root_fd: int) -> None:
    with pytest.raises(NotADirectoryError):
        walk(root_fd, ("to-a", "file"))
    with opened(walk(root_fd, ("to-a",))) as fd:
        assert os.readlink("", dir_fd=fd) == "a"
    with pytest.raises(EscapeError):
        walk(root_fd, ("..",))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b", (("a", "b"), None)),
        ("to-a/back", (("a", "b"), None)),
        ("./a//b/", (("a", "b"), None)),
        ("to-a/new/deeper", (("a", "new", "deeper"), 1)),
        ("dangling/x", (("a", "new", "x"), 1)),
        ("", ((), None)),
    ],
)
def test_links_inside_are_resolved(root_fd: int, path: str, expected: tuple[tuple[str, ...], int | None]) -> None:
    assert resolve(root_fd, path) == expected


@pytest.mark.parametrize("path", ["a/out", "a/out/file", "absolute", "absolute/file", "to-a/out/new", "loop"])
def test_links_that_lead_out_are_refused(root_fd: int, path: str) -> None:
    with pytest.raises(OSError, match=r"leads out|symbolic links"):
        resolve(root_fd, path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    path=st.lists(
        st.sampled_from(
            ["a", "b", "..", ".", "", "to-a", "back", "out", "absolute", "loop", "file", "dangling", "new"]
        ),
        max_size=6,
    ).map("/".join)
)
def test_whatever_is_resolved_lies_below_the_root(root: Path, path: str) -> None:
    with opened(open_root(root)) as fd:
        try:
            names, missing = resolve(fd, path)
        except OSError:
            return
    real = Path(os.path.realpath(root.joinpath(*names)))
    assert real == root.joinpath(*names)
    assert missing is not None or real.exists()


def test_a_folder_is_opened_by_its_real_path_only(root: Path) -> None:
    with opened(open_directory(root, root / "a/b")) as fd:
        assert Path(f"/proc/self/fd/{fd}").readlink() == root / "a/b"
    for path in (root / "to-a", root / "a/out", root / "a/file", root.parent / "outside", root / "none"):
        with pytest.raises(OSError, match=r"."):
            open_directory(root, path)


def test_folders_are_made_with_the_mode_and_not_through_links(root: Path, root_fd: int) -> None:
    before = os.umask(0o077)
    try:
        make_directories(root_fd, ("a", "x", "y"), 0o750)
    finally:
        os.umask(before)
    assert (root / "a/x/y").stat().st_mode & 0o777 == 0o750
    with pytest.raises(OSError, match=r"."):
        make_directories(root_fd, ("absolute", "new"), 0o755)
    assert not (root.parent / "outside/new").exists()


def test_the_tail_of_regular_files_only_is_read(root: Path, root_fd: int) -> None:
    assert read_tail(root_fd, ("a", "file"), 4) == b"6789"
    assert read_tail(root_fd, ("a", "file"), 100) == b"0123456789"
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("a/file")
    for names in (("pipe",), ("link",), ("a",)):
        with pytest.raises(OSError, match="not a regular file"):
            read_tail(root_fd, names, 4)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left_open_by_what_fails(root: Path, root_fd: int) -> None:
    before = open_descriptors()
    for path in ("a/out", "loop", "to-a/new", "none/x/y", "a/file/x"):
        with pytest.raises(OSError, match=r"."):
            open_directory(root, root / path)
        with contextlib.suppress(OSError):
            resolve(root_fd, path)
    assert open_descriptors() == before
