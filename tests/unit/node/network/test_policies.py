"""NetworkPolicies: the rules that are made, and what they let through between pods that are network namespaces."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.network import nft, policies
from wasilet_node.network.selectors import matches

from tests.unit.node.network.test_service import Running, network, pod, with_machine
from tests.unit.node.runtime.guests import running_supervisor

pytestmark = pytest.mark.unit

PLACE = policies.Place(
    pod_cidr=ipaddress.IPv4Network("10.9.4.0/24"), machine_address="10.9.255.1", dns_addresses=("10.10.0.10",)
)
NAMESPACES = [
    {"metadata": {"name": "shop", "labels": {"team": "a"}}},
    {"metadata": {"name": "other", "labels": {"team": "b"}}},
    {"metadata": {"name": "kube-system", "labels": {"kubernetes.io/metadata.name": "kube-system"}}},
]


def known(name: str, address: str, namespace: str = "shop", **labels: str) -> dict[str, Any]:
    ports = [{"name": "web", "containerPort": 8080}]
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name, **labels}},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
        "status": {"podIP": address, "phase": "Running"},
    }


PODS = [
    known("web", "10.9.4.2"),
    known("db", "10.9.4.3"),
    known("far", "10.9.8.2"),
    known("stranger", "10.9.4.4", "other"),
]


def policy(name: str = "p", namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"podSelector": {}, **spec}}


def chains(*wanted: dict[str, Any], pods: list[dict[str, Any]] | None = None) -> dict[str, list[str]]:
    """Lines of each pod's chain, by direction and address."""
    text = policies.rules(wanted, PODS if pods is None else pods, NAMESPACES, PLACE)
    names, found, current = {}, dict[str, list[str]](), ""
    for line in (each.strip() for each in text.splitlines()):
        for part in line[line.find("{") + 1 : line.rfind("}")].split(", ") if "vmap" in line else ():
            address, _, name = part.strip().partition(" : jump ")
            names[name] = address
        if line.startswith("chain ") and "-" in line:
            current = line.split()[1]
            found[current] = []
        elif current and line and not line.startswith(("}", "chain")):
            found[current].append(line)
        elif line == "}":
            current = ""
    return {f"{name.partition('-')[0]} {names[name]}": lines for name, lines in found.items()}


def allowed(made: dict[str, list[str]], chain: str) -> list[str]:
    """What a chain lets through, without what every chain has."""
    lines = made[chain]
    assert lines[-1] == "drop"
    own = [f"ip saddr {chain.split()[1]} return", f"ip daddr {chain.split()[1]} return"]
    return [line for line in lines[:-1] if line not in {*own, "ip saddr 10.9.255.1 return"}]


def test_without_policies_nothing_is_judged() -> None:
    assert "vmap" not in policies.rules([], PODS, NAMESPACES, PLACE)


def test_where_there_is_a_policy_an_address_that_is_not_known_yet_is_nobodys() -> None:
    assert " drop" not in policies.rules([], PODS, NAMESPACES, PLACE)
    text = policies.rules([policy(namespace="other")], PODS, NAMESPACES, PLACE)
    listed = "{ 10.9.4.2, 10.9.4.3, 10.9.4.4 }"
    assert f"ip saddr 10.9.4.0/24 ip saddr != {listed} drop" in text
    assert f"ip daddr 10.9.4.0/24 ip daddr != {listed} ip saddr != 10.9.255.1 drop" in text
    assert "ip saddr 10.9.4.0/24 drop" in policies.rules([policy()], [], NAMESPACES, PLACE)


def test_the_nodes_own_word_about_an_address_comes_before_what_statuses_name() -> None:
    """A new pod has no status yet, and one that is gone may still be listed with an address that was given away."""
    gone, new = known("gone", "10.9.4.2"), known("new", "")
    for each in (gone, new):
        each["metadata"]["uid"] = each["metadata"]["name"]
    new["metadata"]["labels"]["app"] = "web"
    spec = {"podSelector": {"matchLabels": {"app": "gone"}}}
    web = policy(name="web", podSelector={"matchLabels": {"app": "web"}}, policyTypes=["Egress"])
    given = [{**policy(), "spec": spec}, web]
    assert "10.9.4.2 : jump ingress" in policies.rules(given, [gone, new], NAMESPACES, PLACE)
    text = policies.rules(given, [gone, new], NAMESPACES, PLACE, {"new": "10.9.4.2"})
    assert "10.9.4.2 : jump egress" in text
    assert "jump ingress" not in text


