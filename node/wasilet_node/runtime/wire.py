"""Frames and their codec: a length of four bytes, big-endian, then a JSON object in UTF-8.

A frame is one of: a request ``{"op", "seq", ...}``, its answer ``{"seq", "result"}`` or ``{"seq", "error": {"type",
"message"}}``, an event ``{"event": status}``, output ``{"stream", "data"}`` (base64), or the end of a session
``{"exit": {...}}``. Unknown fields are ignored, so that both sides may be of different ages.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerState,
    ContainerStatus,
    ContainerUsage,
    GuestKind,
    HttpCounters,
    HttpPolicy,
    Mount,
    Resources,
    ServerSettings,
)

MAX_FRAME_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct("!I")
_PEER = struct.Struct("3i")

Message = dict[str, Any]


class WireError(Exception):
    """The other side does not speak this protocol."""


def encode(message: Message) -> bytes:
    """One frame. Raises WireError when it is too large."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def decode_body(body: bytes) -> Message:
    """The object in a frame. Raises WireError."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError("a message is not a JSON object")
    return message


class Decoder:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Every message that is complete now. Raises WireError."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield decode_body(body)


@dataclasses.dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket when it connected (or listened), by SO_PEERCRED."""

    pid: int
    """0: it is not of this pid namespace."""

    uid: int


def peer(connection: socket.socket) -> Peer:
    """Who is at the other end. Raises OSError."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _gid = _PEER.unpack(data)
    return Peer(int(pid), int(uid))


# dataclasses.fields and asdict are slow, and a supervisor lists a thousand containers twice a minute.
_CONFIG_FIELDS, _STATUS_FIELDS, _MOUNT_FIELDS, _HTTP_FIELDS, _SERVER_FIELDS = (
    frozenset(field.name for field in dataclasses.fields(cls))
    for cls in (ContainerConfig, ContainerStatus, Mount, HttpPolicy, ServerSettings)
)
_RESOURCES = dataclasses.fields(Resources)


def _known(names: frozenset[str], data: Message) -> Message:
    return {name: value for name, value in data.items() if name in names}


def _flat(names: frozenset[str], instance: object) -> Message:
    return {name: getattr(instance, name) for name in names}


def dump_config(config: ContainerConfig) -> Message:
    """A config as JSON."""
    http = _flat(_HTTP_FIELDS, config.http) if config.http is not None else None
    server = _flat(_SERVER_FIELDS, config.server) if config.server is not None else None
    mounts = [_flat(_MOUNT_FIELDS, mount) for mount in config.mounts]
    return {
        **_flat(_CONFIG_FIELDS, config),
        "http": http,
        "server": server,
        "mounts": mounts,
        "annotations": dict(config.annotations),
    }


def load_config(data: Message) -> ContainerConfig:
    """The config in ``data``. Raises WireError."""
    try:
        fields = _known(_CONFIG_FIELDS, data)
        fields["kind"] = GuestKind(fields["kind"])
        fields["argv"] = tuple(str(item) for item in fields["argv"])
        fields["env"] = tuple((str(name), str(value)) for name, value in fields["env"])
        fields["mounts"] = tuple(Mount(**_known(_MOUNT_FIELDS, mount)) for mount in fields["mounts"])
        fields["etc_files"] = tuple((str(at), str(file)) for at, file in fields.get("etc_files") or ())
        if fields.get("http") is not None:
            http = _known(_HTTP_FIELDS, fields["http"])
            for name in ("allowed_origins", "local_origins", "own_addresses", "kubelet_ports"):
                http[name] = tuple(http.get(name, ()))
            http["api_servers"] = tuple((str(host), int(port)) for host, port in http.get("api_servers", ()))
            fields["http"] = HttpPolicy(**http)
        if fields.get("server") is not None:
            fields["server"] = ServerSettings(**_known(_SERVER_FIELDS, fields["server"]))
        return ContainerConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a container's config is incomplete: {error!r}") from error


def dump_status(status: ContainerStatus) -> Message:
    """A status as JSON."""
    return {**_flat(_STATUS_FIELDS, status), "annotations": dict(status.annotations)}


def load_status(data: Message) -> ContainerStatus:
    """The status in ``data``. Raises WireError."""
    try:
        fields = _known(_STATUS_FIELDS, data)
        fields["state"] = ContainerState(fields["state"])
        return ContainerStatus(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a container's status is incomplete: {error!r}") from error


def load_resources(data: Message) -> Resources:
    """The resources in ``data``. Raises WireError."""
    try:
        return Resources(
            **{field.name: None if data[field.name] is None else int(data[field.name]) for field in _RESOURCES}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a container's resources are incomplete: {error!r}") from error


def load_usage(data: Message) -> ContainerUsage:
    """The usage in ``data``. Raises WireError."""
    try:
        return ContainerUsage(
            id=str(data["id"]),
            cpu_nanoseconds=int(data["cpu_nanoseconds"]),
            memory_bytes=int(data["memory_bytes"]),
            timestamp_ns=int(data["timestamp_ns"]),
            http=load_counters(data.get("http")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a container's usage is incomplete: {error!r}") from error


def load_counters(data: Message | None) -> HttpCounters | None:
    """What ``component_host.counters`` read. Raises KeyError, TypeError, ValueError."""
    if data is None:
        return None
    return HttpCounters(
        in_flight=int(data["in_flight"]),
        connections=int(data["connections"]),
        instances=int(data["instances"]),
        seconds=float(data["seconds"]),
        buckets=tuple(int(count) for count in data["buckets"]),
        statuses={int(status): int(count) for status, count in data["statuses"].items()},
    )
