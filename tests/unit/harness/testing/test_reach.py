"""The ways to a pod: its address, or a forward by a kubectl that is a script here."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from wasilet.settings import load
from wasilet.state import State
from wasilet.testing import reach
from wasilet.testing.http import NoAnswerError
from wasilet.testing.reach import PodId, Reach
from wasilet.testing.service import Service

from tests.unit.harness.testing.log_rig import NAMESPACE, PODS, LogApi, running, scene_on

pytestmark = pytest.mark.unit

KUBECTL = f"""#!{sys.executable}
import os, sys, time
log = os.path.dirname(sys.argv[0])
open(f"{{log}}/calls", "a").write(" ".join(sys.argv[1:]) + f" pid {{os.getpid()}}\\n")
if os.path.exists(f"{{log}}/refuse"):
    sys.exit("error: unable to forward port because pod is not running. Current status=Pending")
print(f"Forwarding from 127.0.0.1:{{41000 + os.getpid() % 1000}} -> 80", flush=True)
time.sleep(600)
"""
POD = PodId("p", "1")


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where its calls are."""
    script = tmp_path / "kubectl"
    script.write_text(KUBECTL)
    script.chmod(0o755)
    monkeypatch.setattr(reach, "kubectl_path", lambda _: str(script))
    monkeypatch.setattr(reach, "machine_networks", list)
    return tmp_path / "calls"


@pytest.fixture
def cluster(tmp_path: Path) -> Any:
    settings = load(environ={**os.environ, "WASILET_STATE_HOME": str(tmp_path / "state")}, name="t")
    return SimpleNamespace(
        settings=settings, provider="host", kubeconfig=tmp_path / "kubeconfig", has_other_nodes=False
    )


@pytest.fixture
def ways(cluster: Any) -> Iterator[Reach]:
    made = Reach(cluster, "ns")
    yield made
    made.close()


def calls(kubectl: Path) -> list[list[str]]:
    return [line.split() for line in kubectl.read_text().splitlines()] if kubectl.exists() else []


def pid(call: list[str]) -> int:
    return int(call[-1])


def test_a_pod_that_no_route_leads_to_is_forwarded_once_for_each_port(ways: Reach, kubectl: Path) -> None:
    first = ways.way(POD, "10.244.0.5", 80)
    assert first == ("127.0.0.1", 41000 + pid(calls(kubectl)[0]) % 1000)
    assert ways.way(POD, "10.244.0.5", 80) == first
    assert ways.way(POD, "10.244.0.5", 81) != first
    words = " ".join(calls(kubectl)[0])
    assert "--namespace ns port-forward --address 127.0.0.1 pod/p :80" in words
    assert len(calls(kubectl)) == 2


def test_a_forward_that_ended_is_made_again_and_another_pod_of_that_name_gets_its_own(
    ways: Reach, kubectl: Path
) -> None:
    ways.way(POD, "10.244.0.5", 80)
    ended = psutil.Process(pid(calls(kubectl)[0]))
    ended.kill()
    while ended.is_running() and ended.status() != psutil.STATUS_ZOMBIE:
        pass
    ways.way(POD, "10.244.0.5", 80)
    ways.way(PodId("p", "2"), "10.244.0.5", 80)
    assert len(calls(kubectl)) == 3


def test_forwards_end_with_the_test(ways: Reach, kubectl: Path) -> None:
    ways.way(POD, "10.244.0.5", 80)
    ways.close()
    assert not psutil.pid_exists(pid(calls(kubectl)[0]))


def test_what_kubectl_says_is_why_there_is_no_answer(ways: Reach, kubectl: Path) -> None:
    (kubectl.parent / "refuse").touch()
    with pytest.raises(NoAnswerError, match=r"the forward to pod/p ended: .*pod is not running"):
        ways.way(POD, "10.244.0.5", 80)


def test_a_pod_of_a_network_of_this_machine_is_asked_at_its_address(ways: Reach, cluster: Any, kubectl: Path) -> None:
    state = State.of(cluster.settings)
    state.create()
    state.update(pod_network={"pod_cidr": "10.244.0.0/16", "service_cidr": "10.245.0.0/16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "machine_networks", lambda: [IPv4Network("10.244.0.0/22")])
        assert ways.way(POD, "10.244.0.5", 80) == ("10.244.0.5", 80)
    assert ways.way(POD, "10.244.0.5", 80)[0] == "127.0.0.1", "the same range behind no route"
    assert len(calls(kubectl)) == 1


def test_a_route_that_holds_the_address_by_chance_is_tried_first(
    ways: Reach, kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VPN's, say, over all of 10.0.0.0/8."""
    monkeypatch.setattr(reach, "machine_networks", lambda: [IPv4Network("10.0.0.0/8")])
    monkeypatch.setattr(reach, "connects", lambda address, _: address == "10.9.9.9")
    assert ways.way(POD, "10.9.9.9", 80) == ("10.9.9.9", 80)
    assert ways.way(POD, "10.244.0.5", 80)[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "routed"),
    [("10.1.2.3", True), ("10.2.2.3", False), ("127.0.0.9", True), ("::1", True), ("fd00::1", False)],
)
def test_only_routes_of_this_machine_count(address: str, *, routed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "machine_networks", lambda: [IPv4Network("10.1.0.0/16")])
    assert reach.is_routed(address) == routed


def test_connects_takes_a_refusal_for_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reach.connects("127.0.0.1", port)
    assert reach.connects("127.0.0.1", port)


def test_the_url_of_a_pod_is_that_of_its_forward(kubectl: Path, cluster: Any) -> None:
    api = LogApi()
    with scene_on(api) as scene:
        scene.reach = Reach(cluster, NAMESPACE)
        shown = api.pod("p", "Running", running("a"))
        shown["status"] |= {"podIP": "10.244.0.5", "hostIP": "10.0.0.1"}
        api.show(PODS, shown)
        assert scene.pod("p").url(80, "/x") == f"http://127.0.0.1:{41000 + pid(calls(kubectl)[0]) % 1000}/x"
        assert f"--namespace {NAMESPACE}" in " ".join(calls(kubectl)[0])
    assert not psutil.pid_exists(pid(calls(kubectl)[0])), "gone with the test's namespace"


def test_a_services_endpoints_are_forwarded_where_they_are_pods(ways: Reach, kubectl: Path) -> None:
    endpoints = [
        {"addresses": ["10.244.0.5"], "targetRef": {"kind": "Pod", "name": "p", "uid": "1"}},
        {"addresses": ["10.244.0.9"]},
    ]
    listed = {"items": [{"ports": [{"name": "", "port": 8080}], "endpoints": endpoints}]}
    kube: Any = SimpleNamespace(get=lambda *_, **__: listed)
    body = {"metadata": {"name": "s", "namespace": "ns"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}}
    made = Service(kube, body, within_seconds=1, reach=ways)
    assert not made._is_reached(80), "no way to the cluster IP"
    assert {made._endpoint(80) for _ in range(2)} == {
        ("127.0.0.1", 41000 + pid(calls(kubectl)[0]) % 1000),
        ("10.244.0.9", 8080),
    }
    assert ":8080" in calls(kubectl)[0]
