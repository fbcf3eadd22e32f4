"""A second machine for tests of the pod network: a network namespace of the test's own, behind a veth."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from wasilet_node.network.netlink import Netlink
from wasilet_node.runtime import netns

GREETED_BYTES = 100
RESOLVED = "192.0.2.77"


@contextlib.contextmanager
def another_machine(name: str, address: str, *, own: str) -> Iterator[None]:
    """A machine behind the veth ``name``, in a namespace of its own, that greets each client at port 80, by the
    address that it sees, and by UDP as well; what is longer than ``GREETED_BYTES`` comes back as it is. At port 53 it
    answers every question for an A record with ``RESOLVED``. ``own``: this machine's address on that link."""
    inside: list[int] = []

    def make() -> tuple[socket.socket, socket.socket, socket.socket]:
        netns.unshare(netns.CLONE_NEWNET)
        inside.append(netns.open_own())
        return socket.create_server(("", 80)), _datagrams(80), _datagrams(53)

    with ThreadPoolExecutor(1) as thread, Netlink() as machine:
        listener, datagrams, questions = thread.submit(make).result()
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

        def greeting_of(data: bytes, peer: str) -> bytes:
            return data if len(data) > GREETED_BYTES else f"hello {peer}\n".encode()

        threads = [
            threading.Thread(target=greet),
            threading.Thread(target=_answer, args=(datagrams, greeting_of)),
            threading.Thread(target=_answer, args=(questions, lambda data, _peer: _resolved(data))),
        ]
        for each in threads:
            each.start()
        try:
            yield
        finally:
            for end in (listener, datagrams, questions):
                # A socket for datagrams is not connected, and is ended all the same.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for each in threads:
                each.join(20)
            for end in (listener, datagrams, questions):
                end.close()


def _datagrams(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("", port))
    return made


def _answer(datagrams: socket.socket, answer: Callable[[bytes, str], bytes]) -> None:
    with contextlib.suppress(OSError):
        while True:
            data, peer = datagrams.recvfrom(65536)
            if not data and peer is None:
                return
            with contextlib.suppress(OSError, ValueError):  # ValueError: that was no question
                datagrams.sendto(answer(data, peer[0]), peer)


def _resolved(question: bytes) -> bytes:
    """RFC 1035: the question again, and after it, to one for an A record, an answer that points back to its name."""
    name_end = question.index(b"\0", 12)
    asked = question[12 : name_end + 5]
    found = asked[-4:-2] == b"\0\1"
    header = question[:2] + bytes.fromhex("8180 0001") + bytes([0, int(found)]) + bytes(4)
    record = bytes.fromhex("c00c 0001 0001 0000003c 0004") + socket.inet_aton(RESOLVED)
    return header + asked + (record if found else b"")
