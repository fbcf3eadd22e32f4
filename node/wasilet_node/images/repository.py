"""One repository of a registry: manifests by tag or digest, blobs as a stream that resumes.

oras-py, which the harness pushes with, is not used here: its version 0.2.43 verifies neither digest nor size, reads
blobs whole into memory, has no time-outs, and retries for about two minutes on any error. A node needs the opposite of
each. So this is the small part of the distribution specification that a pull needs, with the Basic and Bearer
challenges (identity tokens, too) of the Docker registry's token authentication. Redirects are followed by hand, because
the Authorization header goes to the registry's own origin only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from wasilet_common.oci import mediatypes
from wasilet_common.oci.reference import Reference, is_digest
from yarl import URL

from wasilet_node.images.challenge import Challenge, parse_challenges
from wasilet_node.images.model import Credential
from wasilet_node.images.registry import (
    USER_AGENT,
    RegistryAuthError,
    RegistryClient,
    RegistryNotFoundError,
    RegistryProtocolError,
    RegistryUnreachableError,
    TransferInterruptedError,
    authority,
)

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""The distribution specification's suggested limit."""

_MAX_TOKEN_ANSWER_BYTES: Final = 256 * 1024
_MAX_ERROR_BYTES: Final = 8 * 1024
_MAX_REDIRECTS: Final = 5
_CHUNK_BYTES: Final = 256 * 1024
_SLOWEST_BYTES_PER_SECOND: Final = 16 * 1024
"""A registry that drips below this rate is given up on, as each byte would restart the read time-out."""

