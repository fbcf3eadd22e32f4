"""The host functions of wasi-experimental-http: module ``wasi_experimental_http``, the ABI of the crate's 0.7 to 0.10.

Every function returns 0 or one of the crate's error numbers; results go through pointers into the guest's memory named
``memory``. Requests block the guest, which has its own process, so no thread is needed. Bodies are streamed.

What a guest may reach. A request passes when its origin (scheme, host and port; the crate compared hosts only) is in
the list of the container; so must every redirect, which otherwise ends with DESTINATION_NOT_ALLOWED. Guests share the
network of the node, and the list is the pod author's, so neither its names nor its literals lead to loopback, to
link-local addresses (cloud metadata services), multicast, the unspecified address, the node's own addresses, the
cluster's API server or a kubelet (``wasilet_common.addresses``). Every address that a name resolves to is judged, and
the one that was judged is connected to. An origin that the node's operator allows (``--allow-local-origins``) passes.
The crate's ``insecure:allow-all`` is no origin: it allows nothing.

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

import wasmtime
from wasilet_common import addresses

from wasilet_node.runtime.protocol import HttpPolicy

MODULE = "wasi_experimental_http"
CONNECT_TIMEOUT_SECONDS = 10.0
IDLE_TIMEOUT_SECONDS = 30.0
REQUEST_TIMEOUT_SECONDS = 120.0
"""From the call of ``req`` to the head of the last response, redirects included."""

MAX_REDIRECTS = 10
MAX_REQUEST_BODY_BYTES = 16 * 1024 * 1024
MAX_RESPONSE_BODY_BYTES = 128 * 1024 * 1024
MAX_TEXT_BYTES = 64 * 1024
"""A URL, or all headers of a request."""

MAX_OPEN_RESPONSES = 256
"""Where the policy sets no limit: each holds a descriptor."""

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


class _Response:
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

    def send(self, target: Target, method: str, headers: list[tuple[str, str]], body: bytes) -> _Response:
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
    ) -> _Response:
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
            return _Response(connection, response)
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


class _Memory:
    """The guest's memory, with bounds checked here: Python slices would silently be shorter."""

    def __init__(self, caller: Any) -> None:
        memory = caller.get("memory")
        if not isinstance(memory, wasmtime.Memory):
            raise HttpCallError(HttpErrno.MEMORY_NOT_FOUND)
        self._memory = memory
        self._caller = caller

    def read(self, pointer: int, length: int, limit: int) -> bytes:
        """``length`` bytes; over ``limit`` or outside of memory: BUFFER_TOO_SMALL, as the crate has it."""
        start, size = pointer & 0xFFFFFFFF, length & 0xFFFFFFFF
        if size > limit or start + size > self._memory.data_len(self._caller):
            raise HttpCallError(HttpErrno.BUFFER_TOO_SMALL)
        return bytes(self._memory.read(self._caller, start, start + size)) if size else b""

    def text(self, pointer: int, length: int) -> str:
        """A string. Raises UTF_8_ERROR."""
        try:
            return self.read(pointer, length, MAX_TEXT_BYTES).decode()
        except UnicodeDecodeError as error:
            raise HttpCallError(HttpErrno.UTF_8_ERROR) from error

    def check(self, pointer: int, size: int) -> int:
        """The pointer, unsigned. Raises MEMORY_ACCESS_ERROR when ``size`` bytes do not fit there."""
        start = pointer & 0xFFFFFFFF
        if start + size > self._memory.data_len(self._caller):
            raise HttpCallError(HttpErrno.MEMORY_ACCESS_ERROR)
        return start

    def write(self, pointer: int, data: bytes) -> None:
        """Write all of ``data``."""
        start = self.check(pointer, len(data))
        if data:
            self._memory.write(self._caller, data, start)

    def write_u32(self, pointer: int, value: int) -> None:
        """A little-endian number."""
        self.write(pointer, value.to_bytes(4, "little"))


