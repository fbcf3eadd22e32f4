"""A node whose link is a port of the bridge on which the cluster's other nodes are, and its routes to their pods.

The machine, with the bridge, is a network namespace of the test's own; the other node is a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.network import node_routes
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.node_network import OUTWARD
from wasilet_node.network.node_processes import network_policies
from wasilet_node.network.node_routes import Neighbourhood
from wasilet_node.network.service import PodNetwork
from wasilet_node.network.uplink import interface_prefix
from wasilet_node.runtime import netns

from tests.unit.node.network.test_service import SETTINGS, Running, gone, network, pod, with_machine
from tests.unit.node.runtime.guests import eventually, running_supervisor

pytestmark = [pytest.mark.unit]
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft")

MACHINE, NODE, OTHER = "10.28.0.1", "10.28.255.254", "10.28.0.2"
SOCKET = Path("/nowhere/policies.sock")
OTHER_POD, OTHER_PODS = "10.9.0.7", ipaddress.IPv4Network("10.9.0.0/24")
BRIDGED = dataclasses.replace(
    SETTINGS,
    uplink=ipaddress.IPv4Interface(f"{NODE}/16"),
    bridge="br0",
    gateway=ipaddress.IPv4Address(MACHINE),
)
HERE = Neighbourhood(
    own=ipaddress.IPv4Network("10.9.4.0/24"),
    pods=BRIDGED.cluster_cidr,
    uplink=BRIDGED.uplink,
    gateway=ipaddress.IPv4Address(MACHINE),
)


def node(name: str, cidr: str | None, *addresses: str, created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    entries = [{"type": "Hostname", "address": name}, *({"type": "InternalIP", "address": each} for each in addresses)]
    spec = {"podCIDR": cidr} if cidr else {}
    return {"metadata": {"name": name, "creationTimestamp": created}, "spec": spec, "status": {"addresses": entries}}


@pytest.mark.parametrize(
    ("nodes", "routes"),
    [
        pytest.param([node("a", "10.9.0.0/24", OTHER)], {"10.9.0.0/24": OTHER}, id="a Node"),
        pytest.param([node("a", "10.9.0.0/24", "fc00::2", OTHER)], {"10.9.0.0/24": OTHER}, id="of two families"),
        pytest.param([node("a", None, OTHER), node("b", "10.9.0.0/24")], {}, id="no podCIDR, or no address, yet"),
        pytest.param([node("a", "10.9.4.0/24", OTHER)], {}, id="this node's own podCIDR"),
        pytest.param([node("a", "10.9.4.0/23", OTHER)], {}, id="one that holds this node's own"),
        pytest.param([node("a", "10.9.0.0/24", "192.0.2.9")], {}, id="a Node that is not on the bridge"),
        pytest.param([node("a", "10.9.0.0/24", MACHINE)], {}, id="one that says it is the machine"),
        pytest.param([node("a", "10.9.0.0/24", NODE)], {}, id="one that says it is this node"),
        pytest.param([node("a", "0.0.0.0/0", OTHER)], {}, id="a podCIDR that is everything"),
        pytest.param([node("a", "10.28.0.0/24", OTHER)], {}, id="a podCIDR outside of the cluster's"),
        pytest.param([node("a", "rubbish", OTHER), node("b", "fd00::/64", OTHER)], {}, id="no IPv4 network"),
        pytest.param(
            [
                node("new", "10.9.0.0/24", "10.28.0.9", created="2026-01-02T00:00:00Z"),
                node("old", "10.9.0.0/24", OTHER),
            ],
            {"10.9.0.0/24": OTHER},
            id="two with one podCIDR",
        ),
    ],
)
def test_what_is_taken_from_nodes(nodes: list[dict[str, Any]], routes: dict[str, str]) -> None:
    found = node_routes.wanted(nodes, HERE)
    assert {str(network): str(address) for network, address in found.items()} == routes


def test_the_routes_are_kept_only_where_nodes_share_a_bridge() -> None:
    assert not any("uplink" in word for word in network_policies(SETTINGS, HERE.own, SOCKET).argv)
    words = network_policies(BRIDGED, HERE.own, SOCKET).argv
    assert {f"--cluster-cidr={BRIDGED.cluster_cidr}", f"--uplink={BRIDGED.uplink}"} <= set(words)


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    """Of the calling thread's namespace, with the machine's address."""
    with Netlink() as machine:
        machine.add_bridge("br0")
        index = machine.require("br0")
        machine.add_address(index, ipaddress.IPv4Address(MACHINE), prefix=16)
        machine.set_up(index)
        yield


@contextlib.contextmanager
def other_node() -> Iterator[ThreadPoolExecutor]:
    """A thread in the namespace of another node on the bridge, which has one pod's address itself, and a route to our
    pods by our address, as kindnet makes it."""

    def make() -> int:
        netns.unshare(netns.CLONE_NEWNET)
        return netns.open_own()

    def join() -> None:
        with Netlink() as there:
            there.set_up(1)
            eth0 = there.require("eth0")
            there.add_address(eth0, ipaddress.IPv4Address(OTHER), prefix=16)
            there.add_address(1, ipaddress.IPv4Address(OTHER_POD), prefix=32)
            there.set_up(eth0)
            there.add_route(HERE.own, gateway=BRIDGED.uplink.ip, index=eth0)

    with ThreadPoolExecutor(1) as thread:
        inside = thread.submit(make).result()
        with Netlink() as machine:
            machine.add_veth("other", peer="eth0", peer_namespace=inside, master=machine.require("br0"))
        os.close(inside)
        thread.submit(join).result()
        yield thread


async def in_node(pods: PodNetwork, *nodes: dict[str, Any]) -> None:
    """What the process of the node's routes does."""

    def work() -> None:
        with Netlink() as netlink:
            node_routes.apply(netlink, node_routes.wanted(nodes, HERE), HERE)

    await pods._in_thread(work)


