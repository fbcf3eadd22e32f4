"""Bytes passed on between two connections, nothing read or changed."""

from __future__ import annotations

import asyncio
import contextlib

_BLOCK_BYTES = 65536

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def relay(one: Connection, other: Connection) -> None:
    """Both directions until their ends. The end of one direction is passed on while the other lives; one that broke
    ends both. Closing the connections stays with who opened them."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_pump(one[0], other[1]))
        group.create_task(_pump(other[0], one[1]))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(_BLOCK_BYTES):
            writer.write(block)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        return
    # Broken, not ended: the other side must not wait for the rest.
    writer.transport.abort()
