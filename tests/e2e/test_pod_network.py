"""Pods with addresses, Services and names, on a real cluster of two nodes: what is asked, by guests, of guests.

The guest is the sample ``tcp-echo``: a server on wasi:sockets, and a client that looks names up by the pod's own
resolv.conf. Nothing here reaches a pod by any way but those that users have.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from wasilet.cluster import cluster_dns
from wasilet.cluster.down import down
from wasilet.console import PlainReporter
from wasilet.controlplane import pod_network
from wasilet.controlplane.acquire import expected
from wasilet.errors import ApiError
from wasilet.kube.client import Kube, api_path
from wasilet.process import is_alive
from wasilet_dev.bench import push_sleeper
from wasilet_node.network.uplink import interface_prefix
from wasilet_node.runtime import supervisor_registry

from tests.another_machine import RESOLVED, another_machine
from tests.clusters import TestCluster, whole_cluster
from tests.e2e import componentize
from tests.e2e.guests import Guests, build_guest, needs_rust_for_bindings

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft"),
    pytest.mark.skipif(bool(componentize.why_not()), reason="components are made by npm's jco"),
]

SECONDS = 60.0
NAMESPACE = "default"
CONNECTIONS = 100
PORT = 7777


@dataclass(frozen=True, kw_only=True)
class Net:
    """A cluster of two nodes with a server on each, behind one Service."""

    cluster: TestCluster
    image: str

    @property
    def kube(self) -> Kube:
        return self.cluster.kube

    def pod(self, name: str) -> dict[str, Any]:
        return self.kube.get(api_path("pods", name, namespace=NAMESPACE))

    def run(
        self, name: str, *args: str, node: int | None = None, labels: dict[str, str] | None = None, **fields: Any
    ) -> None:
        """Create a pod of the echo guest."""
        container = {"name": "main", "image": self.image, "args": list(args), **fields.pop("container", {})}
        spec = {"containers": [container], **fields}
        if node is not None:
            spec["nodeName"] = self.cluster.cluster.node_names()[node]
        labels = labels or ({"app": "echo"} if args[:1] == ("serve",) else {})
        metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
        self.kube.create(
            api_path("pods", namespace=NAMESPACE),
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        )

    def answers(self, node: int) -> bool:
        """Whether a node's kube-proxy knows the endpoints by now: they follow the pods' readiness in their own time."""
        address = self.kube.get(api_path("services", "echo", namespace=NAMESPACE))["spec"]["clusterIP"]
        name = f"early-{node}-{time.monotonic_ns()}"
        return "answered" in self.said(name, "connect", address, "80", "hello", node=node)

    def said(self, name: str, *args: str, node: int | None = None, **fields: Any) -> str:
        """What a client pod that ran to its end wrote, and remove it."""
        self.run(name, *args, node=node, restartPolicy="Never", **fields)
        path = api_path("pods", name, namespace=NAMESPACE)
        wait(lambda: self.pod(name)["status"].get("phase") in {"Succeeded", "Failed"}, f"the end of {name}")
        text = self.kube.body(f"{path}/log").decode()
        self.kube.delete(path)
        return text.strip()


def wait(holds: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come in {SECONDS} s"
        time.sleep(0.05)


def echo(address: str, port: int, text: str) -> str:
    """What comes back from a server, from this machine."""
    with socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(f"{text}\n".encode())
        return connection.makefile().readline().strip()


def echo_datagram(address: str, port: int, text: str) -> str:
    """As ``echo``, by UDP. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(2)
        asker.connect((address, port))
        asker.send(text.encode())
        return asker.recv(1000).decode()


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    needs_rust_for_bindings()
    with whole_cluster("podnet", nodes=2) as cluster:
        guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
        image = guests.add_bytes("tcp-echo", componentize.as_component(build_guest("tcp-echo")))
        net = Net(cluster=cluster, image=image)
        assert pod_network.plan_of(cluster.cluster.state) is not None, pod_network.why_absent(cluster.cluster.state)
        probe = {"readinessProbe": {"tcpSocket": {"port": "echo"}, "periodSeconds": 1}}
        ports = {"ports": [{"name": "echo", "containerPort": PORT}]}
        for node in (0, 1):
            net.run(f"server-{node}", "serve", str(PORT), node=node, container={**probe, **ports})
        spec = {"type": "NodePort", "selector": {"app": "echo"}, "ports": [{"port": 80, "targetPort": "echo"}]}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "echo"}, "spec": spec}
        net.kube.create(api_path("services", namespace=NAMESPACE), service)
        for node in (0, 1):
            wait(lambda node=node: ready(net.pod(f"server-{node}")), f"server-{node}")  # type: ignore[misc]
        wait(lambda: net.cluster.status()["ready"], "CoreDNS")
        for node in (0, 1):
            wait(lambda node=node: net.answers(node), f"the Service on node {node}")  # type: ignore[misc]
        yield net


def ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def test_each_pod_has_an_address_of_its_nodes_share(net: Net) -> None:
    addresses = {net.pod(f"server-{node}")["status"]["podIP"] for node in (0, 1)}
    assert len(addresses) == 2
    for node, name in enumerate(net.cluster.cluster.node_names()):
        cidr = net.kube.get(api_path("nodes", name))["spec"]["podCIDR"]
        assert net.pod(f"server-{node}")["status"]["podIP"].rpartition(".")[0].startswith(cidr.split(".")[0])
        assert net.pod(f"server-{node}")["status"]["hostIP"] == net.cluster.access.node_address


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("name", ["echo", "echo.default", "echo.default.svc.cluster.local"])
def test_a_service_answers_by_its_names_from_every_node(net: Net, node: int, name: str) -> None:
    address = net.kube.get(api_path("services", "echo", namespace=NAMESPACE))["spec"]["clusterIP"]
    said = net.said(f"client-{node}-{name.count('.')}", "connect", name, "80", "hello", node=node)
    assert said == f"{address} answered hello"


@pytest.mark.parametrize(("client", "server"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_pods_reach_each_other_within_and_across_nodes(net: Net, client: int, server: int) -> None:
    address = net.pod(f"server-{server}")["status"]["podIP"]
    said = net.said(f"direct-{client}-{server}", "connect", address, str(PORT), "hello", node=client)
    assert said == f"{address} answered hello"


def module_refuses(net: Net, node: int, *, asked_from: int) -> None:
    """A pod that cannot have a socket has no namespace; what is sent to its address is answered all the same."""
    net.run("module", node=node, container={"image": push_sleeper(net.cluster.cluster)})
    wait(lambda: net.pod("module")["status"].get("phase") == "Running", "the module")
    address = net.pod("module")["status"]["podIP"]
    assert "refused" in net.said("to-module", "connect", address, "80", "hello", node=asked_from)
    net.kube.delete(api_path("pods", "module", namespace=NAMESPACE))


def test_the_address_of_a_module_refuses_at_once_also_from_another_node(net: Net) -> None:
    module_refuses(net, 0, asked_from=1)


def test_names_that_are_not_there_are_not_found(net: Net) -> None:
    assert "name-unresolvable" in net.said("nobody", "resolve", "nobody.default.svc.cluster.local")


def test_dns_policy_and_host_aliases_are_what_a_guest_resolves_by(net: Net) -> None:
    aliases = [{"ip": "192.0.2.77", "hostnames": ["aliased.example"]}]
    assert net.said("aliased", "resolve", "aliased.example", hostAliases=aliases) == "192.0.2.77"
    config = {
        "nameservers": ["192.0.2.53"],
        "options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}],
    }
    said = net.said("alone", "resolve", "echo.default.svc.cluster.local", dnsPolicy="None", dnsConfig=config)
    assert "lookup echo.default.svc.cluster.local" in said


def test_the_dns_answers_pods_and_nobody_else(net: Net) -> None:
    plan = pod_network.plan_of(net.cluster.cluster.state)
    assert plan is not None
    place = (plan.machine_address, net.cluster.cluster.ports()["dns"])
    # A question for the A record of kubernetes.default.svc.cluster.local (RFC 1035, section 4.1).
    labels = b"".join(bytes([len(part)]) + part for part in b"kubernetes.default.svc.cluster.local".split(b"."))
    question = bytes.fromhex("1234 0100 0001 0000 0000 0000") + labels + bytes.fromhex("00 0001 0001")

    def asked_from(address: str) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.bind((address, 0))
            asker.settimeout(1.0)
            asker.sendto(question, place)
            try:
                return asker.recv(512)
            except TimeoutError:
                return b""

    answer = asked_from(plan.machine_address)
    assert answer[:2] == question[:2]
    assert answer.endswith(socket.inet_aton(plan.service_ip))
    assert asked_from("127.0.0.1") == b"", "as a neighbour's, its address is not of the pods' range"


def test_the_api_server_is_reached_by_the_name_that_every_client_knows(net: Net) -> None:
    plan = pod_network.plan_of(net.cluster.cluster.state)
    assert plan is not None
    assert net.said("api-name", "resolve", "kubernetes.default.svc") == plan.service_ip
    # TLS is not this guest's business: the connection stands, and the server hangs up on what it is sent.
    assert "connection-refused" not in net.said("api", "connect", "kubernetes.default.svc", "443", "hello")


def test_the_machine_reaches_pods_services_and_node_ports(net: Net) -> None:
    service = net.kube.get(api_path("services", "echo", namespace=NAMESPACE))["spec"]
    plan = pod_network.plan_of(net.cluster.cluster.state)
    assert plan is not None
    for attempt in range(8):
        # Whichever of the two pods, on this node or the other, it leads to.
        assert echo(service["clusterIP"], 80, f"by service {attempt}") == f"by service {attempt}"
    for node in (0, 1):
        assert echo(net.pod(f"server-{node}")["status"]["podIP"], PORT, "by pod") == "by pod"
        assert echo(plan.uplink(node).partition("/")[0], service["ports"][0]["nodePort"], "by port") == "by port"


def test_a_node_port_is_open_on_the_machines_own_addresses_while_the_service_lasts(net: Net) -> None:
    asked = [
        {"name": protocol.lower(), "port": 80, "targetPort": PORT, "protocol": protocol} for protocol in ("TCP", "UDP")
    ]
    body = {"type": "NodePort", "selector": {"app": "echo"}, "ports": asked}
    made = net.kube.create(api_path("services", namespace=NAMESPACE), {"metadata": {"name": "local"}, "spec": body})
    port, for_datagrams = (each["nodePort"] for each in made["spec"]["ports"])
    places = [("127.0.0.1", port), (net.cluster.access.node_address, port)]
    for place in places:
        wait(lambda place=place: answers(*place), f"a listener at {place}")  # type: ignore[misc]
        by_udp = (place[0], for_datagrams)
        wait(lambda place=by_udp: answers_datagrams(*place), f"an answer by UDP at {by_udp}")  # type: ignore[misc]
    net.kube.delete(api_path("services", "local", namespace=NAMESPACE))
    for place in places:
        wait(lambda place=place: refused(*place), f"the end of the listener at {place}")  # type: ignore[misc]


def test_a_load_balancer_has_its_own_port_or_a_free_one_and_says_which(net: Net) -> None:
    address = net.cluster.access.node_address
    with socket.create_server((address, 0)) as foreign:
        taken = foreign.getsockname()[1]
    with socket.create_server((address, taken)):
        spec = {"type": "LoadBalancer", "selector": {"app": "echo"}}
        for name, number in (("taken", taken), ("free", taken + 1 if taken < 65535 else taken - 1)):
            ports = [{"port": number, "targetPort": "echo"}]
            net.kube.create(
                api_path("services", namespace=NAMESPACE),
                {"metadata": {"name": name}, "spec": {**spec, "ports": ports}},
            )
        try:
            wait(lambda: ingress(net, "taken") and ingress(net, "free"), "addresses of both")
            where = {name: ingress(net, name)["ports"][0]["port"] for name in ("taken", "free")}
            assert where["taken"] != taken
            for name, own in where.items():
                assert ingress(net, name)["ip"] == address
                wait(lambda own=own: answers(address, own), f"the balancer of {name}")  # type: ignore[misc]
            events = net.kube.get(api_path("events", namespace=NAMESPACE))["items"]
            told = [event["message"] for event in events if event["involvedObject"]["name"] == "taken"]
            assert f"taken on this machine already: {taken} is at {address}:{where['taken']}" in told
        finally:
            for name in ("taken", "free"):
                net.kube.delete(api_path("services", name, namespace=NAMESPACE))
        wait(lambda: refused(address, where["taken"]), "the end of the balancer")


def ingress(net: Net, service: str) -> dict[str, Any]:
    """What the status of a load balancer names first; empty: nothing yet."""
    status = net.kube.get(api_path("services", service, namespace=NAMESPACE)).get("status") or {}
    return next(iter((status.get("loadBalancer") or {}).get("ingress") or ()), {})


def answers(address: str, port: int) -> bool:
    """Whether an echo server is behind it by now."""
    with contextlib.suppress(OSError):
        return echo(address, port, "hello") == "hello"
    return False


def answers_datagrams(address: str, port: int) -> bool:
    """As ``answers``, by UDP."""
    with contextlib.suppress(OSError):
        return echo_datagram(address, port, "hello") == "hello"
    return False


def refused(address: str, port: int) -> bool:
    """Whether no process listens there."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_network_policy_lets_friends_in_and_nobody_else(net: Net) -> None:
    peer = {"podSelector": {"matchLabels": {"friend": "yes"}}}
    spec = {
        "podSelector": {"matchLabels": {"app": "echo"}},
        "ingress": [{"from": [peer], "ports": [{"port": "echo"}]}],
    }
    path = api_path("networkpolicies", namespace=NAMESPACE, group="networking.k8s.io", version="v1")
    net.kube.create(path, {"metadata": {"name": "friends"}, "spec": spec})
    try:
        for node in (0, 1):
            address = net.pod(f"server-{node}")["status"]["podIP"]
            wait(lambda address=address: not reached(net, address), "the policy")  # type: ignore[misc]
            said = net.said(f"friend-{node}", "connect", address, str(PORT), "hi", labels={"friend": "yes"})
            assert said == f"{address} answered hi"
            assert ready(net.pod(f"server-{node}")), "probes come from the node itself"
    finally:
        net.kube.delete(f"{path}/friends")
    wait(lambda: reached(net, net.pod("server-1")["status"]["podIP"]), "the policy's end")


def reached(net: Net, address: str, port: int = PORT, **more: Any) -> bool:
    """Whether a pod that no policy allows gets through, within the deadline that it is given."""
    name = f"stranger-{time.monotonic_ns()}"
    return "answered" in net.said(name, "connect", address, str(port), "hi", activeDeadlineSeconds=3, **more)


def test_pods_reach_other_machines_as_the_machine_does_where_policies_let_them(net: Net) -> None:
    other, labels = "198.51.100.2", {"app": "inward"}
    rule = {"to": [{"ipBlock": {"cidr": f"{other}/32"}}]}
    path = api_path("networkpolicies", namespace=NAMESPACE, group="networking.k8s.io", version="v1")
    spec = {"podSelector": {"matchLabels": labels}, "policyTypes": ["Egress"]}
    with another_machine("others0", other, own="198.51.100.1"):
        for node in (0, 1):
            wait(lambda node=node: reached(net, other, 80, node=node), "the way outward")  # type: ignore[misc]
            said = net.said(f"outward-{node}", "connect", other, "80", "hi", node=node)
            assert said == f"{other} answered hello 198.51.100.1"
            assert resolved_outside(net, other, node=node) == RESOLVED
        net.kube.create(path, {"metadata": {"name": "inward"}, "spec": spec})
        try:
            wait(lambda: not reached(net, other, 80, labels=labels), "the policy")
            assert RESOLVED not in resolved_outside(net, other, labels=labels)
            net.kube.patch(f"{path}/inward", {"spec": {"egress": [rule]}})
            wait(lambda: reached(net, other, 80, labels=labels), "the policy's exception")
            assert resolved_outside(net, other, labels=labels) == RESOLVED
        finally:
            net.kube.delete(f"{path}/inward")


def resolved_outside(net: Net, server: str, **more: Any) -> str:
    """What a pod is told by a DNS server on another machine, which is asked by UDP."""
    options = [{"name": "timeout", "value": "2"}, {"name": "attempts", "value": "2"}]
    config = {"nameservers": [server], "options": options}
    name = f"resolves-{time.monotonic_ns()}"
    return net.said(name, "resolve", "name.example", dnsPolicy="None", dnsConfig=config, **more)


def test_a_pod_listens_on_the_ports_that_web_servers_have(net: Net) -> None:
    """As under containerd and CRI-O: no port of a pod's own network takes a privilege."""
    net.run("low", "serve", "80", node=0, labels={"app": "low"})
    try:
        wait(lambda: net.pod("low")["status"].get("podIP") and ready(net.pod("low")), "the server on port 80")
        address = net.pod("low")["status"]["podIP"]
        assert net.said("asks-low", "connect", address, "80", "hi", node=1) == f"{address} answered hi"
    finally:
        net.kube.delete(api_path("pods", "low", namespace=NAMESPACE))


def test_port_forward_reaches_the_pod_many_times_at_once(net: Net) -> None:
    kubectl = expected("kubectl", cache=net.cluster.settings.cache, environ=net.cluster.settings.environ)
    command = [str(kubectl), "--kubeconfig", str(net.cluster.admin_kubeconfig), "port-forward", "svc/echo", ":80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        try:
            assert forwarding.stdout is not None
            port = int(forwarding.stdout.readline().split(" -> ")[0].rpartition(":")[2])
            with contextlib.ExitStack() as stack:
                connections = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(20)
                ]
                for number, connection in enumerate(connections):
                    connection.sendall(f"forward {number}\n".encode())
                for number, connection in enumerate(connections):
                    assert connection.makefile().readline() == f"forward {number}\n"
        finally:
            forwarding.terminate()
            forwarding.wait(10)


@contextlib.contextmanager
def pod_security(net: Net, level: str) -> Iterator[None]:
    """The namespace has that level in this block."""
    path, label = api_path("namespaces", NAMESPACE), "pod-security.kubernetes.io/enforce"
    net.kube.patch(path, {"metadata": {"labels": {label: level}}})
    try:
        yield
    finally:
        net.kube.patch(path, {"metadata": {"labels": {label: None}}})


def admitted(net: Net, name: str, *args: str, **fields: Any) -> bool:
    """Whether a pod was created: the API server's admission may not know a namespace's new level yet."""
    try:
        net.run(name, *args, **fields)
    except ApiError as error:
        if error.code != 403:
            raise
        return False
    return True


def test_a_host_port_leads_to_its_pod_and_is_given_once(net: Net) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    both = [{"containerPort": PORT, "hostPort": port, "protocol": protocol} for protocol in ("TCP", "UDP")]
    ports = {"ports": both}
    with pod_security(net, "privileged"):
        pod = {"node": 0, "container": ports, "labels": {"app": "apart"}}
        wait(lambda: admitted(net, "on-the-machine", "serve", str(PORT), **pod), "the namespace's new level")
        wait(lambda: ready(net.pod("on-the-machine")), "on-the-machine")
        # It has no probe: it is ready before it listens, and then what was taken for it is closed again.
        wait(lambda: echo("127.0.0.1", port, "by the machine") == "by the machine", "an answer by the machine's port")
        wait(lambda: answers_datagrams("127.0.0.1", port), "an answer by UDP by the machine's port")
        udp_alone = {"ports": both[1:]}
        net.run("too-late", "serve", str(PORT), node=0, container=udp_alone, labels={"app": "apart"})
    wait(lambda: net.pod("too-late")["status"].get("phase") == "Failed", "the refusal")
    assert net.pod("too-late")["status"]["reason"] == "NodePorts"
    for name in ("too-late", "on-the-machine"):
        net.kube.delete(api_path("pods", name, namespace=NAMESPACE))

    def free() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return False
        return True

    wait(free, "the port's end")


@contextlib.contextmanager
def many_connections(address: str, port: int) -> Iterator[Callable[..., int]]:
    """A hundred of them to echo servers, and how many still answer to a text, each within so many seconds."""
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection((address, port), timeout=10)) for _ in range(CONNECTIONS)
        ]
        lines = [stack.enter_context(connection.makefile("rb")) for connection in opened]

        def answering(text: str, seconds: float = 10.0) -> int:
            found = 0
            for connection in opened:
                connection.settimeout(seconds)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{text}\n".encode())
            for each in lines:
                with contextlib.suppress(OSError):
                    found += each.readline() == f"{text}\n".encode()
            return found

        assert answering("first") == CONNECTIONS
        yield answering


