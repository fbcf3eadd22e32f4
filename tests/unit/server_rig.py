"""Stand-ins for what surrounds the kubelet API server, and certificates to call it with."""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.kube.base import KubeObject, WatchEvent
from node.runtime.protocol import ContainerConfig, ContainerStatus, ContainerUsage, ExecResult
from node.settings import NodePaths, NodeSettings


@dataclass(frozen=True)
class Pair:
    """A certificate and its key in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority for one test."""

    def __init__(self, name: str = "test-ca") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key.public_key(), timedelta(days=1))
        self._certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)
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
class FakeKube:
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

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        raise NotImplementedError

    async def list(
        self,
        path: str,
        *,
        field_selector: str | None = None,
        label_selector: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        raise NotImplementedError

    async def replace(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        raise NotImplementedError

    async def patch(
        self, path: str, body: KubeObject, *, content_type: str = "", timeout_seconds: float = 10.0
    ) -> KubeObject:
        raise NotImplementedError

    async def delete(
        self,
        path: str,
        *,
        grace_period_seconds: int | None = None,
        uid: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        raise NotImplementedError

    def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        raise NotImplementedError


@dataclass
class FakePods:
    """Pods by (namespace, name)."""

    known: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def pods(self) -> list[dict[str, Any]]:
        return list(self.known.values())

    def pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.known.get((namespace, name))

    def add(self, pod: dict[str, Any]) -> dict[str, Any]:
        self.known[pod["metadata"]["namespace"], pod["metadata"]["name"]] = pod
        return pod


@dataclass
class FakeRuntime:
    """A runtime that runs nothing."""

    statuses: list[ContainerStatus] = field(default_factory=list)
    usages: list[ContainerUsage] = field(default_factory=list)
    error: Exception | None = None

    async def start(self, config: ContainerConfig) -> ContainerStatus:
        raise NotImplementedError

    async def stop(self, container_id: str, *, timeout_seconds: float = 10.0) -> ContainerStatus | None:
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


def make_settings(folder: Path, *, port: int = 0) -> NodeSettings:
    """Settings of a node that listens on loopback."""
    return NodeSettings(node_name="wasm-1", paths=NodePaths(data=folder), bind_address="127.0.0.1", port=port)


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


def log_folder(root: Path, pod: Mapping[str, Any], container: str = "main") -> Path:
    """The folder of a container's logs, made."""
    metadata = pod["metadata"]
    folder = root / "pods" / f"{metadata['namespace']}_{metadata['name']}_{metadata['uid']}" / container
    folder.mkdir(parents=True, exist_ok=True)
    return folder
