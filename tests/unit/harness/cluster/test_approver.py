"""Which serving certificate requests are approved: one that is right, and none that differs from it in any way."""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wasilet.cluster.approver import Approver
from wasilet.cluster.approver_facts import gather_facts, policy_data, read_policy, service_ranges, write_policy
from wasilet.cluster.approver_rules import Facts, Policy, Verdict, is_open, node_addresses, requesting_node
from wasilet.cluster.approver_rules import judge as judge_with
from wasilet.errors import ApiError, StateError
from wasilet.kube.client import CSRS, KubeObject

from tests.unit.harness.fake_kube import FakeKube

pytestmark = pytest.mark.unit

NODES = "/api/v1/nodes"

KEY = ec.generate_private_key(ec.SECP256R1())
USER = "system:node:wasm-1"


def request(
    *,
    common_name: str = USER,
    organizations: tuple[str, ...] = ("system:nodes",),
    sans: tuple[x509.GeneralName, ...] = (
        x509.DNSName("wasm-1"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.7")),
    ),
    extensions: tuple[x509.ExtensionType, ...] = (),
    extra_subject: tuple[x509.NameAttribute[str], ...] = (),
) -> str:
    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organizations]
    names += [x509.NameAttribute(NameOID.COMMON_NAME, common_name), *extra_subject]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    pem = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return base64.b64encode(pem).decode()


def csr(text: str | None = None, **spec: Any) -> KubeObject:
    return {
        "metadata": {"name": "csr-1", "resourceVersion": "1"},
        "spec": {
            "signerName": "kubernetes.io/kubelet-serving",
            "username": USER,
            "groups": ["system:nodes", "system:authenticated"],
            "usages": ["digital signature", "server auth"],
            "request": text if text is not None else request(),
            **spec,
        },
        "status": {},
    }


NODE: KubeObject = {
    "metadata": {"name": "wasm-1"},
    "status": {
        "addresses": [
            {"type": "InternalIP", "address": "192.0.2.7"},
            {"type": "InternalIP", "address": "2001:db8::7"},
            {"type": "Hostname", "address": "host-a"},
        ]
    },
}


def judge(request: KubeObject, node: KubeObject | None) -> Verdict:
    """In a cluster of that one Node."""
    return judge_with(request, node, policy=Policy(), facts=Facts)


def tampered(text: str) -> str:
    pem = base64.b64decode(text).decode()
    der = bytearray(base64.b64decode("".join(pem.splitlines()[1:-1])))
    der[-1] ^= 1
    body = base64.b64encode(bytes(der)).decode()
    damaged = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"
    return base64.b64encode(damaged.encode()).decode()


def test_what_is_right_is_approved() -> None:
    verdict = judge(csr(), NODE)
    assert verdict.approve, verdict.why
    assert verdict.why == "wasm-1: wasm-1, 192.0.2.7"


@pytest.mark.parametrize(
    "usages", [["server auth", "digital signature"], ["digital signature", "key encipherment", "server auth"]]
)
def test_both_sets_of_usages_are_right(usages: list[str]) -> None:
    assert judge(csr(usages=usages), NODE).approve


@pytest.mark.parametrize(
    "sans",
    [
        (x509.IPAddress(ipaddress.ip_address("192.0.2.7")),),
        (x509.DNSName("wasm-1"),),
        (x509.IPAddress(ipaddress.ip_address("2001:db8:0:0::7")),),
    ],
)
def test_any_of_the_nodes_own_names_will_do(sans: tuple[x509.GeneralName, ...]) -> None:
    assert judge(csr(request(sans=sans)), NODE).approve


def test_the_extensions_that_kubelets_ask_for_are_no_reason_to_refuse() -> None:
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    leaf = x509.BasicConstraints(ca=False, path_length=None)
    assert judge(csr(request(extensions=(usage, leaf))), NODE).approve


