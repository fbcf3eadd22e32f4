"""Which ports of the machine a Service asks for, and what is told about them. Real listeners: tests/e2e."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

import pytest
from wasilet.cluster.service_ports import MachinePort, MachinePorts, asked, is_balanced, load_balancer_status
from wasilet_common.forwarding import listener

pytestmark = pytest.mark.unit

ADDRESS = "192.0.2.2"


def service(**spec: Any) -> dict[str, Any]:
    ports = [{"port": 80, "nodePort": 30080}, {"port": 9, "nodePort": 30009, "protocol": "SCTP"}]
    return {"metadata": {"namespace": "a", "name": "b"}, "spec": {"clusterIP": "10.0.0.7", "ports": ports, **spec}}


@pytest.mark.parametrize(
    ("spec", "places", "left_out"),
    [
        ({"type": "ClusterIP"}, set(), ()),
        ({"type": "ExternalName", "clusterIP": None}, set(), ()),
        ({"type": "NodePort", "clusterIP": "None"}, set(), ()),
        ({"type": "NodePort", "clusterIP": "fd00::7"}, set(), ()),
        ({"type": "NodePort"}, {("127.0.0.1", 30080), (ADDRESS, 30080)}, ("9/SCTP",)),
        ({"type": "LoadBalancer"}, {("127.0.0.1", 30080), (ADDRESS, 30080), (ADDRESS, 80)}, ("9/SCTP",)),
        (
            {"type": "LoadBalancer", "loadBalancerClass": "wasilet.dev/host", "ports": [{"port": 80}]},
            {(ADDRESS, 80)},
            (),
        ),
        ({"type": "LoadBalancer", "loadBalancerClass": "example.com/theirs", "ports": [{"port": 80}]}, set(), ()),
    ],
)
def test_what_a_service_asks_for(spec: dict[str, Any], places: set[tuple[str, int]], left_out: tuple[str, ...]) -> None:
    request = asked(service(**spec), ADDRESS)
    assert {(port.address, port.port) for port in request.ports} == places
    assert request.left_out == left_out
    assert {port.target for port in request.ports} <= {("10.0.0.7", 80)}


def test_one_number_by_two_protocols_is_two_ports() -> None:
    ports = [{"port": 53, "protocol": protocol, "nodePort": 30053} for protocol in ("TCP", "UDP")]
    request = asked(service(type="LoadBalancer", ports=ports), ADDRESS)
    assert request.left_out == ()
    found = {(port.address, port.port, port.protocol, port.balanced) for port in request.ports}
    assert found == {
        (address, number, protocol, balanced)
        for protocol in ("TCP", "UDP")
        for address, number, balanced in (("127.0.0.1", 30053, False), (ADDRESS, 30053, False), (ADDRESS, 53, True))
    }


def test_a_machine_with_loopback_alone_listens_once() -> None:
    request = asked(service(type="NodePort"), "127.0.0.1")
    assert [(port.address, port.port) for port in request.ports] == [("127.0.0.1", 30080)]


def test_the_load_balancer_of_others_is_left_to_them() -> None:
    assert is_balanced(service(type="LoadBalancer"))
    assert not is_balanced(service(type="LoadBalancer", loadBalancerClass="example.com/theirs"))
    assert not is_balanced(service(type="NodePort"))


def test_the_status_names_the_ports_that_are_open() -> None:
    assert load_balancer_status(ADDRESS, {}) == {}
    listed = [{"port": 53, "protocol": "UDP"}, {"port": 8099, "protocol": "TCP"}]
    ingress = {"ip": ADDRESS, "ipMode": "Proxy", "ports": listed}
    assert load_balancer_status(ADDRESS, {(80, "TCP"): 8099, (53, "UDP"): 53}) == {"ingress": [ingress]}


@pytest.mark.parametrize(("protocol", "kind"), [("TCP", socket.SOCK_STREAM), ("UDP", socket.SOCK_DGRAM)])
def test_a_taken_port_is_a_problem_for_a_node_port_and_moves_a_load_balancer(protocol: str, kind: int) -> None:
    def foreign_at(port: int) -> socket.socket:
        return listener(("127.0.0.1", port), kind=kind)

    async def scenario() -> None:
        ports, key = MachinePorts(), ("a", "b")
        with foreign_at(0) as foreign:
            taken = foreign.getsockname()[1]
            balanced = MachinePort(
                service=key,
                address="127.0.0.1",
                port=taken,
                target=("127.0.0.1", 80),
                protocol=protocol,
                balanced=True,
            )
            node_port = replace(balanced, balanced=False)
            await ports.update(key, [node_port, balanced])
            name = str(taken) if protocol == "TCP" else f"{taken}/UDP"
            assert ports.problems(key) == [f"127.0.0.1:{name}: Address already in use"]
            assert ports.balanced(key)[80, protocol] != taken
        await ports.update(key, [node_port])
        assert ports.problems(key) == [], "it is free again, and tried again"
        assert ports.balanced(key) == {}, "what is asked for no longer is closed"
        await ports.update(key, ())
        assert ports.services() == set()
        foreign_at(taken).close()

    asyncio.run(scenario())
