"""Artifacts to a registry and back: ``invoke push`` and ``invoke pull``.

The transport is oras-py's, with its request method replaced. Its own (0.2.43) has no time-outs, answers a registry that
is not there with two minutes of retries, takes a Basic challenge for a token's, and verifies neither digest nor size.
Here each request has a limit and is made once; what is sent is read back and compared; what is fetched counts only once
its size and SHA-256 are those that the manifest names. What oras keeps: logins from docker's configuration with its
credential helpers, token requests, and the URLs of the distribution API.

Plain HTTP is spoken to loopback and to the registries that are listed, never as a fallback.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wasilet_common.oci import mediatypes
from wasilet_common.oci.reference import InvalidReferenceError, Reference, is_digest, is_loopback, parse

from wasilet.errors import HarnessError, UsageError
from wasilet.oci.artifact import Artifact, Blob

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
TRANSFER_TIMEOUT_SECONDS = 600.0
_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_MAX_BLOB_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_UP_HINT = "`invoke up` starts a cluster with a registry; `invoke status` says where it is"


class RegistryError(HarnessError):
    """A registry is not there, refuses, or sends something else than it said."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """An artifact that the registry holds, read back."""

    reference: Reference
    digest: str
    size_bytes: int
    seconds: float
    uploaded_bytes: int
    """0 when the registry had all of it."""

    @property
    def pinned(self) -> str:
        """``registry/repository:tag@sha256:...``: what a manifest wants."""
        return f"{self.reference.name}:{self.reference.tag}@{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A verified manifest, and what it holds."""

    reference: Reference
    digest: str
    artifact_type: str
    """The config's media type."""

    config: dict[str, Any]
    layers: tuple[tuple[str, str, int, str], ...]
    """Media type, digest, size and title of each."""

    size_bytes: int
    saved_to: Path | None = None

    def lines(self) -> list[str]:
        """For people."""
        platform = "/".join(str(self.config[key]) for key in ("os", "architecture") if key in self.config)
        lines = [
            f"{self.reference.name}@{self.digest}",
            f"  config  {self.artifact_type}" + (f", {platform}" if platform else ""),
        ]
        for media_type, digest, size, title in self.layers:
            lines.append(f"  layer   {media_type}, {size} bytes, {digest}" + (f", {title}" if title else ""))
        if self.config.get("created"):
            lines.append(f"  created {self.config['created']}")
        lines.append(f"  verified {self.size_bytes} bytes: every digest and size is what the manifest says")
        return lines


def reference_named(text: str) -> Reference:
    """A reference as a person types it. Raises UsageError."""
    try:
        return parse(text)
    except InvalidReferenceError as error:
        raise UsageError(str(error), hint="write registry/repository:tag, as localhost:5000/hello-world:v1") from error


