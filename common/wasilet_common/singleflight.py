"""Work that several callers wait for and that is done once: pulling an image, compiling a module, asking the API
server about a token.

A caller that is cancelled leaves the others alone. asyncio has nothing of the kind: a bare shared task is cancelled
either by its first caller or by none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TooManyCallsError(Exception):
    """More distinct calls are waiting than the limit allows."""


@dataclass
class _Flight(Generic[V]):
    task: asyncio.Task[V]
    waiters: int = 0


class SingleFlight(Generic[K, V]):
    """One call in flight per key; callers of the same key share its result or its error.

    With ``max_running`` that many calls run at a time, and no more than ``max_waiting`` wait for their turn: beyond
    that TooManyCallsError is raised at once. When the last caller leaves, the call is cancelled, unless it is to
    ``finish``, because its result is kept for the next caller.
    """

    def __init__(self, *, max_running: int | None = None, max_waiting: int = 0, finish: bool = False) -> None:
        self._turn = asyncio.Semaphore(max_running) if max_running is not None else None
        self._limit = None if max_running is None else max_running + max_waiting
        self._finish = finish
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def do(self, key: K, call: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of ``call``, which is made only when none of this key is in flight. Raises what it raises, and
        TooManyCallsError."""
        flight = self._flights.get(key)
        if flight is None:
            if self._limit is not None and len(self._flights) >= self._limit:
                raise TooManyCallsError
            flight = self._flights[key] = _Flight(task=asyncio.create_task(self._run(call)))
            flight.task.add_done_callback(lambda _: self._landed(key, flight))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not self._finish and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight)

    async def close(self) -> None:
        """Cancel what is in flight, and wait until it has ended."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, call: Callable[[], Coroutine[Any, Any, V]]) -> V:
        async with AsyncExitStack() as stack:
            if self._turn is not None:
                await stack.enter_async_context(self._turn)
            return await call()

    def _landed(self, key: K, flight: _Flight[V]) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            flight.task.exception()  # every caller may have gone: an error that no one fetched is not worth a warning

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
