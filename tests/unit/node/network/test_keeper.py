"""The keeper's ways across, with both ends in this process' own network; that they lead elsewhere is an e2e test's."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import cast

import pytest
from wasilet.testing.http import ask as ask_http
from wasilet_common.relay import Connection
from wasilet_node.network import keeper
from wasilet_node.network.errors import NetworkError
from wasilet_node.runtime import rootless

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


@contextmanager
def handing_out(path: Path, *descriptors: int) -> Iterator[None]:
    """A keeper that has nothing but these."""
    with keeper._listen(path) as entrance:
        entrance.setblocking(True)  # noqa: FBT003

        def hand() -> None:
            connection, _ = entrance.accept()
            with connection:
                socket.send_fds(connection, [b"inside"], list(descriptors))

        thread = threading.Thread(target=hand)
        thread.start()
        yield
        thread.join(20)


@pytest.mark.parametrize("kind", rootless.KINDS)
def test_a_socket_is_handed_out_of_the_wanted_kind(tmp_path: Path, kind: socket.SocketKind) -> None:
    with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        given = (stream.fileno(), stream.fileno(), datagrams.fileno())
        with handing_out(tmp_path / "k.sock", *given), rootless.socket_inside(tmp_path / "k.sock", kind) as made:
            assert made.type == kind
            assert not made.getblocking()


def test_a_keeper_that_hands_out_too_little_is_an_error(tmp_path: Path) -> None:
    with (
        socket.socket() as stream,
        handing_out(tmp_path / "k.sock", stream.fileno()),
        pytest.raises(OSError, match="gave no answer"),
    ):
        rootless.ask(tmp_path / "k.sock")


async def test_a_service_of_a_network_without_root_is_asked_by_the_keepers_sockets(tmp_path: Path) -> None:
    """The socket is connected to a server already, so that an address which leads nowhere answers."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        writer.close()

    def connect(address: tuple[str, int], _seconds: float) -> socket.socket:
        assert address == ("192.0.2.1", 80)
        return socket.create_connection(place)

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        place = server.sockets[0].getsockname()
        got = await asyncio.to_thread(ask_http, "http://192.0.2.1/", connect=connect)
    assert got.text == "hi"
