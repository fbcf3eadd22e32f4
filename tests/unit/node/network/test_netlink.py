"""Netlink in a network namespace of the test's own: nothing of the machine's is touched."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
from wasilet_node.network.netlink import Netlink, NetlinkError
from wasilet_node.runtime import netns

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
T = TypeVar("T")
ANYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


def in_namespace(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that has a network namespace of its own, and ends with it."""
    results: list[T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            netns.unshare(netns.CLONE_NEWNET)
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    # While the kernel takes down the namespaces of earlier tests, all that touches links waits for it.
    thread.join(90)
    assert not thread.is_alive()
    if problems:
        raise problems[0]
    return results[0]


def address(text: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(text)


def test_a_bridge_with_an_address_and_a_route() -> None:
    def work() -> list[tuple[str, str | None]]:
        with Netlink() as netlink:
            netlink.add_bridge("b0")
            index = netlink.require("b0")
            netlink.add_address(index, address("10.9.0.1"), prefix=24)
            netlink.set_up(index)
            netlink.add_route(ANYWHERE, gateway=address("10.9.0.254"), index=index)
            routes = netlink.routes()
            # A second dump on one socket: the first must have been read to its end.
            assert netlink.index_of("b0") == index
            assert netlink.index_of("b1") is None
        return sorted((str(route.destination), str(route.gateway) if route.gateway else None) for route in routes)

    assert in_namespace(work) == [("0.0.0.0/0", "10.9.0.254"), ("10.9.0.0/24", None)]


def test_two_namespaces_are_joined_by_a_veth() -> None:
    def work() -> bytes:
        home = netns.open_own()
        here = Netlink()
        netns.unshare(netns.CLONE_NEWNET)
        there = Netlink()
        listener = socket.socket()
        here.add_veth("left", peer="right", peer_namespace=(other := netns.open_own()))
        for netlink, name, own, peer in (
            (here, "left", "10.9.0.1", "10.9.0.2"),
            (there, "right", "10.9.0.2", "10.9.0.1"),
        ):
            index = netlink.require(name)
            netlink.add_address(index, address(own), prefix=32, peer=address(peer))
            netlink.set_up(index)
        listener.bind(("10.9.0.2", 7))
        listener.listen()
        netns.setns(home)
        client = socket.create_connection(("10.9.0.2", 7), timeout=5)
        served, _ = listener.accept()
        served.sendall(b"over there")
        data = client.recv(64)
        for each in (client, served, listener, here, there):
            each.close()
        os.close(home)
        os.close(other)
        return data

    assert in_namespace(work) == b"over there"


def test_the_kernels_refusal_says_what_was_asked() -> None:
    def work() -> None:
        with Netlink() as netlink:
            netlink.add_bridge("b0")
            netlink.add_bridge("b0")

    with pytest.raises(NetlinkError, match="cannot make bridge b0: File exists"):
        in_namespace(work)


def test_a_name_that_does_not_fit_is_refused_before_the_kernel_cuts_it() -> None:
    with Netlink() as netlink, pytest.raises(ValueError, match="15 bytes"):
        netlink.add_bridge("a-name-of-sixteen")
