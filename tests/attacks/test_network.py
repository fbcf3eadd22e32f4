"""Pods against the network around them: every row of ``network.yaml``. The machine is a namespace of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wasilet_node.network import nft, policies
from wasilet_node.network.outward_udp import MAX_FLOWS_PER_POD
from wasilet_node.network.service import PodNetwork
from wasilet_node.runtime import linux, netns
from wasilet_node.runtime.protocol import GuestKind

from tests.another_machine import another_machine
from tests.attacks.tally import Tally
from tests.unit.node.network.test_service import (
    POD_CIDR,
    SETTINGS,
    Running,
    network,
    outward_process,
    sent,
    with_machine,
)
from tests.unit.node.runtime.component_guests import UNKNOWN_ERROR, socket_guest
from tests.unit.node.runtime.guests import Rig, running_supervisor

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft"),
]

TABLE: dict[str, list[dict[str, Any]]] = yaml.safe_load((Path(__file__).parent / "network.yaml").read_text())
KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
GREETING = b"here"
OTHER = "192.0.2.10"
METADATA = "169.254.169.254"
ATTACKER, NEIGHBOUR, VICTIM = "a1", "a2", "b1"
NO_ANSWER_SECONDS = 1.0
"""What is dropped is not refused. Beside it other askers do get answers, so that silence means something."""

MAX_LOG_BYTES = 64 * 1024
MAX_MEMORY_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Two tenants' pods on a node, a supervisor, and another machine."""

    rig: Rig
    pods: PodNetwork
    victim: str
    outward: int

    async def socket_of(self, who: str, kind: int) -> socket.socket:
        if who == "node":
            return self.pods.make_socket(kind=kind)
        if who in {ATTACKER, NEIGHBOUR, VICTIM}:
            return (await self.pods._in_thread(self.pods._socket_inside, who, kind))[0]
        return socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)

    async def reached(self, who: str, address: str, port: int, protocol: str) -> bool:
        """Whether anything at all comes back."""
        loop = asyncio.get_running_loop()
        with await self.socket_of(who, KINDS[protocol]) as asker, contextlib.suppress(OSError):
            async with asyncio.timeout(NO_ANSWER_SECONDS):
                await loop.sock_connect(asker, (address, port))
                if protocol == "UDP":
                    await loop.sock_sendall(asker, b"?")
                return bool(await loop.sock_recv(asker, 100))
        return False

    async def surely_reached(self, who: str, address: str, port: int, protocol: str) -> None:
        """A new bridge port may forward nothing for seconds."""
        for _ in range(30):
            if await self.reached(who, address, port, protocol):
                return
        pytest.fail(f"{who} does not reach {address}:{port} by {protocol}")


@contextlib.asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(another_machine("lan", OTHER, own="192.0.2.9"))
        stack.enter_context(another_machine("cloud", METADATA, own="169.254.169.1"))
        rig = await stack.enter_async_context(running_supervisor(tmp_path))
        pods = await stack.enter_async_context(Running(network(rig.paths)))
        objects, victim = [], ""
        for uid in (ATTACKER, NEIGHBOUR, VICTIM):
            metadata = {"uid": uid, "name": uid, "namespace": uid[0], "labels": {}}
            attached = await pods.attach({"metadata": metadata, "spec": {}})
            assert attached is not None
            victim = attached.addresses[0]
            objects.append({"metadata": metadata, "spec": {}, "status": {"podIP": victim}})
        both = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        deny = {"metadata": {"name": "deny", "namespace": VICTIM[0]}, "spec": both}
        place = policies.Place(pod_cidr=ipaddress.IPv4Network(POD_CIDR), machine_address=str(SETTINGS.machine_address))
        spaces = [{"metadata": {"name": name}} for name in (ATTACKER[0], VICTIM[0])]
        await pods._in_thread(nft.apply, policies.rules([deny], objects, spaces, place))
        yield Stage(rig=rig, pods=pods, victim=victim, outward=await outward_process())


