"""One agent a data folder: the lock that ensures it, and the record by which others find it.

The lock is an flock, which the kernel drops however the agent ends. The record names the process by pid *and* start
time, so a reused pid is never taken for the agent, and never killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from wasilet_common.files import make_folder, write_private

from wasilet_node.runtime.linux import start_time

_LOCK_NAME = "agent.lock"
_RECORD_NAME = "agent.json"


class InstanceError(Exception):
    """The data folder cannot be this agent's; the message says what to do."""


class AlreadyRunningError(InstanceError):
    """Another agent works in this data folder."""


class ForeignFolderError(InstanceError):
    """The data folder holds someone's other things, and making it private would lock them out."""


@dataclass(frozen=True, kw_only=True)
class AgentRecord:
    """``agent.json``."""

    pid: int
    start_time: int
    """Field 22 of /proc/<pid>/stat: clock ticks since boot."""

    node_name: str
    address: str
    port: int
    """Where the kubelet API listens; 0: not yet."""


def acquire(data: Path) -> int:
    """Make the data folder and lock it; the descriptor is the lock. Raises InstanceError and OSError."""
    _refuse_foreign(data)
    make_folder(data)
    descriptor = os.open(data / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        record = read(data)
        who = f"pid {record.pid}, node {record.node_name}" if record is not None else "not yet up"
        raise AlreadyRunningError(
            f"another agent ({who}) uses {data}; give this one its own with --data-dir, or stop that one"
        ) from None
    return descriptor


def _refuse_foreign(data: Path) -> None:
    try:
        found = data.stat()
    except FileNotFoundError:
        return
    shared = found.st_mode & 0o077 or found.st_uid != os.geteuid()
    if shared and not (data / _LOCK_NAME).exists() and any(data.iterdir()):
        raise ForeignFolderError(f"{data} holds other things; give the node a separate folder with --data-dir")


def write(data: Path, record: AgentRecord) -> None:
    """Replace the record, atomically. Raises OSError."""
    write_private(data / _RECORD_NAME, (json.dumps(asdict(record)) + "\n").encode())


def read(data: Path) -> AgentRecord | None:
    """The record of the last agent, alive or not; None where there is none."""
    try:
        document = json.loads((data / _RECORD_NAME).read_bytes())
        return AgentRecord(
            pid=int(document["pid"]),
            start_time=int(document["start_time"]),
            node_name=str(document["node_name"]),
            address=str(document["address"]),
            port=int(document["port"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(data: Path) -> None:
    """The agent ends in good order."""
    (data / _RECORD_NAME).unlink(missing_ok=True)


def stop(record: AgentRecord, *, grace_seconds: float, kill_seconds: float = 2.0) -> bool:
    """SIGTERM, then SIGKILL, to exactly that process. False: it was not there (any more). Raises PermissionError.

    Raises TimeoutError when it does not even end by SIGKILL (a process in uninterruptible sleep).
    """
    try:
        descriptor = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    try:
        # Opened first, compared second: from here on the pid cannot come to mean another process.
        if start_time(record.pid) != record.start_time:
            return False
        for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, kill_seconds)):
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                return True
            if _ended(descriptor, seconds):
                return True
        raise TimeoutError(f"process {record.pid} did not end after SIGKILL")
    finally:
        os.close(descriptor)


def _ended(descriptor: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(left * 1000):
            return True
    return False
