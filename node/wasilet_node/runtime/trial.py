"""Whether the kernel allows what a process cannot take back: a child tries it, and reports."""

from __future__ import annotations

import os
from collections.abc import Callable


def tried_by_child(attempt: Callable[[int], None]) -> tuple[str, int]:
    """``attempt`` is a child's whole life, and gets the descriptor to report to; its OSError is reported as text. What
    was reported, and the child's wait status. One thread. Raises OSError where no child can be made."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reader, "rb") as report:
        try:
            pid = os.fork()
            if pid == 0:
                _live(attempt, writer)
        finally:
            os.close(writer)
        text = report.read().decode(errors="replace")
        return text, os.waitpid(pid, 0)[1]


def _live(attempt: Callable[[int], None], report: int) -> None:
    """Never returns."""
    code = 1
    try:
        attempt(report)
        code = 0
    except OSError as error:
        os.write(report, str(error.strerror).encode())
    finally:
        os._exit(code)
