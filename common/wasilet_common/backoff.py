"""Delays between attempts: kubelet's back-off of crash loops and of image pulls, and a plain one for any other retry.

The crash-loop rule is client-go's ``flowcontrol.Backoff`` as kubelet uses it: the first restart is immediate, then
10 s counted from the moment the container finished, doubling to 300 s; an instance that ran for more than twice the
cap (10 min) starts over. Entries belong to one pod's worker and die with it, so nothing has to expire.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

CRASH_LOOP_INITIAL_SECONDS = 10.0
CRASH_LOOP_MAX_SECONDS = 300.0
CRASH_LOOP_RESET_SECONDS = 2 * CRASH_LOOP_MAX_SECONDS
IMAGE_PULL_INITIAL_SECONDS = 10.0
IMAGE_PULL_MAX_SECONDS = 300.0


def crash_loop_seconds(failures: int) -> float:
    """The delay after so many failures in a row, 1 or more."""
    return float(min(CRASH_LOOP_INITIAL_SECONDS * 2 ** min(failures - 1, 10), CRASH_LOOP_MAX_SECONDS))


@dataclass
class _Entry:
    delay: float
    updated_at: float


@dataclass
class CrashLoopBackoff:
    """All times are seconds since the epoch. A key is a container's name and image: a new image starts afresh."""

    entries: dict[str, _Entry] = field(default_factory=dict)

    def seed(self, key: str, *, restarts: int, started_at: float) -> None:
        """After a restart of the agent: what the delay was when the attempt ``restarts`` (1 or more) began."""
        if key not in self.entries and restarts > 0:
            self.entries[key] = _Entry(crash_loop_seconds(restarts), started_at)

    def remaining(self, key: str, *, finished_at: float, now: float) -> float:
        """Seconds until the container may start again; 0: now."""
        entry = self.entries.get(key)
        if entry is None or finished_at - entry.updated_at > CRASH_LOOP_RESET_SECONDS:
            return 0.0
        # A clock that was set back must not make the wait longer than the delay itself.
        return min(max(0.0, finished_at + entry.delay - now), entry.delay)

    def delay(self, key: str) -> float:
        """The present delay, as the message ``back-off 10s restarting...`` names it."""
        entry = self.entries.get(key)
        return entry.delay if entry else 0.0

    def next(self, key: str, *, finished_at: float, now: float) -> None:
        """The container is being restarted at ``now``: the next failure waits longer."""
        entry = self.entries.get(key)
        if entry is None or finished_at - entry.updated_at > CRASH_LOOP_RESET_SECONDS:
            self.entries[key] = _Entry(CRASH_LOOP_INITIAL_SECONDS, now)
        else:
            entry.delay = min(entry.delay * 2, CRASH_LOOP_MAX_SECONDS)
            entry.updated_at = now


@dataclass
class _Failure:
    delay_seconds: float
    failed_at: float
    error: str


class ImagePullBackoff:
    """kubelet's for image pulls (flowcontrol.Backoff in image_manager.go): delays by key, with the error of each.

    An entry is in back-off while less than its delay has passed since its last failure. Delays double from 10 s to
    300 s; an entry that was left alone for twice the longest delay starts from the beginning. A success clears nothing
    but what has expired: that, too, is kubelet's behaviour.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], _Failure] = {}

    def waiting(self, key: tuple[str, str]) -> str | None:
        """The last error while the key is in back-off, else None."""
        entry = self._entries.get(key)
        if entry is None or self._clock() - entry.failed_at >= entry.delay_seconds:
            return None
        return entry.error

    def failed(self, key: tuple[str, str], error: str) -> None:
        """Begin a back-off, or a longer one."""
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None or self._expired(entry, now):
            delay = IMAGE_PULL_INITIAL_SECONDS
        else:
            delay = min(entry.delay_seconds * 2, IMAGE_PULL_MAX_SECONDS)
        self._entries[key] = _Failure(delay_seconds=delay, failed_at=now, error=error)

    def forget_expired(self) -> None:
        """Drop what would start from the beginning anyway, so that the keys of pods long gone do not pile up."""
        now = self._clock()
        self._entries = {key: entry for key, entry in self._entries.items() if not self._expired(entry, now)}

    @staticmethod
    def _expired(entry: _Failure, now: float) -> bool:
        return now - entry.failed_at > 2 * IMAGE_PULL_MAX_SECONDS


@dataclass
class RetryBackoff:
    """Seconds to wait before something is tried again: doubles from ``initial`` to ``maximum``."""

    initial: float = 1.0
    maximum: float = 10.0
    delay: float = 0.0

    def next(self, *, at_least: float = 0.0) -> float:
        """The delay to use now; it goes on doubling from ``at_least`` where that is more."""
        self.delay = max(min(self.delay * 2, self.maximum) if self.delay else self.initial, at_least)
        return self.delay

    def reset(self) -> None:
        """It worked."""
        self.delay = 0.0


@dataclass(frozen=True)
class NotBefore:
    """A time before which nothing is tried again: ``seconds`` from ``since``, which is seconds since the epoch.

    A clock that is set back ends the wait, since no one can tell by then how long it should still be."""

    since: float = 0.0
    seconds: float = 0.0

    def left(self, now: float) -> float:
        """Seconds; 0: now."""
        return max(0.0, self.since + self.seconds - now) if now >= self.since else 0.0
