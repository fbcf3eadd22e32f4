"""Stand-ins for what surrounds the kubelet API server, and certificates to call it with."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wasilet_node.kube.base import KubeObject
from wasilet_node.network.attachment import MachineNetwork
from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerState,
    ContainerStatus,
    ContainerUsage,
    ExecResult,
    Resources,
    RuntimeCapabilities,
    StreamFrame,
)
from wasilet_node.server.app import KubeletServer
from wasilet_node.settings import NodePaths, NodeSettings

from tests.unit.node.fake_kube import FakeKube


@dataclass(frozen=True)
class Pair:
    """A certificate and its key in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority for one test."""

    def __init__(self, name: str = "test-ca", *, existing: Pair | None = None) -> None:
        """A new authority, or that of a cluster."""
        if existing is not None:
            key = serialization.load_pem_private_key(existing.key, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._key = key
            self.key_pem = existing.key
            self._name = x509.load_pem_x509_certificate(existing.certificate).subject
            self.pem = existing.certificate
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key.public_key(), timedelta(days=1))
        certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.key_pem = _key_pem(self._key)

    def issue(
        self,
        common_name: str,
        *,
        organizations: Sequence[str] = (),
        addresses: Sequence[str] = (),
        names: Sequence[str] = (),
        server: bool = False,
        lifetime: timedelta = timedelta(hours=1),
    ) -> Pair:
        """A leaf of this authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in organizations),
                x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            ]
        )
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(subject, self._name, key.public_key(), lifetime).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if addresses or names:
            alternatives: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
            alternatives += [x509.DNSName(each) for each in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + lifetime)
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def client_context(trusted: bytes, pair: Pair | None = None) -> ssl.SSLContext:
    """What an API server's or a user's TLS looks like."""
    context = ssl.create_default_context(cadata=trusted.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = False
    if pair is not None:
        with tempfile.NamedTemporaryFile(dir="/tmp") as file:
            file.write(pair.certificate + pair.key)
            file.flush()
            context.load_cert_chain(file.name)
    return context


@dataclass
class ReviewKube(FakeKube):
    """An API server that knows tokens and grants; counts what it is asked."""

    tokens: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    grants: set[tuple[str, str, str]] = field(default_factory=set)
    """(user, verb, subresource)."""

    error: Exception | None = None
    asked: list[KubeObject] = field(default_factory=list)

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        self.asked.append(body)
        if self.error is not None:
            raise self.error
        if path.endswith("/tokenreviews"):
            user = self.tokens.get(body["spec"]["token"])
            return {"status": {"authenticated": True, "user": user} if user is not None else {"authenticated": False}}
        attributes = body["spec"]["resourceAttributes"]
        grant = (body["spec"]["user"], attributes["verb"], attributes["subresource"])
        return {"status": {"allowed": grant in self.grants}}


@dataclass
class FakePods:
    """Pods by (namespace, name)."""

    known: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    synced: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.synced.set()

    def pods(self) -> list[dict[str, Any]]:
        return list(self.known.values())

    def pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.known.get((namespace, name))

    def add(self, pod: dict[str, Any]) -> dict[str, Any]:
        self.known[pod["metadata"]["namespace"], pod["metadata"]["name"]] = pod
        return pod


class FakeGuest:
    """A guest that does what its first argument says."""

    def __init__(self, container_id: str, argv: tuple[str, ...], *, stdin: bool) -> None:
        self.container_id = container_id
        self.argv = argv
        self.stdin = stdin
        self.exit_code: int | None = None
        self.error = ""
        self.closed = asyncio.Event()
        self._frames: asyncio.Queue[StreamFrame | None] = asyncio.Queue()
        self._lines = b""

    def behave(self) -> None:
        """echo, fail <code>, trap, big <MiB>, cat, hang."""
        match self.argv:
            case ("echo", *words):
                self.say("stdout", " ".join(words).encode() + b"\n")
                self.say("stderr", b"done\n")
                self.end(0)
            case ("fail", code):
                self.end(int(code))
            case ("trap",):
                self.end(134, "wasm trap: unreachable")
            case ("big", size):
                for _ in range(int(size) * 16):
                    self.say("stdout", b"x" * 65536)
                self.end(0)
            case ("attach",):
                self.say("stdout", b"from now on\n")
                self.end(3)

    def say(self, stream: str, data: bytes) -> None:
        self._frames.put_nowait(StreamFrame(stream=stream, data=data))

    def end(self, code: int | None, error: str = "") -> None:
        self.exit_code, self.error = code, error
        self._frames.put_nowait(None)

    async def frames(self) -> AsyncIterator[StreamFrame]:
        while (frame := await self._frames.get()) is not None:
            yield frame

    async def write_stdin(self, data: bytes) -> None:
        self._lines += data
        self.say("stdout", b"[" + data + b"]")

    async def close_stdin(self) -> None:
        self.say("stdout", b"eof after %d\n" % len(self._lines))
        self.end(0)

    async def interrupt(self) -> None:
        self.end(130)

    async def close(self) -> None:
        self.closed.set()


@dataclass
class FakeRuntime:
    """A runtime that runs nothing."""

    statuses: list[ContainerStatus] = field(default_factory=list)
    usages: list[ContainerUsage] = field(default_factory=list)
    error: Exception | None = None
    start_error: Exception | None = None
    guest: FakeGuest | None = None
    capabilities: RuntimeCapabilities = field(
        default_factory=lambda: RuntimeCapabilities(cpu_limits=True, memory_cgroup=True, wasmtime_version="1")
    )

    async def start(self, config: ContainerConfig) -> ContainerStatus:
        raise NotImplementedError

    async def stop(
        self, container_id: str, *, timeout_seconds: float = 10.0, grace_seconds: float = 0.0
    ) -> ContainerStatus | None:
        raise NotImplementedError

    async def resize(
        self, container_id: str, resources: Resources, *, annotations: Mapping[str, str]
    ) -> ContainerStatus:
        raise NotImplementedError

    async def list(self) -> Sequence[ContainerStatus]:
        if self.error is not None:
            raise self.error
        return self.statuses

    async def remove(self, container_id: str) -> None:
        raise NotImplementedError

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        timeout_seconds: float,
        max_output_bytes: int = 16 * 1024,
        stdin: bytes = b"",
    ) -> ExecResult:
        raise NotImplementedError

    async def usage(self) -> Sequence[ContainerUsage]:
        if self.error is not None:
            raise self.error
        return self.usages

    def events(self) -> AsyncIterator[ContainerStatus]:
        raise NotImplementedError

    async def exec_stream(self, container_id: str, argv: Sequence[str], *, stdin: bool = False) -> FakeGuest:
        if self.start_error is not None:
            raise self.start_error
        self.guest = FakeGuest(container_id, tuple(argv), stdin=stdin)
        self.guest.behave()
        return self.guest

    async def attach(self, container_id: str, *, stdin: bool = False) -> FakeGuest:
        if not stdin:
            return await self.exec_stream(container_id, ("attach",))
        return await self.exec_stream(container_id, ("cat",), stdin=True)