def process_in_the_node(net: Net, name: str) -> int | None:
    """The pid of what node 0's agent keeps under that name."""
    agent = net.cluster.cluster.state.alive(f"node-{net.cluster.cluster.node_names()[0]}")
    if agent is None:
        return None
    children = psutil.Process(agent.process.pid).children()
    return next((child.pid for child in children if any(name in word for word in command_line(child)[:4])), None)


def command_line(process: psutil.Process) -> list[str]:
    """Empty for one that has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def service_address(net: Net) -> str:
    return str(net.kube.get(api_path("services", "echo", namespace=NAMESPACE))["spec"]["clusterIP"])


def test_connections_outlive_kube_proxy_and_the_dns_and_both_come_back(net: Net) -> None:
    plan = pod_network.plan_of(net.cluster.cluster.state)
    dns = net.cluster.cluster.state.alive(cluster_dns.COMPONENT)
    assert plan is not None
    assert dns is not None
    with many_connections(service_address(net), 80) as answering:
        proxy = process_in_the_node(net, "kube-proxy")
        (server,) = psutil.Process(dns.process.pid).children()
        assert proxy is not None
        os.kill(proxy, signal.SIGKILL)
        server.kill()
        assert answering("without both") == CONNECTIONS
        wait(lambda: process_in_the_node(net, "kube-proxy") not in {None, proxy}, "the next kube-proxy")
        assert answering("with both") == CONNECTIONS
    # A Service that is made now has rules by the new one, and a name by the new DNS.
    spec = {"selector": {"app": "echo"}, "ports": [{"port": 81, "targetPort": "echo"}]}
    made = net.kube.create(
        api_path("services", namespace=NAMESPACE),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "later"}, "spec": spec},
    )
    try:
        wait(lambda: answers(made["spec"]["clusterIP"], 81), "rules for a Service")
        wait(lambda: "answered" in net.said(f"later-{time.monotonic_ns()}", "connect", "later", "81", "hi"), "its name")
    finally:
        net.kube.delete(api_path("services", "later", namespace=NAMESPACE))


def test_connections_outlive_the_agent(net: Net) -> None:
    node = net.cluster.cluster.node_names()[0]
    data = net.cluster.cluster.state.node(node)
    address = service_address(net)
    with many_connections(address, 80) as answering:
        agent = net.cluster.cluster.state.alive(f"node-{node}")
        assert agent is not None
        os.kill(agent.process.pid, signal.SIGKILL)
        wait(lambda: not is_alive(agent.process), "the agent's end")
        assert answering("without an agent") == CONNECTIONS
        assert bring_up(net)
        assert answering("after") == CONNECTIONS
    assert echo(address, 80, "again") == "again"
    assert (data / "network" / "pods").is_dir()


def bring_up(net: Net) -> bool:
    from wasilet.cluster.up import up

    return up(net.cluster.settings, reporter=PlainReporter(io.StringIO())).succeeded


def test_a_pod_whose_supervisor_is_killed_begins_again_with_an_address(net: Net) -> None:
    node = net.cluster.cluster.node_names()[0]
    pointer = supervisor_registry.current(net.cluster.cluster.state.node(node))
    assert pointer is not None
    addresses = [net.pod(f"server-{node}")["status"]["podIP"] for node in (0, 1)]
    with many_connections(addresses[0], PORT) as lost, many_connections(addresses[1], PORT) as kept:
        os.kill(pointer.pid, signal.SIGKILL)
        wait(lambda: not pointer.alive(), "the supervisor's end")
        assert kept("on the other node") == CONNECTIONS

        def back() -> bool:
            pod = net.pod("server-0")
            restarts = pod["status"]["containerStatuses"][0]["restartCount"]
            return ready(pod) and restarts >= 1

        wait(back, "server-0, again")
        assert lost("by the next pod", 0.02) == 0
        assert kept("still") == CONNECTIONS
    address = net.pod("server-0")["status"]["podIP"]
    assert echo(address, PORT, "again") == "again"
    assert net.said("after-loss", "connect", address, str(PORT), "hello", node=1) == f"{address} answered hello"


def test_down_leaves_nothing_of_the_network(net: Net) -> None:
    """Last: it ends the cluster."""
    plan = pod_network.plan_of(net.cluster.cluster.state)
    assert plan is not None
    assert any(network.overlaps(plan.pods) for network in pod_network.machine_networks())
    state = net.cluster.cluster.state
    ours = tuple(interface_prefix(state.node(name)) for name in net.cluster.cluster.node_names())
    assert [name for _, name in socket.if_nameindex() if name.startswith(ours)]
    down(net.cluster.settings, reporter=PlainReporter(io.StringIO()), purge=True).raise_for_failure()
    wait(lambda: not any(network.overlaps(plan.pods) for network in pod_network.machine_networks()), "the routes' end")
    wait(lambda: not [name for _, name in socket.if_nameindex() if name.startswith(ours)], "the interfaces' end")
