"""A small certificate authority behind a TLS server that speaks the CertificateSigningRequest part of the API."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wasilet_node.certificates_csr import CLIENT_SIGNER, CSR_PATH
from wasilet_node.certificates_store import NodeNames, key_to_pem, new_key, self_signed
from wasilet_node.kube.kubeconfig import BOOTSTRAP_CONTEXT

from tests.unit.node.kube.rig import api_server, status_response

TOKEN = "abcdef.0123456789abcdef"


class Authority:
    """Signs requests, and itself."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-ca")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    def sign(
        self,
        request: x509.CertificateSigningRequest,
        *,
        client: bool,
        begin: datetime,
        lifetime: timedelta,
        names: bool = True,
    ) -> str:
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(self.name)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        for extension in request.extensions if names else ():
            builder = builder.add_extension(extension.value, critical=extension.critical)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def request(self, key: ec.EllipticCurvePrivateKey, common_name: str) -> x509.CertificateSigningRequest:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


class FakeCluster:
    """What a test sets up, and what the node did."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.url = ""
        self.token = TOKEN
        self.requests: dict[str, dict[str, Any]] = {}
        self.deleted: dict[str, dict[str, Any]] = {}
        self.users: list[str] = []
        """Who asked, by request: ``bootstrap`` or a common name."""

        self.approve = {"client": True, "serving": True}
        self.begin = datetime.now(UTC) - timedelta(minutes=5)
        self.lifetime = timedelta(hours=1)
        self.names_signed = True
        """Copy the names of a request into the certificate."""

        self.forget_clients = False
        """Answer 401 to every client certificate, as a cluster that was made again."""

        self._changed = asyncio.Condition()
        self._version = 10

    def bootstrap(self, folder: Path, **cluster: Any) -> Path:
        """Write a bootstrap file."""
        entry = {
            "server": self.url,
            "certificate-authority-data": base64.b64encode(self.authority.pem.encode()).decode(),
            **cluster,
        }
        document = {
            "clusters": [{"name": "kubernetes", "cluster": entry}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": BOOTSTRAP_CONTEXT, "context": {"cluster": "kubernetes", "user": "u"}}],
            "current-context": BOOTSTRAP_CONTEXT,
        }
        path = folder / "bootstrap.conf"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))
        return path

    def of(self, what: str) -> list[dict[str, Any]]:
        """The ``client`` or ``serving`` requests, oldest first."""
        return [
            each
            for each in self.requests.values()
            if (each["spec"]["signerName"] == CLIENT_SIGNER) == (what == "client")
        ]

    async def condition(self, name: str, type_: str, reason: str = "", message: str = "") -> None:
        """As an approver does."""
        request = self.requests[name]
        request["status"].setdefault("conditions", []).append(
            {"type": type_, "status": "True", "reason": reason, "message": message}
        )
        if type_ == "Approved":
            self._sign(request)
        await self._touch(request)

    async def delete(self, name: str) -> None:
        """As the API server's garbage collector does after a day."""
        request = self.deleted[name] = self.requests.pop(name)
        request["deleted"] = True
        await self._touch(request)

    async def until(self, what: str, count: int) -> dict[str, Any]:
        """The newest request, when that many were made."""
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(lambda: len(self.of(what)) >= count)
        return self.of(what)[-1]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        user = self._user(request)
        if user is None:
            return status_response(401, "Unauthorized")
        if request.path.startswith("/api/v1/nodes/"):
            return status_response(404, "NotFound", "no such node")
        assert request.path.startswith(CSR_PATH), request.path
        if request.method == "POST":
            return await self._create(await request.json(), user)
        name = request.path.removeprefix(CSR_PATH).lstrip("/")
        if name:
            if name not in self.requests:
                return status_response(404, "NotFound", f"{name} not found")
            return web.json_response(self.requests[name])
        name = request.query["fieldSelector"].removeprefix("metadata.name=")
        if request.query.get("watch") == "true":
            return await self._watch(request, name)
        items = [self.requests[name]] if name in self.requests else []
        metadata = {"resourceVersion": str(self._version)}
        return web.json_response({"kind": "CertificateSigningRequestList", "metadata": metadata, "items": items})

    def _user(self, request: web.Request) -> str | None:
        certificate = request.get_extra_info("peercert")
        if certificate:
            if self.forget_clients:
                return None
            return str(dict(pair for entry in certificate["subject"] for pair in entry)["commonName"])
        return "bootstrap" if request.headers.get("Authorization") == f"Bearer {self.token}" else None

    async def _create(self, body: dict[str, Any], user: str) -> web.Response:
        number = len(self.users) + 1
        self.users.append(user)
        name = f"{body['metadata']['generateName']}{number}"
        body["metadata"] = {"name": name, "uid": f"uid-{number}"}
        body["status"] = {}
        self.requests[name] = body
        what = "client" if body["spec"]["signerName"] == CLIENT_SIGNER else "serving"
        if self.approve[what]:
            await self.condition(name, "Approved")
        else:
            await self._touch(body)
        return web.json_response(body, status=201)

    def _sign(self, body: dict[str, Any]) -> None:
        csr = x509.load_pem_x509_csr(base64.b64decode(body["spec"]["request"]))
        pem = self.authority.sign(
            csr,
            client=body["spec"]["signerName"] == CLIENT_SIGNER,
            begin=self.begin,
            lifetime=self.lifetime,
            names=self.names_signed,
        )
        body["status"]["certificate"] = base64.b64encode(pem.encode()).decode()

    async def _touch(self, body: dict[str, Any]) -> None:
        async with self._changed:
            self._version += 1
            body["metadata"]["resourceVersion"] = str(self._version)
            self._changed.notify_all()

    async def _watch(self, request: web.Request, name: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        seen = int(request.query["resourceVersion"])
        followed = self.requests.get(name) or self.deleted.get(name)
        while followed is not None:
            version = int(followed["metadata"]["resourceVersion"])
            if version > seen:
                seen = version
                type_ = "DELETED" if followed.get("deleted") else "MODIFIED"
                await response.write(json.dumps({"type": type_, "object": followed}).encode() + b"\n")
            async with self._changed:
                # Looked at before each wait: what changed while the line above was written is not slept through.
                while int(followed["metadata"]["resourceVersion"]) <= seen:
                    await self._changed.wait()
        return response


@asynccontextmanager
async def fake_cluster(folder: Path) -> AsyncIterator[FakeCluster]:
    """A cluster on loopback."""
    cluster = FakeCluster()
    key = new_key()
    template = self_signed("server", NodeNames(ips=frozenset({"127.0.0.1"})))
    alternatives = x509.load_pem_x509_certificate(template.certificate.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kube-apiserver")]))
        .add_extension(alternatives.value, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = cluster.authority.sign(request, client=False, begin=cluster.begin, lifetime=timedelta(hours=1))
    path = folder / "apiserver.pem"
    path.write_text(pem + key_to_pem(key))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    tls.load_verify_locations(cadata=cluster.authority.pem)
    tls.verify_mode = ssl.CERT_OPTIONAL
    async with api_server(cluster.handle, tls=tls) as (url, _):
        cluster.url = url
        yield cluster
