"""Joining from elsewhere: doors that pass bytes, units that systemd takes, names and addresses that make no sense."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wasilet.cluster import join, tcp_proxy
from wasilet.errors import UsageError
from wasilet.kube.bootstrap_token import Token, bootstrap_config

pytestmark = pytest.mark.unit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def door(to_port: int, *, allowed: str = "127.0.0.0/8") -> AsyncIterator[int]:
    port, stop = free_port(), asyncio.Event()
    networks = [ipaddress.ip_network(allowed)]
    task = asyncio.create_task(
        tcp_proxy.serve(("127.0.0.1", port), ("127.0.0.1", to_port), stop=stop, allowed=networks)
    )
    try:
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    await writer.wait_closed()
                    break
                await asyncio.sleep(0.01)
        yield port
    finally:
        stop.set()
        async with asyncio.timeout(5):
            await task


async def test_bytes_pass_both_ways_and_an_end_is_passed_on() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Answers only when all has come: an end that is not passed on would hang here.
        writer.write((await reader.read(-1))[::-1])
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, door(server.sockets[0].getsockname()[1]) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = bytes(range(256)) * 4000
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await reader.read(-1) == sent[::-1]
        writer.close()
        await writer.wait_closed()


async def test_a_server_that_is_away_closes_the_connection_and_the_proxy_stays() -> None:
    async with door(free_port()) as port:
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(10):
                assert await reader.read(-1) == b""
            writer.close()
            await writer.wait_closed()


async def test_who_comes_from_elsewhere_than_is_allowed_is_not_forwarded() -> None:
    reached = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer.get_extra_info("peername"))
        writer.write(b"reached")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, door(server.sockets[0].getsockname()[1], allowed="127.0.0.2/32") as port:
        for source, expected in (("127.0.0.1", b""), ("127.0.0.2", b"reached")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
            async with asyncio.timeout(10):
                assert await reader.read(-1) == expected
            writer.close()
            await writer.wait_closed()
    assert len(reached) == 1


async def test_stopping_ends_connections_that_are_open() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        async with door(server.sockets[0].getsockname()[1]) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read(-1) == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_an_address_of_a_proxy_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(SystemExit):
        tcp_proxy.main(["--listen", text, "--to", "127.0.0.1:1"])


# --- units -----------------------------------------------------------------------------------------------------------


def unit(**given: str) -> str:
    values = {"node": "wasm-1", "data_dir": "/var/lib/wasilet", "bootstrap_file": "/etc/wasilet/b.conf", **given}
    return join.systemd_unit(**values)


@pytest.mark.parametrize("user", ["root", "daemon"])
def test_systemd_takes_the_unit(tmp_path: Path, user: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "wasilet-node.service"
    arguments = ["--node-labels", 'a=100%,b=x"y', "--max-pods", "500", "--provider-id", "$HOME"]
    text = join.systemd_unit(
        node="wasm-1", data_dir="/var/lib/wasilet", bootstrap_file="/b.conf", user=user, arguments=arguments
    )
    join.write_unit(path, text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "wasilet-node.service" not in done.stderr, done.stderr
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("user", "at_most"), [("root", 70), ("daemon", 40)])
def test_systemd_rates_the_exposure_of_the_unit(tmp_path: Path, user: str, at_most: int) -> None:
    """Of 100; systemd 252 rates 65 and 33, and 92 and more for a unit that takes nothing away."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "wasilet-node.service"
    join.write_unit(path, unit(user=user))
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={at_most}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "--offline" in done.stderr:
        pytest.skip("systemd-analyze is older than 250 and rates no files")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_restart_of_the_agent_leaves_containers_alone() -> None:
    text = unit(user="wasm")
    assert "KillMode=process" in text
    assert "Delegate=yes" in text
    assert "User=wasm" in text
    assert f'ExecStart="{sys.executable}" -P -m wasilet_node --node-name "wasm-1"' in text


@pytest.mark.parametrize("user", ["", "root", "wasm"])
def test_the_unit_takes_away_what_the_node_does_not_need(user: str) -> None:
    lines = unit(user=user).splitlines()
    common = {"NoNewPrivileges=yes", "RestrictSUIDSGID=yes", "RestrictRealtime=yes", "SystemCallArchitectures=native"}
    assert common <= {*lines}
    assert "TasksMax=16384" in lines
    only_root = [line for line in lines if line.startswith("CapabilityBoundingSet=~")]
    assert ("User=wasm" in lines, bool(only_root)) == (user == "wasm", user != "wasm")
    # Memory volumes are mounts of root's node: in a mount namespace of the service the next agent would not see them.
    assert ("ProtectSystem=full" in lines, "CapabilityBoundingSet=" in lines) == (user == "wasm", user == "wasm")


@pytest.mark.parametrize(
    ("data_dir", "user", "expected"),
    [
        ("/var/lib/wasilet/n", "wasm", "StateDirectory=wasilet/n"),
        ("/var/lib/wasilet/n", "root", None),
        ("/srv/n", "wasm", None),
        ("/var/lib/../n", "wasm", None),
    ],
)
def test_the_data_folder_of_an_ordinary_user_is_made_by_systemd(data_dir: str, user: str, expected: str | None) -> None:
    lines = unit(data_dir=data_dir, user=user).splitlines()
    assert next((line for line in lines if line.startswith("StateDirectory=")), None) == expected


def test_a_node_runs_as_the_user_who_asks_for_its_unit() -> None:
    assert join.unit_user({"SUDO_USER": "ann"}) == "ann"
    assert join.unit_user({}) == pwd.getpwuid(os.geteuid()).pw_name


@pytest.mark.parametrize(
    "given",
    [
        {"node": 'x" "--evil'},
        {"node": "UPPER"},
        {"data_dir": "relative"},
        {"data_dir": '/a"b'},
        {"data_dir": "/a%h"},
        {"data_dir": "/a$b"},
        {"bootstrap_file": "/a\nExecStartPre=/bin/evil"},
        {"user": "root\nExecStartPre=/bin/evil"},
    ],
)
def test_nothing_that_is_given_can_end_a_line_or_a_word_of_the_unit(given: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        unit(**given)


def test_arguments_cannot_either() -> None:
    with pytest.raises(UsageError):
        join.systemd_unit(node="n", data_dir="/d", bootstrap_file="/b", arguments=["x\nExecStartPre=/bin/evil"])


# --- bootstrap files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("https://127.0.0.1:6443", True),
        ("https://localhost:6443", True),
        ("https://[::1]:6443", True),
        ("https://192.0.2.1:6443", False),
        ("https://api.example:6443", False),
    ],
)
def test_what_other_machines_cannot_reach_is_known(server: str, *, expected: bool) -> None:
    assert join.is_loopback(server) is expected


def test_the_name_on_the_servers_certificate_goes_along_with_a_proxys_address() -> None:
    config = bootstrap_config(
        server="https://192.0.2.1:7000", ca=b"CA", client_ca=b"CLIENT", token=Token("abcdef", "0" * 16),
        tls_server_name="127.0.0.1",
    )  # fmt: skip
    assert config["clusters"][0]["cluster"]["tls-server-name"] == "127.0.0.1"
    plain = bootstrap_config(server="https://x", ca=None, client_ca=None, token=Token("abcdef", "0" * 16))
    assert "tls-server-name" not in plain["clusters"][0]["cluster"]
