"""What a listener takes in goes on, up to its limit. How host ports, load balancers and the proxy use it: theirs."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest
from wasilet_common.forwarding import Connections, Datagrams, connected_datagrams, listener

pytestmark = pytest.mark.unit


async def test_a_connection_beyond_the_limit_is_closed_and_those_before_it_live() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    to = server.sockets[0].getsockname()
    forwarding = Connections(lambda: asyncio.open_connection(*to), name="echo", limit=2)
    sock = listener(("127.0.0.1", 0))
    place = sock.getsockname()
    await forwarding.begin(sock)
    async with server, asyncio.timeout(10):
        clients = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*place)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            clients.append((reader, writer))
        refused, its_writer = await asyncio.open_connection(*place)
        assert await refused.read() == b""
        its_writer.close()
        for reader, writer in clients:
            writer.write(b"y")
            assert await reader.read(1) == b"y"
        await forwarding.close()
        for reader, writer in clients:
            assert await reader.read() == b""
            writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*place)


async def test_flows_beyond_the_limit_are_dropped_and_those_before_them_live() -> None:
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        place, one, two = (stack.enter_context(listener(("127.0.0.1", 0), kind=socket.SOCK_DGRAM)) for _ in range(3))
        to = place.getsockname()
        forwarding = Datagrams(lambda: connected_datagrams(to), to_port=to[1], limit=1)
        sock = listener(("127.0.0.1", 0), kind=socket.SOCK_DGRAM)
        asked = sock.getsockname()
        await forwarding.begin(sock)
        try:
            async with asyncio.timeout(10):
                for client, text in ((one, b"1"), (two, b"dropped"), (one, b"2")):
                    client.sendto(text, asked)
                assert [await loop.sock_recv(place, 100) for _ in range(2)] == [b"1", b"2"]
        finally:
            await forwarding.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_has_one_listener_even_where_the_other_would_share_it(kind: int, *, shared: bool) -> None:
    with socket.socket(socket.AF_INET, kind) as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(shared))
        foreign.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            foreign.listen()
        with pytest.raises(OSError, match="Address already in use"):
            listener(foreign.getsockname(), kind=kind)
