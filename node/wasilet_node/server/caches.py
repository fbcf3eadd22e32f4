"""A bounded cache whose entries expire, and calls that are made once for all who wait.

The kubelet asks the API server about every caller; without these two a scraper, or somebody who guesses tokens, would
turn each request into two more against the API server. Both are bounded, because their keys come from strangers.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ExpiringCache(Generic[K, V]):
    """At most ``max_entries``; the least recently used goes first. Every entry has a lifetime of its own."""

    def __init__(self, *, max_entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, or None when there is none that is still fresh."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        expires, value = entry
        if expires <= self._clock():
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V, *, ttl_seconds: float) -> None:
        """Keep a value; one of the same key is replaced."""
        self._entries[key] = (self._clock() + ttl_seconds, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)


class TooManyCallsError(Exception):
    """More distinct calls are waiting than the limit allows."""


class SingleFlight(Generic[K, V]):
    """One call in flight a key; callers of the same key share its result or its error.

    A caller that goes away does not end the call for the others. ``max_running`` calls run at a time, and no more than
    ``max_waiting`` wait for their turn: beyond that ``TooManyCallsError`` is raised at once.
    """

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._turn = asyncio.Semaphore(max_running)
        self._limit = max_running + max_waiting
        self._flights: dict[K, asyncio.Task[V]] = {}

    async def do(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        """The result of ``call``, which is made only when none of this key is in flight."""
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= self._limit:
                raise TooManyCallsError
            flight = asyncio.get_running_loop().create_task(self._run(call))
            self._flights[key] = flight
            flight.add_done_callback(lambda task: self._landed(key, task))
        return await asyncio.shield(flight)

    async def close(self) -> None:
        """Cancel what is in flight."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _run(self, call: Callable[[], Awaitable[V]]) -> V:
        async with self._turn:
            return await call()

    def _landed(self, key: K, task: asyncio.Task[V]) -> None:
        self._flights.pop(key, None)
        if not task.cancelled():
            task.exception()  # every waiter may have gone: an error nobody fetched is not worth a warning
