"""Whether a pod is being started or ended now, so that what can wait does not take the processor from it.

A start is a chain of short waits with little work in between. Namespaces for pods that are still to come cost more than
the start itself, and no one waits for them. Events do not wait so long: what reports a pod's start must be there when
its end is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

_STATUS_SECONDS = 0.05
"""From a container's start to the moment its status is on the way to the API server."""


class UnderWay:
    """One object per node, counting."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @property
    def busy(self) -> bool:
        """Whether any pod is at it."""
        return self._count > 0

    async def calm(self, limit_seconds: float) -> bool:
        """Wait until no pod is, or for so long; whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._none.wait()
        return not self.busy

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A start or an end, and the moment until its status is sent."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(_STATUS_SECONDS, self._ended)

    def _ended(self) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()
