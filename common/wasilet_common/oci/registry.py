"""HTTP to registries, trusting nothing that comes back: connections, time-outs, and the errors that people see.

Rules that hold for every request: HTTPS, save for loopback and listed registries; connect and read time-outs; no
cookies, no transparent decompression, no credentials from the environment. A registry may lead a request elsewhere (a
redirect, a token server, where to upload), but never from HTTPS to plain HTTP, nor to what is nearer to this machine
than the registry is: from a public address to a private one, from elsewhere to loopback, from anywhere to link-local
addresses. What a name resolves to is judged, and the address that was judged is connected to.

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
import io
import logging
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from wasilet_common import addresses
from wasilet_common.addresses import Reach
from wasilet_common.oci.reference import is_loopback

logger = logging.getLogger(__name__)

USER_AGENT: Final = "wasilet"
SLOWEST_BYTES_PER_SECOND: Final = 16 * 1024
"""A registry that drips below this rate is given up on, as each byte would restart the read time-out."""

_CHUNK_BYTES: Final = 256 * 1024
_MAX_KNOWN_HOSTS: Final = 1024


class ClientSettings(Protocol):
    """How to reach registries; the node has more settings than these."""

    @property
    def insecure_registries(self) -> tuple[str, ...]:
        """``host[:port]`` of registries reached by plain HTTP. Loopback always may be."""

    @property
    def connect_timeout_seconds(self) -> float: ...

    @property
    def read_timeout_seconds(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Reaching:
    """``ClientSettings`` for a command."""

    insecure_registries: tuple[str, ...] = ()
    connect_timeout_seconds: float = 5.0
    read_timeout_seconds: float = 30.0


class RegistryError(Exception):
    """The root of what this module raises; the message is meant for people, and never holds a secret."""


class RegistryUnreachableError(RegistryError):
    """The registry gave no answer. ``reason``: why, without what was asked for; empty where that is all."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class RegistryAuthError(RegistryError):
    """The registry wants other credentials than it was given. ``why``: its own message, or its status."""

    def __init__(self, message: str, *, why: str = "") -> None:
        super().__init__(message)
        self.why = why


class RegistryNotFoundError(RegistryError):
    """No such repository, tag or blob."""


class TransferInterruptedError(RegistryError):
    """A stream ended early."""


class RegistryProtocolError(RegistryError):
    """The answer is not what the specification allows, or not what was asked for."""


def environment_proxy(url: URL) -> str | None:
    """The proxy that ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY`` name for a URL. Never one for loopback."""
    if is_loopback(authority(url)) or urllib.request.proxy_bypass(url.host or ""):
        return None
    return urllib.request.getproxies_environment().get(url.scheme)


class _Remembering(ThreadedResolver):
    """Keeps what each host resolved to, since that is where its answers come from."""

    def __init__(self, known: dict[str, list[str]]) -> None:
        super().__init__()
        self._known = known

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError."""
        found = await super().resolve(host, port, family)
        if len(self._known) >= _MAX_KNOWN_HOSTS:
            self._known.clear()
        self._known[host] = [entry["host"] for entry in found]
        return found


class _Judging(_Remembering):
    """Refuses a host any of whose addresses is nearer than ``limit``."""

    def __init__(self, known: dict[str, list[str]], limit: Reach) -> None:
        super().__init__(known)
        self._limit = limit

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError, RegistryProtocolError."""
        found = await super().resolve(host, port, family)
        for entry in found:
            _check_reach(host, entry["host"], self._limit)
        return found


