"""A node agent joins a real API server with RBAC, the Node authorizer and NodeRestriction, by its bootstrap file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from wasilet.cluster.approver import examine
from wasilet.cluster.approver_facts import policy_data, write_policy
from wasilet.kube.bootstrap_token import bootstrap_config, create_token, write_bootstrap_file
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet_node import instance
from wasilet_node.certificates import Certificates
from wasilet_node.certificates_store import NodeNames, Pair, load_pair
from wasilet_node.instance import AgentRecord
from wasilet_node.kube.base import ApiStatusError, ForbiddenError
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.events import KubeEventRecorder
from wasilet_node.lease import LeaseKeeper
from wasilet_node.registration import Registration
from wasilet_node.settings import NodePaths, NodeSettings

from tests.clusters import TestCluster

pytestmark = pytest.mark.component

ROOT = Path(__file__).resolve().parents[2]
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


@pytest.fixture(scope="module")
def bootstrap(control_plane_cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    access = control_plane_cluster.access
    path = tmp_path_factory.mktemp("join") / "bootstrap.conf"
    token = create_token(control_plane_cluster.kube, ttl_seconds=3600)
    config = bootstrap_config(server=access.server, ca=access.ca, client_ca=access.client_ca, token=token)
    write_bootstrap_file(path, config)
    return path


class AgentProcess:
    """An agent as users start it, in a folder of its own."""

    def __init__(self, data: Path, name: str, bootstrap: Path | None) -> None:
        self.data = data
        self.name = name
        self.log = data.parent / f"{name}.log"
        self._bootstrap = bootstrap
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "wasilet_node", "--data-dir", str(self.data), "--node-name", self.name]
        command += ["--node-ip", "127.0.0.1", "--port", "0", *arguments]
        if self._bootstrap is not None:
            command += ["--bootstrap-file", str(self._bootstrap)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", env=environment())

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(timeout=20)

    @property
    def record(self) -> AgentRecord:
        record: AgentRecord = until(lambda: instance.read(self.data), what="agent.json")
        return record

    @property
    def listening(self) -> AgentRecord:
        until(lambda: self.record.port, what="port in agent.json")
        return self.record

    def shutdown(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "wasilet_node", "shutdown", "--data-dir", str(self.data)],
            capture_output=True, text=True, timeout=30, check=False, cwd="/", env=environment(),
        )  # fmt: skip

    def end(self) -> None:
        self.shutdown()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(timeout=10)


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def agents(short_folder: Path, kube: Kube) -> Iterator[Callable[[str, Path | None], AgentProcess]]:
    made: list[AgentProcess] = []

    def make(name: str, bootstrap: Path | None) -> AgentProcess:
        made.append(AgentProcess(short_folder / name, name, bootstrap))
        return made[-1]

    try:
        yield make
    finally:
        for agent in made:
            agent.end()
            kube.delete(api_path("nodes", agent.name))


def until(condition: Callable[[], Any], *, what: str, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)
    return found


async def until_async(condition: Callable[[], Any], *, what: str, seconds: float = 20.0) -> Any:
    """The same, in a thread: this process's own tasks go on meanwhile."""
    return await asyncio.to_thread(until, condition, what=what, seconds=seconds)


def ready(kube: Kube, name: str) -> KubeObject | None:
    node = kube.find(api_path("nodes", name))
    conditions = (node or {}).get("status", {}).get("conditions", [])
    return node if any(each["type"] == "Ready" and each["status"] == "True" for each in conditions) else None


def requests_of(kube: Kube, name: str, signer: str) -> list[KubeObject]:
    """The node's own requests and those made for it with the token, oldest first."""
    found = []
    for csr in kube.get(CSRS)["items"]:
        request = x509.load_pem_x509_csr(base64.b64decode(csr["spec"]["request"]))
        if csr["spec"]["signerName"].endswith(signer) and f"CN=system:node:{name}," in request.subject.rfc4514_string():
            found.append(csr)
    return sorted(
        found, key=lambda csr: (csr["metadata"]["creationTimestamp"], int(csr["metadata"]["resourceVersion"]))
    )


def serving_issuer(record: AgentRecord) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = socket.create_connection((record.address, record.port), timeout=5)
    with connection, context.wrap_socket(connection) as tls:
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).issuer.rfc4514_string()


