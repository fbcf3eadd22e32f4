"""Requests at a steady rate while a test does something else, as a rolling update: how many were not answered?

Bounded in time, rate and threads; it ends by itself, with its block, and with the process.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

from wasilet.errors import UsageError
from wasilet.testing.http import Ask, NoAnswerError, WantedAnswer

MAX_PER_SECOND = 5000.0
MAX_SECONDS = 600.0
MAX_WORKERS = 64
REQUEST_SECONDS = 5.0
SHOWN_FAILURES = 10
MAX_REASONS = 100
KEPT_TIMES = 100_000
"""Of so many requests the time is kept."""


@dataclass
class LoadResult:
    """What came of it. Complete once the load has stopped."""

    sent: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """How often, by reason."""

    times: list[float] = field(default_factory=list)
    """Of answers that were as wanted, in seconds."""

    seconds: float = 0.0
    """How long it ran."""

    @property
    def failed(self) -> int:
        """How many requests had no answer, or another one than wanted."""
        return self.failures.total()

    def percentile(self, percent: float) -> float:
        """Of the times, in seconds; 0.0 when there are none."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0

    def __str__(self) -> str:
        """For messages."""
        said = [f"{self.failed} of {self.sent} requests failed in {self.seconds:.1f} s"]
        said += [f"  {count} x {reason}" for reason, count in self.failures.most_common(SHOWN_FAILURES)]
        return "\n".join(said)


class Load:
    """A context: requests are sent until its end, or for ``max_seconds``."""

    def __init__(
        self,
        send: Ask,
        *,
        per_second: float = 50.0,
        workers: int = 8,
        max_seconds: float = 60.0,
        wanted: WantedAnswer | None = None,
    ) -> None:
        """Raises UsageError for what is out of bounds."""
        for name, value, most in (
            ("per_second", per_second, MAX_PER_SECOND),
            ("workers", workers, MAX_WORKERS),
            ("max_seconds", max_seconds, MAX_SECONDS),
        ):
            if not 0 < value <= most:
                raise UsageError(f"{name}={value!r} is out of bounds", hint=f"more than 0, and at most {most:g}")
        self._send = send
        self._wanted = wanted or WantedAnswer()
        self._pause = 1.0 / per_second
        self._max_seconds = max_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began = 0.0
        self._next = 0.0
        self.result = LoadResult()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="load") for _ in range(workers)]

    def __enter__(self) -> Self:
        self._began = self._next = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> LoadResult:
        """No further request; waits for those that are on their way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(REQUEST_SECONDS + 1.0)
        with self._lock:
            self.result.seconds = self.result.seconds or time.monotonic() - self._began
        return self.result

    def _turn(self) -> float | None:
        """When the next request is due; None when there is none. What could not be sent in time is not made up for: the
        rate is a limit."""
        with self._lock:
            due = max(self._next, time.monotonic() - self._pause)
            if self._stop.is_set() or due - self._began >= self._max_seconds:
                return None
            self._next = due + self._pause
            self.result.sent += 1
            return due

    def _work(self) -> None:
        while (due := self._turn()) is not None:
            if self._stop.wait(max(0.0, due - time.monotonic())):
                with self._lock:
                    self.result.sent -= 1
                return
            reason, seconds = self._once()
            with self._lock:
                if reason:
                    known = reason in self.result.failures or len(self.result.failures) < MAX_REASONS
                    self.result.failures[reason if known else "for other reasons"] += 1
                elif len(self.result.times) < KEPT_TIMES:
                    self.result.times.append(seconds)

    def _once(self) -> tuple[str, float]:
        try:
            answer = self._send(REQUEST_SECONDS)
        except NoAnswerError as error:
            return str(error), 0.0
        return ", ".join(self._wanted.lacks(answer)), answer.seconds
