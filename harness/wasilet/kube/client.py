"""A small synchronous client of the API server, on the standard library.

The harness asks a dozen questions and must answer ``up`` on a running cluster within a second; importing
``kubernetes.client`` alone takes a third of that. JSON in, JSON out. One connection is kept open; an object may be
used from several threads, one request at a time.

Keys never touch the disk here: OpenSSL reads them from an anonymous memory file.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from wasilet.errors import ApiError, UsageError
from wasilet.kube.credentials import Credentials, read_credentials

KubeObject = dict[str, Any]
KEEP_SECONDS = 30.0
"""A connection that was idle for longer is not used again: API servers close theirs after 90 s or more."""

MAX_ERROR_BYTES = 64 * 1024
CHUNK_BYTES = 64 * 1024


class Hangup:
    """Ends watches and streams from another thread: what reads them gets an ApiError at once. Used once."""

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it was ended."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Until it is ended, ``seconds`` at most; whether it was."""
        return self._ended.wait(seconds)

    def add(self, connection: http.client.HTTPConnection) -> None:
        """To be ended too."""
        with self._lock:
            if connection.sock is not None:
                self._sockets.add(connection.sock)
                if self.done:
                    _shut(connection.sock)

    def discard(self, open_socket: socket.socket | None) -> None:
        """Over by itself."""
        with self._lock:
            if open_socket is not None:
                self._sockets.discard(open_socket)

    def end(self) -> None:
        """End all there are, and all that will be added."""
        with self._lock:
            self._ended.set()
            for open_socket in self._sockets:
                _shut(open_socket)
            self._sockets.clear()


def _shut(open_socket: socket.socket) -> None:
    # The TCP connection below: shutting TLS down is not safe while another thread reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


