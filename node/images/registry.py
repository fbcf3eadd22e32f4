"""A client of the distribution API that trusts nothing it is sent.

oras-py, which the harness pushes with, is not used here: its version 0.2.43 verifies neither digest nor size, reads
blobs whole into memory, has no time-outs, and retries for about two minutes on any error. A node needs the opposite of
each. So this is the small part of the distribution specification that a pull needs, on aiohttp: manifests by tag or
digest, blobs as a stream that resumes, and the Basic and Bearer challenges (with identity tokens) of the Docker
registry's token authentication.

Rules that hold for every request: HTTPS, save for loopback and listed registries; connect and read time-outs and a
bound on the whole; no cookies, no transparent decompression; redirects are followed by hand, the Authorization header
goes to the registry's own origin only, and a redirect never leads from HTTPS to plain HTTP nor from elsewhere to this
machine.

Errors::

    RegistryError
    ├── RegistryUnreachableError    refused, timed out, unknown host, TLS
    ├── RegistryAuthError           401, 403
    ├── RegistryNotFoundError       404
    ├── TransferInterruptedError    a blob's stream broke off; what came may be kept and resumed
    └── RegistryProtocolError       an answer that breaks the specification: digest, size, redirect
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from node.images import mediatypes
from node.images.challenge import Challenge, parse_challenges
from node.images.model import Credential
from node.images.reference import Reference, is_digest, is_loopback
from node.settings import ImageSettings

logger = logging.getLogger(__name__)

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""The distribution specification's suggested limit."""

_MAX_TOKEN_ANSWER_BYTES: Final = 256 * 1024
_MAX_ERROR_BYTES: Final = 8 * 1024
_MAX_REDIRECTS: Final = 5
_CHUNK_BYTES: Final = 256 * 1024
_SLOWEST_BYTES_PER_SECOND: Final = 16 * 1024
"""A registry that drips below this rate is given up on, as each byte would restart the read time-out."""

_USER_AGENT: Final = "wasilet"
_HTTP_TO_HTTPS: Final = b"HTTP request to an HTTPS server"


class RegistryError(Exception):
    """The root of what this module raises; the message is meant for people, and never holds a secret."""


class RegistryUnreachableError(RegistryError):
    """The registry gave no answer."""


class RegistryAuthError(RegistryError):
    """The registry wants other credentials than it was given."""


class RegistryNotFoundError(RegistryError):
    """No such repository, tag or blob."""


class TransferInterruptedError(RegistryError):
    """A stream ended early."""


class RegistryProtocolError(RegistryError):
    """The answer is not what the specification allows, or not what was asked for."""


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


def environment_proxy(url: URL) -> str | None:
    """The proxy that ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY`` name for a URL. Never one for loopback."""
    host = url.host or ""
    if is_loopback(host):
        return None
    proxies = urllib.request.getproxies_environment()
    return None if urllib.request.proxy_bypass(host) else proxies.get(url.scheme)


