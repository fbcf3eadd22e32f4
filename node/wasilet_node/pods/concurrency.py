"""Waiting for several things that do not depend on each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def side_by_side(*waits: Coroutine[Any, Any, object]) -> None:
    """Each to its end, whatever becomes of the others; then raises what the first of them, in this order, raised."""
    for result in await asyncio.gather(*waits, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
