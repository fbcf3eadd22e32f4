"""Artifacts to a registry and back: ``invoke push`` and ``invoke pull``.

The registry client is the node's (``wasilet_common.oci``), so what a command can push to, a node can pull from:
challenges, odd answers, indexes and limits are handled alike. What is sent is read back and compared; what is fetched
counts only once its size and digest are those that the manifest names. Logins come from :mod:`wasilet.oci.logins`.

Plain HTTP is spoken to loopback and to the registries that are listed, never as a fallback.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wasilet_common.oci import mediatypes
from wasilet_common.oci.reference import InvalidReferenceError, Reference, is_loopback, parse

from wasilet.errors import HarnessError, UsageError
from wasilet.oci.artifact import Artifact
from wasilet.oci.logins import all_logins, basic_header, logins_for

if TYPE_CHECKING:
    from wasilet_common.oci.credentials import Credential
    from wasilet_common.oci.layouts import Descriptor, ImageManifest
    from wasilet_common.oci.registry import RegistryError as ClientError
    from wasilet_common.oci.repository import Repository

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
_MAX_BLOB_BYTES = 512 * 1024 * 1024
_UP_HINT = "`invoke up` starts a cluster with a registry; `invoke status` says where it is"
_Result = TypeVar("_Result")


class RegistryError(HarnessError):
    """A registry is not there, refuses, or sends something else than it announced."""


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

    ``insecure`` lists ``host[:port]`` to be reached by plain HTTP. Raises RegistryError within seconds when no
    registry answers, when it wants a login, or when it holds something else than was sent.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference} names a digest, which only content decides", hint="push to a tag")
    started = time.monotonic()

    async def work() -> int:
        sent = 0
        async with _repository(reference, insecure, environ, actions="pull,push") as repository:
            for blob in (artifact.layer, artifact.config):
                if await repository.blob_size(blob.digest) != len(blob.data):
                    await repository.upload(blob.digest, blob.data)
                    sent += len(blob.data)
            await repository.put_manifest(str(reference.tag), artifact.manifest.data, artifact.manifest.media_type)
        return sent

    uploaded = _run(work(), reference)
    return Pushed(
        reference=reference,
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        seconds=time.monotonic() - started,
        uploaded_bytes=uploaded,
    )


def holds(artifact: Artifact, reference: Reference, *, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a registry on this machine already has exactly this artifact under this tag.

    One request on the standard library: importing a client takes longer than a whole push. False whenever in doubt.
    """
    if not is_loopback(reference.host):
        return False
    headers = {"Accept": mediatypes.OCI_MANIFEST}
    login = next((login for login in logins_for(reference, environ) if login.username), None)
    if login is not None:
        headers["Authorization"] = basic_header(login)
    connection = http.client.HTTPConnection(reference.host, timeout=CONNECT_TIMEOUT_SECONDS)
    try:
        connection.request("HEAD", f"/v2/{reference.repository}/manifests/{reference.tag}", headers=headers)
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
    """Fetch an artifact, verify all of it, and write the module that a node would run to ``output`` when given.

    Of an index that is the wasm entry, of a container image the file that its entrypoint names. Nothing is written
    before it is verified; an existing file is replaced whole. Raises RegistryError (not found, damaged, unreachable)
    and UsageError (``output`` cannot be written).
    """

    async def work() -> Pulled:
        from wasilet_common.oci.choice import choose

        async with _repository(reference, insecure, environ, actions="pull") as repository:
            chosen = await choose(repository, await repository.manifest(reference.target))
            config = await _blob(repository, chosen.image.config, reference)
            layers = [(layer, await _blob(repository, layer, reference)) for layer in chosen.image.layers]
        if output is not None:
            _save(_module(reference, chosen.image, config, layers), output)
        try:
            decoded = json.loads(config)
        except ValueError:
            decoded = {}
        return Pulled(
            reference=reference,
            digest=chosen.manifest.digest,
            artifact_type=chosen.image.config.media_type,
            config=decoded if isinstance(decoded, dict) else {},
            layers=tuple((layer.media_type, layer.digest, layer.size, layer.title) for layer, _ in layers),
            size_bytes=len(config) + sum(len(data) for _, data in layers),
            saved_to=output,
        )

    return _run(work(), reference)


# --- the node's client, as a command uses it -------------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, _Result], reference: Reference) -> _Result:
    from wasilet_common.oci.layouts import LayoutError
    from wasilet_common.oci.registry import RegistryError as ClientError
    from wasilet_common.oci.tarball import LayerError

    try:
        return asyncio.run(work)
    except ClientError as error:
        raise _explained(error, reference) from error
    except (LayoutError, LayerError) as error:
        raise RegistryError(f"{reference}: {error}") from error


