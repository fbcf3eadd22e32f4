"""What the tests of images share: a small registry that can misbehave, and builders of images in each layout."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from wasilet_common.oci import mediatypes
from wasilet_common.oci.credentials import Credential
from wasilet_node.images.compile import Begins
from wasilet_node.runtime.protocol import GuestKind

MODULE = b"\0asm\x01\0\0\0" + b"a core module"
COMPONENT = b"\0asm\x0d\0\x01\0" + b"a component"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def tar_of(files: Iterable[tuple[str, bytes]], *, compress: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue()) if compress else out.getvalue()


@dataclass
class FakeRegistry:
    """Serves what it is given. Each attribute after ``manifests`` is a way to misbehave."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    users: dict[str, str] = field(default_factory=dict)
    """Not empty: a user name and password of these are asked for."""

    realm: str = ""
    """Not empty: a bearer token is asked for, and this is the token server."""

    token: str = "the-token"
    """What the token server hands out; another one makes the older ones expire."""

    identity_tokens: tuple[str, ...] = ()
    served: dict[str, bytes] = field(default_factory=dict)
    """Other bytes under a blob's digest."""

    break_after: list[int] = field(default_factory=list)
    """The next blob answers are cut off after so many bytes."""

    ignore_range: bool = False
    redirect: Callable[[str], str] | None = None
    gate: asyncio.Event | None = None
    """Blobs wait for it."""

    no_head: bool = False
    head_digest: str | None = None
    status: int = 0
    """Every answer has this status."""

    busy: list[tuple[int, str]] = field(default_factory=list)
    """The next answers: a status, and what they say in Retry-After."""

    scopes: list[str] = field(default_factory=list)
    """What tokens were asked for."""

    challenges: tuple[str, ...] = ()
    """Not empty: the WWW-Authenticate headers, in place of the one that ``realm`` and ``users`` make."""

    upload_at: Callable[[str], str] | None = None
    """From the path of an upload to what ``Location`` says."""

    keep: Callable[[bytes], bytes] = bytes
    """What becomes of an uploaded blob."""

    origin: str = ""

    @property
    def host(self) -> str:
        return self.origin.removeprefix("http://")

    def paths(self, method: str = "GET") -> list[str]:
        return [path for used, path, _ in self.requests if used == method]

    def add_blob(self, data: bytes) -> bytes:
        self.blobs[digest_of(data)] = data
        return data

    def add_manifest(self, name: str, document: dict[str, Any] | bytes, media_type: str) -> bytes:
        """Under ``repository:tag``, and under its digest."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        repository, _, tag = name.rpartition(":")
        self.manifests[f"{repository}:{tag}"] = (media_type, body)
        self.manifests[f"{repository}:{digest_of(body)}"] = (media_type, body)
        return body

    def add_image(
        self,
        name: str,
        *,
        config: dict[str, Any] | bytes,
        config_type: str,
        layers: Sequence[tuple[bytes, str]],
        titles: Sequence[str] = (),
    ) -> bytes:
        config_body = config if isinstance(config, bytes) else json.dumps(config).encode()
        self.add_blob(config_body)
        entries = [descriptor(self.add_blob(data), media_type) for data, media_type in layers]
        for entry, title in zip(entries, titles, strict=False):
            entry["annotations"] = {mediatypes.TITLE_ANNOTATION: title}
        return self.add_manifest(
            name,
            {
                "schemaVersion": 2,
                "mediaType": mediatypes.OCI_MANIFEST,
                "config": descriptor(config_body, config_type),
                "layers": entries,
            },
            mediatypes.OCI_MANIFEST,
        )

    def add_cncf(self, name: str, module: bytes = MODULE, title: str = "hello.wasm") -> bytes:
        return self.add_image(
            name,
            config={"architecture": "wasm", "os": "wasip1", "layerDigests": [digest_of(module)]},
            config_type=mediatypes.CNCF_WASM_CONFIG,
            layers=[(module, mediatypes.CNCF_WASM_LAYER)],
            titles=[title],
        )

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.headers)))
        if self.status:
            return web.json_response({"errors": [{"code": "BAD", "message": "as told"}]}, status=self.status)
        if self.busy:
            status, retry_after = self.busy.pop(0)
            return web.Response(status=status, headers={"Retry-After": retry_after})
        if request.path == "/token":
            return await self._token(request)
        if not self._authorized(request):
            challenge = f'Bearer realm="{self.realm}",service="fake"' if self.realm else 'Basic realm="fake"'
            refused = web.json_response({}, status=401)
            for header in self.challenges or (challenge,):
                refused.headers.add("WWW-Authenticate", header)
            return refused
        repository, _, rest = request.path.removeprefix("/v2/").rpartition("/")
        if request.path.endswith("/blobs/uploads/"):
            path = f"{request.path}one?state=x"
            return web.Response(status=202, headers={"Location": self.upload_at(path) if self.upload_at else path})
        if repository.endswith("/blobs/uploads"):
            self.blobs[request.query["digest"]] = self.keep(await request.read())
            return web.Response(status=201)
        if repository.endswith("/manifests") and request.method == "PUT":
            body = await request.read()
            self.add_manifest(f"{repository.removesuffix('/manifests')}:{rest}", body, request.content_type)
            return web.Response(status=201)
        if repository.endswith("/manifests"):
            return self._manifest(request, f"{repository.removesuffix('/manifests')}:{rest}")
        if repository.endswith("/blobs"):
            return await self._blob(request, rest)
        return web.Response(status=404)

    def _authorized(self, request: web.Request) -> bool:
        header = request.headers.get("Authorization", "")
        if self.realm:
            return header == f"Bearer {self.token}"
        if self.users:
            return header in {basic(user, password) for user, password in self.users.items()}
        return True

    async def _token(self, request: web.Request) -> web.Response:
        self.scopes += request.query.getall("scope", [])
        if request.method == "POST":
            form = await request.post()
            allowed = form.get("grant_type") == "refresh_token" and form.get("refresh_token") in self.identity_tokens
            return web.json_response({"access_token": self.token}) if allowed else web.Response(status=401)
        header = request.headers.get("Authorization", "")
        if self.users and header not in {basic(user, password) for user, password in self.users.items()}:
            return web.Response(status=401)
        return web.json_response({"token": self.token})

    def _manifest(self, request: web.Request, name: str) -> web.Response:
        if name not in self.manifests:
            return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]}, status=404)
        if request.method == "HEAD" and self.no_head:
            return web.Response(status=405)
        media_type, body = self.manifests[name]
        headers = {"Docker-Content-Digest": self.head_digest or digest_of(body)}
        return web.Response(body=body, headers={**headers, "Content-Type": media_type})

    async def _blob(self, request: web.Request, digest: str) -> web.StreamResponse:
        if self.redirect is not None:
            return web.Response(status=307, headers={"Location": self.redirect(digest)})
        if self.gate is not None:
            await self.gate.wait()
        data = self.served.get(digest, self.blobs.get(digest))
        if data is None:
            return web.Response(status=404)
        if request.method == "HEAD":
            return web.Response(headers={"Content-Length": str(len(data))})
        start = 0
        span = request.headers.get("Range")
        if span and not self.ignore_range:
            start = int(span.removeprefix("bytes=").rstrip("-"))
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(data) - start
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        await response.prepare(request)
        cut = self.break_after.pop(0) if self.break_after else None
        await response.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None:
            assert request.transport is not None
            request.transport.close()
        return response


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@asynccontextmanager
async def serving(*registries: FakeRegistry) -> AsyncIterator[None]:
    """Each on a loopback port of its own."""
    servers = []
    try:
        for registry in registries:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", registry.handle)
            server = TestServer(app, host="127.0.0.1")
            await server.start_server()
            servers.append(server)
            registry.origin = str(server.make_url("")).rstrip("/")
        yield
    finally:
        for server in servers:
            await server.close()


class FakeCompiler:
    """Takes the module itself for the compiled file."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.kept: frozenset[str] | None = None
        self.error: Exception | None = None

    async def compile(
        self,
        module_path: Path,
        module_digest: str,
        kind: GuestKind,
        *,
        server: bool = False,
        owner: str = "",
        begins: Begins | None = None,
    ) -> Path:
        if begins is not None:
            await begins()
        self.compiled.append(module_digest)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return module_path

    async def prune(self, keep_digests: Iterable[str]) -> None:
        self.kept = frozenset(keep_digests)


class Events:
    """An event sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def __call__(self, type_: str, reason: str, message: str) -> None:
        self.seen.append((type_, reason, message))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.seen]


def credential(registry: str, username: str = "", password: str = "", identity_token: str = "") -> Credential:
    return Credential(registry=registry, username=username, password=password, identity_token=identity_token)
