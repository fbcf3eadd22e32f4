"""Host ports: loopback sockets stand for the machine's port and the pod's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from wasilet_common.forwarding import connected_datagrams
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


def host_ports() -> HostPorts:
    return HostPorts(asyncio.open_connection, lambda address, port: connected_datagrams((address, port)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ports_of_all_containers_are_wanted() -> None:
    ports = [
        {"containerPort": 80, "hostPort": 8080},
        {"containerPort": 81},
        {"containerPort": 53, "hostPort": 54, "protocol": "UDP"},
        {"containerPort": 99, "hostPort": 99, "protocol": "SCTP"},
    ]
    sidecar = {"name": "s", "ports": [{"containerPort": 9, "hostPort": 9, "hostIP": "127.0.0.1"}]}
    pod = {"spec": {"initContainers": [sidecar], "containers": [{"name": "c", "ports": ports}]}}
    assert wanted(pod) == [
        HostPort(address="127.0.0.1", port=9, target=9),
        HostPort(address="0.0.0.0", port=8080, target=80),
        HostPort(address="0.0.0.0", port=54, target=53, protocol="UDP"),
    ]


async def test_bytes_go_both_ways_and_an_end_is_passed_on() -> None:
    async with upper_case_server() as target:
        ports = host_ports()
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
    ports = host_ports()
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


def datagram_socket(address: str = "127.0.0.1") -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind((address, 0))
    return made


async def test_datagrams_of_each_client_are_answered_by_the_address_that_it_asked() -> None:
    ports, loop = host_ports(), asyncio.get_running_loop()
    with datagram_socket() as pod, datagram_socket() as one, datagram_socket() as two, datagram_socket() as probe:
        number = probe.getsockname()[1]
        probe.close()
        target = pod.getsockname()[1]
        await ports.open("u", [HostPort(address="0.0.0.0", port=number, target=target, protocol="UDP")], "127.0.0.1")
        try:
            async with asyncio.timeout(10):
                for client, asked in ((one, "127.0.0.1"), (two, "127.0.0.7"), (one, "127.0.0.1")):
                    # Connected: it takes answers from no other address.
                    client.connect((asked, number))
                    client.send(asked.encode())
                    data, sender = await loop.sock_recvfrom(pod, 100)
                    await loop.sock_sendto(pod, data.upper() + b"!", sender)
                    assert await loop.sock_recv(client, 100) == asked.encode() + b"!"
        finally:
            await ports.close("u")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
            again.bind(("0.0.0.0", number))


async def test_a_port_for_datagrams_that_is_taken_names_its_protocol() -> None:
    ports = host_ports()
    with datagram_socket() as taken:
        # It would share it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        number = taken.getsockname()[1]
        both = [HostPort(address="127.0.0.1", port=number, target=1, protocol=each) for each in ("TCP", "UDP")]
        with pytest.raises(NetworkError, match=f"host port {number}/UDP: "):
            await ports.open("u", both, "127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", number)


async def test_a_pod_that_does_not_listen_ends_the_connection() -> None:
    ports = host_ports()
    port = free_port()
    await ports.open("u", [HostPort(address="127.0.0.1", port=port, target=free_port())], "127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    await ports.close_all()
