"""kubelet's image pull back-off: k8s.io/client-go/util/flowcontrol's Backoff, as image_manager.go uses it.

An entry is in back-off while less than its delay has passed since its last failure. Delays double from 10 s to 300 s;
an entry that was left alone for twice the longest delay starts from the beginning. A success clears nothing but what
has expired: that, too, is kubelet's behaviour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

INITIAL_SECONDS: Final = 10.0
LONGEST_SECONDS: Final = 300.0


@dataclass
class _Entry:
    delay_seconds: float
    failed_at: float
    error: str


class Backoff:
    """Delays by key, with the error that caused each."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}

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
            delay = INITIAL_SECONDS
        else:
            delay = min(entry.delay_seconds * 2, LONGEST_SECONDS)
        self._entries[key] = _Entry(delay_seconds=delay, failed_at=now, error=error)

    def forget_expired(self) -> None:
        """Drop what would start from the beginning anyway, so that the keys of pods long gone do not pile up."""
        now = self._clock()
        self._entries = {key: entry for key, entry in self._entries.items() if not self._expired(entry, now)}

    @staticmethod
    def _expired(entry: _Entry, now: float) -> bool:
        return now - entry.failed_at > 2 * LONGEST_SECONDS