class Kube:
    """Requests to one API server. Paths are API paths, as ``/api/v1/nodes``."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        parts = urlsplit(credentials.server)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"{credentials.server!r} is no address of an API server")
        self._https = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._https else 80)
        self._prefix = parts.path.rstrip("/")
        self._context: ssl.SSLContext | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._used = 0.0
        self._lock = threading.Lock()

    @classmethod
    def from_kubeconfig(cls, path: Path, *, context: str = "") -> Kube:
        """A client for a context (by default the current one) of a kubeconfig file. Raises UsageError."""
        return cls(read_credentials(path, context=context))

    @property
    def server(self) -> str:
        """The base URL."""
        return self._credentials.server

    # --- verbs -----------------------------------------------------------------------------------------------------

    def get(self, path: str, *, timeout_seconds: float = 10.0, **query: str) -> KubeObject:
        """Read an object or a list. Raises ApiError (``code`` 404 when there is none)."""
        return self.request("GET", path, query=query, timeout_seconds=timeout_seconds)

    def find(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject | None:
        """Read an object; None when there is none."""
        try:
            return self.get(path, timeout_seconds=timeout_seconds)
        except ApiError as error:
            if error.code == http.HTTPStatus.NOT_FOUND:
                return None
            raise

    def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        """POST to a collection."""
        return self.request("POST", path, body=body, timeout_seconds=timeout_seconds)

    def replace(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        """PUT an object."""
        return self.request("PUT", path, body=body, timeout_seconds=timeout_seconds)

    def patch(
        self,
        path: str,
        body: Any,
        *,
        content_type: str = "application/merge-patch+json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        """PATCH an object."""
        return self.request("PATCH", path, body=body, content_type=content_type, timeout_seconds=timeout_seconds)

    def delete(self, path: str, *, timeout_seconds: float = 10.0, **query: str) -> bool:
        """Delete an object; False when there was none."""
        try:
            self.request("DELETE", path, query=query, timeout_seconds=timeout_seconds)
        except ApiError as error:
            if error.code == http.HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    def ready(self, *, timeout_seconds: float = 2.0) -> bool:
        """Whether ``/readyz`` reports ready."""
        try:
            status, _ = self._exchange("GET", "/readyz", None, {}, timeout_seconds)
        except ApiError:
            return False
        return status == http.HTTPStatus.OK

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        """One request; the decoded answer. Raises ApiError with the server's own message."""
        target = path + ("?" + urlencode(query) if query else "")
        try:
            data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            # Of a test that hands over a date, say; manifests hold what JSON knows.
            raise UsageError(f"{method} {path}: the object is no JSON: {error}") from error
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if data is not None else {})
        status, answer = self._exchange(method, target, data, headers, timeout_seconds)
        try:
            decoded = json.loads(answer) if answer else {}
        except ValueError:
            decoded = {"message": answer.decode(errors="replace").strip()}
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise _refused(status, decoded, f"{method} {path}")
        return decoded if isinstance(decoded, dict) else {}

    def body(self, path: str, *, timeout_seconds: float = 10.0, **query: str) -> bytes:
        """What a GET answers, as it is: a container's log, metrics. Raises ApiError with the server's message."""
        target = path + ("?" + urlencode(query) if query else "")
        status, answer = self._exchange("GET", target, None, {}, timeout_seconds)
        if status >= http.HTTPStatus.BAD_REQUEST:
            try:
                decoded = json.loads(answer)
            except ValueError:
                decoded = {"message": answer.decode(errors="replace").strip()}
            raise _refused(status, decoded, f"GET {path}")
        return answer

    @contextlib.contextmanager
    def watch(
        self,
        path: str,
        hangup: Hangup | None = None,
        /,
        *,
        timeout_seconds: int = 300,
        idle_seconds: float = 330.0,
        **query: str,
    ) -> Iterator[Iterator[KubeObject]]:
        """A watch on its own connection: yields ``{"type": ..., "object": ...}`` until the server ends it after
        ``timeout_seconds``. Raises ApiError, also when nothing came for ``idle_seconds`` or ``hangup`` ended it."""
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_seconds)}
        connection = self._open(idle_seconds)
        open_socket = None
        try:
            with self._unreachable():
                connection.request("GET", f"{self._prefix}{path}?{urlencode(query)}", headers=self._headers({}))
                open_socket = connection.sock
                if hangup is not None:
                    hangup.add(connection)
                response = connection.getresponse()
            if response.status >= http.HTTPStatus.BAD_REQUEST:
                with contextlib.suppress(ValueError):
                    raise _refused(response.status, json.loads(response.read() or b"{}"), f"WATCH {path}")
                raise _refused(response.status, {}, f"WATCH {path}")
            yield self._events(response)
        finally:
            if hangup is not None:
                hangup.discard(open_socket)
            connection.close()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[KubeObject]:
        while True:
            with self._unreachable():
                line = response.readline()
            if not line:
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ApiError("the watch sent something that is not JSON") from error

    @contextlib.contextmanager
    def stream(
        self, path: str, hangup: Hangup | None = None, /, *, idle_seconds: float = 330.0, **query: str
    ) -> Iterator[Iterator[str]]:
        """A body that comes line by line, as a log that is followed, on its own connection. Raises ApiError, also
        when nothing came for ``idle_seconds``, ``hangup`` ended it, or it broke off."""
        with self.chunks(path, hangup, idle_seconds=idle_seconds, **query) as chunks:
            yield _lines(chunks)

    @contextlib.contextmanager
    def chunks(
        self, path: str, hangup: Hangup | None = None, /, *, idle_seconds: float = 330.0, **query: str
    ) -> Iterator[Iterator[bytes]]:
        """As :meth:`stream`, in pieces as large as they come."""
        connection = self._open(idle_seconds)
        open_socket = None
        try:
            with self._unreachable():
                target = f"{self._prefix}{path}" + ("?" + urlencode(query) if query else "")
                connection.request("GET", target, headers=self._headers({}))
                open_socket = connection.sock
                if hangup is not None:
                    hangup.add(connection)
                response = connection.getresponse()
            if response.status >= http.HTTPStatus.BAD_REQUEST:
                body = response.read(MAX_ERROR_BYTES)
                try:
                    answer = json.loads(body)
                except ValueError:
                    answer = {"message": body.decode(errors="replace").strip()}
                raise _refused(response.status, answer, f"GET {path}")
            yield self._pieces(response)
        finally:
            if hangup is not None:
                hangup.discard(open_socket)
            connection.close()

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while True:
            with self._unreachable():
                # Not readline: http.client takes a chunked body that broke off for one that ended.
                piece = response.read1(CHUNK_BYTES)
            if not piece:
                return
            yield piece

    def close(self) -> None:
        """Close the kept connection; the next request opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # --- transport -------------------------------------------------------------------------------------------------

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str], timeout_seconds: float
    ) -> tuple[int, bytes]:
        with self._lock:
            if self._connection is not None and time.monotonic() - self._used > KEEP_SECONDS:
                # The server may be closing it at this moment, and a POST that meets that must not be sent twice.
                self._connection.close()
                self._connection = None
            fresh = self._connection is None
            try:
                return self._once(method, target, body, headers, timeout_seconds)
            except ApiError:
                # A kept connection may have been closed by the server meanwhile; nothing of this request was read.
                if fresh or method not in {"GET", "PUT", "DELETE"}:
                    raise
                return self._once(method, target, body, headers, timeout_seconds)

    def _once(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str], timeout_seconds: float
    ) -> tuple[int, bytes]:
        try:
            with self._unreachable():
                if self._connection is None:
                    self._connection = self._open(timeout_seconds)
                if self._connection.sock is not None:
                    self._connection.sock.settimeout(timeout_seconds)
                self._connection.request(method, self._prefix + target, body=body, headers=self._headers(headers))
                response = self._connection.getresponse()
                answer = response.status, response.read()
                self._used = time.monotonic()
                return answer
        except BaseException:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise

    def _open(self, timeout_seconds: float) -> http.client.HTTPConnection:
        if not self._https:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_seconds)
        if self._context is None:
            self._context = _ssl_context(self._credentials)
        if self._credentials.server_name:
            return _NamedConnection(
                self._host,
                self._port,
                timeout=timeout_seconds,
                context=self._context,
                server_name=self._credentials.server_name,
            )
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_seconds, context=self._context)

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self._credentials.token}"} if self._credentials.token else {}
        return {"User-Agent": "wasilet"} | headers | token

    @contextlib.contextmanager
    def _unreachable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise ApiError(
                f"the API server at {self.server} gave no answer: {reason}",
                hint="`invoke status` shows what runs of a Wasilet cluster, `invoke up` repairs it",
            ) from error


class _NamedConnection(http.client.HTTPSConnection):
    """TLS for another name than the one connected to (``tls-server-name``)."""

    def __init__(self, host: str, port: int, *, timeout: float, context: ssl.SSLContext, server_name: str) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._tls = context
        self._server_name = server_name

    def connect(self) -> None:
        """As the parent's, with the other name."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Complete lines as they come, and at the end what has no newline."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        if b"\n" in chunk:
            *complete, last = rest.split(b"\n")
            for line in complete:
                yield line.decode(errors="replace")
            rest = bytearray(last)
    if rest:
        yield rest.decode(errors="replace")


