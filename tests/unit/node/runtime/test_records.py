"""What survives a supervisor."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wasilet_node.runtime import linux
from wasilet_node.runtime.protocol import ContainerState
from wasilet_node.runtime.records import Owner, Records, initial_status, valid_id

from tests.unit.node.runtime.test_wire import CONFIG

pytestmark = pytest.mark.unit

DEAD = Owner(pid=os.getpid(), start_time=1)


def own() -> Owner:
    """This process."""
    start_time = linux.start_time(os.getpid())
    assert start_time is not None
    return Owner(pid=os.getpid(), start_time=start_time)


def write_start(records: Records) -> None:
    os.close(records.write_start(CONFIG, 5))


def test_a_container_that_ended_is_found_as_it_ended(tmp_path: Path) -> None:
    records = Records(tmp_path, DEAD)
    write_start(records)
    status = dataclasses.replace(initial_status(CONFIG, 5), state=ContainerState.EXITED, exit_code=3, reason="Error")
    records.write_exit(status)
    ((start, found),) = Records(tmp_path, own()).load()
    assert start.config == CONFIG
    assert found == dataclasses.replace(status, inherited=True)


def test_a_container_that_nobody_saw_end_is_unknown_for_good(tmp_path: Path) -> None:
    write_start(Records(tmp_path, DEAD))
    ((_, first),) = Records(tmp_path, own()).load()
    ((_, second),) = Records(tmp_path, own()).load()
    assert first == second
    assert (first.state, first.exit_code, first.reason) == (ContainerState.EXITED, 137, "ContainerStatusUnknown")
    assert first.finished_at_ns > 0
    assert first.annotations == CONFIG.annotations


def test_containers_of_a_living_supervisor_are_left_to_it(tmp_path: Path) -> None:
    write_start(Records(tmp_path, own()))
    assert list(Records(tmp_path, DEAD).load()) == []
    assert not (tmp_path / CONFIG.id / "exit.json").exists()


@pytest.mark.parametrize("torn", [None, b"", b'{"config": {"id"', b"\xff\xfe"])
def test_a_torn_start_record_means_that_nothing_was_forked(tmp_path: Path, torn: bytes | None) -> None:
    (tmp_path / CONFIG.id).mkdir()
    if torn is not None:
        (tmp_path / CONFIG.id / "start.json").write_bytes(torn)
    assert list(Records(tmp_path, own()).load()) == []
    assert not (tmp_path / CONFIG.id).exists()


def test_a_torn_exit_record_means_that_nobody_was_told(tmp_path: Path) -> None:
    records = Records(tmp_path, DEAD)
    write_start(records)
    (tmp_path / CONFIG.id / "exit.json").write_bytes(b'{"id": "a')
    ((_, status),) = Records(tmp_path, own()).load()
    assert status.reason == "ContainerStatusUnknown"


def test_records_hold_secrets_and_are_private(tmp_path: Path) -> None:
    records = Records(tmp_path / "containers", own())
    write_start(records)
    folder = tmp_path / "containers" / CONFIG.id
    assert (tmp_path / "containers").stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "start.json").stat().st_mode & 0o777 == 0o600


def test_removing_is_idempotent(tmp_path: Path) -> None:
    records = Records(tmp_path, own())
    write_start(records)
    assert records.exists(CONFIG.id)
    records.remove(CONFIG.id)
    records.remove(CONFIG.id)
    assert not records.exists(CONFIG.id)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "../x", "-x", "a" * 129, "a\n", "é"])
def test_an_id_that_could_leave_the_folder_is_no_id(text: str) -> None:
    assert not valid_id(text)


def test_a_hexadecimal_id_is_one() -> None:
    assert valid_id("0" * 64)


def test_no_guest_runs_before_its_start_record_is_on_disk(tmp_path: Path) -> None:
    """A pipe stands for a disk that fails: it cannot be synced. In a process of its own, because a fork needs one
    thread."""
    script = """
import os, sys
from wasilet_node.runtime import engine, guest
from wasilet_node.runtime.loop import Loop
from wasilet_node.runtime.process import SandboxProcess
from wasilet_node.runtime.zygote import Zygote
from tests.unit.node.runtime.test_wire import CONFIG

loop, ends = Loop(), os.pipe()
process = SandboxProcess(loop, CONFIG, on_output=print, on_started=lambda: print("it ran"),
                         on_exit=lambda outcome: (print(outcome.start_failed, outcome.message), loop.stop()))
zygote = Zygote(guest.make_tools(engine.make_linkers()))
process.spawn(zygote, guest_stdin=False, group=None, backstop_bytes=None, record=ends[1])
loop.run()
zygote.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True cannot write the container's start record: [Errno 22] Invalid argument\n"