REFUSED: dict[str, Callable[[], KubeObject]] = {
    "another signer": lambda: csr(signerName="kubernetes.io/kube-apiserver-client-kubelet"),
    "a requester that is no node": lambda: csr(username="alice"),
    "a service account": lambda: csr(username="system:serviceaccount:default:default"),
    "a node's name without the group": lambda: csr(groups=["system:authenticated"]),
    "no groups": lambda: csr(groups=None),
    "another node's subject": lambda: csr(request(common_name="system:node:wasm-2")),
    "a subject without organization": lambda: csr(request(organizations=())),
    "a subject of masters": lambda: csr(request(organizations=("system:masters",))),
    "a subject of nodes and masters": lambda: csr(request(organizations=("system:nodes", "system:masters"))),
    "a subject with the group twice": lambda: csr(request(organizations=("system:nodes", "system:nodes"))),
    "a subject with more in it": lambda: csr(
        request(extra_subject=(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x"),))
    ),
    "client usage": lambda: csr(usages=["digital signature", "client auth"]),
    "server and client usage": lambda: csr(usages=["digital signature", "server auth", "client auth"]),
    "signing usage": lambda: csr(usages=["digital signature", "server auth", "cert sign"]),
    "no usages": lambda: csr(usages=[]),
    "too few usages": lambda: csr(usages=["server auth"]),
    "no names": lambda: csr(request(sans=())),
    "another machine's address": lambda: csr(request(sans=(x509.IPAddress(ipaddress.ip_address("192.0.2.8")),))),
    "loopback": lambda: csr(request(sans=(x509.IPAddress(ipaddress.ip_address("127.0.0.1")),))),
    "one good name and one bad": lambda: csr(request(sans=(x509.DNSName("wasm-1"), x509.DNSName("kubernetes")))),
    "a wildcard": lambda: csr(request(sans=(x509.DNSName("*"),))),
    "an address as a DNS name": lambda: csr(request(sans=(x509.DNSName("192.0.2.7"),))),
    "an email address": lambda: csr(request(sans=(x509.DNSName("wasm-1"), x509.RFC822Name("a@b")))),
    "a URI": lambda: csr(request(sans=(x509.DNSName("wasm-1"), x509.UniformResourceIdentifier("spiffe://x/y")))),
    "an authority": lambda: csr(request(extensions=(x509.BasicConstraints(ca=True, path_length=None),))),
    "an unknown extension": lambda: csr(
        request(extensions=(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),))
    ),
    "a signature that is not its key's": lambda: csr(tampered(request())),
    "something that is no request": lambda: csr(base64.b64encode(b"hello").decode()),
    "something that is not base64": lambda: csr("%%%"),
    "nothing": lambda: csr(""),
    "far too much": lambda: csr(base64.b64encode(b"x" * 100_000).decode()),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_left_alone_with_a_reason(make: Callable[[], KubeObject]) -> None:
    verdict = judge(make(), NODE)
    assert not verdict.approve
    assert verdict.why


def test_a_node_that_is_not_there_yet_is_waited_for() -> None:
    verdict = judge(csr(), None)
    assert (verdict.approve, verdict.pending) == (False, True)
    assert "there is no Node 'wasm-1'" in verdict.why


def test_another_nodes_object_vouches_for_nothing() -> None:
    other = copy.deepcopy(NODE)
    other["metadata"]["name"] = "wasm-2"
    assert not judge(csr(), other).approve


def test_an_address_of_the_wrong_kind_is_not_the_nodes() -> None:
    node = {
        "metadata": {"name": "wasm-1"},
        "status": {
            "addresses": [{"type": "Hostname", "address": "192.0.2.7"}, {"type": "InternalIP", "address": "host-a"}]
        },
    }
    assert node_addresses(node) == frozenset()


@pytest.mark.parametrize(
    "status",
    [
        {"conditions": [{"type": "Approved", "status": "True"}]},
        {"conditions": [{"type": "Denied", "status": "True"}]},
        {"conditions": [{"type": "Failed", "status": "True"}]},
        {"certificate": "eA=="},
    ],
)
def test_what_is_decided_is_not_open(status: KubeObject) -> None:
    assert not is_open({**csr(), "status": status})
    assert is_open(csr())


def test_a_node_is_told_by_name_and_group() -> None:
    assert requesting_node(csr()) == "wasm-1"
    assert requesting_node(csr(groups=[])) == ""


def cluster(*nodes: KubeObject) -> FakeKube:
    kube = FakeKube()
    for node in nodes:
        kube.show(NODES, node)
    return kube


def approved(kube: FakeKube) -> list[KubeObject]:
    return [body for method, path, body in kube.requests if (method, path) == ("PUT", f"{CSRS}/csr-1/approval")]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def running(kube: FakeKube, status_file: Path) -> tuple[threading.Thread, threading.Event]:
    stop = threading.Event()
    approver = Approver(kube, status_file)
    thread = threading.Thread(target=approver.run, args=(stop,), daemon=True)
    thread.start()
    return thread, stop


def test_the_loop_approves_reports_and_outlives_an_absent_api_server(tmp_path: Path) -> None:
    status_file = tmp_path / "status"
    kube = cluster()
    kube.unanswered = 2
    kube.show(CSRS, csr())
    thread, stop = running(kube, status_file)
    try:
        wait_until(lambda: status_file.exists() and json.loads(status_file.read_text())["left_alone"] != [])
        assert json.loads(status_file.read_text())["left_alone"] == [
            {"name": "csr-1", "why": "there is no Node 'wasm-1'"}
        ]
        kube.show(NODES, NODE)
        wait_until(lambda: bool(approved(kube)))
        (condition,) = approved(kube)[0]["status"]["conditions"]
        assert (condition["type"], condition["status"]) == ("Approved", "True")
        wait_until(lambda: json.loads(status_file.read_text())["approved"] == 1)
        kube.show(CSRS, csr(request(organizations=("system:masters",))))
        wait_until(lambda: json.loads(status_file.read_text())["left_alone"] != [])
        assert len(approved(kube)) == 1
        kube.remove(f"{CSRS}/csr-1")
        wait_until(lambda: json.loads(status_file.read_text())["left_alone"] == [])
        assert status_file.stat().st_mode & 0o777 == 0o600
    finally:
        stop.set()
        thread.join(5)
    assert not thread.is_alive()


RANGES = "/apis/networking.k8s.io/v1/servicecidrs"
SERVICES = "/api/v1/namespaces/default/services"


def test_the_addresses_of_services_api_servers_and_other_nodes_are_asked_of_the_cluster() -> None:
    other = {**copy.deepcopy(NODE), "metadata": {"name": "wasm-2"}}

    def asked_at(server: str) -> Facts:
        kube = FakeKube(server)
        kube.show(RANGES, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00::/108"]}})
        kube.show(SERVICES, {"metadata": {"name": "kubernetes"}, "spec": {"clusterIPs": ["10.96.0.1"]}})
        slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
        kube.show(slices, {"metadata": {"name": "kubernetes"}, "endpoints": [{"addresses": ["192.0.2.3"]}]})
        kube.show(NODES, NODE)
        kube.show(NODES, other)
        return gather_facts(kube, "wasm-1")

    facts = asked_at("https://192.0.2.1:6443")
    assert {str(net) for net in facts.service_ranges} == {"10.96.0.0/16", "fd00::/108", "10.96.0.1/32"}
    assert {str(ip) for ip in facts.api_servers} == {"192.0.2.1", "192.0.2.3", "10.96.0.1"}
    assert facts.other_nodes == dict.fromkeys(node_addresses(NODE), "wasm-2")
    assert facts.api_names == frozenset()
    assert asked_at("https://API.example:6443").api_names == {"api.example"}


def test_an_older_clusters_service_range_is_learned_from_the_refusal_of_a_dry_run() -> None:
    def ranges(refusal: str, code: int) -> list[str]:
        kube = FakeKube()
        kube.refusals[f"POST {SERVICES}"] = ApiError(refusal, code=code)
        found = service_ranges(kube)
        assert not kube.requests, "nothing may be created"
        return found

    assert ranges("Service is invalid: spec.clusterIPs: the range of valid IPs is 10.43.0.0/16", 422) == [
        "10.43.0.0/16"
    ]
    assert ranges("Forbidden", 422) == []
    with pytest.raises(ApiError):
        ranges("Forbidden", 403)


def test_a_policy_that_is_missing_or_damaged_approves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    with pytest.raises(StateError, match="missing"):
        read_policy(path)
    path.write_text('{"nodes": []}')
    with pytest.raises(StateError, match="damaged"):
        read_policy(path)
    write_policy(path, policy_data({"wasm-1": ["127.0.0.1"]}, only_known=True, service_ranges=["10.96.0.0/16"]))
    policy, ranges = read_policy(path)
    assert policy == Policy(nodes={"wasm-1": frozenset({ipaddress.ip_address("127.0.0.1")})}, only_known=True)
    assert ranges == {ipaddress.ip_network("10.96.0.0/16")}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_node_that_becomes_known_needs_no_restart_of_the_approver(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    write_policy(policy, policy_data({}, only_known=True, service_ranges=[]))
    kube = cluster(NODE)
    kube.show(CSRS, csr())
    approver = Approver(kube, tmp_path / "status", policy)
    stop = threading.Event()
    thread = threading.Thread(target=approver.run, args=(stop,), daemon=True)
    thread.start()
    try:
        wait_until(
            lambda: "knows no node" in (tmp_path / "status").read_text() if (tmp_path / "status").exists() else False
        )
        assert not approved(kube)
        write_policy(policy, policy_data({"wasm-1": []}, only_known=True, service_ranges=[]))
        wait_until(lambda: bool(approved(kube)))
    finally:
        stop.set()
        thread.join(5)
