"""Delays between attempts: kubelet's crash-loop back-off, and a plain one for retries of the agent's own.

The crash-loop rule is client-go's ``flowcontrol.Backoff`` as kubelet uses it: the first restart is immediate, then
10 s counted from the moment the container finished, doubling to 300 s; an instance that ran for more than twice the
cap (10 min) starts over. Entries belong to one pod's worker and die with it, so nothing has to expire.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CRASH_LOOP_INITIAL_SECONDS = 10.0
CRASH_LOOP_MAX_SECONDS = 300.0
CRASH_LOOP_RESET_SECONDS = 2 * CRASH_LOOP_MAX_SECONDS


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
            delay = min(CRASH_LOOP_INITIAL_SECONDS * 2 ** min(restarts - 1, 10), CRASH_LOOP_MAX_SECONDS)
            self.entries[key] = _Entry(delay, started_at)

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
class RetryBackoff:
    """Seconds to wait before the agent tries something again: doubles from ``initial`` to ``maximum``."""

    initial: float = 1.0
    maximum: float = 10.0
    delay: float = 0.0

    def next(self) -> float:
        """The delay to use now."""
        self.delay = min(self.delay * 2, self.maximum) if self.delay else self.initial
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