class RegistryClient:
    """Connections to all registries; one a node. ``close`` it."""

    def __init__(
        self,
        *,
        settings: ImageSettings,
        ssl_context: ssl.SSLContext | None = None,
        proxy: Callable[[URL], str | None] = environment_proxy,
    ) -> None:
        self.settings = settings
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None
        self._https_hosts: set[str] = set()

    def repository(self, reference: Reference, credential: Credential | None) -> Repository:
        """One repository, seen with one credential (None: anonymously). Tokens live as long as this object."""
        return Repository(client=self, reference=reference, credential=credential)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def origin(self, host: str) -> URL:
        """``https://host``, or ``http://host`` where plain HTTP is allowed and nothing showed otherwise."""
        scheme = "http" if self.plain_http_allowed(host) and host not in self._https_hosts else "https"
        return URL(f"{scheme}://{host}")

    def plain_http_allowed(self, host: str) -> bool:
        """Loopback, or listed as insecure."""
        return is_loopback(host) or host in self.settings.insecure_registries

    def speaks_https(self, host: str) -> None:
        """Remember that a host where plain HTTP is allowed wants HTTPS."""
        self._https_hosts.add(host)

    def may_go(self, target: URL, *, source: URL) -> bool:
        """Whether a request may be led from ``source`` to ``target`` by the registry's word."""
        host = _authority(target)
        if not target.host or target.user or target.password:
            return False
        if is_loopback(host) and not is_loopback(_authority(source)):
            return False
        return target.scheme == "https" or (
            target.scheme == "http" and source.scheme == "http" and self.plain_http_allowed(host)
        )

    @asynccontextmanager
    async def send(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, one answer, no redirects. Raises RegistryUnreachableError."""
        request = f'{method.capitalize()} "{url.with_query(None)}"'
        try:
            response = await self._open_session().request(
                method,
                url,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
                data=form,
                allow_redirects=False,
                proxy=self._proxy(url),
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise RegistryUnreachableError(f"failed to do request: {request}: {self._explain(error, url)}") from error
        try:
            yield response
        finally:
            response.close() if not response.content.at_eof() else response.release()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            settings = self.settings
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._ssl_context or ssl.create_default_context(), limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    connect=settings.connect_timeout_seconds,
                    sock_connect=settings.connect_timeout_seconds,
                    sock_read=settings.read_timeout_seconds,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    def _explain(self, error: Exception, url: URL) -> str:
        """Go's words for network errors, which kubectl users know, and what to do about it."""
        host = _authority(url)
        address = f"{url.host}:{url.port}"
        if isinstance(error, aiohttp.ClientProxyConnectionError):
            return "the proxy of HTTPS_PROXY or HTTP_PROXY does not answer; correct it, or add the host to NO_PROXY"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            reason = getattr(error.certificate_error, "verify_message", "") or "unknown authority"
            return f"tls: failed to verify certificate: x509: {reason}; trust its authority by SSL_CERT_FILE"
        if isinstance(error, aiohttp.ClientConnectorSSLError):
            if "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER" in str(error):
                return (
                    "http: server gave HTTP response to HTTPS client; if it speaks plain HTTP on purpose, "
                    f"list it: --insecure-registries {host}"
                )
            return "remote error: tls: handshake failure"
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return f"dial tcp: lookup {url.host}: no such host; is the registry's name spelt right?"
        if isinstance(error, aiohttp.ClientConnectorError):
            what = (error.os_error.strerror or "connection failed").lower()
            if isinstance(error.os_error, ConnectionRefusedError):
                what = "connection refused"
            return f"dial tcp {address}: connect: {what}; is the registry running at {host}?"
        if isinstance(error, aiohttp.SocketTimeoutError):
            limit = self.settings.read_timeout_seconds
            return f"net/http: timeout awaiting response headers ({limit:g} s); the registry at {host} is stuck"
        if isinstance(error, TimeoutError):
            limit = self.settings.connect_timeout_seconds
            return f"dial tcp {address}: i/o timeout ({limit:g} s); is the registry running at {host}?"
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return "EOF"
        return f"{type(error).__name__}: the answer is not HTTP, or the connection broke"


class Repository:
    """What a pull asks of one repository."""

    def __init__(self, *, client: RegistryClient, reference: Reference, credential: Credential | None) -> None:
        self._client = client
        self._reference = reference
        self._credential = credential
        self._authorization = ""

    async def resolve(self, target: str) -> str | None:
        """The digest that a tag (or digest) stands for; None: the registry does not say, ask for the manifest.

        Raises RegistryError.
        """
        async with (
            self._bounded("the manifest"),
            self._request("HEAD", f"manifests/{target}", {"Accept": mediatypes.ACCEPT}) as response,
        ):
            if response.status == 405:
                return None
            await self._raise_for_status(response, "HEAD")
            digest = response.headers.get("Docker-Content-Digest", "")
        if not is_digest(digest):
            return None
        if is_digest(target) and digest != target:
            raise RegistryProtocolError(f"the registry resolved {target} to another digest, {digest}")
        return digest

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
        deadline = self._client.settings.read_timeout_seconds * 2 + expected / _SLOWEST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(deadline) as limit:
                ends = limit.when()
                async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                    received += len(chunk)
                    if received > expected:
                        raise RegistryProtocolError("the blob is longer than its descriptor says")
                    # The consumer's time (disk, hashing) is not the registry's: the limit stands still meanwhile.
                    limit.reschedule(None)
                    paused = asyncio.get_running_loop().time()
                    yield chunk
                    if ends is not None:
                        ends += asyncio.get_running_loop().time() - paused
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
        """Ask the registry, answering one challenge (the first, or that of a token which expired meanwhile), and
        correcting the scheme once."""
        answered = False
        for _ in range(4):
            origin = self._client.origin(self._reference.host)
            url = origin / "v2" / self._reference.repository / path
            async with self._follow(method, url, headers) as response:
                if response.status == 401 and not answered and response.url.origin() == origin:
                    challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
                    retry = answered = await self._authenticate(challenges)
                elif response.status == 400 and origin.scheme == "http":
                    retry = _HTTP_TO_HTTPS in await response.content.read(_MAX_ERROR_BYTES)
                    if retry or method == "HEAD":
                        retry = True
                        self._client.speaks_https(self._reference.host)
                else:
                    retry = False
                if not retry:
                    yield response
                    return
        raise RegistryAuthError(self._denied("the registry keeps asking for authentication"))

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
                if target is None or not self._client.may_go(target, source=url):
                    raise RegistryProtocolError(f"the registry at {_authority(url)} redirects to where it may not")
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
        except ValueError:
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
                "client_id": _USER_AGENT,
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
        async with self._client.send(method, url, headers=headers, form=form) as response:
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


def _authority(url: URL) -> str:
    """``host[:port]`` as references write it."""
    return url.authority.rpartition("@")[2]


def _location(response: aiohttp.ClientResponse, url: URL) -> URL | None:
    location = response.headers.get("Location", "")
    try:
        return url.join(URL(location, encoded=True)) if location else None
    except ValueError:
        return None


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
