"""Bytes between two connections: ends are passed on, and a peer that is gone is not waited for without end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from wasilet_common.relay import relay

pytestmark = pytest.mark.unit

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def between(*, half_closed_seconds: float = 600.0) -> AsyncIterator[tuple[Connection, Connection, asyncio.Event]]:
    """A client, the server that it is relayed to, and the relay's end."""
    over, arrived = asyncio.Event(), asyncio.Queue[Connection]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await arrived.put((reader, writer))

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(*target.sockets[0].getsockname())
        try:
            await relay((reader, writer), there, half_closed_seconds=half_closed_seconds)
        finally:
            over.set()
            there[1].close()
            writer.close()

    async with asyncio.timeout(20):
        target = await asyncio.start_server(serve, "127.0.0.1")
        proxy = await asyncio.start_server(forward, "127.0.0.1")
        client = await asyncio.open_connection(*proxy.sockets[0].getsockname())
        server = await arrived.get()
        try:
            yield client, server, over
        finally:
            for connection in (client, server):
                connection[1].close()
            for each in (target, proxy):
                each.close()
            await over.wait()


async def test_what_one_sends_the_other_reads_and_an_end_is_passed_on_while_the_answer_comes() -> None:
    async with between() as (client, server, over):
        client[1].write(b"question")
        client[1].write_eof()
        assert await server[0].read() == b"question"
        server[1].write(b"answer")
        await asyncio.sleep(0.05)
        assert not over.is_set()
        server[1].close()
        assert await client[0].read() == b"answer"
        await over.wait()


async def test_a_connection_that_breaks_ends_the_other() -> None:
    async with between() as (client, server, over):
        client[1].transport.abort()
        assert await server[0].read() == b""
        server[1].close()
        await over.wait()


async def test_a_half_closed_connection_lives_while_bytes_come_and_not_for_ever() -> None:
    async with between(half_closed_seconds=0.3) as (client, server, over):
        client[1].write_eof()
        for _ in range(4):
            await asyncio.sleep(0.15)
            server[1].write(b"x")
        assert not over.is_set()
        await over.wait()
        assert await client[0].read() == b"xxxx"
