"""Files of a volume are published all at once, in AtomicWriter's layout."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.volumes import atomic
from wasilet_node.volumes.atomic import FileProjection, PayloadError

pytestmark = pytest.mark.unit


def files(**contents: str) -> dict[str, FileProjection]:
    return {name.replace("__", "/"): FileProjection(text.encode(), 0o644) for name, text in contents.items()}


def visible(folder: Path) -> dict[str, str]:
    """What a reader finds who does not look at names that begin with two dots."""
    found = {}
    for entry in folder.iterdir():
        if entry.name.startswith(".."):
            continue
        for at, _, names in os.walk(entry):
            for name in names:
                file = Path(at, name)
                found[str(file.relative_to(folder))] = file.read_text()
        if entry.is_file():
            found[entry.name] = entry.read_text()
    return found


def test_names_are_relative_links_through_the_data_link(tmp_path: Path) -> None:
    assert atomic.write(tmp_path / "v", files(a="1", sub__b="2"))
    assert (tmp_path / "v/a").readlink() == Path("..data/a")
    assert (tmp_path / "v/sub").readlink() == Path("..data/sub")
    assert str((tmp_path / "v/..data").readlink()).startswith("..2")
    assert visible(tmp_path / "v") == {"a": "1", "sub/b": "2"}


def test_an_update_changes_removes_and_adds_and_leaves_one_folder(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="1", b="1", sub__c="1"))
    assert atomic.write(tmp_path, files(a="2", d="2"))
    assert visible(tmp_path) == {"a": "2", "d": "2"}
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("..")) == ["a", "d"]
    assert len(list(tmp_path.glob("..2*"))) == 1


def test_the_same_payload_again_writes_nothing(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="1"))
    before = (tmp_path / "..data").readlink()
    assert not atomic.write(tmp_path, files(a="1"))
    assert (tmp_path / "..data").readlink() == before


def test_an_empty_payload_is_published_too(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="1"))
    atomic.write(tmp_path, {})
    assert visible(tmp_path) == {}
    assert atomic.is_published(tmp_path)


def test_modes_are_set_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        atomic.write(tmp_path, {"a": FileProjection(b"x", 0o644), "b": FileProjection(b"x", 0o400)})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o400
    assert atomic.write(tmp_path, {"a": FileProjection(b"x", 0o600), "b": FileProjection(b"x", 0o400)})
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("leftover", ["folder", "link", "dangling"])
def test_what_a_killed_write_left_is_cleared(tmp_path: Path, leftover: str) -> None:
    atomic.write(tmp_path, files(a="1"))
    match leftover:
        case "folder":
            (tmp_path / "..2020_01_01_00_00_00.dead").mkdir()
            (tmp_path / "..2020_01_01_00_00_00.dead/a").write_text("half")
        case "link":
            (tmp_path / "..data_tmp").symlink_to("..2020_01_01_00_00_00.dead")
        case "dangling":
            (tmp_path / "..data").unlink()
            (tmp_path / "..data").symlink_to("..gone")
    atomic.write(tmp_path, files(a="2"))
    assert visible(tmp_path) == {"a": "2"}
    assert len([entry for entry in tmp_path.iterdir() if entry.name.startswith("..")]) == 2


def test_a_full_disk_keeps_the_old_files_and_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write(tmp_path, files(a="1"))
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("wasilet_node.volumes.atomic.os.fchmod", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(tmp_path, files(a="2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert visible(tmp_path) == {"a": "1"}


def test_a_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="0", b="0"))
    done = threading.Event()
    mixtures: list[tuple[str, str]] = []

    def read() -> None:
        while not done.is_set():
            try:
                fd = os.open(tmp_path / "..data", os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                mixtures.append(("no", "data"))
                continue
            try:
                pair = tuple(Path(f"/proc/self/fd/{fd}/{name}").read_text() for name in "ab")
            except FileNotFoundError:
                continue  # the folder was replaced and removed: a reader opens again
            finally:
                os.close(fd)
            if pair[0] != pair[1]:
                mixtures.append((pair[0], pair[1]))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        atomic.write(tmp_path, files(a=str(number), b=str(number)))
    done.set()
    reader.join()
    assert mixtures == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "must not be empty"),
        ("/etc/passwd", "must be relative path: /etc/passwd"),
        ("../x", "must not contain '..': ../x"),
        ("a/../b", "must not contain '..': a/../b"),
        ("..data", "must not start with '..': ..data"),
        ("./..data", "must not start with"),
        ("..x/y", "must not start with '..': ..x/y"),
        ("x" * 256, "filenames must be less than or equal to 255 characters"),
        ("/".join("x" * 40 for _ in range(110)), "less than or equal to 4096 characters"),
        (".", "names no file"),
        ("a\0b", "names no file"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused_in_kubelets_words(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(PayloadError) as caught:
        atomic.write(tmp_path / "v", {path: FileProjection(b"x", 0o644)})
    assert message in str(caught.value)
    assert not (tmp_path / "v").exists()


def test_a_file_where_another_needs_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match="a/b needs a folder where a is a file"):
        atomic.write(tmp_path, files(a="1", a__b="2"))


@given(st.text(alphabet="ab./\0", max_size=12))
def test_whatever_is_accepted_stays_below_the_folder(path: str) -> None:
    try:
        clean = atomic.validate_path(path)
    except PayloadError:
        return
    joined = os.path.normpath(f"/v/{clean}")
    assert joined.startswith("/v/")
    assert not clean.startswith("..")
