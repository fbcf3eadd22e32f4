"""Reading CRI log files: rendering, tails, rotated and compressed files."""

from __future__ import annotations

import contextlib
import gzip
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.cri_log.reader import open_log, skip_to_tail
from wasilet_common.cri_log.render import Renderer, RenderOptions
from wasilet_common.time_format import parse_rfc3339_nano, rfc3339_nano

pytestmark = pytest.mark.unit

STAMP = "2025-01-01T00:00:00.000000000Z"


def line(text: str, *, stream: str = "stdout", tag: str = "F", stamp: str = STAMP) -> bytes:
    return f"{stamp} {stream} {tag} {text}\n".encode()


def render(data: bytes, **options: object) -> bytes:
    renderer = Renderer(RenderOptions(**options))  # type: ignore[arg-type]
    return renderer.feed(data) + renderer.finish()


def tail(path: Path, lines: int) -> bytes:
    with contextlib.ExitStack() as stack:
        renderer = Renderer(RenderOptions())
        segments = skip_to_tail(open_log(path, stack), lines)
        out = b"".join(renderer.feed(chunk) for segment in segments for chunk in segment.chunks())
        return out + renderer.finish()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T01:00:00.000000001+01:00", 1),
        ("1969-12-31T23:00:00-01:00", 0),
        ("2025-02-30T00:00:00Z", None),
        ("yesterday", None),
        ("2025-01-01T00:00:00", None),
    ],
)
def test_timestamps_are_read_to_the_nanosecond(text: str, expected: int | None) -> None:
    assert parse_rfc3339_nano(text.encode()) == expected


@given(st.integers(min_value=0, max_value=253_402_300_799 * 1_000_000_000))
def test_a_timestamp_survives_being_written_and_read(nanoseconds: int) -> None:
    assert parse_rfc3339_nano(rfc3339_nano(nanoseconds)) == nanoseconds


def test_pieces_of_a_line_are_joined_and_stamped_once() -> None:
    data = line("one ", tag="P") + line("line", tag="F") + line("two")
    assert render(data) == b"one line\ntwo\n"
    assert render(data, timestamps=True) == f"{STAMP} one line\n{STAMP} two\n".encode()


def test_text_is_kept_byte_for_byte() -> None:
    data = STAMP.encode() + b" stdout F  two  spaces \xff\x00\r\n"
    assert render(data) == b" two  spaces \xff\x00\r\n"


def test_an_empty_line_is_a_line() -> None:
    assert render(line("") + line("x")) == b"\nx\n"


def test_unknown_tags_are_full_lines_and_more_tags_may_follow() -> None:
    assert render(line("a", tag="P:x") + line("b", tag="F:y:z")) == b"ab\n"


@pytest.mark.parametrize("junk", [b"\n", b"no log\n", b"a b c\n", b"2025 stdin F x\n"])
def test_what_is_no_cri_line_is_left_out(junk: bytes) -> None:
    assert render(junk + line("x")) == b"x\n"


def test_one_stream_can_be_chosen() -> None:
    data = line("out") + line("err", stream="stderr")
    assert render(data, stderr=False) == b"out\n"
    assert render(data, stdout=False) == b"err\n"


def test_since_compares_times_of_any_precision() -> None:
    since = parse_rfc3339_nano(b"2025-01-01T00:00:01Z")
    data = b"".join(
        line(s, stamp=s)
        for s in ("2025-01-01T00:00:00.999Z", "2025-01-01T01:00:01+01:00", "2025-01-01T00:00:02.000000000Z")
    )
    assert render(data, since_ns=since).count(b"\n") == 2


def test_limit_bytes_cuts_in_the_middle_of_a_line() -> None:
    renderer = Renderer(RenderOptions(limit_bytes=5))
    assert renderer.feed(line("abc") + line("def")) == b"abc\nd"
    assert renderer.done
    assert renderer.feed(line("more")) == b""


@given(
    st.lists(st.tuples(st.sampled_from("FP"), st.text("ab \x00é", max_size=5)), max_size=12),
    st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=5),
)
def test_the_output_does_not_depend_on_how_the_bytes_arrive(lines: list[tuple[str, str]], cuts: list[int]) -> None:
    data = b"".join(line(text, tag=tag) for tag, text in lines)
    renderer = Renderer(RenderOptions(timestamps=True))
    pieces, position, turn = [], 0, 0
    while position < len(data):
        step = cuts[turn % len(cuts)]
        pieces.append(renderer.feed(data[position : position + step]))
        position, turn = position + step, turn + 1
    assert b"".join(pieces) + renderer.finish() == render(data, timestamps=True)


@given(
    files=st.lists(st.lists(st.sampled_from("FP"), max_size=6), min_size=1, max_size=3),
    unfinished=st.booleans(),
    wanted=st.integers(min_value=0, max_value=12),
    compress=st.booleans(),
)
def test_a_tail_is_the_end_of_the_whole_log(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    files: list[list[str]],
    unfinished: bool,
    wanted: int,
    compress: bool,
) -> None:
    path = tmp_path_factory.mktemp("log") / "0.log"
    number, whole = 0, b""
    for index, tags in enumerate(files):
        data = b""
        for tag in tags:
            number += 1
            data += line(f"<{number}>", tag=tag)
        whole += data
        if index == len(files) - 1:
            if unfinished:
                data += line("end")[:-1]
                whole += line("end")[:-1]
            path.write_bytes(data)
        elif compress and index == 0:
            path.with_name(f"0.log.2025010{index}-000000.gz").write_bytes(gzip.compress(data))
        else:
            path.with_name(f"0.log.2025010{index}-000000").write_bytes(data)
    logical = render(whole).splitlines(keepends=True)
    assert tail(path, wanted) == b"".join(logical[len(logical) - min(wanted, len(logical)) :])


def test_a_tail_of_a_large_file_reads_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    with path.open("wb") as file:
        file.seek(64 * 1024**3)  # a hole larger than memory: who reads the whole file does not return
        file.write(b"\n" + line("before") + line("last but one") + line("last"))
    assert tail(path, 2) == b"last but one\nlast\n"


def test_a_damaged_archive_gives_what_can_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(line("old") * 100)
    (tmp_path / "0.log.20250101-000000.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "0.log").write_bytes(line("new"))
    assert tail(tmp_path / "0.log", 1) == b"new\n"
    assert tail(tmp_path / "0.log", 1000).endswith(b"new\n")


def test_a_file_that_is_being_compressed_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "0.log.20250101-000000").write_bytes(line("old"))
    (tmp_path / "0.log.20250101-000000.gz").write_bytes(gzip.compress(line("old")))
    (tmp_path / "0.log.20250101-000000.tmp").write_bytes(b"half")
    (tmp_path / "0.log").write_bytes(line("new"))
    assert tail(tmp_path / "0.log", 10) == b"old\nnew\n"


def test_logs_of_another_instance_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "1.log").write_bytes(line("one"))
    (tmp_path / "11.log.20250101-000000").write_bytes(line("eleven"))
    assert tail(tmp_path / "1.log", 10) == b"one\n"


def test_year_one_does_not_break_the_clock() -> None:
    assert rfc3339_nano(-(10**20)).startswith(b"0001-01-01T00:00:00")
    assert rfc3339_nano(int(datetime(2025, 1, 1, tzinfo=UTC).timestamp()) * 10**9) == STAMP.encode()
