"""The host provider on this machine: created, repaired, kept apart from other clusters, and deleted without a trace."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import http.client
import io
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wasilet.cluster import cluster_dns, service_ports
from wasilet.cluster.down import down
from wasilet.cluster.pod_network_step import SERVICES_STEP
from wasilet.cluster.status import status
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.controlplane import pod_network
from wasilet.controlplane.local_registry import login_file
from wasilet.controlplane.pki import CertificateSpec, Pki
from wasilet.errors import ApiError, PortTakenError, StateError, UsageError
from wasilet.kube.client import CSRS, Kube, api_path
from wasilet.kube.credentials import Credentials, read_credentials
from wasilet.oci.artifact import make_artifact
from wasilet.oci.logins import basic_header, logins_for
from wasilet.oci.push import RegistryError, holds, push, reference_named
from wasilet.ports import port_is_free
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Recap, Status

from tests.clusters import TestCluster, temporary_settings, whole_cluster

pytestmark = pytest.mark.component

DNS_SECONDS = 60.0
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "registry", "approver")


@pytest.fixture(scope="module")
def own() -> Iterator[TestCluster]:
    with whole_cluster("repaired") as made:
        yield made


def bring_up(settings: Settings, *, check: bool = False) -> Recap:
    log = io.StringIO()
    recap = up(settings, reporter=PlainReporter(log), check=check)
    assert recap.succeeded, log.getvalue()
    return recap


def changed(recap: Recap) -> list[str]:
    return [o.name for o in recap.outcomes if o.status is Status.CHANGED]


@contextlib.contextmanager
def client(credentials: Credentials) -> Iterator[Kube]:
    kube = Kube(credentials)
    try:
        yield kube
    finally:
        kube.close()


@contextlib.contextmanager
def approver_of(made: TestCluster) -> Iterator[Kube]:
    with client(read_credentials(made.cluster.state.etc / "approver.conf")) as kube:
        yield kube


def pids(settings: Settings) -> dict[str, int | None]:
    data = status(settings)
    return {entry["name"]: entry["pid"] for entry in [*data["components"], *data["nodes"]]}


def of_the_pod_network(made: TestCluster) -> tuple[str, ...]:
    """The components that are there on machines that allow it."""
    return (
        ()
        if pod_network.plan_of(made.cluster.state) is None
        else (pod_network.PROXY, service_ports.COMPONENT, cluster_dns.COMPONENT)
    )


def dns_is_there(made: TestCluster) -> bool:
    return cluster_dns.has_binaries(made.settings)


def wait_for_dns(made: TestCluster) -> None:
    """Where it has not to be built first."""
    if of_the_pod_network(made) and dns_is_there(made):
        wait_until_ready(made, cluster_dns.COMPONENT)


def wait_until_ready(made: TestCluster, component: str) -> None:
    deadline = time.monotonic() + DNS_SECONDS
    while True:
        entries = {entry["name"]: entry for entry in status(made.settings)["components"]}
        if entries[component]["ready"]:
            return
        assert time.monotonic() < deadline, made.cluster.state.log(component).read_text()
        time.sleep(0.2)


def test_a_second_up_changes_nothing(own: TestCluster) -> None:
    before = pids(own.settings)
    recap = bring_up(own.settings)
    assert changed(recap) == []
    assert pids(own.settings) == before


@pytest.mark.parametrize("component", [*COMPONENTS, "node"])
def test_up_repairs_what_was_killed_and_only_that(own: TestCluster, component: str) -> None:
    name = own.cluster.node_names()[0] if component == "node" else component
    before = pids(own.settings)
    victim = before[name]
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    recap = bring_up(own.settings)
    after = pids(own.settings)
    assert after.pop(name) not in {victim, None}
    before.pop(name)
    assert after == before
    assert len([step for step in changed(recap) if step not in {"Ready", SERVICES_STEP}]) == 1
    wait_for_dns(own)
    assert status(own.settings)["ready"]


def test_status_has_the_promised_fields(own: TestCluster) -> None:
    wait_for_dns(own)
    data = json.loads(json.dumps(status(own.settings)))
    assert data["name"] == "repaired"
    assert data["provider"] == "host"
    assert Path(data["kubeconfig"]).is_file()
    assert data["registry"].startswith("localhost:")
    assert {c["name"] for c in data["components"]} == {*COMPONENTS, *of_the_pod_network(own)}
    for entry in data["components"]:
        # CoreDNS is built in the background where it has to be.
        assert entry["ready"] is True or (entry["name"] == cluster_dns.COMPONENT and not dns_is_there(own))
        assert psutil.pid_exists(entry["pid"])
        assert Path(entry["log"]).is_file()
    (node,) = data["nodes"]
    assert set(node) >= {"name", "address", "port", "pid", "supervisor_pid", "data_dir", "ready"}
    assert node["ready"] is True
    assert psutil.Process(node["supervisor_pid"]).is_running()
    assert Path(node["data_dir"]).is_dir()


def test_only_the_owner_can_read_what_is_private(own: TestCluster) -> None:
    root = own.cluster.state.path
    assert root.stat().st_mode & 0o077 == 0
    for path in [*root.glob("pki/*.key"), *root.glob("etc/*"), *root.glob("logs/*"), root / "cluster.json"]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_nothing_but_nodes_listens_beyond_loopback(own: TestCluster) -> None:
    """But for what pods reach of this machine, at the one address of its end of the nodes' links."""
    wait_for_dns(own)
    plan, ports = pod_network.plan_of(own.cluster.state), own.cluster.ports()
    inner = {}
    if plan is not None:
        inner[pod_network.PROXY] = {(plan.machine_address, ports["apiserver"])}
        inner[cluster_dns.COMPONENT] = {(plan.machine_address, ports[cluster_dns.DNS_PORT])}
    seen: dict[str, set[tuple[str, int]]] = {}
    for entry in status(own.settings)["components"]:
        process = psutil.Process(entry["pid"])
        for connection in [each for one in (process, *process.children()) for each in one.net_connections("inet")]:
            open_to_all = connection.type == socket.SOCK_DGRAM and len(connection.raddr) == 0
            if connection.status == psutil.CONN_LISTEN or open_to_all:
                seen.setdefault(entry["name"], set()).add((connection.laddr.ip, connection.laddr.port))
    for name, places in seen.items():
        beyond = {place for place in places if place[0] not in {"127.0.0.1", "::ffff:127.0.0.1"}}
        assert beyond <= inner.get(name, set()), name
    assert seen.keys() >= {*COMPONENTS} - {"approver"}