def make_settings(folder: Path, *, port: int = 0, node_name: str = "wasm-1") -> NodeSettings:
    """Settings of a node that listens on loopback."""
    return NodeSettings(node_name=node_name, paths=NodePaths(data=folder), bind_address="127.0.0.1", port=port)


def make_pod(
    name: str = "web", *, container: str = "main", state: dict[str, Any] | None = None, **status: Any
) -> dict[str, Any]:
    """A pod of one container."""
    return {
        "metadata": {"namespace": "default", "name": name, "uid": f"uid-{name}"},
        "spec": {"containers": [{"name": container, "image": "example/hello:v1"}]},
        "status": {
            "phase": "Running",
            "containerStatuses": [
                {
                    "name": container,
                    "restartCount": 0,
                    "containerID": "wasmtime://a0",
                    "state": state if state is not None else {"running": {"startedAt": "2025-01-01T00:00:00Z"}},
                    "lastState": {},
                    **status,
                }
            ],
        },
    }


def make_status(
    container_id: str = "a0",
    *,
    pod: str = "web",
    uid: str = "",
    attempt: int = 0,
    state: ContainerState = ContainerState.RUNNING,
) -> ContainerStatus:
    """What the runtime says of the container of ``make_pod``."""
    return ContainerStatus(
        id=container_id,
        pod_uid=uid or f"uid-{pod}",
        pod_namespace="default",
        pod_name=pod,
        container_name="main",
        attempt=attempt,
        image="example/hello:v1",
        image_id="sha256:0",
        log_path="/none",
        state=state,
        pid=os.getpid(),
        started_at_ns=time.time_ns() - 10_000_000_000,
    )


