"""A log of what guests and unauthenticated clients cause: they could fill the disk with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

MAX_LINES = 30
PERIOD_SECONDS = 60.0


class SparingLog:
    """At most so many lines per period; the rest is counted. Of one thread."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        lines: int = MAX_LINES,
        seconds: float = PERIOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._since = float("-inf")
        self._written = 0

    def info(self, message: str, *arguments: object) -> None:
        """As of a logger."""
        now = self._clock()
        if now - self._since >= self._seconds:
            if self._written > self._lines:
                self._logger.info("%d more messages were left out", self._written - self._lines)
            self._since, self._written = now, 0
        self._written += 1
        if self._written <= self._lines:
            self._logger.info(message, *arguments)