def test_up_waits_for_what_answers_pods(own: TestCluster) -> None:
    if not of_the_pod_network(own) or not dns_is_there(own):
        pytest.skip("no pod network here, or no CoreDNS yet")
    for name in (cluster_dns.COMPONENT, pod_network.PROXY):
        record = own.cluster.state.alive(name)
        assert record is not None
        os.kill(record.process.pid, signal.SIGKILL)
    recap = bring_up(own.settings)
    assert recap.succeeded
    assert SERVICES_STEP in changed(recap)
    ready = {entry["name"]: entry["ready"] for entry in status(own.settings)["components"]}
    assert ready[cluster_dns.COMPONENT]
    assert ready[pod_network.PROXY]


@pytest.mark.parametrize("component", [cluster_dns.COMPONENT, pod_network.PROXY])
def test_what_answers_pods_comes_back_without_an_up_and_ends_with_its_keeper(own: TestCluster, component: str) -> None:
    if not of_the_pod_network(own) or not dns_is_there(own):
        pytest.skip("no pod network here, or no CoreDNS yet")
    wait_until_ready(own, component)
    record = own.cluster.state.alive(component)
    assert record is not None
    keeper = psutil.Process(record.process.pid)
    (first,) = keeper.children()
    first.kill()
    first.wait(10)
    deadline = time.monotonic() + DNS_SECONDS
    while not (running := keeper.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_until_ready(own, component)
    assert own.cluster.state.alive(component) == record
    keeper.kill()
    running[0].wait(10)
    assert bring_up(own.settings).succeeded
    wait_until_ready(own, component)


def test_the_proxy_for_pods_takes_only_pods(own: TestCluster) -> None:
    """Linux takes packets for any of its addresses on any interface, so a neighbour may set a route to that address."""
    plan = pod_network.plan_of(own.cluster.state)
    if plan is None:
        pytest.skip(pod_network.why_absent(own.cluster.state))
    place = (plan.machine_address, own.cluster.ports()["apiserver"])
    context = ssl.create_default_context(cafile=str(Pki(own.cluster.state.pki).certificate("ca")))
    with socket.create_connection(place, timeout=5) as inside:
        assert inside.getsockname()[0] == plan.machine_address
        with context.wrap_socket(inside, server_hostname=plan.machine_address) as secured:
            assert secured.version() == "TLSv1.3"
    with socket.create_connection(place, timeout=5, source_address=("127.0.0.1", 0)) as stranger:
        assert stranger.recv(1) == b""


def test_no_secret_is_in_a_command_line(own: TestCluster) -> None:
    bootstrap = yaml.safe_load(own.cluster.state.bootstrap_file.read_text())
    secret = bootstrap["users"][0]["user"]["token"].partition(".")[2]
    for pid in pids(own.settings).values():
        assert pid is not None
        assert secret not in " ".join(psutil.Process(pid).cmdline())
    for log in own.cluster.state.logs.glob("*.log"):
        assert secret not in log.read_text(errors="replace")


def test_unauthenticated_clients_are_refused(own: TestCluster) -> None:
    credentials = read_credentials(own.admin_kubeconfig)
    from dataclasses import replace

    with client(replace(credentials, certificate=None, key=None)) as anonymous, pytest.raises(ApiError) as caught:
        anonymous.get("/api/v1/namespaces")
    assert caught.value.code == 401


@pytest.mark.parametrize("name", ["controller_manager", "scheduler"])
@pytest.mark.parametrize("path", ["/metrics", "/configz", "/debug/pprof/", "/healthz", "/livez", "/readyz", "/version"])
def test_all_that_the_control_plane_serves_wants_a_credential(own: TestCluster, name: str, path: str) -> None:
    pki = Pki(own.cluster.state.pki)
    context = ssl.create_default_context(cafile=str(pki.certificate("ca")))
    connection = http.client.HTTPSConnection("127.0.0.1", own.cluster.ports()[name], timeout=5, context=context)
    try:
        connection.request("GET", path)
        assert connection.getresponse().status in {401, 403}
    finally:
        connection.close()


def test_who_did_what_is_written_down_without_bodies(own: TestCluster) -> None:
    secret = {"metadata": {"generateName": "audited-"}, "stringData": {"k": "never-in-a-log"}}
    made = own.kube.create(api_path("secrets", namespace="default"), secret)
    path = api_path("secrets", made["metadata"]["name"], namespace="default")
    own.kube.delete(path)
    log = own.cluster.state.logs / "audit.log"
    deadline = time.monotonic() + 40
    while f'"requestURI":"{path}"' not in log.read_text():
        assert time.monotonic() < deadline, "the deletion is not in the audit log"
        time.sleep(0.2)
    assert "never-in-a-log" not in log.read_text()
    assert '"resource":"leases"' not in log.read_text()


def test_who_reads_a_secret_is_written_down_even_where_it_is_a_node(own: TestCluster) -> None:
    """What a stolen node's credential is used for; what nodes read all the time is left out."""
    pki, node = Pki(own.cluster.state.pki), "system:node:audited"
    pki.make([CertificateSpec(name="audited", authority="ca", common_name=node, organizations=("system:nodes",))])
    credentials = read_credentials(own.admin_kubeconfig)
    credentials = replace(credentials, certificate=pki.read_certificate("audited"), key=pki.key("audited").read_bytes())
    secret, pod = (api_path(kind, "of-another", namespace="default") for kind in ("secrets", "pods"))
    with client(credentials) as kube:
        for path in (pod, secret):
            with pytest.raises(ApiError, match=r"403|404|forbidden|not found"):
                kube.get(path)
    log = own.cluster.state.logs / "audit.log"
    deadline = time.monotonic() + 40
    while not (found := [line for line in log.read_text().splitlines() if f'"username":"{node}"' in line]):
        assert time.monotonic() < deadline, "a node's reading of a Secret is not in the audit log"
        time.sleep(0.2)
    assert [json.loads(line)["requestURI"] for line in found] == [secret]


def test_etcd_wants_a_client_certificate_of_its_own_authority(own: TestCluster) -> None:
    pki = Pki(own.cluster.state.pki)
    port = own.cluster.ports()["etcd"]
    context = ssl.create_default_context(cafile=str(pki.certificate("etcd-ca")))
    context.load_cert_chain(pki.certificate("admin"), pki.key("admin"))
    answer = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError), socket.create_connection(("127.0.0.1", port), 5) as raw:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
            tls.sendall(b"GET /health HTTP/1.1\r\nHost: etcd\r\n\r\n")
            answer = tls.recv(100)
    assert answer == b"", "etcd answered a foreign certificate"