class RegistryClient:
    """Connections to all registries; one per node or command. ``close`` it."""

    def __init__(
        self,
        *,
        settings: ClientSettings,
        ssl_context: ssl.SSLContext | None = None,
        proxy: Callable[[URL], str | None] = environment_proxy,
        reach: Callable[[addresses.Address], Reach] = addresses.reach,
    ) -> None:
        """``reach``: how far a registry's address is; tests take one of this machine for a public one."""
        self.settings = settings
        self._reach = reach
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._known: dict[str, list[str]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._https_hosts: set[str] = set()

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
        """Whether a request may be led from ``source`` to ``target`` by the registry, as far as it can be judged
        without a look-up."""
        host = authority(target)
        if not target.host or target.user or target.password:
            return False
        near = _written_reach(target.host)
        if near >= Reach.LOOPBACK and near > _written_reach(source.host or ""):
            return False
        return target.scheme == "https" or (
            target.scheme == "http" and source.scheme == "http" and self.plain_http_allowed(host)
        )

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        data: bytes | Mapping[str, str] | None = None,
        source: URL | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, one answer, no redirects. ``data``: a body, or a form's fields. ``source``: the registry that
        led here. Raises RegistryUnreachableError; RegistryProtocolError when it led astray."""
        request = f'{method.capitalize()} "{url.with_query(None)}"'
        limit = self.settings.connect_timeout_seconds + self.settings.read_timeout_seconds
        body = io.BytesIO(data) if isinstance(data, bytes) else data
        if isinstance(data, bytes):
            limit += len(data) / SLOWEST_BYTES_PER_SECOND
        async with self._session_for(url, source) as session:
            try:
                async with asyncio.timeout(limit):
                    response = await session.request(
                        method,
                        url,
                        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
                        data=body,
                        allow_redirects=False,
                        proxy=self._proxy(url),
                    )
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                reason = self._explain(error, url)
                raise RegistryUnreachableError(f"failed to do request: {request}: {reason}", reason=reason) from error
            try:
                yield response
            finally:
                response.close() if not response.content.at_eof() else response.release()

    @asynccontextmanager
    async def bounded(self, what: str, host: str) -> AsyncIterator[None]:
        """A limit for a whole small answer. Raises RegistryUnreachableError naming it."""
        limit = 2 * self.settings.read_timeout_seconds + self.settings.connect_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError as error:
            reason = f"the registry at {host} did not send {what} within {limit:g} s"
            raise RegistryUnreachableError(reason, reason=reason) from error
        except aiohttp.ClientError as error:
            reason = f"the connection to the registry at {host} broke: {type(error).__name__}"
            raise RegistryUnreachableError(reason, reason=reason) from error

    @asynccontextmanager
    async def _session_for(self, url: URL, source: URL | None) -> AsyncIterator[aiohttp.ClientSession]:
        """The one of all, or one for a single request to where a registry led: its connections were judged."""
        if source is None or source.origin() == url.origin():
            if self._session is None:
                self._session = self._new_session(_Remembering(self._known))
            yield self._session
            return
        limit = self._limit(source)
        if addresses.literal(url.host or "") is not None:
            _check_reach(authority(url), url.host or "", limit)
        # A proxy resolves names by itself; it is the user's, and may be anywhere.
        resolver = _Remembering(self._known) if self._proxy(url) else _Judging(self._known, limit)
        session = self._new_session(resolver)
        try:
            yield session
        finally:
            await session.close()

    def _limit(self, source: URL) -> Reach:
        """How near a registry may lead: as near as the farthest address that it resolved to. From nowhere to link-local
        addresses."""
        host = source.host or ""
        found = [addresses.literal(text) for text in self._known.get(host, [])] or [addresses.literal(host)]
        reached = [self._reach(address) for address in found if address is not None]
        return min(*reached, Reach.LOOPBACK) if reached else Reach.PUBLIC

    def _new_session(self, resolver: aiohttp.abc.AbstractResolver) -> aiohttp.ClientSession:
        settings = self.settings
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl_context, limit=0, resolver=resolver),
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

    def _explain(self, error: Exception, url: URL) -> str:
        """Go's wording for network errors, which kubectl users know, and what to do about it."""
        host = authority(url)
        address = f"{url.host_subcomponent}:{url.port}"
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
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            limit = self.settings.connect_timeout_seconds
            return f"dial tcp {address}: i/o timeout ({limit:g} s); is the registry running at {host}?"
        if isinstance(error, TimeoutError):
            limit = self.settings.read_timeout_seconds
            return f"net/http: timeout awaiting response headers ({limit:g} s); the registry at {host} is stuck"
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return "EOF"
        return f"{type(error).__name__}: the answer is not HTTP, or the connection broke"


def _written_reach(host: str) -> Reach:
    """Of a host as it is written; a name that is not this machine's says nothing, so it counts as public."""
    if addresses.names_this_machine(host):
        return Reach.LOOPBACK
    address = addresses.literal(host)
    return Reach.PUBLIC if address is None else addresses.reach(address)


def _check_reach(host: str, text: str, limit: Reach) -> None:
    address = addresses.literal(text)
    if address is not None and addresses.reach(address) > limit:
        raise RegistryProtocolError(
            f"the registry leads to {host} at {text}, which is nearer to this machine than the registry itself is"
        )


async def read_bounded(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    """A whole body. Raises RegistryProtocolError when it has more than ``limit`` bytes."""
    if response.content_length is not None and response.content_length > limit:
        raise RegistryProtocolError(f"{what} has {response.content_length} bytes, more than the {limit} allowed")
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit:
            raise RegistryProtocolError(f"{what} has more than the {limit} bytes allowed")
    return bytes(body)


def authority(url: URL) -> str:
    """``host[:port]`` as references write it, IPv6 in brackets."""
    host = url.host_subcomponent or ""
    return host if url.explicit_port is None else f"{host}:{url.explicit_port}"
