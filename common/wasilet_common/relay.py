"""Bytes passed on between two connections, nothing read or changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

HALF_CLOSED_SECONDS = 600.0
_BLOCK_BYTES = 65536

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def relay(one: Connection, other: Connection, *, half_closed_seconds: float = HALF_CLOSED_SECONDS) -> None:
    """Both directions until their ends. The end of one direction is passed on while the other lives; one that broke
    ends both. Closing the connections stays with who opened them.

    When one direction has ended and nothing came by the other for ``half_closed_seconds``, that is an end as well: a
    peer that is gone is not told apart from one that only has nothing more to say."""
    moved = 0

    def count() -> None:
        nonlocal moved
        moved += 1

    pumps = {
        asyncio.create_task(_pump(one[0], other[1], count)),
        asyncio.create_task(_pump(other[0], one[1], count)),
    }
    try:
        _, pumps = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        before = -1
        while pumps and before != moved:
            before = moved
            _, pumps = await asyncio.wait(pumps, timeout=half_closed_seconds)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK_BYTES):
            count()
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        return
    # Broken, not ended: the other side must not wait for the rest.
    writer.transport.abort()