def test_the_approver_may_do_nothing_else(own: TestCluster) -> None:
    with approver_of(own) as approver:
        assert approver.get(CSRS)["items"]
        assert approver.get(api_path("nodes", own.cluster.node_names()[0]))
    forbidden = [
        ("GET", api_path("secrets"), None),
        ("GET", api_path("pods"), None),
        ("GET", api_path("services", namespace="default"), None),
        ("DELETE", api_path("nodes", own.cluster.node_names()[0]), None),
        ("POST", api_path("namespaces"), {"metadata": {"name": "mine"}}),
    ]
    for verb, path, body in forbidden:
        with approver_of(own) as approver, pytest.raises(ApiError) as caught:
            approver.request(verb, path, body=body)
        assert caught.value.code == 403, (verb, path)


def test_the_approver_may_not_approve_for_another_signer(own: TestCluster) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mallory")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    csr = own.kube.create(
        CSRS,
        {
            "metadata": {"generateName": "other-signer-"},
            "spec": {
                "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
                "signerName": "kubernetes.io/kube-apiserver-client",
                "usages": ["client auth"],
            },
        },
    )
    condition = {"type": "Approved", "status": "True", "reason": "No", "message": "no"}
    with approver_of(own) as approver, pytest.raises(ApiError) as caught:
        approver.replace(f"{CSRS}/{csr['metadata']['name']}/approval", csr | {"status": {"conditions": [condition]}})
    assert caught.value.code == 403
    own.kube.delete(f"{CSRS}/{csr['metadata']['name']}")


