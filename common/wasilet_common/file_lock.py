"""A lock between processes: flock(2) of a file, waited for with a bound.

The kernel lets go of it when its holder ends, however that happens, so nothing has to be cleaned up after a crash. The
file stays: to remove it would let two holders have two files of one name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def locked_file(
    path: Path,
    *,
    timeout_seconds: float,
    late: Callable[[], Exception],
    waiting: Callable[[float], None] = lambda _seconds: None,
) -> Iterator[int]:
    """Hold the lock file ``path`` (mode 0600, made where it is missing); the value is its descriptor.

    ``waiting``: called at each look (20 per second) with the seconds waited so far; what it raises ends the wait.
    ``late``: the error to raise after ``timeout_seconds``. Raises OSError where the file cannot be opened or its file
    system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        started = time.monotonic()
        while not _try(descriptor):
            waited = time.monotonic() - started
            if waited >= timeout_seconds:
                raise late()
            waiting(waited)
            time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
