"""Host ports: relays between two loopback sockets, which stand for the machine's port and the pod's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.host_ports import HostPort, HostPorts, wanted

pytestmark = pytest.mark.unit


@asynccontextmanager
async def upper_case_server() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_tcp_ports_of_all_containers_are_wanted() -> None:
    ports = [
        {"containerPort": 80, "hostPort": 8080},
        {"containerPort": 81},
        {"containerPort": 53, "hostPort": 53, "protocol": "UDP"},
    ]
    sidecar = {"name": "s", "ports": [{"containerPort": 9, "hostPort": 9, "hostIP": "127.0.0.1"}]}
    pod = {"spec": {"initContainers": [sidecar], "containers": [{"name": "c", "ports": ports}]}}
    assert wanted(pod) == [
        HostPort(address="127.0.0.1", port=9, target=9),
        HostPort(address="0.0.0.0", port=8080, target=80),
    ]


async def test_bytes_go_both_ways_and_an_end_is_passed_on() -> None:
    async with upper_case_server() as target:
        ports = HostPorts(asyncio.open_connection)
        port = free_port()
        await ports.open("u", [HostPort(address="127.0.0.1", port=port, target=target)], "127.0.0.1")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"HELLO"
        writer.close()
        await ports.close("u")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_a_port_that_is_taken_names_itself_and_leaves_none_open() -> None:
    ports = HostPorts(asyncio.open_connection)
    free = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        both = [HostPort(address="127.0.0.1", port=each, target=1) for each in (free, number)]
        with pytest.raises(NetworkError, match=f"host port {number}: "):
            await ports.open("u", both, "127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", free)


async def test_a_pod_that_does_not_listen_ends_the_connection() -> None:
    ports = HostPorts(asyncio.open_connection)
    port = free_port()
    await ports.open("u", [HostPort(address="127.0.0.1", port=port, target=free_port())], "127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    await ports.close_all()
