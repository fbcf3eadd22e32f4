"""The keeper's ways across, with both ends in this process' own network; that they lead elsewhere is an e2e test's."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from wasilet_common.relay import Connection
from wasilet_node.network import keeper
from wasilet_node.network.errors import NetworkError

pytestmark = pytest.mark.unit


class Inside:
    """Stands in for the network inside: every connection ends at one port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[keeper.Address] = []

    async def connect(self, address: keeper.Address) -> Connection:
        self.asked.append(address)
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@asynccontextmanager
async def proxy(path: Path, inside: Inside) -> AsyncIterator[None]:
    made = keeper.ConnectProxy(cast("keeper.Inside", inside), [ipaddress.IPv4Network("10.9.0.0/16")])
    server = await asyncio.start_unix_server(made.accept, sock=keeper._listen(path))
    async with server:
        yield


async def ask(path: Path, address: str, port: int) -> tuple[bytes, Connection]:
    """As the API server does. The answer's first line."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"CONNECT {address}:{port} HTTP/1.1\r\nHost: {address}:{port}\r\n\r\n".encode())
    return (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0], (reader, writer)


async def said(connection: Connection) -> bytes:
    reader, writer = connection
    writer.write(b"hello\n")
    line = await reader.readline()
    writer.close()
    return line


async def test_pods_and_services_are_reached_inside_and_everything_else_from_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "connect.sock"
    async with echo() as port, proxy(path, inside := Inside(port)):
        for address, number, asked in (("10.9.4.7", 80, 1), ("127.0.0.1", port, 1)):
            answer, connection = await ask(path, address, number)
            assert answer == b"HTTP/1.1 200 Connection established"
            assert await said(connection) == b"hello\n"
            assert len(inside.asked) == asked
        assert inside.asked == [("10.9.4.7", 80)]


async def test_a_place_where_no_one_listens_is_a_refusal(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with proxy(tmp_path / "connect.sock", Inside(0)):
            answer, (_, writer) = await ask(tmp_path / "connect.sock", "127.0.0.1", unused.getsockname()[1])
            writer.close()
    assert answer == b"HTTP/1.1 502 Bad Gateway"


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\n\r\n", b"CONNECT nowhere\r\n\r\n", b"\xff\r\n\r\n", b"CONNECT a:b HTTP/1.1\r\n\r\n"]
)
async def test_what_is_no_request_to_connect_is_refused(tmp_path: Path, head: bytes) -> None:
    async with proxy(tmp_path / "connect.sock", inside := Inside(0)):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "connect.sock")
        writer.write(head)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    assert inside.asked == []


async def test_the_sockets_are_the_users_alone_and_take_the_place_of_dead_ones(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    keeper._listen(path).close()
    with keeper._listen(path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_node_that_is_not_let_in_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"does not let this node in \(.*no\.sock\): No such file"):
        keeper.enter(tmp_path / "no.sock")
