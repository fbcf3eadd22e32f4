"""HTTP to registries, trusting nothing that comes back: connections, time-outs, and the errors that people see.

Rules that hold for every request: HTTPS, save for loopback and listed registries; connect and read time-outs; no
cookies, no transparent decompression, no credentials from the environment. A registry may lead a request elsewhere (a
redirect, a token server), but never from HTTPS to plain HTTP, nor from elsewhere to this machine.

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
import ipaddress
import logging
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from wasilet_common.oci.reference import is_loopback
from yarl import URL

from wasilet_node.settings import ImageSettings

logger = logging.getLogger(__name__)

USER_AGENT: Final = "wasilet"


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


def environment_proxy(url: URL) -> str | None:
    """The proxy that ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY`` name for a URL. Never one for loopback."""
    if is_loopback(authority(url)) or urllib.request.proxy_bypass(url.host or ""):
        return None
    return urllib.request.getproxies_environment().get(url.scheme)


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
        host = authority(target)
        if not target.host or target.user or target.password:
            return False
        if _names_this_machine(target) and not is_loopback(authority(source)):
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
        limit = self.settings.connect_timeout_seconds + self.settings.read_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                response = await self._open_session().request(
                    method,
                    url,
                    headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
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


def _names_this_machine(url: URL) -> bool:
    """Every spelling by which a resolver takes a host for this machine without asking anybody: unspecified and mapped
    addresses, ``localhost.``, and the C library's ``127.1`` or ``0x7f000001``."""
    name = (url.host or "").rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(socket.inet_aton(name))
    except (OSError, ValueError):
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def authority(url: URL) -> str:
    """``host[:port]`` as references write it, IPv6 in brackets."""
    host = url.host_subcomponent or ""
    return host if url.explicit_port is None else f"{host}:{url.explicit_port}"
