"""Logs that are kept on disk, and several of them read as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasilet.testing import log_spool
from wasilet.testing.log_match import Judge
from wasilet.testing.log_spool import LogSpool, LogTail, SpoolError, line_of, nanoseconds_of, text_of
from wasilet.testing.merged_log import LogLines, Reading

from tests.unit.harness.testing.log_rig import START_NS, stamped

pytestmark = pytest.mark.unit

Entry = tuple[int, int, str]
"""Which log, milliseconds since the line before in it, text."""

ENTRIES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50), st.sampled_from("abcd")), max_size=60)


@pytest.mark.parametrize(
    ("raw", "at", "text"),
    [
        (b"1970-01-01T00:00:01.5Z hello there", 1.5, "hello there"),
        (b"1970-01-01T01:00:01.123456789+01:00 x", 1.123456789, "x"),
        (b"1970-01-01T00:00:01Z ", 1.0, ""),
        (b"no stamp at all", 0.0, "no stamp at all"),
        (b"", 0.0, ""),
        (b"1970-13-41T00:00:01Z x", 0.0, "x"),
        (b"1970-01-01T00:00:01Z \xff", 1.0, "\ufffd"),
    ],
)
def test_a_line_is_taken_apart(raw: bytes, at: float, text: str) -> None:
    assert line_of(raw).at == pytest.approx(at)
    assert line_of(raw).text == text


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=80), st.integers(1, 400))
def test_every_line_can_be_read_again_wherever_it_is_kept(lines: list[bytes], memory_bytes: int) -> None:
    spool = LogSpool(memory_bytes=memory_bytes)
    for line in lines:
        spool.append(line + b"\n")
    assert list(spool.lines()) == lines
    assert spool.count == len(lines)
    for start in range(0, len(lines), 7):
        assert list(spool.lines(start, start + 5)) == lines[start : start + 5]
    assert [line.text for line in spool.tail(3)] == [text_of(line) for line in lines[-3:]]
    assert (spool.first, spool.last) == ((lines[0], lines[-1]) if lines else (None, None))


def test_lines_longer_than_a_block_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_spool, "BLOCK_BYTES", 16)
    spool = LogSpool(memory_bytes=1)
    spool.append(b"short\n" + b"x" * 1000 + b"\nend\n")
    assert [len(line) for line in spool.lines()] == [5, 1000, 3]


def test_a_log_on_disk_has_no_name_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    spool = LogSpool(memory_bytes=1)
    spool.append(b"hello\n")
    assert list(tmp_path.iterdir()) == []
    assert list(spool.lines()) == [b"hello"]


def test_a_log_that_is_too_long_to_be_kept_is_an_error_and_keeps_what_it_has() -> None:
    spool = LogSpool(max_bytes=10)
    spool.append(b"12345\n")
    with pytest.raises(SpoolError, match="longer than"):
        spool.append(b"12345\n")
    assert list(spool.lines()) == [b"12345"]


def test_a_tail_keeps_the_end_the_first_line_and_the_count() -> None:
    tail = LogTail(lines=3)
    for number in range(10):
        tail.append(f"{number}\n".encode())
    assert [line.text for line in tail.tail(2)] == ["8", "9"]
    assert (tail.count, tail.first, tail.last) == (10, b"0", b"9")


def logs_of(entries: list[Entry]) -> tuple[list[LogSpool], list[list[tuple[int, str]]]]:
    """The logs, empty yet, and for each its lines with their times. No two lines have the same time."""
    clocks = [0, 1, 2]
    logs: list[list[tuple[int, str]]] = [[], [], []]
    for log, pause, text in entries:
        clocks[log] += 3 * pause
        logs[log].append((START_NS + clocks[log], text))
    return [LogSpool(memory_bytes=200) for _ in range(3)], logs


@settings(deadline=None, max_examples=200)
@given(ENTRIES, st.lists(st.integers(0, 2), min_size=60, max_size=60), st.lists(st.sampled_from("abcd"), min_size=1))
def test_the_order_of_arrival_changes_nothing(entries: list[Entry], arrivals: list[int], order: list[str]) -> None:
    """Whatever comes first over the wire, the verdict is that on all lines in the order of their times."""
    spools, logs = logs_of(entries)
    judge = Judge(in_order=order[:4], contains=["a"], absent=["d"])
    reading = Reading(judge)
    pending = [list(log) for log in logs]
    rest = [number for number, log in enumerate(pending) for _ in log]
    for log in [*arrivals, *rest]:
        if pending[log]:
            ns, text = pending[log].pop(0)
            spools[log].append(stamped(text, ns))
            reading.read([spool for spool in spools if spool.count])
    whole = [text for _, text in sorted(line for log in logs for line in log)]
    expected = Judge(in_order=order[:4], contains=["a"], absent=["d"])
    expected.feed(whole)
    assert [want.line for want in judge.wanted] == [want.line for want in expected.wanted]
    assert (judge.forbidden, judge.forbidden_count) == (expected.forbidden, expected.forbidden_count)
    lines = LogLines(spools)
    assert list(lines) == whole
    for chosen in (slice(-5, None), slice(3, 8), slice(None, None, 2), slice(8, 3)):
        assert lines[chosen] == whole[chosen]
    assert all(lines[index] == whole[index] for index in range(-len(whole), len(whole), 9))
    assert lines == whole


def test_a_late_line_is_judged_again_from_near_its_place_and_not_from_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = LogSpool(), LogSpool()
    first.append(b"".join(stamped(f"line {number}", START_NS + number * 1000) for number in range(50_000)))
    second.append(stamped("begin", START_NS - 1))
    judge = Judge(contains=["never"])
    reading = Reading(judge)
    reading.read([first, second])
    fed = 0
    feed = Judge.feed

    def counted(self: Judge, lines: object) -> None:
        nonlocal fed
        fed += 1
        feed(self, lines)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "feed", counted)
    second.append(stamped("late", START_NS + 49_990 * 1000 + 1))
    reading.read([first, second])
    assert judge.seen == 50_002
    assert 1 <= fed <= 5000


def test_lines_are_compared_as_a_list_is() -> None:
    spool = LogSpool()
    spool.append(b"a\nb\n")
    lines = LogLines([spool])
    assert lines == ["a", "b"]
    assert lines == ("a", "b")
    assert [lines] == [["a", "b"]]
    assert lines != ["a"]
    assert lines != "ab"
    assert repr(lines) == "['a', 'b']"
    with pytest.raises(IndexError):
        lines[2]
    spool.append(b"c\n")
    assert len(lines) == 2, "what came later is not in it"


def test_nanoseconds_are_kept_whole() -> None:
    assert nanoseconds_of(stamped("x", START_NS + 123_456_789)) == START_NS + 123_456_789
