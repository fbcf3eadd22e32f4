"""A second machine for tests of the pod network: a network namespace of the test's own, behind a veth."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from wasilet_node.network.netlink import Netlink
from wasilet_node.runtime import netns


@contextlib.contextmanager
def another_machine(name: str, address: str, *, own: str) -> Iterator[None]:
    """A machine behind the veth ``name``, in a namespace of its own, that greets each client at port 80, by the
    address that it sees. ``own``: this machine's address on that link."""
    inside: list[int] = []

    def make() -> socket.socket:
        netns.unshare(netns.CLONE_NEWNET)
        inside.append(netns.open_own())
        return socket.create_server(("", 80))

    with ThreadPoolExecutor(1) as thread, Netlink() as machine:
        listener = thread.submit(make).result()
        machine.add_veth(name, peer="eth0", peer_namespace=inside[0])
        index = machine.require(name)
        machine.add_address(index, ipaddress.IPv4Address(own), prefix=24)

        def join() -> None:
            with Netlink() as there:
                there.set_up(1)
                eth0 = there.require("eth0")
                there.add_address(eth0, ipaddress.IPv4Address(address), prefix=24)
                there.set_up(eth0)

        thread.submit(join).result()
        os.close(inside[0])

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = listener.accept()
                    with connection:
                        connection.sendall(f"hello {peer[0]}\n".encode())

        greeting = threading.Thread(target=greet)
        greeting.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            greeting.join(20)
            listener.close()
