"""Fairness between streams and everything else that the agent's event loop does.

Frames cost processor time that a client can ask for at will, while the same loop renews the lease, reports the status
and runs probes. So frames are handled in turns of at most 2 ms, one connection after the other, and between turns the
loop gets at least as much time for all else: whatever arrives, streams take half a core and hold up nothing for longer
than a turn. What is not handled yet waits in bounded buffers, and then in the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

TURN_SECONDS = 0.002
PAID_SECONDS = 0.001
"""Shorter work is added up: a timer of the event loop is no more exact than this."""

ANSWERS_PER_SECOND = 500.0
ANSWERS_AT_ONCE = 2048
"""Per connection. A port-forward opens two streams for each of its connections."""


class Connection(Protocol):
    """The receiving side of a protocol, without I/O."""

    def receive(self, data: bytes | bytearray) -> None:
        """Take bytes in, and handle none of them."""

    def step(self, until: float) -> float | None:
        """Handle frames until ``time.monotonic()`` is ``until``. The seconds to wait before the next step; None: there
        is nothing to do until more comes."""


class Turns:
    """The turns of all connections of one server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._owed_seconds = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for a turn; the time by which it has to end."""
        async with self._lock:  # first come, first served
            await asyncio.sleep(self._owed_seconds if self._owed_seconds >= PAID_SECONDS else 0.0)
            if self._owed_seconds >= PAID_SECONDS:
                self._owed_seconds = 0.0
            began = self._clock()
            try:
                yield began + TURN_SECONDS
            finally:
                self._owed_seconds += self._clock() - began

    async def work_off(self, connection: Connection) -> None:
        """Turns until nothing is left of what the connection received. Raises what its ``step`` raises."""
        while True:
            async with self.turn() as until:
                pause = connection.step(until)
            if pause is None:
                return
            if pause:
                await asyncio.sleep(pause)


class Allowance:
    """So many answers per second, and so many at once."""

    def __init__(
        self,
        *,
        per_second: float = ANSWERS_PER_SECOND,
        at_once: int = ANSWERS_AT_ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second = per_second
        self._at_once = float(at_once)
        self._clock = clock
        self._left = self._at_once
        self._looked_at = clock()

    def wait_seconds(self) -> float:
        """How long until one more is allowed; 0: now."""
        now = self._clock()
        self._left = min(self._at_once, self._left + (now - self._looked_at) * self._per_second)
        self._looked_at = now
        return 0.0 if self._left >= 1.0 else (1.0 - self._left) / self._per_second

    def spend(self) -> None:
        """One is used."""
        self._left -= 1.0
