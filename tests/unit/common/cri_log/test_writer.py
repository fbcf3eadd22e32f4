"""CRI log lines and rotation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.cri_log.layout import rotated_files
from wasilet_common.cri_log.record import MAX_LINE_BYTES
from wasilet_common.cri_log.writer import LineFramer, LogFile
from wasilet_common.time_format import rfc3339_nano

pytestmark = pytest.mark.unit

STAMP = b"2024-01-02T03:04:05.000000006Z"


def parse(data: bytes) -> list[tuple[bytes, bytes]]:
    """Tag and text of each CRI line."""
    found = []
    for line in data.split(b"\n")[:-1]:
        stamp, stream, tag, text = line.split(b" ", 3)
        assert (stamp, stream) == (STAMP, b"stdout")
        found.append((tag, text))
    return found


def test_timestamps_have_nine_digits() -> None:
    assert rfc3339_nano(1_704_164_645_000_000_006) == STAMP


@given(st.lists(st.binary(max_size=40000).map(lambda data: data.replace(b"\r", b"\n")), max_size=8))
def test_whatever_is_written_in_whatever_pieces_comes_back_whole(pieces: list[bytes]) -> None:
    framer = LineFramer("stdout")
    lines = parse(b"".join(framer.feed(piece, STAMP) for piece in pieces) + framer.finish(STAMP))
    written = b"".join(pieces)
    joined = b"".join(text + (b"\n" if tag == b"F" else b"") for tag, text in lines)
    assert joined == written
    assert all(len(text) <= MAX_LINE_BYTES for _, text in lines)
    assert all(tag == b"F" or len(text) == MAX_LINE_BYTES for tag, text in lines[:-1])


def test_a_line_of_exactly_the_limit_is_whole() -> None:
    assert parse(LineFramer("stdout").feed(b"x" * MAX_LINE_BYTES + b"\n", STAMP)) == [(b"F", b"x" * MAX_LINE_BYTES)]


def test_an_endless_line_does_not_pile_up() -> None:
    framer = LineFramer("stdout")
    for _ in range(100):
        framer.feed(b"x" * 65536, STAMP)
        assert len(framer._pending) <= MAX_LINE_BYTES


def test_a_full_file_is_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / "pod" / "main" / "0.log"
    log = LogFile(path, max_size_bytes=100, max_files=3)
    for number in range(50):
        log.write(b"%049d\n" % number)
    log.close()
    old = rotated_files(path)
    assert len(old) == 2
    text = b"".join(file.read_bytes() for file in [*old, path])
    numbers = [int(line) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 50))
    assert path.stat().st_mode & 0o777 == 0o600


def test_one_file_means_that_only_the_current_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogFile(path, max_size_bytes=10, max_files=1)
    for _ in range(5):
        log.write(b"x" * 10)
    log.close()
    assert rotated_files(path) == []
    assert path.stat().st_size == 10


def test_other_attempts_are_not_rotated_files_of_this_one(tmp_path: Path) -> None:
    for name in ("1.log", "10.log", "1.log.20240102-030405.000000001"):
        (tmp_path / name).touch()
    assert [path.name for path in rotated_files(tmp_path / "1.log")] == ["1.log.20240102-030405.000000001"]
    assert rotated_files(tmp_path / "0.log") == []


def test_a_file_that_exists_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"before\n")
    log = LogFile(path, max_size_bytes=1000, max_files=2)
    log.write(b"after\n")
    log.close()
    assert path.read_bytes() == b"before\nafter\n"


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.log"
    log = LogFile(path, max_size_bytes=1000, max_files=2)
    real, calls = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(descriptor, data[:3])
        if calls == 2:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data)

    monkeypatch.setattr("wasilet_common.cri_log.writer.os.write", full)
    log.write(b"broken\n")
    log.write(b"whole\n")
    log.close()
    assert path.read_bytes() == b"bro\nwhole\n"
    assert log.dropped_bytes == 4


def test_a_disk_that_stays_full_joins_no_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.log"
    log = LogFile(path, max_size_bytes=1000, max_files=2)
    real, answers = os.write, [3, 0, 0, 100]

    def full(descriptor: int, data: memoryview) -> int:
        room = answers[0] if answers[0] != 3 else answers.pop(0)
        if answers[0] == 0 and room == 0:
            answers.pop(0)
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data[:room])

    monkeypatch.setattr("wasilet_common.cri_log.writer.os.write", full)
    for line in (b"broken\n", b"lost\n", b"whole\n"):
        log.write(line)
    log.close()
    assert path.read_bytes() == b"bro\nwhole\n"


def test_a_rotation_that_finds_no_room_leaves_the_file_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.log"
    log = LogFile(path, max_size_bytes=5, max_files=2)
    log.write(b"first\n")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("wasilet_common.cri_log.writer.os.open", full)
    log.write(b"second\n")
    log.close()
    assert (path.read_bytes(), rotated_files(path)) == (b"first\nsecond\n", [])


def test_a_log_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"0\.log"):
        LogFile(tmp_path / "0.log", max_size_bytes=1000, max_files=2)