def push(
    artifact: Artifact, reference: Reference, *, insecure: Collection[str] = (), environ: Mapping[str, str] = os.environ
) -> Pushed:
    """Upload what the registry lacks, then the manifest, and read it back.

    ``insecure`` lists ``host[:port]`` to be spoken to in plain HTTP. Raises RegistryError within seconds when no
    registry answers, when it wants a login, or when it holds something else than was sent.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference} names a digest, which only content decides", hint="push to a tag")
    started = time.monotonic()
    uploaded = 0
    with _Session(reference, insecure, environ) as session:
        for blob in (artifact.layer, artifact.config):
            uploaded += session.upload(blob)
        session.put_manifest(artifact.manifest, str(reference.tag))
    return Pushed(
        reference=reference,
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        seconds=time.monotonic() - started,
        uploaded_bytes=uploaded,
    )


def holds(artifact: Artifact, reference: Reference) -> bool:
    """Whether a registry on this machine already has exactly this artifact under this tag, without a login.

    One request on the standard library: importing oras takes longer than a whole push. False whenever in doubt.
    """
    if not is_loopback(reference.host):
        return False
    connection = http.client.HTTPConnection(reference.host, timeout=CONNECT_TIMEOUT_SECONDS)
    try:
        connection.request(
            "HEAD", f"/v2/{reference.repository}/manifests/{reference.tag}", headers={"Accept": mediatypes.OCI_MANIFEST}
        )
        response = connection.getresponse()
        return response.status == 200 and response.getheader("Docker-Content-Digest") == artifact.digest
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def pull(
    reference: Reference,
    *,
    output: Path | None = None,
    insecure: Collection[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Pulled:
    """Fetch an artifact, verify all of it, and write its wasm layer to ``output`` when given.

    Nothing is written before it is verified; an existing file is replaced whole. Raises RegistryError (not found,
    damaged, unreachable) and UsageError (``output`` cannot be written).
    """
    with _Session(reference, insecure, environ) as session:
        manifest, digest = session.get_manifest(reference.target)
        config = session.get_blob(_described(manifest.get("config"), reference))
        layers = []
        wasm: bytes | None = None
        size = len(config)
        for entry in _list(manifest.get("layers")):
            described = _described(entry, reference)
            data = session.get_blob(described)
            size += len(data)
            title = str((entry.get("annotations") or {}).get(mediatypes.TITLE_ANNOTATION) or "")
            layers.append((described.media_type, described.digest, described.size, title))
            if wasm is None and (described.media_type in mediatypes.WASM_LAYERS or data[:4] == b"\0asm"):
                wasm = data
    if output is not None:
        if wasm is None:
            raise RegistryError(f"{reference} holds no wasm layer, only {', '.join(layer[0] for layer in layers)}")
        _save(wasm, output)
    return Pulled(
        reference=reference,
        digest=digest,
        artifact_type=str((manifest.get("config") or {}).get("mediaType") or ""),
        config=_json_object(config),
        layers=tuple(layers),
        size_bytes=size,
        saved_to=output,
    )


@dataclass(frozen=True, kw_only=True)
class _Descriptor:
    media_type: str
    digest: str
    size: int


class _Session:
    """The requests of one push or pull."""

    def __init__(self, reference: Reference, insecure: Collection[str], environ: Mapping[str, str]) -> None:
        import oras.provider
        import requests

        # oras logs what is raised here as well, and its own advice, in a style of its own.
        logging.getLogger("oras").setLevel(logging.CRITICAL)
        self._reference = reference
        self._plain = is_loopback(reference.host) or reference.host in insecure or reference.registry in insecure
        self._registry = oras.provider.Registry(hostname=reference.host, insecure=self._plain)
        self._registry.session.headers["User-Agent"] = "wasilet"
        self._base = f"{'http' if self._plain else 'https'}://{reference.host}"
        # Of the environment only what concerns TLS and proxies: requests would also take logins from ~/.netrc.
        self._registry.session.trust_env = False
        if not self._plain:
            self._registry.session.proxies.update(requests.utils.get_environ_proxies(self._base))
            bundle = environ.get("REQUESTS_CA_BUNDLE") or environ.get("SSL_CERT_FILE")
            self._registry.session.verify = bundle or True
        self._authorization: str | None = None
        self._config_path = _docker_config(environ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.session.close()

    # --- blobs and manifests ---------------------------------------------------------------------------------------

    def upload(self, blob: Blob) -> int:
        """Upload unless the registry has it with the right size; the bytes that were sent."""
        url = f"/v2/{self._reference.repository}/blobs/{blob.digest}"
        head = self._request("HEAD", url, accept=(200, 404))
        if head.status_code == 200 and int(head.headers.get("Content-Length") or -1) == len(blob.data):
            return 0
        begun = self._request("POST", f"/v2/{self._reference.repository}/blobs/uploads/", accept=(202,))
        location = self._location(begun)
        separator = "&" if "?" in location else "?"
        headers = {"Content-Type": "application/octet-stream"}
        target = f"{location}{separator}digest={blob.digest}"
        self._request("PUT", target, accept=(201, 202, 204), headers=headers, data=blob.data)
        check = self._request("HEAD", url, accept=(200, 404))
        if check.status_code != 200 or int(check.headers.get("Content-Length") or -1) != len(blob.data):
            raise RegistryError(f"{self._reference.host} took {blob.digest} but does not hold it as it was sent")
        return len(blob.data)

    def put_manifest(self, manifest: Blob, tag: str) -> None:
        """Put under a tag, then read back by digest and by tag."""
        url = f"/v2/{self._reference.repository}/manifests/"
        headers = {"Content-Type": manifest.media_type}
        self._request("PUT", url + tag, accept=(200, 201, 202), headers=headers, data=manifest.data)
        for name in (manifest.digest, tag):
            answer = self._request("GET", url + name, accept=(200,), headers={"Accept": manifest.media_type})
            if _body(answer, _MAX_MANIFEST_BYTES) != manifest.data:
                raise RegistryError(f"{self._reference.host} holds another manifest under {name} than was sent")

    def get_manifest(self, target: str) -> tuple[dict[str, Any], str]:
        """The manifest (of an index: its wasm entry's) and its digest, which is computed here."""
        url = f"/v2/{self._reference.repository}/manifests/{target}"
        answer = self._request("GET", url, accept=(200,), headers={"Accept": mediatypes.ACCEPT})
        data = _body(answer, _MAX_MANIFEST_BYTES)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if is_digest(target) and target != (digest if target.startswith("sha256:") else _sha512(data)):
            raise RegistryError(f"{self._reference.host} sent another manifest than {target}")
        manifest = _json_object(data)
        media_type = str(manifest.get("mediaType") or answer.headers.get("Content-Type") or "")
        if media_type in mediatypes.INDEXES:
            for entry in _list(manifest.get("manifests")):
                platform = entry.get("platform") or {}
                if platform.get("architecture") in {"wasm", "wasm32"} and is_digest(str(entry.get("digest"))):
                    return self.get_manifest(str(entry["digest"]))
            raise RegistryError(f"{self._reference} is an index without a wasm entry")
        if media_type not in mediatypes.MANIFESTS:
            raise RegistryError(f"{self._reference} is no image manifest but {media_type or 'something nameless'}")
        return manifest, digest

    def get_blob(self, described: _Descriptor) -> bytes:
        """A blob, no longer than it says, with the digest that it says."""
        url = f"/v2/{self._reference.repository}/blobs/{described.digest}"
        data = _body(self._request("GET", url, accept=(200,)), described.size)
        algorithm = described.digest.partition(":")[0]
        if (
            len(data) != described.size
            or hashlib.new(algorithm, data).hexdigest() != described.digest.partition(":")[2]
        ):
            raise RegistryError(f"{described.digest} of {self._reference} is damaged: size or digest differ")
        return data

    # --- one request -----------------------------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        url: str,
        *,
        accept: tuple[int, ...],
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> requests.Response:
        url = url if "://" in url else self._base + url
        response = self._send(method, url, headers or {}, data)
        if response.status_code == 401 and self._authorize(response):
            response.close()
            response = self._send(method, url, headers or {}, data)
        if response.status_code not in accept:
            raise self._refusal(response, method)
        return response

    def _send(self, method: str, url: str, headers: dict[str, str], data: bytes | None) -> requests.Response:
        own = url.startswith(self._base + "/")
        if own and self._authorization:
            headers = {**headers, "Authorization": self._authorization}
        with self._reachable():
            response: requests.Response = self._registry.session.request(
                method,
                url,
                data=data,
                headers=headers,
                stream=True,
                timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
            )
        return response

    def _location(self, response: requests.Response) -> str:
        """Where an upload goes: on the registry itself, or another HTTPS server that it names."""
        location = response.headers.get("Location", "")
        if location.startswith("/"):
            return self._base + location
        if location.startswith((f"{self._base}/", "https://")):
            return location
        if location.startswith("http://") and self._plain:
            return location
        raise RegistryError(f"{self._reference.host} answers an upload with an unusable address: {location!r}")

    def _authorize(self, response: requests.Response) -> bool:
        """Answer a challenge by docker's configuration; whether there is something new to try."""
        from oras.container import Container

        challenge = response.headers.get("Www-Authenticate", "")
        auth = self._registry.auth
        with self._reachable():
            container = Container(f"{self._reference.host}/{self._reference.repository}")
            auth.load_configs(container, configs=[self._config_path] if self._config_path else None)
        basic = getattr(auth, "_basic_auth", None)
        before = self._authorization
        if challenge.lower().startswith("basic"):
            self._authorization = f"Basic {basic}" if basic else None
        elif challenge.lower().startswith("bearer"):
            self._authorization = self._bearer(challenge)
        return self._authorization is not None and self._authorization != before

    def _bearer(self, challenge: str) -> str | None:
        from oras.auth.utils import parse_auth_header

        header = parse_auth_header(challenge)
        realm = str(header.realm or "")
        if not (realm.startswith("https://") or (self._plain and realm.startswith("http://"))):
            raise RegistryError(f"{self._reference.host} sends logins to {realm!r}, which is not HTTPS")
        basic = getattr(self._registry.auth, "_basic_auth", None)
        params = {key: value for key, value in (("service", header.service), ("scope", header.scope)) if value}
        headers = {"Authorization": f"Basic {basic}"} if basic else {}
        with self._reachable():
            answer = self._registry.session.get(
                realm, params=params, headers=headers, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
            )
        if answer.status_code != 200:
            return None
        token = _json_object(answer.content)
        value = token.get("token") or token.get("access_token")
        return f"Bearer {value}" if isinstance(value, str) and value else None

    def _refusal(self, response: requests.Response, method: str) -> RegistryError:
        host, status = self._reference.host, response.status_code
        said = "; ".join(
            str(error.get("message"))
            for error in _list(_json_object(response.content, strict=False).get("errors"))
            if error.get("message")
        )
        said = f": {said}" if said else ""
        if status in {401, 403}:
            had = "the login that docker's configuration holds" if self._authorization else "no login"
            return RegistryError(
                f"{host} refuses {had} for {self._reference.repository}{said}", hint=f"type: docker login {host}"
            )
        if status == 404 and method in {"GET", "HEAD"}:
            return RegistryError(f"{host} has no {self._reference.repository}:{self._reference.target}{said}")
        hint = "its log says more; that of a cluster's registry: `invoke logs registry`" if status >= 500 else ""
        return RegistryError(f"{host} answers {method} with HTTP {status}{said}", hint=hint)

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        import requests

        host = self._reference.host
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise RegistryError(
                f"{host} speaks no TLS that can be trusted: {_innermost(error)}",
                hint=f"for a registry that speaks plain HTTP: --insecure {host}",
            ) from error
        except requests.exceptions.Timeout as error:
            raise RegistryError(f"the registry {host} does not answer in time", hint=_UP_HINT) from error
        except (requests.exceptions.RequestException, OSError) as error:
            raise RegistryError(f"no registry answers at {host}: {_innermost(error)}", hint=_UP_HINT) from error


def _docker_config(environ: Mapping[str, str]) -> str | None:
    """``$DOCKER_CONFIG/config.json``, which oras does not look at by itself."""
    folder = environ.get("DOCKER_CONFIG")
    path = Path(folder) / "config.json" if folder else None
    return str(path) if path is not None and path.is_file() else None


def _innermost(error: BaseException) -> str:
    """The reason at the bottom: urllib3 wraps it three times."""
    found: BaseException = error
    while True:
        inner = getattr(found, "reason", None) or found.__cause__ or (found.args[0] if found.args else None)
        if not isinstance(inner, BaseException) or inner is found:
            break
        found = inner
    text = getattr(found, "strerror", None) or str(found)
    return str(text).rpartition(": ")[2] or type(found).__name__


def _body(response: requests.Response, limit: int) -> bytes:
    """The body as it was sent (no decompression), refused when it is longer than ``limit`` bytes."""
    import urllib3

    data = bytearray()
    deadline = time.monotonic() + TRANSFER_TIMEOUT_SECONDS
    try:
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
            data += chunk
            if len(data) > limit:
                raise RegistryError(f"the registry sends more than the {limit} bytes that it should")
            if time.monotonic() > deadline:
                raise RegistryError(f"the transfer took longer than {TRANSFER_TIMEOUT_SECONDS:g} s")
    except (urllib3.exceptions.HTTPError, OSError, http.client.HTTPException) as error:
        raise RegistryError(f"the transfer broke off after {len(data)} bytes: {_innermost(error)}") from error
    finally:
        response.close()
    return bytes(data)


def _described(entry: Any, reference: Reference) -> _Descriptor:
    entry = entry if isinstance(entry, dict) else {}
    digest, size = str(entry.get("digest") or ""), entry.get("size")
    if not is_digest(digest) or not isinstance(size, int) or not 0 <= size <= _MAX_BLOB_BYTES:
        raise RegistryError(f"the manifest of {reference} describes a blob without a usable digest or size")
    return _Descriptor(media_type=str(entry.get("mediaType") or ""), digest=digest, size=size)


def _list(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _json_object(data: bytes, *, strict: bool = True) -> dict[str, Any]:
    try:
        decoded = json.loads(data)
    except ValueError as error:
        if strict:
            raise RegistryError("the registry sends something that is not JSON") from error
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _sha512(data: bytes) -> str:
    return f"sha512:{hashlib.sha512(data).hexdigest()}"


def _save(data: bytes, output: Path) -> None:
    from wasilet.cluster.state import write_file

    write_file(output, data, mode=0o644)