def test_a_node_joins_serves_and_survives_what_happens_to_nodes(
    agents: Callable[[str, Path | None], AgentProcess], kube: Kube, bootstrap: Path
) -> None:
    agent = agents("join-1", bootstrap)
    agent.start("--taint", "kubernetes.io/arch=wasm32-wasi:NoSchedule", "--node-labels", "team=wasm")

    # Ready comes before anybody approved the serving certificate.
    node = until(lambda: ready(kube, "join-1"), what="Ready node")
    assert node["metadata"]["labels"]["kubernetes.io/arch"] == "wasm32-wasi"
    assert node["metadata"]["labels"]["team"] == "wasm"
    assert {"key": "kubernetes.io/arch", "value": "wasm32-wasi", "effect": "NoSchedule"} in node["spec"]["taints"]
    record = agent.listening
    assert node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] == record.port
    assert serving_issuer(record) == "CN=join-1 (self-signed)"

    (serving,) = until(lambda: requests_of(kube, "join-1", "kubelet-serving"), what="serving request")
    assert serving["spec"]["username"] == "system:node:join-1"
    lie = examine(kube, serving)
    assert not lie.approve, "loopback is every machine's"
    assert "loopback" in lie.why
    policy = agent.data.parent / "policy.json"
    write_policy(policy, policy_data({"join-1": ["127.0.0.1"]}, only_known=True, service_ranges=[]))
    verdict = examine(kube, serving, policy)
    assert verdict.approve, verdict
    until(lambda: "self-signed" not in serving_issuer(record), what="the cluster's certificate on new connections")

    lease = until(lambda: kube.find(f"{LEASES}/join-1"), what="lease")
    assert [each["uid"] for each in lease["metadata"]["ownerReferences"]] == [node["metadata"]["uid"]]

    # A deleted Node is made again, with its labels and taints.
    kube.delete(api_path("nodes", "join-1"))
    again = until(lambda: ready(kube, "join-1"), what="Node made again")
    assert again["metadata"]["uid"] != node["metadata"]["uid"]
    assert {"key": "kubernetes.io/arch", "value": "wasm32-wasi", "effect": "NoSchedule"} in again["spec"]["taints"]

    # The agent's end is not the supervisor's, and the next agent asks for no certificate.
    supervisor = (agent.data / "supervisor.json").read_bytes()
    agent.send(signal.SIGTERM)
    assert agent.wait() == 0
    assert instance.read(agent.data) is None
    count = len(kube.get(CSRS)["items"])
    agent.start()
    until(lambda: "brought it up to date" in agent.log.read_text(), what="the Node found")
    assert (agent.data / "supervisor.json").read_bytes() == supervisor
    assert len(kube.get(CSRS)["items"]) == count
    assert "self-signed" not in serving_issuer(agent.listening)

    # Only the explicit request ends the supervisor too.
    done = agent.shutdown()
    assert done.returncode == 0, done.stderr
    assert agent.wait() == 0
    assert not (agent.data / "supervisor.json").exists()


def test_a_killed_agent_starts_again(
    agents: Callable[[str, Path | None], AgentProcess], kube: Kube, bootstrap: Path
) -> None:
    agent = agents("join-2", bootstrap)
    agent.start()
    until(lambda: ready(kube, "join-2"), what="Ready node")
    agent.send(signal.SIGKILL)
    agent.wait()
    agent.start()
    until(lambda: "brought it up to date" in agent.log.read_text(), what="the Node found")