def test_a_pod_may_not_reach_the_registry_by_another_name_than_the_one_told(own: TestCluster) -> None:
    registry = status(own.settings)["registry"]
    host, _, port = registry.partition(":")
    assert host == "localhost"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as connection:
        connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 401 " in connection.recv(200)


def test_the_registry_wants_a_login_that_only_its_owner_can_read_and_deletes_nothing(own: TestCluster) -> None:
    registry = str(status(own.settings)["registry"])
    module = own.cluster.state.path / "hello.wasm"
    module.write_bytes(b"\0asm\x01\x00\x00\x00")
    artifact = make_artifact(module, environ={})
    reference = reference_named(f"{registry}/guarded/hello:v1")
    with pytest.raises(RegistryError, match="wants a login for guarded/hello, and there is none"):
        push(artifact, reference, environ={"HOME": str(own.cluster.state.path), "WASILET_STATE_HOME": "/nonexistent"})
    pushed = push(artifact, reference, environ=own.settings.environ)
    assert holds(artifact, reference, environ=own.settings.environ)
    assert not holds(artifact, reference, environ={"HOME": "/nonexistent", "WASILET_STATE_HOME": "/nonexistent"})
    folder = login_file(own.cluster.state).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    login = logins_for(reference, own.settings.environ)[0]
    host, _, port = registry.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    path = f"/v2/guarded/hello/manifests/{pushed.digest}"
    connection.request("DELETE", path, headers={"Authorization": basic_header(login)})
    assert connection.getresponse().status == 405
    connection.close()
    assert login.password not in " ".join(
        Path(f"/proc/{record.process.pid}/cmdline").read_text() for record in own.cluster.state.records()
    )


