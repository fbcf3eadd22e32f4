"""What is found out about a cluster of containers before its wasm pods get addresses of it, with stand-ins; and how
addresses are chosen."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.cluster.known_nodes import policy_of
from wasilet.cluster.opening import open_cluster
from wasilet.controlplane import joined_network, pod_network
from wasilet.controlplane.joined_network import JoinedPlan, choose_addresses, first_ipv4, node_arguments, plan_of
from wasilet.controlplane.versions import versions
from wasilet.providers import joined_network_steps as steps
from wasilet.providers.base import NETWORK_STEP, Cluster
from wasilet.providers.docker import Docker
from wasilet.providers.existing_facts import update_facts
from wasilet.settings import Settings

from tests.rigs.standins.settings import standin_settings
from tests.rigs.standins.world import World
from tests.unit.harness.fake_kube import FakeKube

pytestmark = pytest.mark.unit

NETWORK = ipaddress.IPv4Network("172.18.0.0/29")
BRIDGE = {
    "Id": "0123456789abcdef",
    "Driver": "bridge",
    # IPv6 first, as an engine may list them. The interface is one that every machine has.
    "IPAM": {"Config": [{"Subnet": "fc00::/64"}, {"Subnet": "127.0.0.0/8", "Gateway": "127.0.0.1"}]},
    "Options": {"com.docker.network.bridge.name": "lo"},
    "Containers": {"a": {"IPv4Address": "127.255.255.254/8"}, "b": {"IPv4Address": ""}},
}
CONFIGURATION = {
    "networking": {
        "podSubnet": "fd00::/56,10.244.0.0/16",
        "serviceSubnet": "10.96.0.0/16",
        "dnsDomain": "example.local",
    }
}


@pytest.mark.parametrize(
    ("have", "taken", "count", "chosen"),
    [
        pytest.param([], [], 2, ["172.18.0.6", "172.18.0.5"], id="from the end, without broadcast"),
        pytest.param([], ["172.18.0.6", "172.18.0.4"], 2, ["172.18.0.5", "172.18.0.3"], id="what is taken is left out"),
        pytest.param(["172.18.0.3"], ["172.18.0.6"], 2, ["172.18.0.3", "172.18.0.5"], id="nodes keep theirs"),
        pytest.param(["172.18.0.3", "172.18.0.2"], [], 1, ["172.18.0.3"], id="fewer nodes"),
        pytest.param([], [f"172.18.0.{n}" for n in range(1, 6)], 2, ["172.18.0.6"], id="no more are free"),
    ],
)
def test_addresses_are_chosen_where_an_engine_comes_last(
    have: list[str], taken: list[str], count: int, chosen: list[str]
) -> None:
    assert list(choose_addresses(NETWORK, count=count, have=have, taken=taken)) == chosen


@pytest.mark.parametrize(
    ("text", "found"),
    [("10.244.0.0/16", "10.244.0.0/16"), ("fd00::/56, 10.9.0.0/16", "10.9.0.0/16"), ("fd00::/56", ""), (None, "")],
)
def test_of_two_families_the_ipv4_range_is_taken(text: str | None, found: str) -> None:
    assert first_ipv4(text) == found


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "machine")
    made.folder.mkdir()
    made.write("networks", [{"name": "kind", "id": "n1", "labels": {}, "inspected": BRIDGE}])
    labels = {"io.x-k8s.kind.cluster": "wasilet", "io.x-k8s.kind.role": "control-plane"}
    made.add_container(id="n", name="n", labels=labels, gateway="127.0.0.1", network="kind")
    conflist = made.folder / "files/n/etc/cni/net.d/10-kindnet.conflist"
    conflist.parent.mkdir(parents=True)
    conflist.write_text("{}")
    return made


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Settings:
    return standin_settings(world, tmp_path, "kind", "docker", "kind")


@pytest.fixture
def kube() -> FakeKube:
    made = FakeKube()
    put_configuration(made, CONFIGURATION)
    made.put(steps.DNS_SERVICE, {"metadata": {}, "spec": {"clusterIP": "10.96.0.10"}})
    endpoints = [{"addresses": ["10.1.1.1"]}, {"addresses": ["127.0.0.2"]}]
    made.put(steps.API_SLICE, {"metadata": {}, "endpoints": endpoints, "ports": [{"port": 6443}]})
    made.put("/version", {"metadata": {}, "gitVersion": "v1.36.0+k3s1"})
    return made


def put_configuration(kube: FakeKube, configuration: Any) -> None:
    kube.put(steps.KUBEADM, {"metadata": {}, "data": {"ClusterConfiguration": yaml.safe_dump(configuration)}})


@pytest.fixture
def cluster(settings: Settings, kube: FakeKube) -> Iterator[Cluster]:
    with open_cluster(settings) as made:
        made.client = kube
        made.state.create()
        update_facts(made, uid="1", server="https://127.0.0.1:1", node_address="127.0.0.1")
        yield made


def containers(cluster: Cluster) -> list[Any]:
    return Docker(cluster.settings.environ).containers("io.x-k8s.kind.cluster=wasilet")


def found(cluster: Cluster) -> JoinedPlan:
    return steps._found(cluster, containers(cluster))


def test_what_a_cluster_tells_of_its_network(cluster: Cluster) -> None:
    assert found(cluster) == JoinedPlan(
        pods="10.244.0.0/16",
        services="10.96.0.0/16",
        dns=("10.96.0.10",),
        domain="example.local",
        bridge="lo",
        network="127.0.0.0/8",
        gateway="127.0.0.1",
        server="https://127.0.0.2:6443",
        kubernetes=versions().kubernetes["1.36"],
    )


@pytest.mark.parametrize(
    ("version", "proxy"), [("v1.37.9", "1.37"), ("v1.99.0", "1.37"), ("v1.35.0", "1.35"), ("v1.34.4", None)]
)
def test_kube_proxy_is_never_newer_than_the_api_server(
    cluster: Cluster, kube: FakeKube, version: str, proxy: str | None
) -> None:
    kube.put("/version", {"metadata": {}, "gitVersion": version})
    if proxy is None:
        with pytest.raises(steps._AbsentError, match=r"Kubernetes 1\.34 is older"):
            found(cluster)
    else:
        assert found(cluster).kubernetes == versions().kubernetes[proxy]


def plugin(world: World) -> Path:
    return world.folder / "files/n/etc/cni/net.d/10-kindnet.conflist"


def another_plugin(world: World, _kube: FakeKube) -> None:
    plugin(world).rename(plugin(world).with_name("10-calico.conflist"))


def no_plugin(world: World, _kube: FakeKube) -> None:
    plugin(world).unlink()


def engine_elsewhere(world: World, _kube: FakeKube) -> None:
    elsewhere = BRIDGE | {"Options": {"com.docker.network.bridge.name": "br-not-here"}}
    world.write("networks", [{"name": "kind", "id": "n1", "labels": {}, "inspected": elsewhere}])


def overlay(world: World, _kube: FakeKube) -> None:
    world.write("networks", [{"name": "kind", "id": "n1", "labels": {}, "inspected": BRIDGE | {"Driver": "overlay"}}])


def without_kubeadm(_world: World, kube: FakeKube) -> None:
    kube.remove(steps.KUBEADM)


def only_ipv6(_world: World, kube: FakeKube) -> None:
    put_configuration(kube, {"networking": {"podSubnet": "fd00::/56", "serviceSubnet": "fd01::/112"}})


def api_server_elsewhere(_world: World, kube: FakeKube) -> None:
    kube.put(steps.API_SLICE, {"metadata": {}, "endpoints": [{"addresses": ["10.1.1.1"]}], "ports": [{"port": 6443}]})


@pytest.fixture
def no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_network, "obstacle", lambda *_, **__: "")


@pytest.mark.usefixtures("no_obstacle")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_plugin, "the cluster's network is not kindnet, kind's own"),
        (no_plugin, "n has no network plug-in"),
        (engine_elsewhere, "Docker's network kind is not on this machine"),
        (overlay, "its nodes are in no Docker network with a bridge"),
        (without_kubeadm, "the cluster has no kubeadm-config, which names its ranges of addresses"),
        (only_ipv6, "the cluster has no IPv4 range of pods and Services"),
        (api_server_elsewhere, "no API server in 127.0.0.0/8, the network of its nodes"),
    ],
)
def test_why_pods_share_the_machines_network(
    world: World, kube: FakeKube, cluster: Cluster, change: Any, reason: str
) -> None:
    change(world, kube)
    cluster.settings = replace(cluster.settings, timeouts=replace(cluster.settings.timeouts, ready_seconds=0.0))
    (network, proxy) = steps.joined_network_steps(cluster, lambda: containers(cluster))
    assert network.key == NETWORK_STEP
    assert network.change(lambda _: None) == f"none: {reason}"
    assert pod_network.described(cluster.state)["absent"] == reason
    assert plan_of(cluster.state) is None
    assert proxy.look().detail == proxy.change(lambda _: None) == "none without a pod network"


@pytest.mark.usefixtures("no_obstacle")
def test_a_network_plug_in_that_comes_later_is_waited_for(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "client_credential", lambda *_, **__: None)
    plugin(world).rename(plugin(world).with_suffix(".new"))
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        plugin(world).with_suffix(".new").rename(plugin(world))

    cluster.settings = replace(cluster.settings, timeouts=replace(cluster.settings.timeouts, ready_seconds=60.0))
    (network, _) = steps.joined_network_steps(cluster, lambda: containers(cluster))
    assert network.change(say).startswith("pods 10.244.0.0/16")
    assert said == ["waiting: n has no network plug-in"]


def test_without_root_there_is_none(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (network, _) = steps.joined_network_steps(cluster, lambda: containers(cluster))
    assert network.change(lambda _: None) == "none: it needs root"


@pytest.mark.usefixtures("no_obstacle")
def test_what_was_chosen_is_kept_and_nodes_and_the_approver_are_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        steps,
        "client_credential",
        lambda _admin, path, *, user, server, **_: asked.append((path.name, f"{user} {server}")),
    )
    (network, _) = steps.joined_network_steps(cluster, lambda: containers(cluster))
    assert network.change(lambda _: None) == "pods 10.244.0.0/16, Services 10.96.0.0/16, on lo"
    plan = plan_of(cluster.state)
    assert plan is not None
    # The first from the end is a container's.
    assert plan.addresses == ("127.255.255.253",)
    assert asked == [
        ("kube-proxy.conf", "wasilet:kube-proxy https://127.0.0.2:6443"),
        ("netpol.conf", "wasilet:network-policies https://127.0.0.2:6443"),
    ]
    assert found(cluster) == plan, "what is found again is what was written down"
    words = node_arguments(plan, index=0, folder=Path("/etc"), kube_proxy=Path("/kube-proxy"))
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--uplink"] == "127.255.255.253/8"
    assert (given["--uplink-bridge"], given["--uplink-gateway"]) == ("lo", "127.0.0.1")
    assert policy_of(cluster)["nodes"] == {"unit-1": ["127.0.0.1", "127.255.255.253"]}
    assert pod_network.described(cluster.state) == {
        "pods": "10.244.0.0/16",
        "services": "10.96.0.0/16",
        "machine_address": "127.0.0.1",
        "dns": "10.96.0.10",
        "absent": None,
    }


def test_two_clusters_on_one_bridge_take_different_addresses(cluster: Cluster, settings: Settings) -> None:
    joined_network.record(cluster.state, replace(found(cluster), addresses=("127.255.255.253",)))
    with open_cluster(replace(settings, name="other")) as other:
        other.state.create()
        assert joined_network.addresses_of_others(other.settings, other.state) == ["127.255.255.253"]
        other.client = cluster.client
        plan = steps._with_addresses(other, found(cluster), containers(cluster))
        other.client = None
    assert plan.addresses == ("127.255.255.253",), "it has them already"
