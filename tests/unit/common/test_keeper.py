"""A keeper and its program, as real processes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from wasilet_common.keeper import Restarts, kept, main

pytestmark = pytest.mark.unit
SECONDS = 30.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@contextlib.contextmanager
def keeping(folder: Path, body: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A keeper of a script, and its log."""
    script, log = folder / "program", folder / "log"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    with log.open("wb") as output, subprocess.Popen(kept("it", [str(script)]), stderr=output, stdout=output) as keeper:
        try:
            yield keeper, log
        finally:
            keeper.kill()


def program(keeper: subprocess.Popen[bytes]) -> psutil.Process:
    (found,) = psutil.Process(keeper.pid).children()
    return found


def test_a_program_that_ended_starts_again_and_its_end_is_in_the_log(tmp_path: Path) -> None:
    with keeping(tmp_path, "echo begun; exit 3") as (_, log):
        until(lambda: lines(log).count("begun") == 3)
        assert "it ended with 3; it starts again" in lines(log)


def test_one_that_is_killed_starts_again(tmp_path: Path) -> None:
    with keeping(tmp_path, "echo begun; exec sleep 600") as (keeper, log):
        until(lambda: lines(log) == ["begun"])
        program(keeper).kill()
        until(lambda: lines(log) == ["begun", "it ended with -9; it starts again", "begun"])


def test_sigterm_ends_both_and_waits_for_the_program(tmp_path: Path) -> None:
    body = "trap 'sleep 0.3; echo ended; exit 0' TERM; echo begun; while :; do sleep 0.05; done"
    with keeping(tmp_path, body) as (keeper, log):
        until(lambda: "begun" in lines(log))
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(SECONDS) == 0
        assert lines(log) == ["begun", "ended"]


def test_the_program_does_not_outlive_a_keeper_that_is_killed(tmp_path: Path) -> None:
    with keeping(tmp_path, "echo begun; exec sleep 600") as (keeper, log):
        until(lambda: "begun" in lines(log))
        its = program(keeper)
        keeper.kill()
        its.wait(SECONDS)


def test_sigterm_ends_the_wait_for_the_next_start(tmp_path: Path) -> None:
    argv = kept("it", [str(tmp_path / "absent")])
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as keeper:
        assert keeper.stderr is not None
        assert keeper.stderr.readline()
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(SECONDS) == 0


def test_waits_double_and_begin_again_after_a_steady_run() -> None:
    restarts = Restarts(first_seconds=1, longest_seconds=3, steady_seconds=60)
    assert [restarts.delay_seconds(ran_seconds=0) for _ in range(4)] == [1, 2, 3, 3]
    assert restarts.delay_seconds(ran_seconds=61) == 1


def test_too_few_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["name"]) == 2
    assert "NAME PROGRAM" in capsys.readouterr().err
    assert kept("n", ["/p"])[:4] == (sys.executable, "-P", "-m", "wasilet_common.keeper")
