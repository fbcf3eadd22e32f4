"""The HTTP client that answers a guest's calls: what a guest may reach, and what of a response it gets.

A request passes when its origin (scheme, host and port; the crate compared hosts only) is in the list of the container;
so must every redirect, which otherwise ends with DESTINATION_NOT_ALLOWED. Guests share the network of the node, and the
list is the pod author's, so neither its names nor its literals lead to loopback, to link-local addresses (cloud
metadata services), multicast, the unspecified address, the node's own addresses, the cluster's API server or a kubelet
(``wasilet_common.addresses``). Every address that a name resolves to is judged, and the one that was judged is
connected to. An origin that the node's operator allows (``--allow-local-origins``) passes. The crate's
``insecure:allow-all`` is no origin: it allows nothing.

Host, Content-Length and the hop-by-hop headers are Wasilet's: a guest that set Host could speak to a neighbour of the
server that it may speak to.
"""

from __future__ import annotations

import base64
import encodings.idna  # noqa: F401 - getaddrinfo needs it, and a sandbox must not import
import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from wasilet_common import addresses

from wasilet_node.runtime.protocol import HttpPolicy

CONNECT_TIMEOUT_SECONDS = 10.0
IDLE_TIMEOUT_SECONDS = 30.0
REQUEST_TIMEOUT_SECONDS = 120.0
"""From the call of ``req`` to the head of the last response, redirects included."""

MAX_REDIRECTS = 10
MAX_REQUEST_BODY_BYTES = 16 * 1024 * 1024
MAX_RESPONSE_BODY_BYTES = 128 * 1024 * 1024

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BAD_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_BAD_URL = re.compile(r"[\x00-\x20\x7f\\]")
_OURS = frozenset({"host", "content-length", "connection", "transfer-encoding", "upgrade", "te", "trailer", "expect",
                   "keep-alive", "proxy-authorization", "proxy-connection"})  # fmt: skip
