"""A cluster of two nodes that an ordinary user makes: its pods have addresses, in a user namespace of the user's own.

The harness, the control plane and the nodes run as a user with no account and no right; this process, which is root,
only looks at it from outside, and sends what users of the machine would.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasilet.cluster.opening import open_cluster
from wasilet.controlplane import pod_network
from wasilet.controlplane.acquire import expected
from wasilet.errors import ApiError
from wasilet.kube.client import api_path
from wasilet.process import is_alive
from wasilet.settings import cache_root, load

from tests.another_machine import another_machine
from tests.clusters import TestCluster
from tests.e2e import componentize
from tests.e2e.guests import Guests, build_guest, needs_rust_for_bindings
from tests.e2e.test_pod_network import (
    NAMESPACE,
    PORT,
    Net,
    admitted,
    answers,
    echo,
    module_refuses,
    pod_security,
    reached,
    ready,
    wait,
)
from tests.ordinary_user import OrdinaryUser, ordinary_user

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="another user is made by root; needs nft"),
    pytest.mark.skipif(bool(componentize.why_not()), reason="components are made by npm's jco"),
]
NAME = "rootless"


@pytest.fixture(scope="module")
def user() -> Iterator[OrdinaryUser]:
    needs_rust_for_bindings()
    component = componentize.as_component(build_guest("tcp-echo"))
    with ordinary_user() as user:
        (user.home / "echo.wasm").write_bytes(component)
        yield user


@pytest.fixture(scope="module")
def net(user: OrdinaryUser) -> Iterator[Net]:
    """Two servers behind one Service, with a probe of their port."""
    user.wasilet("up", "--name", NAME, "--nodes", "2")
    settings = load(environ={**user.environ, "KUBECONFIG": str(user.home / ".kube" / "config")}, name=NAME)
    with open_cluster(settings) as cluster:
        found = TestCluster(settings, cluster)
        guests = Guests(str(found.status()["registry"]), settings.environ)
        net = Net(cluster=found, image=guests.add_bytes("tcp-echo", (user.home / "echo.wasm").read_bytes()))
        _begin_servers(net)
        yield net


def _begin_servers(net: Net) -> None:
    probe = {"readinessProbe": {"tcpSocket": {"port": "echo"}, "periodSeconds": 1}}
    ports = {"ports": [{"name": "echo", "containerPort": PORT}]}
    for node in (0, 1):
        net.run(f"server-{node}", "serve", str(PORT), node=node, container={**probe, **ports})
    spec = {"type": "NodePort", "selector": {"app": "echo"}, "ports": [{"port": 80, "targetPort": "echo"}]}
    net.kube.create(api_path("services", namespace=NAMESPACE), {"metadata": {"name": "echo"}, "spec": spec})
    for node in (0, 1):
        wait(lambda node=node: ready(net.pod(f"server-{node}")), f"server-{node}")  # type: ignore[misc]
        wait(lambda node=node: net.answers(node), f"the Service on node {node}")  # type: ignore[misc]


def addresses(net: Net) -> list[str]:
    return [str(net.pod(f"server-{node}")["status"]["podIP"]) for node in (0, 1)]


def test_pods_have_addresses_and_the_machine_knows_nothing_of_them(net: Net) -> None:
    plan = pod_network.plan_of(net.cluster.cluster.state)
    assert plan is not None
    assert plan.rootless
    assert len(set(addresses(net))) == 2
    assert not any(network.overlaps(plan.pods) for network in pod_network.machine_networks())
    node = net.kube.get(api_path("nodes", net.cluster.cluster.node_names()[0]))
    (condition,) = [each for each in node["status"]["conditions"] if each["type"] == "NetworkUnavailable"]
    assert (condition["status"], condition["reason"]) == ("False", "PodNetworkReady")


@pytest.mark.parametrize(("client", "server"), [(0, 0), (0, 1), (1, 0)])
def test_pods_reach_each_other_and_the_service_by_its_name(net: Net, client: int, server: int) -> None:
    address = addresses(net)[server]
    assert net.said(f"direct-{client}-{server}", "connect", address, str(PORT), "hello", node=client) == (
        f"{address} answered hello"
    )
    assert "answered hello" in net.said(f"named-{client}-{server}", "connect", "echo", "80", "hello", node=client)


def test_the_address_of_a_module_refuses_at_once(net: Net) -> None:
    module_refuses(net, 0, asked_from=1)


def test_pods_reach_the_api_server_and_other_machines(net: Net) -> None:
    assert "connection-refused" not in net.said("api", "connect", "kubernetes.default.svc", "443", "hello")
    other = "198.51.100.6"
    with another_machine("others1", other, own="198.51.100.5"):
        wait(lambda: reached(net, other, 80, node=1), "the way outward")


def test_the_api_servers_proxies_reach_pods_and_services(net: Net) -> None:
    """The guest sends the request back, which is no answer of HTTP; that it came is in its log."""
    for place in (f"pods/server-0:{PORT}", "services/echo:80"):
        asked = f"by-{place.partition('/')[0]}"
        with contextlib.suppress(ApiError):
            net.kube.get(f"/api/v1/namespaces/{NAMESPACE}/{place}/proxy/{asked}")
        wait(functools.partial(has_logged, net, f"GET /{asked}"), f"{asked} in a log")


def has_logged(net: Net, text: str) -> bool:
    """Either of the two servers, which write down what they are sent once they have answered."""
    logs = [net.kube.body(f"{api_path('pods', f'server-{node}', namespace=NAMESPACE)}/log") for node in (0, 1)]
    return any(text.encode() in log for log in logs)


def test_port_forward_node_port_and_host_port_reach_pods_from_the_machine(net: Net) -> None:
    kubectl = expected("kubectl", cache=cache_root(), environ=dict(os.environ))
    command = [str(kubectl), "--kubeconfig", str(net.cluster.admin_kubeconfig), "port-forward", "svc/echo", ":80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        try:
            assert forwarding.stdout is not None
            port = int(forwarding.stdout.readline().split(" -> ")[0].rpartition(":")[2])
            assert echo("127.0.0.1", port, "forwarded") == "forwarded"
        finally:
            forwarding.terminate()
            forwarding.wait(10)
    node_port = net.kube.get(api_path("services", "echo", namespace=NAMESPACE))["spec"]["ports"][0]["nodePort"]
    wait(lambda: answers("127.0.0.1", node_port), "an answer at the node port")
    with socket.socket() as probe:
        probe.bind(("", 0))
        host_port = int(probe.getsockname()[1])
    ports = {"ports": [{"containerPort": PORT, "hostPort": host_port}]}
    with pod_security(net, "privileged"):
        pod = {"node": 0, "container": ports, "labels": {"app": "apart"}}
        wait(lambda: admitted(net, "on-the-machine", "serve", str(PORT), **pod), "the namespace's new level")
    wait(lambda: answers("127.0.0.1", host_port), "an answer at the host port")
    net.kube.delete(api_path("pods", "on-the-machine", namespace=NAMESPACE))


def test_a_node_port_takes_datagrams(net: Net) -> None:
    ports = [{"port": 80, "targetPort": PORT, "protocol": "UDP"}]
    spec = {"type": "NodePort", "selector": {"app": "echo"}, "ports": ports}
    path = api_path("services", namespace=NAMESPACE)
    made = net.kube.create(path, {"metadata": {"name": "datagrams"}, "spec": spec})
    place = ("127.0.0.1", made["spec"]["ports"][0]["nodePort"])

    def answered() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker, contextlib.suppress(OSError):
            asker.settimeout(1.0)
            asker.connect(place)
            asker.send(b"hello")
            return asker.recv(100) == b"hello"
        return False

    wait(answered, "an answer by UDP")
    net.kube.delete(f"{path}/datagrams")


def test_what_is_inside_can_be_looked_at(net: Net, user: OrdinaryUser) -> None:
    data = net.cluster.cluster.state.node(net.cluster.cluster.node_names()[0])
    seen = user.run(sys.executable, "-P", "-m", "wasilet_node.network.inspect", "--data-dir", str(data))
    assert f": {addresses(net)[0]} by " in seen
    assert "table ip kube-proxy {" in seen


def test_a_network_policy_keeps_strangers_out(net: Net) -> None:
    path = api_path("networkpolicies", namespace=NAMESPACE, group="networking.k8s.io", version="v1")
    net.kube.create(path, {"metadata": {"name": "none"}, "spec": {"podSelector": {"matchLabels": {"app": "echo"}}}})
    try:
        wait(lambda: not reached(net, addresses(net)[0]), "the policy")
    finally:
        net.kube.delete(f"{path}/none")
    wait(lambda: reached(net, addresses(net)[0]), "the policy's end")


def test_no_process_of_it_is_roots_and_sandboxes_have_no_right_even_in_its_namespace(
    net: Net, user: OrdinaryUser
) -> None:
    statuses = [Path(f"/proc/{pid}/status").read_text(encoding="ascii") for pid in user.processes()]
    guests = [status for status in statuses if status.startswith("Name:\twasilet-sandbox\n")]
    assert len(guests) == 2
    for status in guests:
        assert f"Uid:\t{user.uid}\t{user.uid}\t{user.uid}\t{user.uid}\n" in status
        assert "CapPrm:\t0000000000000000\n" in status
        assert "CapAmb:\t0000000000000000\n" in status
        assert "NoNewPrivs:\t1\n" in status
    assert all(f"Uid:\t{user.uid}\t{user.uid}\t" in status for status in statuses)


def test_an_agent_and_the_keeper_that_are_killed_come_back_to_the_same_pods(net: Net, user: OrdinaryUser) -> None:
    before = addresses(net)
    state = net.cluster.cluster.state
    for component in (f"node-{net.cluster.cluster.node_names()[0]}", pod_network.PROXY):
        record = state.alive(component)
        assert record is not None
        os.kill(record.process.pid, signal.SIGKILL)
        wait(lambda record=record: not is_alive(record.process), "its end")  # type: ignore[misc]
    user.wasilet("up", "--name", NAME, "--nodes", "2")
    wait(lambda: net.answers(0), "the Service")
    assert addresses(net) == before
    pods = [net.pod(f"server-{node}") for node in (0, 1)]
    assert [pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods] == [0, 0]
    assert net.said("again", "connect", before[1], str(PORT), "hello", node=0) == f"{before[1]} answered hello"


def test_after_a_kill_of_everything_there_is_nothing_and_up_makes_it_again(net: Net, user: OrdinaryUser) -> None:
    user.kill_all()
    user.wasilet("up", "--name", NAME, "--nodes", "2")
    for node in (0, 1):
        wait(lambda node=node: net.answers(node), f"the Service on node {node}")  # type: ignore[misc]


def test_down_leaves_nothing(net: Net, user: OrdinaryUser) -> None:
    """Last: it ends the cluster."""
    assert user.processes()
    user.wasilet("down", "--purge", "--name", net.cluster.cluster.state.name)
    assert user.processes() == []