def test_default_deny_isolates_the_pods_of_its_namespace_and_node() -> None:
    made = chains(policy())
    assert sorted(made) == ["ingress 10.9.4.2", "ingress 10.9.4.3"]
    assert allowed(made, "ingress 10.9.4.2") == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, ["return"]),
        ({"ports": [{"port": 80}]}, ["tcp dport 80 return"]),
        ({"ports": [{"port": 80, "endPort": 90, "protocol": "UDP"}]}, ["udp dport 80-90 return"]),
        ({"ports": [{"port": "web"}, {"port": "nope"}]}, ["tcp dport 8080 return"]),
        ({"ports": [{"protocol": "UDP"}]}, ["meta l4proto udp return"]),
        ({"from": [{"podSelector": {"matchLabels": {"app": "db"}}}]}, ["ip saddr { 10.9.4.3 } return"]),
        ({"from": [{"podSelector": {}}]}, ["ip saddr { 10.9.4.2, 10.9.4.3, 10.9.8.2 } return"]),
        ({"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]}, ["ip saddr { 10.9.4.4 } return"]),
        (
            {
                "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "far"}}}],
                "ports": [{"port": 1}],
            },
            ["ip saddr { 10.9.8.2 } tcp dport 1 return"],
        ),
        ({"from": [{"podSelector": {"matchLabels": {"app": "nobody"}}}]}, []),
        (
            {"from": [{"ipBlock": {"cidr": "10.9.0.0/16", "except": ["10.9.4.0/24"]}}]},
            ["ip saddr 10.9.0.0/16 ip saddr != { 10.9.4.0/24 } return"],
        ),
    ],
)
def test_ingress_rules(rule: dict[str, Any], expected: list[str]) -> None:
    made = chains(policy(podSelector={"matchLabels": {"app": "web"}}, ingress=[rule]))
    assert sorted(made) == ["ingress 10.9.4.2"]
    assert allowed(made, "ingress 10.9.4.2") == expected


DNS = [
    "meta l4proto udp ct original ip daddr 10.10.0.10 return",
    "meta l4proto tcp ct original ip daddr 10.10.0.10 return",
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, ["return", *DNS]),
        ({"ports": [{"port": 53, "protocol": "UDP"}]}, ["udp dport 53 return", DNS[0]]),
        (
            {
                "to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}],
                "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}],
            },
            DNS,
        ),
        ({"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}, ["ip daddr { 10.9.4.3 } return"]),
        (
            {"to": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": "web"}]},
            ["ip daddr 10.9.4.3 tcp dport 8080 return"],
        ),
    ],
)
def test_egress_rules(rule: dict[str, Any], expected: list[str]) -> None:
    made = chains(policy(podSelector={"matchLabels": {"app": "web"}}, policyTypes=["Egress"], egress=[rule]))
    assert sorted(made) == ["egress 10.9.4.2"]
    assert allowed(made, "egress 10.9.4.2") == expected


def test_policies_add_to_each_other() -> None:
    web = {"matchLabels": {"app": "web"}}
    made = chains(policy("a", podSelector=web), policy("b", podSelector=web, ingress=[{"ports": [{"port": 80}]}]))
    assert allowed(made, "ingress 10.9.4.2") == ["tcp dport 80 return"]


def test_pods_that_have_ended_or_share_the_machines_network_are_no_peers() -> None:
    ended = known("ended", "10.9.4.9")
    ended["status"]["phase"] = "Succeeded"
    shared = known("shared", "192.0.2.1")
    shared["spec"]["hostNetwork"] = True
    made = chains(policy(ingress=[{"from": [{"podSelector": {}}]}]), pods=[ended, shared, PODS[0]])
    assert allowed(made, "ingress 10.9.4.2") == ["ip saddr { 10.9.4.2 } return"]


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["0"]}]}, False),
    ],
)
def test_selectors(selector: dict[str, Any], fits: object) -> None:
    assert matches(selector, {"a": "1"}) == fits


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft")
def test_the_kernel_lets_through_what_the_policies_allow_and_nothing_else(tmp_path: Path) -> None:
    async def connects(source: socket.socket, target: tuple[str, int], seconds: float) -> bool:
        with source:
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.get_running_loop().sock_connect(source, target)
            except TimeoutError:
                return False
        return True

    async def work() -> None:
        async with running_supervisor(tmp_path) as rig, Running(network(rig.paths)) as pods:
            addresses = {}
            for name in ("web", "db", "stranger"):
                attached = await pods.attach(pod(name))
                assert attached is not None
                addresses[name] = attached.addresses[0]
            listener, _ = await pods._in_thread(pods._socket_inside, "web")
            listener.bind(("0.0.0.0", 8080))
            listener.listen()
            target = (addresses["web"], 8080)

            async def reaches(name: str, *, wanted: bool) -> bool:
                source, _ = await pods._in_thread(pods._socket_inside, name)
                return await connects(source, target, 10.0 if wanted else 0.5)

            homes = {"stranger": "other"}
            seen = [known(name, address, homes.get(name, "shop")) for name, address in addresses.items()]
            rule = {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": "web"}]}
            allow = policy("allow", podSelector={"matchLabels": {"app": "web"}}, ingress=[rule])
            mute = policy("mute", podSelector={"matchLabels": {"app": "db"}}, policyTypes=["Egress"])
            for wanted, expected in (
                ([], {"web": True, "db": True, "stranger": True}),
                ([policy()], {"web": True, "db": False, "stranger": False}),
                ([allow], {"web": True, "db": True, "stranger": False}),
                ([allow, mute], {"web": True, "db": False, "stranger": False}),
                ([], {"web": True, "db": True, "stranger": True}),
            ):
                text = policies.rules(wanted, seen, NAMESPACES, PLACE)
                await pods._in_namespace(lambda text=text: nft.apply(text))  # type: ignore[misc]
                found = {name: await reaches(name, wanted=expected[name]) for name in addresses}
                assert found == expected, text
                # Probes come from the node itself.
                _, writer = await pods.connect(*target)
                writer.close()
            listener.close()

    with_machine(work)
