"""The one module that knows the official client: a ``RESTClientObject`` of ``kubernetes.aio``, tuned for a node.

The lowest level of that package is used, its session and TLS set-up, and nothing of its generated layers: they decode
into models (ten times slower than JSON), and its URL templating and ``sanitize_for_serialization`` copy every body.
Importing the package costs 0.25 s of CPU and 18 MB beyond aiohttp, so it is imported here, late, while the supervisor
starts.

What the defaults get wrong for a node, and is set here:

- a total time-out of 300 s, also for watches, and 0 taken for unset: every request passes its own ``ClientTimeout``;
- a connection whose peer vanished is noticed after hours: TCP keepalive and user time-out cut that to half a minute;
- proxies of the environment apply to loopback too, unlike Go's clients: not here;
- Python 3.13's strict X.509 checks refuse the certificates that minikube and older k3s make, which Go accepts.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakSet

from wasilet_node.kube.kubeconfig import Cluster, Credentials

if TYPE_CHECKING:
    import aiohttp

_KEEPALIVE_IDLE_SECONDS = 15
_KEEPALIVE_INTERVAL_SECONDS = 5
_KEEPALIVE_PROBES = 3
_USER_TIMEOUT_MILLISECONDS = 30_000
_READ_BUFFER_BYTES = 256 * 1024
# A connection is closed in the loop's third turn at the latest; the bound is for a transport that never lets go.
_CLOSE_TURNS = 100


def load() -> None:
    """Import the official client now, for instance in a thread while something else is waited for."""
    import kubernetes.aio.client.configuration
    import kubernetes.aio.client.rest  # noqa: F401


class Transport:
    """Connections to one API server with one identity. ``limit``: parallel connections, 0 for no limit.

    Raises ValueError when the certificates cannot be loaded.
    """

    def __init__(self, cluster: Cluster, credentials: Credentials, *, limit: int, user_agent: str) -> None:
        from kubernetes.aio.client.configuration import Configuration
        from kubernetes.aio.client.rest import RESTClientObject

        configuration = Configuration(host=cluster.server, connection_pool_maxsize=limit)
        configuration.ca_cert_data = cluster.ca_data
        configuration.verify_ssl = not cluster.insecure_skip_tls_verify
        configuration.tls_server_name = cluster.tls_server_name
        configuration.disable_strict_ssl_verification = True
        configuration.proxy = cluster.proxy_url
        with _pair_file(credentials) as path:
            configuration.cert_file = path
            configuration.key_file = path
            try:
                self._rest: Any = RESTClientObject(configuration)
            except OSError as error:
                raise ValueError(f"the certificates for {cluster.server} cannot be loaded: {error}") from error
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._server = cluster.server
        self._limit = limit
        self._trust_env = not _is_loopback(cluster.server)
        self._headers = {"User-Agent": user_agent, "Accept": "application/json"}
        if credentials.token is not None:
            self._headers["Authorization"] = f"Bearer {credentials.token}"

    async def request(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,
        body: object | None = None,
        content_type: str = "application/json",
    ) -> aiohttp.ClientResponse:
        """Send one request; the caller reads and releases the response."""
        if self._rest.pool_manager is None:
            self._rest.pool_manager = self._session()
        response = await self._rest.request(
            method,
            self._server + path,
            headers={**self._headers, "Content-Type": content_type},
            body=body,
            _request_timeout=timeout,
        )
        raw: aiohttp.ClientResponse = response.response
        return raw

    async def close(self) -> None:
        """Close all connections, those included that a cancelled request was just making, and see them closed.

        A request that is cancelled between TCP's connect and the first turn of its TLS handshake leaves asyncio with
        a connection that is never closed (``SSLProtocol`` ignores ``close`` until its ``connection_made`` was called):
        its handshake would go on for as long as the loop runs. An end of the stream ends it like any other.
        """
        await self._rest.close()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for _ in range(_CLOSE_TURNS):
            if all(connection.fileno() < 0 for connection in list(self._sockets)):
                break
            await asyncio.sleep(0)

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        connector = aiohttp.TCPConnector(
            limit=self._limit, ssl=self._rest.ssl_context, keepalive_timeout=60.0, socket_factory=self._make_socket
        )
        return aiohttp.ClientSession(connector=connector, trust_env=self._trust_env, read_bufsize=_READ_BUFFER_BYTES)

    def _make_socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol = address[:3]
        made = socket.socket(family, kind, protocol)
        self._sockets.add(made)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MILLISECONDS)
        return made


def _is_loopback(server: str) -> bool:
    host = urlsplit(server).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _pair_file(credentials: Credentials) -> Iterator[str | None]:
    """A name under which OpenSSL can read certificate and key, which are never written to a disk for it."""
    if credentials.certificate is None or credentials.key is None:
        yield None
        return
    descriptor = os.memfd_create("client-pair", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as stream:
            stream.write(f"{credentials.certificate.rstrip()}\n{credentials.key.rstrip()}\n".encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
