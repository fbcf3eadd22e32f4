"""Looking at paths of the machine, which may be on a file system that hangs.

A thread that hangs in the kernel cannot be ended. So these are not the event loop's threads, whose pool a few such
paths would use up for all of the agent, and they are daemons, or the agent could not exit. How many may hang is
limited. A thread that has answered takes the next call: to start one, the event loop waits until it runs, which takes
milliseconds while all processors are busy.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from wasilet_node.volumes.base import VolumeError

_T = TypeVar("_T")
_Calls = SimpleQueue[Callable[[], None] | None]

_KEPT_THREADS = 4


class HostThreads:
    """``limit`` calls at a time, each given up on after ``timeout_seconds`` (its thread goes on, and keeps its place).
    Those above the limit wait for a place as long as that."""

    def __init__(self, *, limit: int = 32, timeout_seconds: float = 10.0) -> None:
        self._free = asyncio.Semaphore(limit)
        self._timeout_seconds = timeout_seconds
        self._idle: list[_Calls] = []
        weakref.finalize(self, _end, self._idle)

    async def run(self, what: str, function: Callable[[], _T]) -> _T:
        """Call ``function`` in a thread. Raises what it raises, and VolumeError naming ``what`` when it hangs or too
        many others do."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise VolumeError(f"{what}: too many other paths of the machine do not answer") from None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def settle(calls: _Calls, result: _T | None, error: Exception | None) -> None:
            self._free.release()
            self._idle.append(calls)
            if len(self._idle) > _KEPT_THREADS:
                _end([self._idle.pop()])
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def call(calls: _Calls) -> None:
            result: _T | None = None
            problem: Exception | None = None
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - handed to the caller that awaits
                problem = error
            # The loop may have ended while the file system hung.
            try:
                loop.call_soon_threadsafe(settle, calls, result, problem)
            except RuntimeError:
                _end([calls])

        try:
            calls = self._idle.pop() if self._idle else _thread()
        except RuntimeError as error:
            self._free.release()
            raise VolumeError(f"{what}: {error}") from error
        calls.put(lambda: call(calls))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await future
        except TimeoutError:
            if not future.cancelled():
                raise
            raise VolumeError(f"{what} did not answer within {self._timeout_seconds:g} s") from None


def _thread() -> _Calls:
    """A new thread, by the calls that it takes. Raises RuntimeError when there can be no more threads."""
    calls: _Calls = SimpleQueue()
    threading.Thread(target=_take, args=(calls,), name="host path", daemon=True).start()
    return calls


def _take(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        call()
        # The thread waits for the next one without keeping what this one had.
        del call


def _end(threads: list[_Calls]) -> None:
    for calls in threads:
        calls.put(None)
