"""Looking at paths of the machine, which may be on a file system that hangs.

A thread that hangs in the kernel cannot be ended. So these are not the event loop's threads, whose pool a few such
paths would use up for all of the agent, and they are daemons, or the agent could not exit. How many may hang is
limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from wasilet_node.volumes.base import VolumeError

_T = TypeVar("_T")


class HostThreads:
    """``limit`` calls at a time, each given up on after ``timeout_seconds`` (its thread goes on, and keeps its place).
    Those above the limit wait for a place as long as that."""

    def __init__(self, *, limit: int = 32, timeout_seconds: float = 10.0) -> None:
        self._free = asyncio.Semaphore(limit)
        self._timeout_seconds = timeout_seconds

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

        def settle(result: _T | None, error: Exception | None) -> None:
            self._free.release()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def call() -> None:
            result: _T | None = None
            problem: Exception | None = None
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - handed to the caller that awaits
                problem = error
            # The loop may have ended while the file system hung.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, problem)

        try:
            threading.Thread(target=call, name="host path", daemon=True).start()
        except RuntimeError as error:
            self._free.release()
            raise VolumeError(f"{what}: {error}") from error
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await future
        except TimeoutError:
            if not future.cancelled():
                raise
            raise VolumeError(f"{what} did not answer within {self._timeout_seconds:g} s") from None