def api_path(
    kind_plural: str, name: str = "", *, group: str = "", version: str = "v1", namespace: str = "", sub: str = ""
) -> str:
    """``/apis/<group>/<version>/namespaces/<namespace>/<plural>/<name>/<sub>``, leaving out what is empty."""
    parts = [f"/apis/{group}/{version}" if group else f"/api/{version}"]
    if namespace:
        parts.append(f"namespaces/{quote(namespace, safe='')}")
    parts += [part for part in (kind_plural, quote(name, safe=""), sub) if part]
    return "/".join(parts)


CSRS = api_path("certificatesigningrequests", group="certificates.k8s.io")


def _refused(status: int, answer: Any, what: str) -> ApiError:
    data = answer if isinstance(answer, dict) else {}
    message = str(data.get("message") or f"{what}: HTTP {status}")
    return ApiError(message, code=status, reason=str(data.get("reason") or ""))


def _ssl_context(credentials: Credentials) -> ssl.SSLContext:
    try:
        cadata = credentials.ca.decode("ascii") if credentials.ca else None
        context = ssl.create_default_context(cadata=cadata)
        if not credentials.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        # Kubernetes CAs made by other tools lack the extensions that OpenSSL's strict mode (Python 3.13) asks for.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if credentials.certificate and credentials.key:
            with _memory_file(credentials.certificate) as cert, _memory_file(credentials.key) as key:
                context.load_cert_chain(cert, key)
        return context
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"the certificates for {credentials.server} cannot be used: {error}") from error


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