class HttpHost:
    """The five functions. Defined once on a linker; each child gives its own copy its container's policy."""

    def __init__(self) -> None:
        self._client = HttpClient(None)
        self._max_open = MAX_OPEN_RESPONSES
        self._responses: dict[int, _Response] = {}
        self._next = 0

    def configure(self, policy: HttpPolicy | None) -> None:
        """Set what the guest may do; None: nothing."""
        self._client = HttpClient(policy)
        limit = policy.max_concurrent_requests if policy else None
        self._max_open = MAX_OPEN_RESPONSES if limit is None else min(limit, MAX_OPEN_RESPONSES)

    def define(self, linker: wasmtime.Linker) -> None:
        """Define the functions in ``linker``."""
        for name, function, count in (
            ("req", self._req, 10),
            ("close", self._close, 1),
            ("header_get", self._header_get, 6),
            ("headers_get_all", self._headers_get_all, 4),
            ("body_read", self._body_read, 4),
        ):
            signature = wasmtime.FuncType([wasmtime.ValType.i32()] * count, [wasmtime.ValType.i32()])
            linker.define_func(MODULE, name, signature, _guarded(function), access_caller=True)

    def _req(self, caller: Any, *numbers: int) -> None:
        url_at, url_len, method_at, method_len, head_at, head_len, body_at, body_len, status_at, handle_at = numbers
        if len(self._responses) >= self._max_open:
            raise HttpCallError(HttpErrno.TOO_MANY_SESSIONS)
        memory = _Memory(caller)
        target = parse_url(memory.text(url_at, url_len))
        self._client.check(target.origin)
        method = memory.text(method_at, method_len)
        if not _TOKEN.fullmatch(method) or method.upper() == "CONNECT":
            raise HttpCallError(HttpErrno.INVALID_METHOD)
        body = memory.read(body_at, body_len, MAX_REQUEST_BODY_BYTES)
        headers = parse_headers(memory.text(head_at, head_len))
        memory.check(status_at, 2)
        memory.check(handle_at, 4)
        response = self._client.send(target, method, headers, body)
        while self._next in self._responses:
            self._next = (self._next + 1) & 0x7FFFFFFF
        self._responses[self._next] = response
        memory.write(status_at, response.status.to_bytes(2, "little"))
        memory.write_u32(handle_at, self._next)

    def _close(self, _caller: Any, handle: int) -> None:
        # An unknown handle is fine: the crate's Drop panics on anything but 0.
        response = self._responses.pop(handle, None)
        if response is not None:
            response.close()

    def _header_get(self, caller: Any, *numbers: int) -> None:
        handle, name_at, name_len, value_at, value_len, written_at = numbers
        response = self._response(handle)
        memory = _Memory(caller)
        wanted = memory.text(name_at, name_len).lower()
        value = next((value for name, value in response.headers if name == wanted), None)
        if value is None:
            raise HttpCallError(HttpErrno.HEADER_NOT_FOUND)
        self._give(memory, value, value_at, value_len, written_at)

    def _headers_get_all(self, caller: Any, handle: int, buffer_at: int, buffer_len: int, written_at: int) -> None:
        response = self._response(handle)
        text = b"".join(name.encode() + b":" + value + b"\n" for name, value in response.headers)
        self._give(_Memory(caller), text, buffer_at, buffer_len, written_at)

    def _body_read(self, caller: Any, handle: int, buffer_at: int, buffer_len: int, read_at: int) -> None:
        response = self._response(handle)
        memory = _Memory(caller)
        memory.check(read_at, 4)
        memory.check(buffer_at, buffer_len & 0xFFFFFFFF)
        data = response.read(buffer_len & 0xFFFFFFFF)
        memory.write(buffer_at, data)
        memory.write_u32(read_at, len(data))

    def _response(self, handle: int) -> _Response:
        response = self._responses.get(handle)
        if response is None:
            raise HttpCallError(HttpErrno.INVALID_HANDLE)
        return response

    @staticmethod
    def _give(memory: _Memory, data: bytes, buffer_at: int, buffer_len: int, written_at: int) -> None:
        if len(data) > buffer_len & 0xFFFFFFFF:
            raise HttpCallError(HttpErrno.BUFFER_TOO_SMALL)
        memory.write(buffer_at, data)
        memory.write_u32(written_at, len(data))


def _guarded(function: Any) -> Any:
    """The error number instead of the exception; a defect of Wasilet's is RUNTIME_ERROR for the guest."""

    def call(caller: Any, *numbers: int) -> int:
        try:
            function(caller, *numbers)
        except HttpCallError as error:
            return int(error.errno)
        except Exception:  # noqa: BLE001 - the guest gets the crate's own number for it
            return int(HttpErrno.RUNTIME_ERROR)
        return int(HttpErrno.SUCCESS)

    return call