def test_clusters_live_side_by_side_and_one_goes_without_the_other(own: TestCluster) -> None:
    environ = dict(own.settings.environ)
    from wasilet.settings import load

    other = load(environ=environ, name="beside", kubeconfig=own.settings.kubeconfig)
    before = pids(own.settings)
    try:
        bring_up(other)
        ours, theirs = (set(State.of(s).read()["ports"].values()) for s in (own.settings, other))
        assert not ours & theirs
        contexts = yaml.safe_load(Path(str(own.settings.kubeconfig)).read_text())["contexts"]
        assert {c["name"] for c in contexts} == {"wasilet-repaired", "wasilet-beside"}
    finally:
        assert down(other, reporter=PlainReporter(io.StringIO()), purge=True).succeeded
    assert pids(own.settings) == before
    assert status(own.settings)["ready"]
    data = yaml.safe_load(Path(str(own.settings.kubeconfig)).read_text())
    assert [c["name"] for c in data["contexts"]] == ["wasilet-repaired"]
    assert data["current-context"] == "wasilet-repaired"
    assert all(port_is_free(port) for port in theirs)


def test_a_second_up_waits_and_says_who_holds_the_lock(own: TestCluster) -> None:
    lock = own.cluster.state.path / "lock"
    log = io.StringIO()
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(b"pid 4711 (invoke up)\n")
        held.flush()
        result: list[Recap] = []
        thread = threading.Thread(target=lambda: result.append(up(own.settings, reporter=PlainReporter(log))))
        thread.start()
        deadline = time.monotonic() + 10
        while not log.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert log.getvalue().startswith("waiting for pid 4711 (invoke up), which works on cluster")
        assert not result
        fcntl.flock(held, fcntl.LOCK_UN)
        thread.join(30)
    assert result[0].succeeded


def test_another_node_joins_and_stays_by_an_approver_that_outlived_the_api_server(own: TestCluster) -> None:
    from dataclasses import replace

    approver = pids(own.settings)["approver"]
    victim = pids(own.settings)["kube-apiserver"]
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    bring_up(replace(own.settings, nodes=2))
    data = status(own.settings)
    assert [node["ready"] for node in data["nodes"]] == [True, True]
    assert pids(own.settings)["approver"] == approver
    pairs = [Path(node["data_dir"]) / "pki" / "serving.pem" for node in data["nodes"]]
    deadline = time.monotonic() + 20
    while not all(pair.is_file() for pair in pairs):
        assert time.monotonic() < deadline, "the second node's serving certificate was not approved"
        time.sleep(0.05)
    assert changed(bring_up(own.settings)) == [], "`up` without --nodes keeps what is there"


def test_up_of_another_provider_is_refused(own: TestCluster) -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match="is of provider 'host'"):
        up(replace(own.settings, provider="kind"), reporter=PlainReporter(io.StringIO()))


def test_check_on_a_bare_machine_changes_nothing() -> None:
    with temporary_settings("unborn") as settings:
        recap = bring_up(settings, check=True)
        assert recap.check
        assert "API server" in changed(recap)
        assert not State.of(settings).path.exists()
        assert not Path(str(settings.kubeconfig)).exists()


def test_a_wanted_port_that_is_taken_is_named_with_its_holder() -> None:
    with socket.socket() as taken, temporary_settings("taken") as settings:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        from dataclasses import replace

        wanted = replace(settings, ports=replace(settings.ports, apiserver=port))
        recap = up(wanted, reporter=PlainReporter(io.StringIO()))
        (failure,) = recap.failures
        assert isinstance(failure.error, PortTakenError)
        assert str(port) in failure.detail
        assert f"pid {os.getpid()}" in failure.detail
        assert not State.of(settings).path.exists(), "nothing half-made"


def test_a_first_up_without_binaries_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from wasilet.controlplane.acquire import AcquireError

    def nowhere(*_: object, **__: object) -> None:
        raise AcquireError("can be had from nowhere")

    monkeypatch.setattr("wasilet.controlplane.acquire.acquire", nowhere)
    with temporary_settings("bare") as made:
        environ = {k: v for k, v in made.environ.items() if k != "KUBEBUILDER_ASSETS"}
        environ |= {"WASILET_CACHE": str(tmp_path / "cache"), "PATH": str(tmp_path)}
        recap = up(replace(made, environ=environ), reporter=PlainReporter(io.StringIO()))
        assert [o.name for o in recap.failures] == ["binaries"]
        assert not State.of(made).path.exists()


