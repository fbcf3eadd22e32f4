"""One repository of a registry: manifests by tag or digest, blobs as a stream that resumes, uploads.

The node pulls and the commands push and pull with this. oras-py is not used for it: its version 0.2.43 verifies
neither digest nor size, reads blobs whole into memory, has no time-outs, and retries for two minutes on any error. So
this is the part of the distribution specification that is needed here. Redirects are followed by hand, because the
Authorization header goes to the registry's own origin only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from wasilet_common.oci import mediatypes
from wasilet_common.oci.authentication import Authenticator, Denial, pod_denial
from wasilet_common.oci.challenge import parse_challenges
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.reference import Reference, is_digest
from wasilet_common.oci.registry import (
    SLOWEST_BYTES_PER_SECOND,
    RegistryClient,
    RegistryNotFoundError,
    RegistryProtocolError,
    RegistryUnreachableError,
    TransferInterruptedError,
    authority,
    read_bounded,
)

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""The distribution specification's suggested limit."""

_MAX_ERROR_BYTES: Final = 8 * 1024
_MAX_REDIRECTS: Final = 5
_CHUNK_BYTES: Final = 256 * 1024
_LONGEST_PAUSE_SECONDS: Final = 10
"""What a registry may ask for by Retry-After; one that asks for more is left to the pull's back-off."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_SAME_METHOD: Final = frozenset({307, 308})
"""Those after which a request with a body is sent again as it was (RFC 9110, section 15.4)."""

_HTTP_TO_HTTPS: Final = (b"HTTP request to an HTTPS server", b"HTTP request was sent to HTTPS port")
"""What Go's and nginx' servers say to plain HTTP on a TLS port."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest or index whose body hashes to ``digest``."""

    media_type: str
    digest: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A blob on its way: ``chunks`` begins at byte ``start``, which is 0 when the registry ignored the range."""

    start: int
    chunks: AsyncIterator[bytes]


class Repository:
    """What is asked of one repository, with one credential (None: anonymously). A token lives as long as this."""

    def __init__(
        self,
        *,
        client: RegistryClient,
        reference: Reference,
        credential: Credential | None,
        logins: Sequence[Credential] = (),
        actions: str = "pull",
        denial: Denial = pod_denial,
    ) -> None:
        """For the last three see ``Authenticator``."""
        self.credential = credential
        self._client = client
        self._reference = reference
        self._authenticator = Authenticator(
            client=client, reference=reference, credential=credential, logins=logins, actions=actions, denial=denial
        )
        self._authorization = ""

    async def resolve(self, target: str) -> str | None:
        """The digest that a tag (or digest) stands for; None: the registry does not say, ask for the manifest.

        Raises RegistryError.
        """
        try:
            digest = await self._head(target)
        except RegistryUnreachableError as error:
            # A TLS port answers a plain HEAD with a body, which HTTP does not allow.
            if not isinstance(error.__cause__, aiohttp.ClientResponseError) or not await self._wants_https():
                raise
            digest = await self._head(target)
        if not is_digest(digest):
            return None
        if is_digest(target) and digest != target:
            raise RegistryProtocolError(f"the registry resolved {target} to another digest, {digest}")
        return digest

    async def _head(self, target: str) -> str:
        async with (
            self._client.bounded("the manifest", self._reference.host),
            self._request("HEAD", f"manifests/{target}", {"Accept": mediatypes.ACCEPT}) as response,
        ):
            if response.status == 405:
                return ""
            await self._raise_for_status(response, "HEAD")
            return response.headers.get("Docker-Content-Digest", "")

    async def manifest(self, target: str) -> Manifest:
        """A manifest by tag or digest, at most 4 MiB; by digest, its body is verified. Raises RegistryError."""
        async with (
            self._client.bounded("the manifest", self._reference.host),
            self._request("GET", f"manifests/{target}", {"Accept": mediatypes.ACCEPT}) as response,
        ):
            await self._raise_for_status(response, "GET")
            body = await read_bounded(response, MAX_MANIFEST_BYTES, "the manifest")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        algorithm = target.partition(":")[0] if is_digest(target) else "sha256"
        digest = f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"
        if is_digest(target) and digest != target:
            raise RegistryProtocolError(f"manifest {target} was asked for, but what came hashes to {digest}")
        return Manifest(media_type=media_type, digest=digest, body=body)

    @asynccontextmanager
    async def blob(self, digest: str, *, size: int, offset: int = 0) -> AsyncIterator[Transfer]:
        """Stream a blob of ``size`` bytes from ``offset`` on, where the registry can. Nothing is verified but sizes:
        the reader hashes. Raises RegistryError; from ``chunks``, TransferInterruptedError."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._request("GET", f"blobs/{digest}", headers) as response:
            if response.status == 416 and offset:
                restart = True
            else:
                restart = False
                await self._raise_for_status(response, "GET")
                start = _start_of(response, offset)
                length = response.content_length
                if length is not None and length != size - start:
                    raise RegistryProtocolError(
                        f"blob {digest} should have {size} bytes, but the registry announces {length + start}"
                    )
                yield Transfer(start=start, chunks=self._chunks(response, size - start))
        if restart:
            async with self.blob(digest, size=size) as transfer:
                yield transfer

    async def _chunks(self, response: aiohttp.ClientResponse, expected: int) -> AsyncIterator[bytes]:
        received = 0
        clock = asyncio.get_running_loop().time
        patience = self._client.settings.read_timeout_seconds * 2
        ends = clock() + patience
        try:
            async with asyncio.timeout_at(ends) as limit:
                async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                    received += len(chunk)
                    if received > expected:
                        raise RegistryProtocolError("the blob is longer than its descriptor says")
                    # The consumer's time (disk, hashing) is not the registry's: the limit stands still meanwhile.
                    limit.reschedule(None)
                    paused = clock()
                    yield chunk
                    ends += clock() - paused
                    # Bytes buy time, at the slowest rate, but none can be saved up for a drip that comes later.
                    ends = min(ends + len(chunk) / SLOWEST_BYTES_PER_SECOND, clock() + patience)
                    limit.reschedule(ends)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransferInterruptedError(
                f"the blob's transfer broke off after {received} of {expected} bytes: {type(error).__name__}"
            ) from error
        if received < expected:
            raise TransferInterruptedError(f"the blob ended after {received} of {expected} bytes: unexpected EOF")

    # --- uploads -----------------------------------------------------------------------------------------------------

    async def blob_size(self, digest: str) -> int | None:
        """Bytes of a blob that the registry has; None: it has none of that digest. Raises RegistryError."""
        async with self._request("HEAD", f"blobs/{digest}", {}) as response:
            if response.status == 404:
                return None
            await self._raise_for_status(response, "HEAD")
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isascii() and length.isdigit() and len(length) < 19 else -1

    async def upload(self, digest: str, data: bytes) -> None:
        """Send a blob whole, and see that the registry holds it. Raises RegistryError."""
        async with self._request("POST", "blobs/uploads/", {}) as begun:
            await self._raise_for_status(begun, "POST", accepted={202})
            place = _location(begun, begun.url)
            asked = begun.url
        if place is None or not self._client.may_go(place, source=asked):
            raise RegistryProtocolError(
                f"the registry at {self._reference.host} answers an upload with an address that may not be used"
            )
        headers = {"Content-Type": "application/octet-stream"}
        target = place.extend_query(digest=digest)
        async with self._request("PUT", "", headers, data=data, url=target) as response:
            await self._raise_for_status(response, "PUT", accepted={201, 202, 204})
        if await self.blob_size(digest) != len(data):
            raise RegistryProtocolError(
                f"the registry at {self._reference.host} took {digest} but does not hold it as it was sent"
            )

    async def put_manifest(self, tag: str, data: bytes, media_type: str) -> None:
        """Put a manifest under a tag, and read it back by digest and by tag. Raises RegistryError."""
        async with self._request("PUT", f"manifests/{tag}", {"Content-Type": media_type}, data=data) as response:
            await self._raise_for_status(response, "PUT", accepted={200, 201, 202})
        for name in (f"sha256:{hashlib.sha256(data).hexdigest()}", tag):
            if (await self.manifest(name)).body != data:
                raise RegistryProtocolError(
                    f"the registry at {self._reference.host} holds another manifest under {name} than was sent"
                )

    # --- one request -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, headers: Mapping[str, str], *, data: bytes | None = None, url: URL | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the registry, answering one challenge (the first, or that of a token which expired meanwhile),
        correcting the scheme once, and waiting once when it states for how long. ``url``: in place of ``path``, where
        the registry directs an upload."""
        answered = waited = False
        for _ in range(4):
            pause = 0.0
            origin = self._client.origin(self._reference.host)
            target = url or origin / "v2" / self._reference.repository / path
            async with self._follow(method, target, headers, data) as response:
                if response.status == 401 and not answered and response.url.origin() == origin:
                    challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
                    authorization = await self._authenticator.answer(challenges)
                    self._authorization = authorization or self._authorization
                    retry = answered = bool(authorization)
                elif response.status == 400:
                    retry = await self._wants_https()
                elif response.status in {429, 503} and not waited:
                    pause = _retry_after(response)
                    retry = waited = pause > 0
                else:
                    retry = False
                if not retry:
                    yield response
                    return
            await asyncio.sleep(pause)
        self._authenticator.deny("the registry keeps asking for authentication")

    async def _wants_https(self) -> bool:
        """Whether plain HTTP was wrong; asked again, since the answer to a HEAD has no body."""
        origin = self._client.origin(self._reference.host)
        if origin.scheme != "http":
            return False
        async with self._client.send("GET", origin / "v2" / "", headers={}) as response:
            body = await response.content.read(_MAX_ERROR_BYTES) if response.status == 400 else b""
        wanted = any(phrase in body for phrase in _HTTP_TO_HTTPS)
        if wanted:
            self._client.speaks_https(self._reference.host)
        return wanted

    @asynccontextmanager
    async def _follow(
        self, method: str, url: URL, headers: Mapping[str, str], data: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        origin = source = self._client.origin(self._reference.host)
        followed: Collection[int] = _REDIRECTS if method in {"GET", "HEAD"} else _SAME_METHOD
        for _ in range(_MAX_REDIRECTS + 1):
            authorization = {}
            if self._authorization and url.origin() == origin:
                authorization = {"Authorization": self._authorization}
            async with self._client.send(
                method, url, headers={**headers, **authorization}, data=data, source=source
            ) as response:
                if response.status not in followed:
                    yield response
                    return
                target = _location(response, url)
                if target is None:
                    raise RegistryProtocolError(f"the registry at {authority(url)} redirects to nowhere")
                if not self._client.may_go(target, source=url):
                    raise RegistryProtocolError(
                        f"the registry at {authority(url)} redirects to {str(target.with_query(None))[:200]}, which is"
                        " refused: plain HTTP to a host that --insecure-registries does not list, or this machine"
                    )
                source, url = url, target
        raise RegistryProtocolError(f"the registry at {self._reference.host} redirects in circles")

    async def _raise_for_status(
        self, response: aiohttp.ClientResponse, method: str, *, accepted: Collection[int] = (200, 206)
    ) -> None:
        status = response.status
        if status in accepted:
            return
        detail = ""
        if method != "HEAD" and response.url.host == URL(f"//{self._reference.host}").host:
            detail = _server_message(await response.content.read(_MAX_ERROR_BYTES))
        if status in {401, 403}:
            self._authenticator.deny(detail or f"{status}")
        if status == 404 and method in {"GET", "HEAD"}:
            raise RegistryNotFoundError(f"{self._reference}: not found")
        hint = "; the registry limits how often this node may pull" if status == 429 else ""
        said = f"{status}{': ' + detail if detail else ''}{hint}"
        raise RegistryUnreachableError(
            f"unexpected status from {method} request to {response.url.with_query(None)}: {said}",
            reason=f"answers {method} with HTTP {said}",
        )


def _location(response: aiohttp.ClientResponse, url: URL) -> URL | None:
    """Where a redirect leads; None: to nowhere that can be asked. yarl takes a URL apart only as it is looked at, and
    some that are none are an IndexError there."""
    location = response.headers.get("Location", "")
    try:
        target = url.join(URL(location, encoded=True))
        return target if location and target.origin().host else None
    except (ValueError, IndexError):
        return None


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds (RFC 9110, section 10.2.3); 0: none given, too many, or a date."""
    text = response.headers.get("Retry-After", "").strip()
    seconds = int(text) if text.isascii() and text.isdigit() and len(text) <= 4 else 0
    return float(seconds) if seconds <= _LONGEST_PAUSE_SECONDS else 0.0


def _start_of(response: aiohttp.ClientResponse, offset: int) -> int:
    if response.status != 206:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isascii() or not first.isdigit() or len(first) > 18 or int(first) != offset:
        raise RegistryProtocolError("the registry answered with another range than was asked for")
    return offset


def _decode(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _server_message(body: bytes) -> str:
    """``code: message`` of the first error of a distribution-spec answer, tamed; empty for any other body."""
    errors = _decode(body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    text = f"{first.get('code', '')}: {first.get('message', '')}"[:200]
    return "".join(c if c.isprintable() else " " for c in text).strip(" :")
