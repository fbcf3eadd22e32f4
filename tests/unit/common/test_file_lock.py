"""The lock between processes: exclusive, bounded, and free again when its holder dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasilet_common.file_lock import locked_file

HOLDER = """
import sys, time
from pathlib import Path
from wasilet_common.file_lock import locked_file
with locked_file(Path(sys.argv[1]), timeout_seconds=5, late=TimeoutError):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``tmp_path/lock``."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_another_process_holds_is_waited_for_and_no_longer_than_the_bound(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    waits: list[float] = []
    with (
        pytest.raises(LookupError),
        locked_file(tmp_path / "lock", timeout_seconds=0.2, late=LookupError, waiting=waits.append),
    ):
        pytest.fail("two have the lock")
    assert waits
    assert waits == sorted(waits)


def test_the_lock_of_a_holder_that_was_killed_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def kill(_seconds: float) -> None:
        holder.kill()

    with locked_file(tmp_path / "lock", timeout_seconds=10, late=TimeoutError, waiting=kill) as descriptor:
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_a_wait_raises_ends_it_and_leaves_no_descriptor(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def cancelled(_seconds: float) -> None:
        raise KeyboardInterrupt

    before = descriptors()
    with (
        pytest.raises(KeyboardInterrupt),
        locked_file(tmp_path / "lock", timeout_seconds=10, late=TimeoutError, waiting=cancelled),
    ):
        pytest.fail("two have the lock")
    assert descriptors() == before


def test_a_lock_is_no_way_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"), locked_file(tmp_path / "lock", timeout_seconds=1, late=TimeoutError):
        pytest.fail("followed a link")
    assert not (tmp_path / "elsewhere").exists()