def log_folder(root: Path, pod: Mapping[str, Any], container: str = "main") -> Path:
    """The folder of a container's logs, made."""
    metadata = pod["metadata"]
    folder = root / "pods" / f"{metadata['namespace']}_{metadata['name']}_{metadata['uid']}" / container
    folder.mkdir(parents=True, exist_ok=True)
    return folder


API_SERVER = "kube-apiserver-kubelet-client"
NOT_YET = "the node agent has just started and does not know its pods yet: try again"
LIMIT = 8
"""Of connections of a rig's server."""


class SwitchedNetworks(MachineNetwork):
    """What ``inner`` says, which a test may change."""

    def __init__(self) -> None:
        self.inner = MachineNetwork()

    def addresses(self, pod: Any) -> tuple[str, ...] | None:
        return self.inner.addresses(pod)

    async def connect_inside(self, pod: Any, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.inner.connect_inside(pod, port)


class Rig:
    """A server, its surroundings, and a way to call it."""

    def __init__(self, folder: Path, *, max_connections: int = LIMIT) -> None:
        self.authority = Authority()
        self.kube = ReviewKube()
        self.pods = FakePods()
        self.runtime = FakeRuntime()
        self.log_root = folder
        self.networks = SwitchedNetworks()
        self.serving = self.authority.issue("system:node:wasm-1", addresses=["127.0.0.1"], server=True)
        self.server = KubeletServer(
            settings=make_settings(folder),
            kube=self.kube,
            pods=self.pods,
            runtime=self.runtime,
            log_root=folder,
            client_ca_pem=self.authority.pem,
            max_connections=max_connections,
            networks=self.networks,
        )
        for subresource in ("proxy", "pods", "healthz", "configz", "stats", "metrics", "log"):
            self.kube.grants.add((API_SERVER, "get", subresource))
            self.kube.grants.add((API_SERVER, "create", subresource))
        self.client = self.authority.issue(API_SERVER, organizations=["kubeadm:cluster-admins"])

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.server.port}{path}"

    def tls(self, pair: Pair | None) -> ssl.SSLContext:
        return client_context(self.authority.pem, pair)

    async def get(
        self, path: str, *, pair: Pair | None = None, anonymous: bool = False, token: str = "", method: str = "GET"
    ) -> tuple[int, str]:
        context = self.tls(None if anonymous or token else pair or self.client)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url(path), ssl=context, headers=headers) as response,
        ):
            return response.status, await response.text()


@asynccontextmanager
async def running(folder: Path, *, max_connections: int = LIMIT) -> AsyncIterator[Rig]:
    """A rig whose server listens."""
    rig = Rig(folder, max_connections=max_connections)
    rig.server.set_certificate(rig.serving.certificate, rig.serving.key)
    task = asyncio.create_task(rig.server.run())
    try:
        async with asyncio.timeout(5):
            await rig.server.wait_listening()
        yield rig
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
