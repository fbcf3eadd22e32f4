"""The supervisor's own log, ``<data>/supervisor.log``, bounded: it lives for months, and nothing else rotates it.

The file is descriptor 2, so that what Python or wasmtime say on their way down is in it too. When it has grown too
long it becomes ``supervisor.log.1``, in place of the one before, and descriptors 1 and 2 are turned to a new file.
After an upgrade two supervisors append to one file: the one that finds it renamed by the other only follows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

MAX_BYTES = 1024 * 1024
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


def open_log(data: Path) -> int:
    """A descriptor of the log, to be handed to a supervisor as its standard error. Raises OSError."""
    return os.open(_path(data), _FLAGS, 0o600)


class OwnLog(logging.Handler):
    """Writes records to descriptor 2, and rotates what is behind it if that is the log of ``data``."""

    def __init__(self, data: Path, *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._path = _path(data)
        self._max_bytes = max_bytes
        self._previous = self._path.with_name(f"{self._path.name}.1")
        status = os.fstat(2)
        self._ours = _is_file(status, self._path) or _is_file(status, self._previous)

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises: a full disk loses log lines."""
        with contextlib.suppress(OSError):
            os.write(2, (self.format(record) + "\n").encode(errors="backslashreplace"))
            if self._ours and (status := os.fstat(2)).st_size >= self._max_bytes:
                self._rotate(status)

    def _rotate(self, status: os.stat_result) -> None:
        if _is_file(status, self._path):
            self._path.rename(self._previous)
        fresh = os.open(self._path, _FLAGS, 0o600)
        try:
            for descriptor in (1, 2):
                os.dup2(fresh, descriptor)
        finally:
            os.close(fresh)


def _is_file(status: os.stat_result, path: Path) -> bool:
    try:
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.stat())
    except OSError:
        return False


def _path(data: Path) -> Path:
    return data / "supervisor.log"