_LONGEST_PAUSE_SECONDS: Final = 10
"""What a registry may ask for by Retry-After; one that asks for more is left to the pull's back-off."""

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
    """What a pull asks of one repository, with one credential (None: anonymously). A token lives as long as this."""

    def __init__(self, *, client: RegistryClient, reference: Reference, credential: Credential | None) -> None:
        self._client = client
        self._reference = reference
        self._credential = credential
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
            self._bounded("the manifest"),
            self._request("HEAD", f"manifests/{target}", {"Accept": mediatypes.ACCEPT}) as response,
        ):
            if response.status == 405:
                return ""
            await self._raise_for_status(response, "HEAD")
            return response.headers.get("Docker-Content-Digest", "")

    async def manifest(self, target: str) -> Manifest:
        """A manifest by tag or digest, at most 4 MiB; by digest, its body is verified. Raises RegistryError."""
        async with (
            self._bounded("the manifest"),
            self._request("GET", f"manifests/{target}", {"Accept": mediatypes.ACCEPT}) as response,
        ):
            await self._raise_for_status(response, "GET")
            body = await _read(response, MAX_MANIFEST_BYTES, "the manifest")
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
                    ends = min(ends + len(chunk) / _SLOWEST_BYTES_PER_SECOND, clock() + patience)
                    limit.reschedule(ends)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TransferInterruptedError(
                f"the blob's transfer broke off after {received} of {expected} bytes: {type(error).__name__}"
            ) from error
        if received < expected:
            raise TransferInterruptedError(f"the blob ended after {received} of {expected} bytes: unexpected EOF")

    @asynccontextmanager
    async def _bounded(self, what: str) -> AsyncIterator[None]:
        settings = self._client.settings
        limit = 2 * settings.read_timeout_seconds + settings.connect_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError as error:
            raise RegistryUnreachableError(
                f"the registry at {self._reference.host} did not send {what} within {limit:g} s"
            ) from error
        except aiohttp.ClientError as error:
            raise RegistryUnreachableError(
                f"the connection to the registry at {self._reference.host} broke: {type(error).__name__}"
            ) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the registry, answering one challenge (the first, or that of a token which expired meanwhile),
        correcting the scheme once, and waiting once when it says for how long."""
        answered = waited = False
        for _ in range(4):
            pause = 0.0
            origin = self._client.origin(self._reference.host)
            url = origin / "v2" / self._reference.repository / path
            async with self._follow(method, url, headers) as response:
                if response.status == 401 and not answered and response.url.origin() == origin:
                    challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
                    retry = answered = await self._authenticate(challenges)
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
        raise RegistryAuthError(self._denied("the registry keeps asking for authentication"))

    async def _wants_https(self) -> bool:
        """Whether plain HTTP was wrong; asked anew, since the answer to a HEAD has no body."""
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
    async def _follow(self, method: str, url: URL, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        origin = url.origin()
        for _ in range(_MAX_REDIRECTS + 1):
            authorization = {}
            if self._authorization and url.origin() == origin:
                authorization = {"Authorization": self._authorization}
            async with self._client.send(method, url, headers={**headers, **authorization}) as response:
                if response.status not in {301, 302, 303, 307, 308}:
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
                url = target
        raise RegistryProtocolError(f"the registry at {self._reference.host} redirects in circles")

    async def _authenticate(self, challenges: list[Challenge]) -> bool:
        for challenge in challenges:
            if challenge.scheme == "bearer":
                self._authorization = f"Bearer {await self._token(challenge)}"
                return True
        if any(challenge.scheme == "basic" for challenge in challenges):
            if self._credential is None or not self._credential.username:
                raise RegistryAuthError(self._denied("no basic auth credentials"))
            self._authorization = _basic(self._credential)
            return True
        return False

    async def _token(self, challenge: Challenge) -> str:
        """https://distribution.github.io/distribution/spec/auth/token/ and /oauth/."""
        source = self._client.origin(self._reference.host)
        try:
            realm = URL(challenge.parameters.get("realm", ""))
            allowed = self._client.may_go(realm, source=source)
        except (ValueError, IndexError):
            allowed = False
        if not allowed:
            raise RegistryProtocolError(
                f"the registry at {self._reference.host} sends its clients to a token server that may not be used"
            )
        service = challenge.parameters.get("service", "")
        scope = challenge.parameters.get("scope", "") or f"repository:{self._reference.repository}:pull"
        credential = self._credential
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credential.identity_token,
                "service": service,
                "client_id": USER_AGENT,
                "scope": scope,
            }
            method, url = "POST", realm
            headers: dict[str, str] = {}
        else:
            form = None
            headers = {}
            query = [("service", service)] if service else []
            query += [("scope", part) for part in scope.split()]
            method, url = "GET", realm.extend_query(query)
            if credential is not None and credential.username:
                headers = {"Authorization": _basic(credential)}
        # Of its own, because a token that expires is asked for while blobs come in, whose limits are far longer.
        async with self._bounded("a token"), self._client.send(method, url, headers=headers, form=form) as response:
            if response.status in {400, 401, 403}:
                raise RegistryAuthError(self._denied(f"failed to fetch a token: {response.status}"))
            if response.status != 200:
                raise RegistryUnreachableError(
                    f"unexpected status from {method} request to {realm.with_query(None)}: {response.status}"
                )
            answer = _decode(await _read(response, _MAX_TOKEN_ANSWER_BYTES, "the token"))
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryProtocolError(f"the token server of {self._reference.host} answered without a token")
        return token

    async def _raise_for_status(self, response: aiohttp.ClientResponse, method: str) -> None:
        status = response.status
        if status in {200, 206}:
            return
        detail = ""
        if method != "HEAD" and response.url.host == URL(f"//{self._reference.host}").host:
            detail = _server_message(await response.content.read(_MAX_ERROR_BYTES))
        if status in {401, 403}:
            raise RegistryAuthError(self._denied(detail or f"{status}"))
        if status == 404:
            raise RegistryNotFoundError(f"{self._reference}: not found")
        hint = "; the registry limits how often this node may pull" if status == 429 else ""
        raise RegistryUnreachableError(
            f"unexpected status from {method} request to {response.url.with_query(None)}: "
            f"{status}{': ' + detail if detail else ''}{hint}"
        )

    def _denied(self, why: str) -> str:
        if self._credential is None:
            hint = f"name a pull secret for {self._reference.registry} in the pod's imagePullSecrets"
        else:
            hint = f"the pull secret for {self._credential.registry} is not accepted"
        return f"pull access denied, repository does not exist or may require authorization: {why}; {hint}"


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
    """Seconds (RFC 9110, section 10.2.3); 0: none said, too many, or a date."""
    text = response.headers.get("Retry-After", "").strip()
    seconds = int(text) if text.isascii() and text.isdigit() and len(text) <= 4 else 0
    return float(seconds) if seconds <= _LONGEST_PAUSE_SECONDS else 0.0


def _basic(credential: Credential) -> str:
    return aiohttp.encode_basic_auth(credential.username, credential.password)


def _start_of(response: aiohttp.ClientResponse, offset: int) -> int:
    if response.status != 206:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isascii() or not first.isdigit() or len(first) > 18 or int(first) != offset:
        raise RegistryProtocolError("the registry answered with another range than was asked for")
    return offset


async def _read(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    if response.content_length is not None and response.content_length > limit:
        raise RegistryProtocolError(f"{what} has {response.content_length} bytes, more than the {limit} allowed")
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit:
            raise RegistryProtocolError(f"{what} has more than the {limit} bytes allowed")
    return bytes(body)


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