@pytest.mark.parametrize("what", ["kubeconfig", "disk"])
def test_what_would_fail_half_way_is_refused_before_anything_is_made(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    with temporary_settings("refused") as made:
        settings = made
        if what == "kubeconfig":
            damaged = tmp_path / "config"
            damaged.write_text("clusters: 7\n")
            settings = replace(made, kubeconfig=damaged)
        else:
            monkeypatch.setattr("wasilet.cluster.up.NEEDED_BYTES", 1 << 62)
        with pytest.raises(StateError, match="is no kubeconfig" if what == "kubeconfig" else r"only \d+ MB are free"):
            up(settings, reporter=PlainReporter(io.StringIO()))
        assert not State.of(settings).path.exists()


def test_up_after_being_killed_anywhere_recovers_and_down_leaves_nothing(tmp_path: Path) -> None:
    with temporary_settings("killed") as settings:
        script = tmp_path / "up.py"
        script.write_text(
            "import sys, os, io\n"
            "from wasilet.console import PlainReporter\n"
            "from wasilet.settings import load\n"
            "from wasilet.cluster.up import up\n"
            f"up(load(environ=os.environ, name='killed', kubeconfig={str(settings.kubeconfig)!r}),"
            " reporter=PlainReporter(sys.stderr))\n"
        )
        for seconds in (0.35, 0.9, 2.5):
            process = subprocess.Popen(
                [sys.executable, "-P", script], env=dict(settings.environ), stderr=subprocess.DEVNULL, cwd="/"
            )
            time.sleep(seconds)
            process.kill()
            process.wait()
        recap = bring_up(settings)
        assert recap.succeeded
        state = State.of(settings)
        ours = state.stray_processes()
        by_name: dict[str, list[int]] = {}
        for record in ours:
            running = psutil.Process(record.pid)
            argv = running.cmdline()
            if _is_fork_of(running.parent(), running, {record.pid for record in ours}):
                continue
            # A keeper by what it keeps.
            words = argv[argv.index("-m") + 1 :] if "-m" in argv else [Path(argv[0]).name]
            name = " ".join(words[:2] if words[0] == "wasilet_common.keeper" else words[:1])
            by_name.setdefault(name, []).append(record.pid)
        twins = {name: found for name, found in by_name.items() if len(found) > 1}
        assert not twins, "a killed run's process was started a second time"
        ports = state.read()["ports"].values()
        assert down(settings, reporter=PlainReporter(io.StringIO()), purge=True).succeeded
        assert not [record for record in ours if psutil.pid_exists(record.pid) and _alive(record.pid)]
        assert all(port_is_free(port) for port in ports)
        assert not state.path.exists()
        assert not Path(str(settings.kubeconfig)).exists()


def _is_fork_of(parent: psutil.Process | None, process: psutil.Process, ours: set[int]) -> bool:
    """A zygote and the sandboxes made ahead of time are children of their supervisor, whose command line they have. A
    second supervisor, or any other process that was started twice, is no one's child here."""
    return parent is not None and parent.pid in ours and parent.cmdline() == process.cmdline()


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_what_a_cluster_kept_is_there_again_after_down_and_up() -> None:
    with whole_cluster("again") as made:
        made.kube.create(
            api_path("configmaps", namespace="default"), {"metadata": {"name": "kept"}, "data": {"a": "b"}}
        )
        assert down(made.settings, reporter=PlainReporter(io.StringIO())).succeeded
        assert not Path(str(made.settings.kubeconfig)).exists()
        data: dict[str, Any] = status(made.settings)
        assert not data["ready"]
        bring_up(made.settings)
        kept = made.kube.get(api_path("configmaps", "kept", namespace="default"))
        assert kept["data"] == {"a": "b"}


def test_down_of_an_unknown_cluster_says_so() -> None:
    with temporary_settings("nowhere") as settings, pytest.raises(UsageError, match="no cluster 'nowhere'"):
        down(settings, reporter=PlainReporter(io.StringIO()))
