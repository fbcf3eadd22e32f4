"""Programs that are run, and daemons that are found again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from wasilet.errors import CancelledError, CommandError
from wasilet.process import (
    ProcessRecord,
    cancelled_by,
    find,
    is_alive,
    run,
    send_signal,
    spawn,
    stop,
    tail_of,
    with_environment,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[ProcessRecord]]:
    started: list[ProcessRecord] = []
    yield started
    stop(started, grace_seconds=0)


def test_output_is_returned_and_input_is_fed() -> None:
    done = run(["sh", "-c", "cat; echo to-stderr >&2"], timeout_seconds=10, input="hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello", "to-stderr\n")


def test_much_output_and_much_input_do_not_block_each_other() -> None:
    text = "x" * 1_000_000
    assert run(["cat"], timeout_seconds=20, input=text).stdout == text


def test_a_program_without_input_reads_nothing() -> None:
    assert run(["cat"], timeout_seconds=5).stdout == ""


def test_input_that_nobody_reads_is_no_error() -> None:
    assert run(["true"], timeout_seconds=5, input="x" * 1_000_000).returncode == 0


def test_a_failure_carries_code_and_last_lines_of_stderr() -> None:
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo out; seq 1 50 >&2; exit 7"], timeout_seconds=10)
    assert caught.value.returncode == 7
    assert caught.value.tail[-1] == "50"
    assert len(caught.value.tail) == 20
    assert "exit code 7" in caught.value.message


def test_a_failure_is_free_of_colours_and_its_lines_too() -> None:
    seen: list[str] = []
    with pytest.raises(CommandError) as caught:
        run(
            ["sh", "-c", r"printf '\033[36mINFO\033[0m begin\n\033[31mFATA\033[0m why\n' >&2; exit 1"],
            timeout_seconds=10,
            on_line=seen.append,
        )
    assert caught.value.message.endswith("failed with exit code 1: FATA why")
    assert caught.value.tail == ("INFO begin", "FATA why")
    assert seen == ["INFO begin", "FATA why"]


def test_output_that_is_data_keeps_every_byte() -> None:
    assert run(["printf", r"\033[1mx"], timeout_seconds=10).stdout == "\x1b[1mx"


def test_the_line_that_says_why_can_be_chosen() -> None:
    lines = "ERROR: why\nadvice\nmore advice\n"
    with pytest.raises(CommandError) as caught:
        run(
            ["sh", "-c", 'printf "$0" >&2; exit 1', lines],
            timeout_seconds=10,
            headline=lambda given: next((line for line in given if line.startswith("ERROR")), None),
        )
    assert caught.value.message.endswith("failed with exit code 1: ERROR: why")
    with pytest.raises(CommandError, match="exit code 1: more advice"):
        run(["sh", "-c", 'printf "$0" >&2; exit 1', lines], timeout_seconds=10, headline=lambda _: None)


def test_a_failure_can_be_looked_at_instead() -> None:
    assert run(["sh", "-c", "exit 3"], timeout_seconds=10, check=False).returncode == 3


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandError, match="no-such-program is not installed"):
        run(["no-such-program", "x"], timeout_seconds=1)


def test_a_missing_folder_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such folder"):
        run(["true"], timeout_seconds=1, cwd=tmp_path / "gone")


def test_words_are_never_interpreted_by_a_shell() -> None:
    assert run(["printf", "%s", "$(id) `id` ; id"], timeout_seconds=5).stdout == "$(id) `id` ; id"


def test_a_time_out_ends_the_whole_family(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(CommandError, match=r"longer than 0\.3 s"):
        run(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout_seconds=0.3)
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 3
    while (record := find(child)) and is_alive(record) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert record is None or not is_alive(record)


def test_what_a_program_leaves_running_does_not_keep_the_caller() -> None:
    left = int(run(["sh", "-c", "sleep 60 & echo $!"], timeout_seconds=30).stdout)
    os.kill(left, signal.SIGKILL)


def test_lines_are_told_as_they_come() -> None:
    lines: list[str] = []
    run(["sh", "-c", "echo one; echo two >&2; printf three"], timeout_seconds=5, on_line=lines.append)
    assert sorted(lines) == ["one", "three", "two"]


def test_a_run_that_is_given_up_ends_its_program_promptly() -> None:
    event = threading.Event()
    threading.Timer(0.2, event.set).start()
    with cancelled_by(event), pytest.raises(CancelledError):
        run(["sleep", "30"], timeout_seconds=30)


def test_a_daemon_is_known_by_pid_and_start(tmp_path: Path, daemons: list[ProcessRecord]) -> None:
    record = spawn(["sleep", "60"], log=tmp_path / "log")
    daemons.append(record)
    assert is_alive(record)
    assert ProcessRecord.from_json(record.to_json()) == record
    assert not is_alive(replace(record, start_time=record.start_time + 1)), "a reused pid is another process"
    assert not is_alive(replace(record, boot_id="another boot"))


def test_a_reused_pid_is_never_signalled(tmp_path: Path, daemons: list[ProcessRecord]) -> None:
    record = spawn(["sleep", "60"], log=tmp_path / "log")
    daemons.append(record)
    stranger = replace(record, start_time=record.start_time - 1)
    assert not send_signal(stranger, signal.SIGKILL)
    assert stop(stranger, grace_seconds=0) == []
    assert is_alive(record)


def test_a_daemon_has_a_session_a_private_log_and_no_descriptors(tmp_path: Path, daemons: list[ProcessRecord]) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)  # noqa: FBT003
    log = tmp_path / "log"
    code = "import os,time; print(os.listdir('/proc/self/fd'), os.getsid(0)==os.getpid(), flush=True); time.sleep(60)"
    daemons.append(spawn([sys.executable, "-P", "-c", code], log=log))
    os.close(write_end)
    deadline = time.monotonic() + 10
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.close(read_end)
    assert log.stat().st_mode & 0o777 == 0o600
    assert "['0', '1', '2', '3'] True" in log.read_text()


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    record = spawn(["true"], log=tmp_path / "log")
    deadline = time.monotonic() + 5
    while is_alive(record) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(record)
    assert not psutil.pid_exists(record.pid), "a child of ours is reaped as well"


def test_stop_is_gentle_first_and_firm_afterwards(tmp_path: Path, daemons: list[ProcessRecord]) -> None:
    code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    stubborn = spawn([sys.executable, "-P", "-c", code], log=tmp_path / "stubborn")
    obedient = spawn(["sleep", "60"], log=tmp_path / "obedient")
    daemons.extend([stubborn, obedient])
    while "up" not in (tmp_path / "stubborn").read_text():
        time.sleep(0.01)
    started = time.monotonic()
    assert stop([stubborn, obedient], grace_seconds=0.3) == []
    assert not is_alive(stubborn)
    assert not is_alive(obedient)
    assert time.monotonic() - started >= 0.3


def test_a_process_is_found_by_its_environment_exactly(tmp_path: Path, daemons: list[ProcessRecord]) -> None:
    env = {"PATH": os.environ["PATH"], "WASILET_TEST_MARK": "abc"}
    record = spawn(["sleep", "60"], log=tmp_path / "log", env=env)
    daemons.append(record)
    deadline = time.monotonic() + 5
    while not (found := with_environment("WASILET_TEST_MARK", "abc")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == [record]
    assert with_environment("WASILET_TEST_MARK", "ab") == []


def test_the_tail_of_a_log_skips_blank_lines_and_survives_any_bytes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\n\n\xff\xfe two\n\n")
    assert tail_of(log)[0] == "one"
    assert len(tail_of(log)) == 2
    assert tail_of(tmp_path / "none") == ()