_SECRET = frozenset({"authorization", "cookie", "cookie2", "www-authenticate"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class HttpErrno(IntEnum):
    """The crate's ``HTTP_ERROR``."""

    SUCCESS = 0
    INVALID_HANDLE = 1
    MEMORY_NOT_FOUND = 2
    MEMORY_ACCESS_ERROR = 3
    BUFFER_TOO_SMALL = 4
    HEADER_NOT_FOUND = 5
    UTF_8_ERROR = 6
    DESTINATION_NOT_ALLOWED = 7
    INVALID_METHOD = 8
    INVALID_ENCODING = 9
    INVALID_URL = 10
    REQUEST_ERROR = 11
    RUNTIME_ERROR = 12
    TOO_MANY_SESSIONS = 13


class HttpCallError(Exception):
    """Ends a host function with ``errno``."""

    def __init__(self, errno: HttpErrno, message: str = "") -> None:
        super().__init__(message or errno.name)
        self.errno = errno


class Origin(NamedTuple):
    """Scheme, host in lower case, and port."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Target:
    """A URL taken apart."""

    origin: Origin
    path: str
    authorization: str | None


def parse_url(url: str) -> Target:
    """Take an absolute URL apart. Raises HttpCallError INVALID_URL; schemes are judged by the origin, not here."""
    if _BAD_URL.search(url):
        raise HttpCallError(HttpErrno.INVALID_URL)
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        if not host or not parts.scheme:
            raise HttpCallError(HttpErrno.INVALID_URL)
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        user, password = parts.username, parts.password
    except ValueError as error:
        raise HttpCallError(HttpErrno.INVALID_URL) from error
    scheme = parts.scheme.lower()
    path = urllib.parse.quote(parts.path or "/", safe="/%!$&'()*+,;=:@~-._")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe="/?%!$&'()*+,;=:@~-._[]")
    authorization = None
    if user is not None:
        pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    effective = port if port is not None else _DEFAULT_PORTS.get(scheme, 0)
    return Target(origin=Origin(scheme, host.lower(), effective), path=path, authorization=authorization)


def is_method(text: str) -> bool:
    """Whether a guest may name it: a token of RFC 9110, and no tunnel."""
    return _TOKEN.fullmatch(text) is not None and text.upper() != "CONNECT"


def parse_headers(text: str) -> list[tuple[str, str]]:
    """Header lines ``name:value``. Raises HttpCallError INVALID_ENCODING. Headers that are Wasilet's are left out."""
    headers = []
    for line in text.split("\n"):
        entry = line.removesuffix("\r")
        if not entry:
            continue
        name, colon, value = entry.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _BAD_VALUE.search(value):
            raise HttpCallError(HttpErrno.INVALID_ENCODING)
        if name.lower() not in _OURS:
            headers.append((name, value.strip()))
    return headers


def allowed_origins(origins: tuple[str, ...]) -> frozenset[Origin]:
    """The origins of a policy; entries that are no http or https URL allow nothing."""
    found = set()
    for text in origins:
        try:
            origin = parse_url(text).origin
        except HttpCallError:
            continue
        if origin.scheme in _DEFAULT_PORTS:
            found.add(origin)
    return frozenset(found)


class _Answer(io.RawIOBase):
    """The bytes that a server sends. A socket's own limit begins again with every byte, so a server that drips could
    hold its guest for ever: there is one for the whole head, too."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline: float | None = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What ``http.client`` asks of a socket."""
        return io.BufferedReader(self)

    def head_ended(self) -> None:
        """From here on each read has the idle limit alone."""
        self._deadline = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError."""
        left = IDLE_TIMEOUT_SECONDS
        if self._deadline is not None:
            left = min(left, self._deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError("the head of the answer did not come in time")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Give the socket back."""
        self._raw.close()
        super().close()


class Response:
    """An open response; its body is read as the guest asks."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._left = MAX_RESPONSE_BODY_BYTES
        self.status = response.status
        self.headers: list[tuple[str, bytes]] = []
        for name, value in response.getheaders():
            raw = value.encode("latin-1", errors="replace")
            try:
                raw.decode()
            except UnicodeDecodeError:
                raw = value.encode()
            if not _BAD_VALUE.search(value):
                self.headers.append((name.lower(), raw))

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, b"" at the end."""
        try:
            data = self._response.read1(min(size, 1024 * 1024)) if size else b""
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise HttpCallError(HttpErrno.REQUEST_ERROR, str(error)) from error
        self._left -= len(data)
        if self._left < 0:
            raise HttpCallError(HttpErrno.REQUEST_ERROR, "the response body is too large")
        return data

    def close(self) -> None:
        """Free the descriptor."""
        self._response.close()
        self._connection.close()


class HttpClient:
    """Sends requests under one policy."""

    def __init__(self, policy: HttpPolicy | None) -> None:
        policy = policy or HttpPolicy(allowed_origins=())
        self._allowed = allowed_origins(policy.allowed_origins)
        self._local = allowed_origins(policy.local_origins)
        self._guard = addresses.guard(
            own=policy.own_addresses, endpoints=policy.api_servers, ports=policy.kubelet_ports
        )
        self._tls: ssl.SSLContext | None = None

    def check(self, origin: Origin) -> None:
        """Raises HttpCallError DESTINATION_NOT_ALLOWED unless the policy names the origin, and it may be called."""
        if origin not in self._allowed:
            raise HttpCallError(HttpErrno.DESTINATION_NOT_ALLOWED)
        self._judge(origin, origin.host)

    def _judge(self, origin: Origin, host: str) -> None:
        """``host``: the origin's, or an address that it resolves to. Raises as ``check`` does."""
        refusal = "" if origin in self._local else self._guard.refusal(host, origin.port)
        if refusal:
            raise HttpCallError(HttpErrno.DESTINATION_NOT_ALLOWED, f"{host} is {refusal}")

    def send(self, target: Target, method: str, headers: list[tuple[str, str]], body: bytes) -> Response:
        """The response after redirects. Raises HttpCallError."""
        deadline = time.monotonic() + REQUEST_TIMEOUT_SECONDS
        for _ in range(MAX_REDIRECTS + 1):
            self.check(target.origin)
            answer = self._send_one(target, method, headers, body, deadline)
            location = next((value for name, value in answer.headers if name == "location"), None)
            if answer.status not in (301, 302, 303, 307, 308) or location is None:
                return answer
            answer.close()
            base = f"{target.origin.scheme}://{_netloc(target.origin)}{target.path}"
            following = parse_url(urllib.parse.urljoin(base, location.decode(errors="replace")))
            if answer.status == 303 or (answer.status in (301, 302) and method == "POST"):
                method = "HEAD" if method == "HEAD" else "GET"
                body = b""
                headers = [pair for pair in headers if not pair[0].lower().startswith("content-")]
            if following.origin != target.origin:
                headers = [pair for pair in headers if pair[0].lower() not in _SECRET]
            target = following
        raise HttpCallError(HttpErrno.REQUEST_ERROR, "too many redirects")

    def _send_one(
        self, target: Target, method: str, headers: list[tuple[str, str]], body: bytes, deadline: float
    ) -> Response:
        connection = http.client.HTTPConnection(target.origin.host, target.origin.port)
        try:
            connection.sock = self._connect(target.origin, deadline)
            names = {name.lower() for name, _ in headers}
            connection.putrequest(method, target.path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", _netloc(target.origin))
            for name, value in headers:
                connection.putheader(name, value.encode())
            for name, default in (("accept", "*/*"), ("user-agent", "wasilet")):
                if name not in names:
                    connection.putheader(name, default)
            if target.authorization and "authorization" not in names:
                connection.putheader("Authorization", target.authorization)
            if body or method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            answer = _Answer(connection.sock, deadline)
            response = http.client.HTTPResponse(answer, method=method)  # type: ignore[arg-type]
            try:
                response.begin()
            except BaseException:
                response.close()
                raise
            answer.head_ended()
            return Response(connection, response)
        except HttpCallError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise HttpCallError(HttpErrno.REQUEST_ERROR, str(error)) from error

    def _connect(self, origin: Origin, deadline: float) -> socket.socket:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        last: OSError | None = None
        for entry in found:
            self._judge(origin, str(entry[4][0]))
        for family, kind, protocol, _, address in found:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(min(CONNECT_TIMEOUT_SECONDS, left))
                sock.connect(address)
                self._judge_connection(origin, sock)
                if origin.scheme == "https":
                    sock = self._context().wrap_socket(sock, server_hostname=origin.host)
                sock.settimeout(min(IDLE_TIMEOUT_SECONDS, max(left, 1.0)))
                return sock
            except HttpCallError:
                sock.close()
                raise
            except OSError as error:
                sock.close()
                last = error
        raise last or TimeoutError(f"no connection to {origin.host}:{origin.port} in time")

    def _judge_connection(self, origin: Origin, sock: socket.socket) -> None:
        """The kernel's answer, before a byte is sent: a machine that connects to itself has one address at both ends.
        So an address that the node got after the policy was made is refused, too."""
        if origin not in self._local and sock.getsockname()[0] == sock.getpeername()[0]:
            raise HttpCallError(HttpErrno.DESTINATION_NOT_ALLOWED, f"{origin.host} is the node itself")

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _netloc(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return host if origin.port == _DEFAULT_PORTS[origin.scheme] else f"{host}:{origin.port}"
