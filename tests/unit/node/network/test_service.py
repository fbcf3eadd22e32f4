"""The pod network with a real supervisor, and a network namespace of the test's own in the place of the machine's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import ipaddress
import os
import re
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from wasilet_node.network import nft, pod_networks
from wasilet_node.network.channel import NamespaceChannel
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import BRIDGE, BRIDGE_ADDRESS, NodeNetwork
from wasilet_node.network.outward_udp import MAX_FLOWS_PER_POD
from wasilet_node.network.pod_networks import POOL_LOW, POOL_SIZE
from wasilet_node.network.policy_gate import SOCKET_NAME, PolicyReports
from wasilet_node.network.service import PodNetwork
from wasilet_node.network.uplink import interface_prefix
from wasilet_node.runtime import linux, supervisor_registry
from wasilet_node.runtime.protocol import GuestKind, StartError
from wasilet_node.settings import NetworkSettings, NodePaths

from tests.another_machine import RESOLVED, another_machine
from tests.unit.node.network.test_netlink import in_namespace
from tests.unit.node.runtime.component_guests import ACCESS_DENIED, socket_guest
from tests.unit.node.runtime.guests import connected, eventually, running_supervisor

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft"),
]
SETTINGS = NetworkSettings(
    cluster_cidr=ipaddress.IPv4Network("10.9.0.0/16"),
    service_cidr=ipaddress.IPv4Network("10.10.0.0/16"),
    uplink=ipaddress.IPv4Interface("10.9.255.2/30"),
    cluster_dns=("10.10.0.10",),
)
POD_CIDR = "10.9.4.0/24"


def pod(uid: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"uid": uid, "name": uid, "namespace": "default"}, "spec": spec}


def hosts(_pod: dict[str, Any], addresses: tuple[str, ...]) -> bytes:
    return f"{addresses[0]} me\n".encode()


def network(paths: NodePaths, settings: NetworkSettings = SETTINGS, **more: Any) -> PodNetwork:
    return PodNetwork(settings, paths, node_name="n", hosts_of=hosts, **more)


class Running:
    """A network that runs as in an agent; leaving it is the agent's end."""

    def __init__(self, network: PodNetwork, cidr: str = POD_CIDR) -> None:
        self.network = network
        self.cidr = cidr

    async def __aenter__(self) -> PodNetwork:
        self.network.set_pod_cidr(self.cidr)
        self.task = asyncio.create_task(self.network.run())
        await self.network.settle(10)
        return self.network

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def with_machine(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` where the machine's network is one of its own."""

    def run() -> None:
        with Netlink() as machine:
            machine.set_up(1)
        asyncio.run(work())  # type: ignore[arg-type]

    in_namespace(run)


def machine_interfaces() -> set[str]:
    """Of the namespace that the calling thread is in."""
    with Netlink() as machine:
        return {name for _, name in machine.links() if name.startswith("wl")}


async def until(condition: Callable[[], bool]) -> None:
    async def probe() -> bool | None:
        return True if condition() else None

    await eventually(probe)


def shared_by_modules(pods: PodNetwork) -> int:
    """How many interfaces of the node lead to a namespace of theirs."""
    assert pods._node is not None
    return sum(name.startswith("m") for _, name in pods._node.node.links())


def test_pods_of_modules_share_a_namespace_that_refuses_what_nothing_in_them_can_take(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            only_address = await pods.attach(pod("m0"), None)
            assert only_address is not None
            attached = [await pods.attach(pod(f"m{number}"), GuestKind.MODULE) for number in range(20)]
            addresses = {address for each in attached if each is not None for address in each.addresses}
            assert len(addresses) == 20
            assert only_address.addresses[0] in addresses
            assert [each.key for each in attached if each is not None] == [""] * 20
            assert await pods._in_thread(shared_by_modules, pods) == 1
            for connect in (pods.connect, lambda *_: pods.connect_inside(pod("m7"), 80)):
                with pytest.raises(ConnectionRefusedError):
                    await connect(min(addresses), 80)
            # From the machine, and from another pod.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((min(addresses), 80), timeout=5)
            await pods.attach(pod("u1"))
            client, _ = await pods._in_thread(pods._socket_inside, "u1")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.get_running_loop().sock_connect(client, (max(addresses), 80))
            client.close()
            for number in range(20):
                await pods.detach(f"m{number}")
            modules = pods._pods._modules if pods._pods is not None else None
            assert modules is not None
            assert local_addresses(modules.netlink) == []

    with_machine(work)


def local_addresses(netlink: Netlink) -> list[str]:
    """Those that no interface has."""
    found = []
    for answer in netlink._dump(26, bytes([socket.AF_INET]) + bytes(11), "list routes"):
        length, table, protocol = answer[1], answer[4], answer[5]
        if (length, table, protocol) == (32, 255, 4):
            found.append(socket.inet_ntoa(answer[16:20]))
    return found


def test_a_component_beside_modules_brings_the_pod_its_namespace_and_the_address_stays(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            before = await pods.attach(pod("u1"), GuestKind.MODULE)
            assert before is not None
            with pytest.raises(ConnectionRefusedError):  # now the node knows whom it asks for that address
                await pods.connect(before.addresses[0], 80)
            after = await pods.attach(pod("u1"), GuestKind.COMPONENT)
            assert after is not None
            assert after.addresses == before.addresses
            assert after.key
            assert await pods.attach(pod("u1"), GuestKind.MODULE) == after
            listener, _ = await pods._in_thread(pods._socket_inside, "u1")
            listener.bind(("0.0.0.0", 80))
            listener.listen()
            async with asyncio.timeout(5):
                _, writer = await pods.connect(after.addresses[0], 80)
            writer.close()
            listener.close()

    with_machine(work)


def test_the_next_agent_answers_for_the_pods_of_modules_and_repairs_what_was_lost(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig:
            async with Running(network(rig.paths)) as first:
                attached = [await first.attach(pod(uid), GuestKind.MODULE) for uid in ("m1", "m2")]
                addresses = [each.addresses[0] for each in attached if each is not None]
                modules = first._pods._modules if first._pods is not None else None
                assert modules is not None
                lost = ipaddress.IPv4Address(addresses[1])
                await first._in_thread(lambda: modules.netlink.forget_local_address(lost, index=modules.loopback))
            async with Running(network(rig.paths)) as second:
                with pytest.raises(ConnectionRefusedError):
                    await second.connect(addresses[0], 80)
                assert await second.attach(pod("m2"), GuestKind.MODULE) == attached[1]
                with pytest.raises(ConnectionRefusedError):
                    await second.connect(addresses[1], 80)
                third = await second.attach(pod("m3"), GuestKind.MODULE)
                assert third is not None
                assert third.addresses[0] not in addresses
                assert await second._in_thread(shared_by_modules, second) == 1

    with_machine(work)


def test_namespaces_for_later_pods_let_starts_go_first(tmp_path: Path) -> None:
    async def work() -> None:
        waits: list[int] = []
        calm = asyncio.Event()
        calm.set()

        async def wait(_limit_seconds: float) -> bool:
            waits.append(ready())
            if not calm.is_set():
                await asyncio.sleep(0.01)
            return calm.is_set()

        def ready() -> int:
            return pods._pods.ready if pods._pods is not None else 0

        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths, calm=wait)) as pods:
            await until(lambda: ready() == POOL_SIZE)
            calm.clear()
            waits.clear()
            for number in range(POOL_SIZE - POOL_LOW - 1):
                await pods.attach(pod(f"u{number}"))
            await until(lambda: bool(waits))
            assert ready() == POOL_LOW + 1, "none was made while starts were under way"
            await pods.attach(pod("last"))
            await until(lambda: ready() > POOL_LOW)
            calm.set()
            await until(lambda: ready() == POOL_SIZE)

    with_machine(work)


def test_pods_get_addresses_reach_each_other_and_nothing_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            assert (pods.problem, pods.absent) == (None, None)
            one, two = await pods.attach(pod("u1")), await pods.attach(pod("u2"))
            assert one is not None
            assert two is not None
            assert len({*one.addresses, *two.addresses}) == 2
            assert await pods.attach(pod("u1")) == one
            assert await pods.attach(pod("u3", hostNetwork=True)) is None
            text = Path(dict(await pods.etc_files(pod("u1")))["/etc/resolv.conf"]).read_text()
            assert "nameserver 10.10.0.10" in text
            listener = await pods._in_thread(pods._socket_inside, "u2")
            listener[0].bind(("0.0.0.0", 80))
            listener[0].listen()
            client = await pods._in_thread(pods._socket_inside, "u1")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client[0], (two.addresses[0], 80))
            accepted, peer = await loop.sock_accept(listener[0])
            assert peer[0] == one.addresses[0], "between pods nothing is translated"
            for each in (client[0], accepted):
                each.close()
            _, writer = await pods.connect(two.addresses[0], 80)
            writer.close()
            _, writer = await pods.connect_inside(pod("u2"), 80)
            writer.close()
            # From the machine, by the route that the uplink brought.
            with socket.create_connection((two.addresses[0], 80), timeout=5):
                pass
            listener[0].close()
            await pods.detach("u1")
            await pods.detach("u1")
            assert pods.addresses(pod("u1")) is None
            assert [path.name for path in (rig.paths.network / "pods").iterdir()] == ["u2.json"]
            assert not (rig.paths.network / "etc" / "u1").exists()
        # The supervisor is gone, and the agent's threads: with them the namespaces, and with these the veth.
        await until(lambda: not machine_interfaces())
        with Netlink() as machine:
            assert machine.routes() == []

    with_machine(work)


def test_the_policies_process_learns_each_address_when_its_pod_has_it_and_a_pod_waits_for_the_answer(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            reports, changed = PolicyReports(), asyncio.Event()
            following = asyncio.create_task(reports.follow(rig.paths.network / SOCKET_NAME, changed))
            first = await pods.attach(pod("u1"))
            assert first is not None
            await until(lambda: reports.claims == {"u1": first.addresses[0]})
            await pods.await_policies(pod("u1"))
            reports.applied(["u1"], reports.claims, judging=True)
            second = await pods.attach(pod("u2"))
            assert second is not None
            await until(lambda: len(reports.claims) == 2)
            waiting = asyncio.create_task(pods.await_policies(pod("u2")))
            reports.applied(["u1", "u2"], reports.claims, judging=True)
            await waiting
            await pods.detach("u1")
            await until(lambda: reports.claims == {"u2": second.addresses[0]})
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    with_machine(work)


def test_a_burst_of_pods_does_not_read_the_machines_routes_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    look = NodeNetwork.know_machine

    def counted(node: NodeNetwork) -> None:
        looks.append(None)
        look(node)

    monkeypatch.setattr(NodeNetwork, "know_machine", counted)

    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            for number in range(6):
                await until(lambda: pods._pods is not None and len(pods._pods._pool) == POOL_SIZE)
                await pods.attach(pod(f"u{number}"))
            await until(lambda: pods._pods is not None and len(pods._pods._pool) == POOL_SIZE)
        assert len(looks) <= 3, "at the start, after its own changes, and perhaps because half a minute is over"

    with_machine(work)


def test_the_next_agent_finds_everything_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig:
            async with Running(network(rig.paths)) as first:
                attached = await first.attach(pod("u1"))
                before = machine_interfaces()
            async with Running(network(rig.paths)) as second:
                assert second.addresses(pod("u1")) == (attached.addresses if attached else None)
                assert machine_interfaces() == before, "the node's network was made once"
                assert await second.attach(pod("u1")) == attached
                other = await second.attach(pod("u2"))
                assert attached is not None
                assert other is not None
                assert other.addresses != attached.addresses

    with_machine(work)


def test_a_lost_supervisor_takes_the_pods_networks_and_the_next_one_gets_new_ones(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            first = await pods.attach(pod("u1"))
            pid = rig.pid()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: linux.start_time(pid) is None)
            async with connected(tmp_path):
                second = await pods.attach(pod("u1"))
            assert first is not None
            assert second is not None
            assert second.key != first.key

    with_machine(work)


def test_a_supervisor_that_hung_is_asked_again_and_has_kept_all(tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            running_supervisor(tmp_path) as rig,
            Running(network(rig.paths, supervisor_seconds=0.3)) as pods,
        ):
            before = await pods.attach(pod("u1"))
            assert before is not None
            await pods.attach(pod("u2"))
            pointer = supervisor_registry.current(rig.paths.data)
            assert pointer is not None
            os.kill(pointer.pid, signal.SIGSTOP)
            try:
                with pytest.raises(NetworkError, match="does not answer"):
                    await pods.detach("u2")
                with pytest.raises(NetworkError, match="does not answer"):
                    await pods.detach("u2")
                assert pods.addresses(pod("u1")) == before.addresses
            finally:
                os.kill(pointer.pid, signal.SIGCONT)
            await pods.detach("u2")
            assert pods.uids() == ["u1"]
            assert await pods.attach(pod("u1")) == before
            assert await pods.attach(pod("u3")) is not None
            (made, address) = await pods._in_thread(pods._socket_inside, "u1")
            made.close()
            assert (address,) == before.addresses

    with_machine(work)


def test_a_namespace_that_is_made_when_nobody_waits_for_it_any_more_is_not_kept(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig:
            pointer = supervisor_registry.current(rig.paths.data)
            assert pointer is not None
            gone = NamespaceChannel(pointer)
            gone._socket.sendall(b'{"op": "make", "key": "late"}')
            gone.close()
            asked = NamespaceChannel(pointer)
            # They are made one after another, so the other has been made when this one is.
            os.close(asked.make("after"))
            kept = asked.kept()
            asked.close()
            assert kept == ["after"]

    with_machine(work)


def test_a_guest_in_its_pods_network_may_open_sockets_and_no_other(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            attached = await pods.attach(pod("u1"))
            assert attached is not None
            for protocol in ("tcp", "udp"):
                inside = await rig.run(
                    socket_guest(protocol),
                    kind=GuestKind.COMPONENT,
                    network=attached.key,
                    etc_files=await pods.etc_files(pod("u1")),
                )
                assert (inside.exit_code, inside.message) == (0, "")
                outside = await rig.run(socket_guest(protocol), kind=GuestKind.COMPONENT)
                assert outside.exit_code == 100 + ACCESS_DENIED

    with_machine(work)


def test_a_network_that_is_gone_is_a_start_error(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig:
            artifact = rig.artifact(socket_guest("tcp"), GuestKind.COMPONENT)
            config = rig.config(artifact, kind=GuestKind.COMPONENT, network="nowhere")
            with pytest.raises(StartError, match="the pod's network namespace is gone"):
                await rig.client.start(config)

    with_machine(work)


def test_a_bridge_without_ports_is_named_and_takes_pods_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_networks, "BRIDGE_PORTS", POOL_SIZE + 3)

    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            await until(lambda: pods._pods is not None and pods._pods.ready == POOL_SIZE)
            for number in range(POOL_SIZE + 2):
                assert await pods.attach(pod(f"u{number}")) is not None
            with pytest.raises(NetworkError, match="the pods' bridge is full: 10 pods with components"):
                await pods.attach(pod("u-too-many"))
            assert await pods.attach(pod("m1"), GuestKind.MODULE) is not None
            assert pods.problem is None
            await pods.detach("u0")
            assert await pods.attach(pod("u10")) is not None

    with_machine(work)


def test_addresses_run_out_by_name_and_come_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths), "10.9.4.0/29") as pods:
            for number in range(5):
                assert await pods.attach(pod(f"u{number}")) is not None
            with pytest.raises(NetworkError, match=r"no free address in 10\.9\.4\.0/29"):
                await pods.attach(pod("u5"))
            await pods.detach("u0")
            assert await pods.attach(pod("u5")) is not None

    with_machine(work)


def test_an_uplink_that_is_taken_leaves_pods_in_the_machines_network_and_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        with Netlink() as machine:
            machine.add_bridge("other")
            index = machine.require("other")
            address = ipaddress.IPv4Address
            machine.add_address(index, address("10.9.255.1"), prefix=32, peer=address("10.9.255.2"))
            machine.set_up(index)
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            assert pods.absent == "10.9.255.2 is reached by other already: another cluster's?"
            assert pods.problem is None
            assert await pods.attach(pod("u1")) is None
            assert pods.shares_machine(pod("u1"))

    with_machine(work)


def test_without_nft_pods_share_the_machines_network_and_nothing_of_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig:
            monkeypatch.setattr(nft, "find", functools.partial(nft.find, ""))
            monkeypatch.setenv("PATH", str(tmp_path))
            async with Running(network(rig.paths)) as pods:
                assert pods.absent == "nft is not installed (package nftables)"
                assert await pods.attach(pod("u1")) is None
                assert machine_interfaces() == set()

    with_machine(work)


@contextlib.asynccontextmanager
async def two_nodes(tmp_path: Path) -> AsyncIterator[tuple[PodNetwork, PodNetwork]]:
    """On one machine."""
    other = dataclasses.replace(SETTINGS, uplink=ipaddress.IPv4Interface("10.9.255.6/30"))
    async with (
        running_supervisor(tmp_path / "a") as one,
        running_supervisor(tmp_path / "b") as two,
        Running(network(one.paths)) as here,
        Running(network(two.paths, other), "10.9.8.0/24") as there,
    ):
        yield here, there


async def reach(here: PodNetwork, there: PodNetwork, *, name: str, limit_seconds: float) -> None:
    """From a new pod of one node to a new one of the other. Raises TimeoutError."""
    near, far = await here.attach(pod(f"{name}1")), await there.attach(pod(f"{name}2"))
    assert near is not None
    assert far is not None
    listener, _ = await there._in_thread(there._socket_inside, f"{name}2")
    client, _ = await here._in_thread(here._socket_inside, f"{name}1")
    with listener, client:
        listener.bind(("0.0.0.0", 80))
        listener.listen()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_seconds):
            await loop.sock_connect(client, (far.addresses[0], 80))
            accepted, peer = await loop.sock_accept(listener)
        accepted.close()
        assert peer[0] == near.addresses[0]


def test_two_nodes_of_one_machine_reach_each_others_pods(tmp_path: Path) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (here, there):
            await reach(here, there, name="u", limit_seconds=5)

    with_machine(work)


@pytest.mark.skipif(not shutil.which("iptables"), reason="the machine's firewall is set with iptables")
def test_what_the_machine_drops_or_does_not_forward_is_no_matter_of_pods_of_two_nodes(tmp_path: Path) -> None:
    """A Docker engine sets the policy to DROP when it starts, and may switch forwarding off when it ends."""

    async def work() -> None:
        async with two_nodes(tmp_path) as (here, there):
            firewall = await asyncio.create_subprocess_exec("iptables", "-P", "FORWARD", "DROP")
            assert await firewall.wait() == 0
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("0", encoding="ascii")
            await reach(here, there, name="to", limit_seconds=5)
            await reach(there, here, name="fro", limit_seconds=5)

    with_machine(work)


def test_a_node_that_came_again_is_reached_by_the_others(tmp_path: Path) -> None:
    """Its link is another one, its addresses are not."""
    other = dataclasses.replace(SETTINGS, uplink=ipaddress.IPv4Interface("10.9.255.6/30"))

    async def work() -> None:
        async with running_supervisor(tmp_path / "a") as one, Running(network(one.paths)) as here:
            for turn in range(2):
                async with (
                    running_supervisor(tmp_path / f"b{turn}") as two,
                    Running(network(two.paths, other), "10.9.8.0/24") as there,
                ):
                    await reach(here, there, name=f"to{turn}", limit_seconds=5)
                    await reach(there, here, name=f"fro{turn}", limit_seconds=5)
                await gone(two.paths.data)

    with_machine(work)


def test_the_machines_way_to_the_services_outlives_the_node_that_made_it(tmp_path: Path) -> None:
    other = dataclasses.replace(SETTINGS, uplink=ipaddress.IPv4Interface("10.9.255.6/30"))

    def gateway() -> str:
        with Netlink() as machine:
            return str(next((r.gateway for r in machine.routes() if r.destination == SETTINGS.service_cidr), ""))

    async def work() -> None:
        async with running_supervisor(tmp_path / "b") as two:
            async with running_supervisor(tmp_path / "a") as one, Running(network(one.paths)):
                assert gateway() == "10.9.255.2"
                there = Running(network(two.paths, other), "10.9.8.0/24")
                await there.__aenter__()
            try:
                await until(lambda: gateway() == "10.9.255.6")
            finally:
                await there.__aexit__()

    with_machine(work)


def test_pods_do_not_reach_another_clusters_pods_nodes_or_loopback_of_the_machine(tmp_path: Path) -> None:
    """Two clusters on one machine: each row is an address and a port where something does listen."""
    other = NetworkSettings(
        cluster_cidr=ipaddress.IPv4Network("10.29.0.0/16"),
        service_cidr=ipaddress.IPv4Network("10.30.0.0/16"),
        uplink=ipaddress.IPv4Interface("10.29.255.2/30"),
    )

    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with (
            running_supervisor(tmp_path / "a") as one,
            running_supervisor(tmp_path / "b") as two,
            Running(network(one.paths)) as here,
            Running(network(two.paths, other), "10.29.4.0/24") as there,
        ):
            await here.attach(pod("u1"))
            target = await there.attach(pod("u2"))
            assert target is not None
            in_pod, _ = await there._in_thread(there._socket_inside, "u2")
            with socket.socket() as on_loopback, there.make_socket() as on_node, in_pod:
                for listener, address in ((on_loopback, "127.0.0.1"), (on_node, "0.0.0.0"), (in_pod, "0.0.0.0")):
                    listener.bind((address, 80))
                    listener.listen()
                rows = {
                    "a pod of the other cluster": target.addresses[0],
                    "a node of the other cluster": "10.29.255.2",
                    "the gateway of the other cluster's pods": "10.29.4.1",
                    "the machine's loopback, from its end of the link": "10.9.255.1",
                    "the machine's loopback, from its end of the other link": "10.29.255.1",
                    "its own loopback": "127.0.0.1",
                }
                # The machine itself reaches what listens, so that a refusal is one of the pod alone.
                for name in ("a pod of the other cluster", "a node of the other cluster"):
                    with socket.create_connection((rows[name], 80), timeout=20):
                        pass
                for name, address in rows.items():
                    client, _ = await here._in_thread(here._socket_inside, "u1")
                    with client:
                        try:
                            async with asyncio.timeout(20):
                                await loop.sock_connect(client, (address, 80))
                        except ConnectionRefusedError:
                            continue
                    pytest.fail(f"{name} was reached")

    with_machine(work)


async def gone(data: Path) -> None:
    """Until the link of a node that ended is gone: the kernel takes it down in its own time."""
    async with asyncio.timeout(20):
        while True:
            with Netlink() as machine:
                if not any(name.startswith(interface_prefix(data)) for _, name in machine.links()):
                    return
            await asyncio.sleep(0.05)


def test_the_gateway_keeps_its_hardware_address_whatever_pods_come(tmp_path: Path) -> None:
    async def work() -> None:
        def hardware_address() -> str:
            with socket.socket() as any_socket:
                # SIOCGIFHWADDR: the address follows the name and the family.
                found = fcntl.ioctl(any_socket, 0x8927, struct.pack("256s", BRIDGE.encode()))
            return found[18:24].hex()

        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            before = await pods._in_thread(hardware_address)
            for number in range(12):
                await pods.attach(pod(f"u{number}"))
            assert await pods._in_thread(hardware_address) == before == BRIDGE_ADDRESS.hex()

    with_machine(work)


async def asked(pods: PodNetwork, target: str, port: int = 80) -> str:
    """What a server sends to a pod that connects; empty: the connection was refused or reset."""
    try:
        client = await connected_from(pods, target, port)
        with client:
            async with asyncio.timeout(20):
                return (await asyncio.get_running_loop().sock_recv(client, 100)).decode()
    except (ConnectionRefusedError, ConnectionResetError):
        return ""


async def connected_from(pods: PodNetwork, target: str, port: int) -> socket.socket:
    """A pod's connection. Raises OSError.

    While the kernel takes other namespaces down, a new bridge port may forward nothing for seconds, and a lost SYN is
    repeated ever later: so each attempt has a socket of its own."""
    for attempts_left in reversed(range(20)):
        client, _ = await pods._in_thread(pods._socket_inside, "u1")
        try:
            async with asyncio.timeout(2):
                await asyncio.get_running_loop().sock_connect(client, (target, port))
        except BaseException as error:
            client.close()
            if not isinstance(error, TimeoutError) or not attempts_left:
                raise
        else:
            return client
    raise AssertionError


def test_pods_reach_other_machines_and_nothing_that_only_this_one_reaches(tmp_path: Path) -> None:
    async def work() -> None:
        # As a Docker engine leaves it, which must not matter.
        nft.apply("table ip engine { chain f { type filter hook forward priority 0; policy drop; }; }")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        async with contextlib.AsyncExitStack() as stack:
            for name, address, own in (("lan", "192.0.2.10", "192.0.2.9"), ("wlother", "10.29.0.5", "10.29.0.1")):
                stack.enter_context(another_machine(name, address, own=own))
            rig = await stack.enter_async_context(running_supervisor(tmp_path))
            pods = await stack.enter_async_context(Running(network(rig.paths)))
            await pods.attach(pod("u1"))
            process = await outward_process()
            assert await asked(pods, "192.0.2.10") == "hello 192.0.2.9\n"
            rows = {
                "a port at which the other machine does not listen": ("192.0.2.10", 81),
                "a kubelet": ("192.0.2.10", 10250),
                "a network that the machine has no route to": ("203.0.113.1", 80),
                "the metadata service": ("169.254.169.254", 80),
                "another cluster": ("10.29.0.5", 80),
                "a Service that is not there": ("10.10.0.99", 80),
                "what takes the connections in": ("192.0.0.8", 80),
            }
            for name, (address, port) in rows.items():
                assert not await asked(pods, address, port), name
            os.kill(process, signal.SIGKILL)
            again = await outward_process(other_than=process)
            assert await asked(pods, "192.0.2.10") == "hello 192.0.2.9\n"
            threads = list(Path(f"/proc/{again}/task").iterdir())
            assert len(threads) > 1
            for thread in threads:
                status = (thread / "status").read_text()
                found = re.findall(r"^(?:Uid|CapPrm|CapEff|NoNewPrivs):\t(\S+)", status, re.MULTILINE)
                assert found == ["65534", "0" * 16, "0" * 16, "1"]

    with_machine(work)


def test_pods_send_datagrams_to_other_machines_and_to_nothing_that_only_this_one_reaches(tmp_path: Path) -> None:
    async def work() -> None:
        nft.apply("table ip engine { chain f { type filter hook forward priority 0; policy drop; }; }")
        async with contextlib.AsyncExitStack() as stack:
            for name, address, own in (("lan", "192.0.2.10", "192.0.2.9"), ("wlother", "10.29.0.5", "10.29.0.1")):
                stack.enter_context(another_machine(name, address, own=own))
            # Nothing may come to what listens on the machine's loopback.
            local = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            local.bind(("127.0.0.1", 80))
            local.setblocking(False)  # noqa: FBT003
            rig = await stack.enter_async_context(running_supervisor(tmp_path))
            pods = await stack.enter_async_context(Running(network(rig.paths)))
            await pods.attach(pod("u1"))
            await outward_process()
            assert await sent(pods, "192.0.2.10", b"x") == b"hello 192.0.2.9\n"
            large = os.urandom(40_000)
            assert await sent(pods, "192.0.2.10", large) == large, "in fragments, there and back"
            assert (await sent(pods, "192.0.2.10", QUESTION, port=53)).endswith(socket.inet_aton(RESOLVED))
            rows = {
                "a port at which the other machine does not listen": ("192.0.2.10", 81),
                "a kubelet": ("192.0.2.10", 10250),
                "a network that the machine has no route to": ("203.0.113.1", 80),
                "the metadata service": ("169.254.169.254", 80),
                "one that is not link-local": ("100.100.100.200", 80),
                "all machines of the link": ("192.0.2.255", 80),
                "another cluster": ("10.29.0.5", 80),
                "a Service that is not there": ("10.10.0.99", 80),
                "what takes the datagrams in": ("192.0.0.8", 80),
                "the machine's end of the link": ("10.9.255.1", 80),
            }
            for name, (address, port) in rows.items():
                assert not await sent(pods, address, b"x", port=port), name
            with pytest.raises(BlockingIOError):
                local.recv(1)

    with_machine(work)


def test_a_pod_that_asks_from_many_sockets_has_its_share_of_flows_and_no_more(tmp_path: Path) -> None:
    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(another_machine("lan", "192.0.2.10", own="192.0.2.9"))
            rig = await stack.enter_async_context(running_supervisor(tmp_path))
            pods = await stack.enter_async_context(Running(network(rig.paths)))
            for uid in ("u1", "u2"):
                await pods.attach(pod(uid))
            process = await outward_process()
            # It answers, so that what follows is lost by no bridge port that is still to forward.
            assert await sent(pods, "192.0.2.10", b"x", uid="u2")
            for number in range(MAX_FLOWS_PER_POD + 20):
                asker, _ = await pods._in_thread(pods._socket_inside, "u1", socket.SOCK_DGRAM)
                stack.enter_context(asker)
                answered = await sent(pods, "192.0.2.10", b"x", asker=asker)
                assert answered or number >= MAX_FLOWS_PER_POD
            assert psutil.Process(process).num_fds() < 2 * MAX_FLOWS_PER_POD + 40
            # Those that are not in use any longer make room.
            async with asyncio.timeout(20):
                while not await sent(pods, "192.0.2.10", b"x"):  # noqa: ASYNC110 - no event tells of it
                    await asyncio.sleep(0.1)
            assert await sent(pods, "192.0.2.10", b"x", uid="u2"), "another pod has its own share"

    with_machine(work)


def test_where_the_kernel_has_no_tproxy_datagrams_outward_are_refused_and_connections_are_not(tmp_path: Path) -> None:
    """The module's absence is played by an ``nft`` that refuses the word."""
    fake = tmp_path / "bin" / "nft"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!/bin/sh
rules=$(cat)
case "$rules" in *tproxy*) echo "Error: Could not process rule: No such file or directory" >&2; exit 1;; esac
printf '%s' "$rules" | exec {nft.find()} "$@"
""",
        encoding="utf-8",
    )
    fake.chmod(0o755)

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(another_machine("lan", "192.0.2.10", own="192.0.2.9"))
            rig = await stack.enter_async_context(running_supervisor(tmp_path))
            pods = await stack.enter_async_context(Running(network(rig.paths)))
            await pods.attach(pod("u1"))
            await outward_process()
            assert await asked(pods, "192.0.2.10") == "hello 192.0.2.9\n"
            assert not await sent(pods, "192.0.2.10", b"x")
            assert "no UDP to other machines" in (rig.paths.network / "outward.log").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
        with_machine(work)


QUESTION = bytes.fromhex("1234 0100 0001 0000 0000 0000 04") + b"name" + bytes.fromhex("07") + b"example\0\0\1\0\1"


async def sent(
    pods: PodNetwork,
    target: str,
    data: bytes,
    *,
    port: int = 80,
    uid: str = "u1",
    asker: socket.socket | None = None,
) -> bytes:
    """What comes back for a pod's datagram; empty: it was refused. Datagrams are lost while the kernel takes other
    namespaces down, so it is sent again. ``asker``: a socket of the pod, which stays open."""
    with contextlib.ExitStack() as stack:
        if asker is None:
            asker = stack.enter_context((await pods._in_thread(pods._socket_inside, uid, socket.SOCK_DGRAM))[0])
        asker.connect((target, port))
        for attempts_left in reversed(range(20)):
            try:
                asker.send(data)
                async with asyncio.timeout(2):
                    return await asyncio.get_running_loop().sock_recv(asker, 65536)
            except TimeoutError:
                if not attempts_left:
                    raise
            except ConnectionRefusedError:
                return b""
    raise AssertionError


async def outward_process(*, other_than: int = 0) -> int:
    """Of this test's agent, once the process has given up what it does not need."""

    def find() -> int | None:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    entry.name == str(other_than)
                    or b"wasilet_node.network.outward" not in (entry / "cmdline").read_bytes()
                ):
                    continue
                status = (entry / "status").read_text()
                if f"PPid:\t{os.getpid()}\n" in status and "Uid:\t65534" in status:
                    return int(entry.name)
        return None

    async def probe() -> int | None:
        return find()

    return await eventually(probe, timeout_seconds=30)


def test_pods_reach_the_machine_at_all_its_addresses(tmp_path: Path) -> None:
    async def work() -> None:
        address = ipaddress.IPv4Address
        with Netlink() as machine:
            machine.add_bridge("lan")
            index = machine.require("lan")
            machine.add_address(index, address("192.0.2.9"), prefix=24)
            machine.set_up(index)
            machine.add_route(ipaddress.IPv4Network("0.0.0.0/0"), gateway=address("192.0.2.1"), index=index)
        listener = socket.socket()
        listener.bind(("192.0.2.9", 80))
        listener.listen()
        async with (
            contextlib.AsyncExitStack() as stack,
            running_supervisor(tmp_path) as rig,
            Running(network(rig.paths)) as pods,
        ):
            stack.callback(listener.close)
            await pods.attach(pod("u1"))
            (await connected_from(pods, "192.0.2.9", 80)).close()

    with_machine(work)