async def outward(pods: PodNetwork) -> None:
    """Until the last of what an agent makes is there."""

    def there() -> bool:
        with Netlink() as netlink:
            return netlink.index_of(OUTWARD) is not None

    async def probe() -> bool | None:
        return True if await pods._in_thread(there) else None

    await eventually(probe)


async def connected(client: socket.socket, address: str, port: int) -> str:
    """The client's address; or the name of the error."""
    client.setblocking(False)  # noqa: FBT003
    try:
        async with asyncio.timeout(20):
            await asyncio.get_running_loop().sock_connect(client, (address, port))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return str(client.getsockname()[0])


def listening(address: str, port: int) -> socket.socket:
    made = socket.create_server((address, port))
    made.setblocking(False)  # noqa: FBT003
    return made


@needs_root
def test_pods_and_those_of_another_node_reach_each_other_by_their_own_addresses(tmp_path: Path) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        with bridge(), other_node() as there:
            async with running_supervisor(tmp_path) as rig, Running(network(rig.paths, BRIDGED)) as pods:
                assert (pods.problem, pods.absent) == (None, None)
                attached = await pods.attach(pod("u1"))
                assert attached is not None
                (own,) = attached.addresses
                with there.submit(listening, OTHER_POD, 80).result() as listener:
                    with (await pods._in_thread(pods._socket_inside, "u1"))[0] as client:
                        assert await connected(client, OTHER_POD, 80) == "EHOSTUNREACH"
                    await in_node(pods, node("other", str(OTHER_PODS), OTHER))
                    with (await pods._in_thread(pods._socket_inside, "u1"))[0] as client:
                        assert await connected(client, OTHER_POD, 80) == own
                        accepted, peer = await loop.sock_accept(listener)
                        accepted.close()
                        assert peer[0] == own
                in_pod = (await pods._in_thread(pods._socket_inside, "u1"))[0]
                with in_pod, there.submit(socket.socket).result() as client:
                    in_pod.bind(("0.0.0.0", 80))
                    in_pod.listen()
                    client.bind((OTHER_POD, 0))
                    assert await connected(client, own, 80) == OTHER_POD
                    accepted, peer = await loop.sock_accept(in_pod)
                    accepted.close()
                    assert peer[0] == OTHER_POD
                await in_node(pods)
                with (await pods._in_thread(pods._socket_inside, "u1"))[0] as client:
                    assert await connected(client, OTHER_POD, 80) == "EHOSTUNREACH"

    with_machine(work)


@needs_root
def test_a_nodes_address_leads_to_the_machine_and_pods_reach_the_other_nodes(tmp_path: Path) -> None:
    """The kubelet API and pods with hostNetwork listen there; the API server is on another node."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with bridge(), other_node() as there:
            async with running_supervisor(tmp_path) as rig, Running(network(rig.paths, BRIDGED)) as pods:
                await pods.attach(pod("u1"))
                with listening(MACHINE, 10250) as listener, there.submit(socket.socket).result() as client:
                    assert await connected(client, NODE, 10250) == OTHER
                    accepted, _ = await loop.sock_accept(listener)
                    accepted.close()
                client = (await pods._in_thread(pods._socket_inside, "u1"))[0]
                with client, there.submit(listening, OTHER, 6443).result() as listener:
                    await connected(client, OTHER, 6443)
                    accepted, peer = await loop.sock_accept(listener)
                    accepted.close()
                    assert peer[0] == NODE, "only between pods an address is kept"

    with_machine(work)


@needs_root
def test_the_machine_has_a_port_of_its_bridge_and_nothing_else(tmp_path: Path) -> None:
    async def work() -> None:
        with bridge(), Netlink() as machine:
            before = machine.routes(), {name for _, name in machine.links()}
            async with running_supervisor(tmp_path) as rig, Running(network(rig.paths, BRIDGED)) as pods:
                await outward(pods)
                (added,) = {name for _, name in machine.links()} - before[1]
                assert added.startswith(interface_prefix(rig.paths.data))
                assert machine.routes() == before[0]
            await gone(rig.paths.data)
            assert (machine.routes(), {name for _, name in machine.links()}) == before

    with_machine(work)


@needs_root
def test_a_bridge_that_is_made_again_gets_its_port_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            with bridge(), Netlink() as machine:
                rig = await stack.enter_async_context(running_supervisor(tmp_path))
                pods = await stack.enter_async_context(Running(network(rig.paths, BRIDGED)))
                machine.delete_link(machine.require("br0"))
            with bridge():
                await outward(pods)
                await pods._in_thread(pods._know_machine)
                client = pods.make_socket()
                with client, listening(MACHINE, 80):
                    assert await connected(client, MACHINE, 80) == NODE

    with_machine(work)


@needs_root
def test_without_the_bridge_pods_share_the_machines_network_and_the_reason_is_said(tmp_path: Path) -> None:
    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths, BRIDGED)) as pods:
            assert pods.absent == "this machine has no bridge br0"

    with_machine(work)