@asynccontextmanager
async def _repository(
    reference: Reference, insecure: Collection[str], environ: Mapping[str, str], *, actions: str
) -> AsyncIterator[Repository]:
    from wasilet_common.oci.registry import Reaching, RegistryClient
    from wasilet_common.oci.repository import Repository

    settings = Reaching(
        insecure_registries=tuple(insecure),
        connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
        read_timeout_seconds=READ_TIMEOUT_SECONDS,
    )
    bundle = environ.get("REQUESTS_CA_BUNDLE") or environ.get("SSL_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=bundle) if bundle else None
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"the certificates in {bundle} cannot be read: {error}") from error
    logins = logins_for(reference, environ)
    client = RegistryClient(settings=settings, ssl_context=context)
    try:
        yield Repository(
            client=client,
            reference=reference,
            credential=logins[0] if logins else None,
            logins=all_logins(environ),
            actions=actions,
            denial=_denial,
        )
    finally:
        await client.close()


def _denial(credential: Credential | None, reference: Reference, why: str) -> str:
    if credential is None:
        return f"{reference.host} wants a login for {reference.repository}, and there is none: {why}"
    return f"{reference.host} does not accept the login for {credential.registry}, for {reference.repository}: {why}"


def _explained(error: ClientError, reference: Reference) -> RegistryError:
    """The client's error as a person at a terminal reads it, with what to type."""
    import aiohttp
    from wasilet_common.oci import registry

    host, cause = reference.host, error.__cause__
    if isinstance(error, registry.RegistryAuthError):
        return RegistryError(str(error), hint=f"type: docker login {host}")
    if isinstance(error, registry.RegistryNotFoundError):
        return RegistryError(f"{host} has no {reference.repository}:{reference.target}")
    if not isinstance(error, registry.RegistryUnreachableError):
        return RegistryError(str(error))
    if isinstance(cause, aiohttp.ClientConnectorSSLError | aiohttp.ClientConnectorCertificateError):
        return RegistryError(
            f"{host} speaks no TLS that can be trusted: {error.reason}",
            hint=f"for a registry that speaks plain HTTP: --insecure {host}",
        )
    if cause is None:
        hint = (
            "its log says more; that of a cluster's registry: `invoke logs registry`"
            if " HTTP 5" in error.reason
            else ""
        )
        return RegistryError(f"{host} {error.reason}" if error.reason else str(error), hint=hint)
    if isinstance(cause, TimeoutError):
        return RegistryError(f"the registry {host} does not answer in time: {error.reason}", hint=_UP_HINT)
    return RegistryError(f"no registry answers at {host}: {error.reason}", hint=_UP_HINT)


async def _blob(repository: Repository, blob: Descriptor, reference: Reference) -> bytes:
    """A blob, no longer than announced, with the digest announced."""
    if blob.size > _MAX_BLOB_BYTES:
        raise RegistryError(f"{blob.digest} of {reference} has {blob.size} bytes, more than {_MAX_BLOB_BYTES}")
    data = bytearray()
    async with repository.blob(blob.digest, size=blob.size) as transfer:
        async for chunk in transfer.chunks:
            data += chunk
    algorithm, _, digest = blob.digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != digest:
        raise RegistryError(f"{blob.digest} of {reference} is damaged: its content has another digest")
    return bytes(data)


def _module(reference: Reference, image: ImageManifest, config: bytes, layers: list[tuple[Descriptor, bytes]]) -> bytes:
    """What a node would run. Raises LayoutError, LayerError, RegistryError."""
    from wasilet_common.oci import layouts, tarball

    plan = layouts.plan(image, config)
    content = {layer.digest: data for layer, data in layers}
    if not plan.member:
        return content[plan.layers[0].digest]
    budget = tarball.Budget(total_bytes=_MAX_BLOB_BYTES)
    for layer in reversed(plan.layers):
        out = io.BytesIO()
        with tempfile.NamedTemporaryFile() as file:
            file.write(content[layer.digest])
            file.flush()
            found = tarball.extract(
                Path(file.name), media_type=layer.media_type, name=plan.member, out=out, budget=budget
            )
        if found is not None and found.deleted:
            break
        if found is not None:
            return out.getvalue()
    raise RegistryError(f"{reference} has no file /{plan.member}, which is its entrypoint")


def _save(data: bytes, output: Path) -> None:
    from wasilet.storage import write_file

    write_file(output, data, mode=0o644)
