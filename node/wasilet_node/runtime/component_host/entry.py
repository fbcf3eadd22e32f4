"""A sandbox's way into the component host: what is prepared before the fork, and in the child before the fences.

The supervisor opens the library when the first component comes, so that children share its pages. The listening socket
is made in the child before the fences close: behind them a server that calls no one can neither bind nor connect.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import ABI_VERSION, HostUnavailableError, Library
from wasilet_node.runtime.hostcalls import http_client
from wasilet_node.runtime.protocol import ContainerConfig, HttpPolicy, Mount, ServerSettings
from wasilet_node.runtime.safe_path import open_directory

SERVER_OPEN_FILES = 8192
"""Each connection is one."""

BACKLOG = 1024
EPOCH_MILLISECONDS = 10
UNLIMITED_INSTANCE_BYTES = 1024**3
"""Of a server without a memory limit."""

MAX_CONCURRENT_OUTGOING = 256
_CERTIFICATE_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
)


class ComponentHost:
    """The library, opened once; part of the supervisor's tools."""

    def __init__(self) -> None:
        self.library: Library | None = None
        """Once it was opened."""

        self.why_not = ""
        """Why there is none; as of the last look."""

    def open(self) -> None:
        """Looks again each time while there is none: it may have been built meanwhile."""
        if self.library is None:
            try:
                self.library = locate.load()
            except HostUnavailableError as error:
                self.why_not = str(error)


def instance_memory(config: ContainerConfig, backstop_bytes: int | None) -> int | None:
    """How far one linear memory may grow. A server's is capped below the container's limit: one request that allocates
    without end fails alone, where it would otherwise end all others with the container."""
    if config.server is None:
        return backstop_bytes
    if config.memory_limit_bytes is None:
        return UNLIMITED_INSTANCE_BYTES
    return config.memory_limit_bytes * 3 // 4


def listen(settings: ServerSettings, *, loopback: bool = False) -> socket.socket:
    """A socket on the port of all addresses of this network namespace, or of loopback's IPv4 address alone. Raises
    OSError with a text for the user."""
    try:
        if loopback:
            return _listen(socket.AF_INET, "127.0.0.1", settings.port)
        try:
            return _listen(socket.AF_INET6, "::", settings.port)
        except OSError as error:
            if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                raise
            return _listen(socket.AF_INET, "0.0.0.0", settings.port)  # noqa: S104 - the pod's own
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on port {settings.port}: {error.strerror}") from error


def _listen(family: int, address: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def certificates() -> str | None:
    """The file of certificates that outgoing HTTPS trusts: OpenSSL's, else where distributions keep it."""
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, paths.openssl_cafile, *_CERTIFICATE_FILES):
        if path and Path(path).is_file():
            return path
    return None


@contextmanager
def spec(
    config: ContainerConfig,
    *,
    report: int,
    stdin: bool,
    memory_bytes: int | None,
    listener: int = -1,
    counters: int = -1,
) -> Iterator[bytes]:
    """The JSON text for the library; descriptors of mounts are open while it is used. Raises OSError with a text for
    the user."""
    opened: list[int] = []
    try:
        yield json.dumps(
            {
                "version": ABI_VERSION,
                "artifact": config.artifact,
                "report": report,
                "role": _role(config.server, listener, counters),
                "argv": config.argv,
                "env": config.env,
                "mounts": [_mount(mount, opened) for mount in config.mounts],
                "stdin": stdin,
                "memory_bytes": memory_bytes,
                "sockets": {"listen": True, "connect": True, "deny": _refused()} if _has_sockets(config) else None,
                "outgoing": _outgoing(config.http) if config.http is not None else None,
            }
        ).encode()
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _refused() -> list[str]:
    """Networks (CIDRs) that neither sockets nor outgoing requests reach, judged after names are resolved, whatever the
    pod's annotation allows. The pod network's rules hold besides; a list of the node's operator goes here."""
    return []


def _has_sockets(config: ContainerConfig) -> bool:
    """Sockets are for those with their own network; on the node's they would reach what only the node may."""
    return bool(config.network)


def _mount(mount: Mount, opened: list[int]) -> dict[str, Any]:
    host = mount.host
    if mount.root:
        # Guests write above this folder: a path could lead elsewhere by now, a descriptor cannot.
        try:
            opened.append(open_directory(mount.root, mount.host))
        except OSError as error:
            text = f"mount {mount.guest}: {error.strerror}: {mount.host}"
            raise OSError(error.errno, text) from error
        host = f"/proc/self/fd/{opened[-1]}"
    return {"host": host, "guest": mount.guest, "read_only": mount.read_only}


def _role(server: ServerSettings | None, listener: int, counters: int) -> object:
    if server is None:
        return "command"
    return {
        "server": {
            "listener": listener,
            "counters": counters,
            "reuse": server.reuse,
            "max_concurrent": server.max_concurrent_requests,
            "max_connections": server.max_connections,
            "request_timeout_ms": _milliseconds(server.request_timeout_seconds),
            "idle_timeout_ms": _milliseconds(server.idle_timeout_seconds),
            "header_timeout_ms": _milliseconds(server.header_timeout_seconds),
            "max_header_bytes": server.max_header_bytes,
            "max_body_bytes": server.max_body_bytes,
            "epoch_ms": EPOCH_MILLISECONDS,
            "linger_ms": round(server.linger_seconds * 1000),
        }
    }


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _outgoing(policy: HttpPolicy) -> dict[str, Any]:
    return {
        "origins": policy.allowed_origins,
        "local_origins": policy.local_origins,
        "own_addresses": policy.own_addresses,
        "api_servers": [(host.lower(), port) for host, port in policy.api_servers],
        "ports": [10250, 10255, *policy.kubelet_ports],
        "deny": _refused(),
        "max_concurrent": min(policy.max_concurrent_requests or MAX_CONCURRENT_OUTGOING, MAX_CONCURRENT_OUTGOING),
        "connect_timeout_ms": _milliseconds(http_client.CONNECT_TIMEOUT_SECONDS),
        "request_timeout_ms": _milliseconds(http_client.REQUEST_TIMEOUT_SECONDS),
        "idle_timeout_ms": _milliseconds(http_client.IDLE_TIMEOUT_SECONDS),
        "max_request_bytes": http_client.MAX_REQUEST_BODY_BYTES,
        "max_response_bytes": http_client.MAX_RESPONSE_BODY_BYTES,
        "roots": certificates(),
    }
