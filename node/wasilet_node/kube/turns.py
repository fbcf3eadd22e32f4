"""Few requests at a time, as long as the server is quick.

Each request beyond those under way needs another connection, and its TLS handshake costs both sides more than a status
does. A burst of pods would open dozens of them, which are idle a second later and gone after a minute. So a request
waits a moment for one that ends. It never waits longer: a server that is slow is asked side by side, as it was before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

AT_ONCE = 8
PATIENCE_SECONDS = 0.25


class Turns:
    """One object per client; belongs to one event loop."""

    def __init__(self, at_once: int = AT_ONCE, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._patience_seconds = patience_seconds

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A request, which may begin now."""
        taken = await self._take()
        try:
            yield
        finally:
            if taken:
                self._free.release()

    async def _take(self) -> bool:
        try:
            async with asyncio.timeout(self._patience_seconds if self._free.locked() else None):
                return await self._free.acquire()
        except TimeoutError:
            return False
