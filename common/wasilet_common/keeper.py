"""Keeps one program running: ``python -P -m wasilet_common.keeper NAME PROGRAM [ARGUMENT...]``.

The program is started again whenever it ended, by the pace that :class:`Restarts` has, and ends with this process,
however that ends. This process does nothing else and imports next to nothing, so that there is little of which it
could die. SIGTERM is passed on; the program's end is waited for.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from wasilet_common.backoff import RetryBackoff
from wasilet_common.child import ending_with_parent

_POLL_SECONDS = 0.1


@dataclass
class Restarts:
    """When a program that ended starts again."""

    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    steady_seconds: float = 60.0
    """One that ran for longer starts again after ``first_seconds``."""

    _retry: RetryBackoff = field(init=False)

    def __post_init__(self) -> None:
        self._retry = RetryBackoff(self.first_seconds, self.longest_seconds)

    def delay_seconds(self, *, ran_seconds: float) -> float:
        """After an end."""
        if ran_seconds > self.steady_seconds:
            self._retry.reset()
        return self._retry.next()


def kept(name: str, argv: Sequence[str]) -> tuple[str, ...]:
    """The command line of a keeper of ``argv``, whose first word is a path; ``name`` is for its log."""
    return (sys.executable, "-P", "-m", "wasilet_common.keeper", name, *argv)


def keep_running(name: str, argv: Sequence[str], restarts: Restarts) -> None:
    """Until SIGTERM. Of the main thread."""
    over = False
    running: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        # Nothing that takes a lock: the interrupted code may hold it.
        nonlocal over
        over = True
        for process in running:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    while not over:
        begun = time.monotonic()
        code = _run_once(argv, running, is_over=lambda: over)
        now = time.monotonic()
        again_at = now + restarts.delay_seconds(ran_seconds=now - begun)
        if not over:
            _log_line(f"{name} ended with {code}; it starts again")
        while not over and time.monotonic() < again_at:
            time.sleep(_POLL_SECONDS)


def _run_once(argv: Sequence[str], running: list[subprocess.Popen[bytes]], *, is_over: Callable[[], bool]) -> int | str:
    """Its exit code, or why it did not start."""
    try:
        process = subprocess.Popen(ending_with_parent(argv))
    except OSError as error:
        return str(error)
    running[:] = [process]
    if is_over():
        process.terminate()
    code = process.wait()
    running.clear()
    return code


def _log_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - its log


def main(argv: Sequence[str]) -> int:
    """The command line; runs until SIGTERM."""
    if len(argv) < 2:
        _log_line("wasilet_common.keeper NAME PROGRAM [ARGUMENT...]")
        return 2
    keep_running(argv[0], argv[1:], Restarts())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