@contextlib.asynccontextmanager
async def greeting(sock: socket.socket, address: str, port: int) -> AsyncIterator[None]:
    """Everyone who comes to that address, by TCP or UDP as the socket is."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        writer.close()

    if sock.type == socket.SOCK_DGRAM:
        loop = asyncio.get_running_loop()

        def greet_by_datagram() -> None:
            _, client = sock.recvfrom(100)
            sock.sendto(GREETING, client)

        loop.add_reader(sock, greet_by_datagram)
        try:
            yield
        finally:
            loop.remove_reader(sock)
            sock.close()
    else:
        async with await asyncio.start_server(greet, sock=sock):
            yield


def test_a_scan_finds_nothing_that_is_not_the_pods_to_find(tmp_path: Path, tally: Tally) -> None:
    async def work() -> None:
        async with stage(tmp_path) as here, contextlib.AsyncExitStack() as stack:
            tried = []
            for row in TABLE["scan"]:
                for protocol, kind in KINDS.items():
                    if row["listens"] != "metadata":
                        sock = await here.socket_of(VICTIM if row["listens"] == "victim" else row["listens"], kind)
                        await stack.enter_async_context(greeting(sock, row["address"], row["port"]))
                    own = "node" if row["listens"] == "node" else "machine"
                    address = here.victim if row["listens"] == "victim" else row["address"]
                    await here.surely_reached(own, address, row["port"], protocol)
                    tried += [(row, asked, protocol) for asked in row["asked"]]
            for protocol in KINDS:
                await here.surely_reached(ATTACKER, OTHER, 80, protocol)

            async def attempt(row: dict[str, Any], asked: str, protocol: str) -> str:
                address = here.victim if asked == "victim" else asked
                found = await here.reached(ATTACKER, address, row["port"], protocol)
                return f"{row['what']} at {asked} by {protocol}" if found else ""

            found = await asyncio.gather(*(attempt(*each) for each in tried))
            assert [each for each in found if each] == []
            tally.count("not reached", len(found))

    with_machine(work)


def test_a_sweep_of_the_nodes_pods_finds_the_tenants_own_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with stage(tmp_path) as here, contextlib.AsyncExitStack() as stack:
            for who in (NEIGHBOUR, VICTIM):
                sock = await here.socket_of(who, socket.SOCK_STREAM)
                await stack.enter_async_context(greeting(sock, "0.0.0.0", 80))
            own = here.pods.addresses({"metadata": {"uid": NEIGHBOUR}})
            assert own is not None
            await here.surely_reached(ATTACKER, own[0], 80, "TCP")
            await here.surely_reached("machine", here.victim, 80, "TCP")
            prefix = POD_CIDR.rpartition(".")[0]
            hosts = [f"{prefix}.{number}" for number in range(1, 255)]
            found = await asyncio.gather(*(here.reached(ATTACKER, host, 80, "TCP") for host in hosts))
            assert [host for host, reached in zip(hosts, found, strict=True) if reached] == [own[0]]

    with_machine(work)


def flood(sockets: list[socket.socket], address: str, row: dict[str, Any]) -> int:
    """How many the kernel took."""
    data, taken = bytes(row["bytes"]), 0
    for number in range(row["datagrams"]):
        with contextlib.suppress(OSError):  # no room, or it was refused before
            sockets[number % len(sockets)].sendto(data, (address, row["port"] + number % row.get("ports", 1)))
            taken += 1
    return taken


def kept_from(process: int) -> int:
    """How many datagrams the kernel dropped before ``outward`` had them, in the namespace of one of its threads."""
    found = 0
    for thread in Path(f"/proc/{process}/task").iterdir():
        with (thread / "ns" / "net").open() as namespace:
            netns.setns(namespace.fileno())
        done = subprocess.run([nft.find(), "list", "ruleset"], capture_output=True, text=True, timeout=20, check=True)
        found += sum(int(number) for number in re.findall(r"counter packets (\d+) bytes \d+ drop", done.stdout))
    return found


def test_a_pod_that_floods_keeps_no_other_from_the_network_and_what_it_takes_is_bounded(
    tmp_path: Path, tally: Tally
) -> None:
    async def work() -> None:
        async with stage(tmp_path) as here, contextlib.AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            neighbour = stack.enter_context(await here.socket_of(NEIGHBOUR, socket.SOCK_DGRAM))
            for protocol in KINDS:
                await here.surely_reached(NEIGHBOUR, OTHER, 80, protocol)
            for row in TABLE["flood"]:
                with contextlib.ExitStack() as floods:
                    sockets = [
                        floods.enter_context(await here.socket_of(ATTACKER, socket.SOCK_DGRAM))
                        for _ in range(row["sockets"])
                    ]
                    address = here.victim if row["to"] == "victim" else row["to"]
                    begun = time.monotonic()
                    flooding = loop.run_in_executor(None, flood, sockets, address, row)
                    # At least once, and for as long as it lasts.
                    while True:
                        for protocol in KINDS:
                            await here.surely_reached(NEIGHBOUR, OTHER, 80, protocol)
                        assert await sent(here.pods, OTHER, b"x", asker=neighbour), row["what"]
                        if flooding.done():
                            break
                    taken = await flooding
                    tally.note(f"{row['what']}: {taken} datagrams in {time.monotonic() - begun:.1f} s")
                    if row.get("limited"):
                        with ThreadPoolExecutor(1) as thread:
                            kept = await loop.run_in_executor(thread, kept_from, here.outward)
                        assert kept > row["datagrams"] / 2
                    process = psutil.Process(here.outward)
                    # Of both pods.
                    assert process.num_fds() <= 2 * 2 * MAX_FLOWS_PER_POD + 64, row["what"]
                    assert process.memory_info().rss < MAX_MEMORY_BYTES, row["what"]
            log = here.rig.paths.network / "outward.log"
            assert log.stat().st_size < MAX_LOG_BYTES
            assert "Traceback" not in log.read_text()
            tally.count("withstood", len(TABLE["flood"]))

    with_machine(work)


def test_a_pod_that_keeps_its_connections_has_its_share_and_its_neighbour_is_let_through(
    tmp_path: Path, tally: Tally
) -> None:
    async def work() -> None:
        linux.raise_open_files_limit()
        async with stage(tmp_path) as here, contextlib.AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            for row in TABLE["connections"]:
                place = (row["to"], row["port"])
                for who in (ATTACKER, NEIGHBOUR):
                    await here.surely_reached(who, *place, "TCP")

                async def open_one(place: tuple[str, int] = place) -> bool:
                    sock = stack.enter_context(await here.socket_of(ATTACKER, socket.SOCK_STREAM))
                    with contextlib.suppress(ConnectionError):
                        await loop.sock_connect(sock, place)
                        return bool(await loop.sock_recv(sock, 100))
                    return False

                async with asyncio.timeout(60):
                    had = 0
                    while had < row["had"]:
                        had += sum(await asyncio.gather(*(open_one() for _ in range(min(50, row["had"] - had)))))
                    beyond = await asyncio.gather(*(open_one() for _ in range(row["connections"] - row["had"])))
                assert not any(beyond)
                await here.surely_reached(NEIGHBOUR, *place, "TCP")
                tally.count("refused", len(beyond))

    with_machine(work)


def test_a_guest_that_asks_for_ten_thousand_sockets_is_refused_and_its_neighbour_is_not(
    tmp_path: Path, tally: Tally
) -> None:
    async def work() -> None:
        async with stage(tmp_path) as here:
            keys = {}
            for uid in (ATTACKER, NEIGHBOUR):
                attached = await here.pods.attach({"metadata": {"uid": uid}, "spec": {}})
                assert attached is not None
                keys[uid] = attached.key
            for row in TABLE["sockets"]:
                greedy, modest = await asyncio.gather(
                    *(
                        here.rig.run(
                            socket_guest(row["protocol"], sockets=number),
                            kind=GuestKind.COMPONENT,
                            network=keys[uid],
                        )
                        for uid, number in ((ATTACKER, row["sockets"]), (NEIGHBOUR, row["had"]))
                    )
                )
                assert greedy.exit_code == 100 + UNKNOWN_ERROR
                assert (modest.exit_code, modest.message) == (0, "")
                tally.count("refused")

    with_machine(work)