def test_a_token_that_is_not_known_is_explained(
    agents: Callable[[str, Path | None], AgentProcess], bootstrap: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.conf"
    wrong.touch(mode=0o600)
    text = bootstrap.read_text()
    import yaml

    document = yaml.safe_load(text)
    document["users"][0]["user"]["token"] = "abcdef.0123456789abcdef"
    wrong.write_text(yaml.safe_dump(document))
    agent = agents("join-3", wrong)
    agent.start()
    deadline = time.monotonic() + 40
    while (code := agent._process.poll() if agent._process else None) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert code == 1
    last = agent.log.read_text().splitlines()[-1]
    assert f"does not accept the token in {wrong}" in last
    assert "Traceback" not in agent.log.read_text()


def test_a_foreign_node_is_not_taken_over(
    agents: Callable[[str, Path | None], AgentProcess], kube: Kube, bootstrap: Path
) -> None:
    kube.create(api_path("nodes"), {"metadata": {"name": "join-4"}})
    kube.patch(
        api_path("nodes", "join-4") + "/status",
        {"status": {"nodeInfo": {"architecture": "amd64", "containerRuntimeVersion": "containerd://1.7.1"}}},
    )
    agent = agents("join-4", bootstrap)
    agent.start()
    assert agent.wait() == 1
    assert "runs containerd://1.7.1; choose another name with --node-name" in agent.log.read_text()
    assert "Traceback" not in agent.log.read_text()


def certificates(data: Path, name: str, bootstrap: Path, **more: Any) -> Certificates:
    return Certificates(
        node_name=name,
        pki=data / "pki",
        kubeconfig=data / "kubeconfig",
        bootstrap_file=bootstrap,
        user_agent="test",
        **more,
    )


@contextlib.asynccontextmanager
async def background(*parts: Any) -> Any:
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes


async def test_a_client_certificate_renews_itself_with_its_own_rights(
    kube: Kube, bootstrap: Path, tmp_path: Path
) -> None:
    shares = iter([0.0])
    made = certificates(tmp_path, "join-5", bootstrap, renewal_share=lambda: next(shares, 0.9))
    client = await made.join()
    first = load_pair(made.client_path)
    async with background(made.run(on_serving=lambda _: None)):
        await until_async(lambda: load_pair(made.client_path) != first, what="renewed certificate")
        with pytest.raises(ApiStatusError) as caught:
            await client.get("/api/v1/nodes/join-5")
    assert caught.value.code == 404
    await client.close()
    requests = await asyncio.to_thread(requests_of, kube, "join-5", "kube-apiserver-client-kubelet")
    assert [csr["spec"]["username"].split(":")[1] for csr in requests] == ["bootstrap", "node"]


async def test_a_denied_serving_request_is_reported_and_pods_do_not_wait(
    kube: Kube, bootstrap: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = certificates(tmp_path, "join-6", bootstrap)
    client = await made.join()
    served: list[Pair] = []
    async with background(made.run(on_serving=served.append)):
        made.set_names(NodeNames(dns=frozenset({"join-6"})))

        def requests() -> list[KubeObject]:
            return requests_of(kube, "join-6", "kubelet-serving")

        (body,) = await until_async(requests, what="serving request")
        condition = {"type": "Denied", "status": "True", "reason": "Policy", "message": "not today"}
        body["status"] = {"conditions": [condition]}
        path = f"{CSRS}/{body['metadata']['name']}/approval"
        await asyncio.to_thread(kube.replace, path, body)
        await until_async(lambda: "was denied: Policy: not today" in caplog.text, what="log line")
    assert served == []
    await client.close()


class Counting(KubeClient):
    """Counts the patches of a Node's status."""

    patches = 0

    async def patch(
        self,
        path: str,
        body: KubeObject,
        *,
        content_type: str = "application/strategic-merge-patch+json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        self.patches += path.endswith("/status")
        return await super().patch(path, body, content_type=content_type, timeout_seconds=timeout_seconds)


async def test_a_quiet_node_costs_nothing_and_a_moved_one_keeps_no_old_address(
    kube: Kube, bootstrap: Path, tmp_path: Path
) -> None:
    made = certificates(tmp_path, "join-7", bootstrap)
    joined = await made.join()
    pair = load_pair(made.client_path)
    assert pair is not None
    from wasilet_node.certificates import _credentials

    client = Counting(joined.cluster, _credentials(pair), user_agent="test")
    settings = NodeSettings(node_name="join-7", paths=NodePaths(data=tmp_path), status_interval_seconds=0.05)
    address = "192.0.2.7"

    async def images() -> Sequence[dict[str, object]]:
        return [{"names": ["example.com/a@sha256:" + "0" * 64], "sizeBytes": 1}]

    events = KubeEventRecorder(client, host="join-7")
    registration = Registration(
        kube=client,
        events=events,
        settings=settings,
        server=client.cluster.server,
        port=lambda: 10250,
        hostname="join-7",
        agent_version="0",
        instance_id="a" * 32,
        runtime_version="0",
        problem=lambda: None,
        images=images,
        on_names=lambda _: None,
        on_unauthorized=lambda: None,
        find_address=lambda _: address,
    )
    lease = LeaseKeeper(
        kube=client,
        node_name="join-7",
        node_uid=registration.uid,
        duration_seconds=40,
        renew_interval_seconds=0.1,
        on_unauthorized=lambda: None,
    )
    try:
        await registration.register()
        async with background(registration.run(), lease.run(), events.run()):
            await asyncio.sleep(1.0)
            before = client.patches
            await asyncio.sleep(1.0)
            assert client.patches == before, "the server's copy of a status must compare equal to what was sent"

            address = "192.0.2.8"
            registration.wake()

            def addresses() -> list[str]:
                node = kube.get(api_path("nodes", "join-7"))
                return [each["address"] for each in node["status"]["addresses"]]

            await until_async(lambda: addresses() == ["192.0.2.8", "join-7"], what="new address")
            await events.flush(timeout_seconds=5)

        found = await asyncio.to_thread(
            lambda: kube.get(api_path("events", namespace="default"), fieldSelector="involvedObject.name=join-7")
        )
        reasons = {each["reason"] for each in found["items"] if each["source"].get("component") == "kubelet"}
        assert {"Starting", "NodeReady"} <= reasons
    finally:
        await client.close()
        await joined.close()
        await asyncio.to_thread(kube.delete, api_path("nodes", "join-7"))


async def test_the_node_has_no_more_rights_than_a_node(bootstrap: Path, tmp_path: Path) -> None:
    client = await certificates(tmp_path, "join-8", bootstrap).join()
    try:
        for path in ("/api/v1/nodes", "/api/v1/pods", "/api/v1/secrets", "/api/v1/nodes/other"):
            with pytest.raises(ForbiddenError):
                await client.get(path)
    finally:
        await client.close()
