"""The gRPC health check of probes: ``grpc.health.v1.Health/Check`` over one HTTP/2 connection, in cleartext.

One request and the first answer are all that is spoken, so a gRPC library (30 MB) is not needed: the request's headers
are HPACK literals without index (RFC 7541, 6.2.2), and of the answer only DATA frames are read, since a server that is
well sends its status there; one that knows no such service, or is not gRPC at all, sends none.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

from wasilet_node.pods.handlers import Outcome, Reach

MAX_FRAME_BYTES = 1024 * 1024
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_STREAM = 1
_STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_SERVING = 1


async def check(action: dict[str, Any], *, reach: Reach, timeout_seconds: float) -> Outcome:
    """Whether the pod says that it serves."""
    port, service = int(action["port"]), str(action.get("service") or "")
    if not reach.host({}):
        return Outcome(ok=False, output="the pod has no network of its own, so grpc has nothing to reach: use exec")
    where = f"{reach.address}:{port}"
    try:
        async with asyncio.timeout(timeout_seconds):
            status = await _status(reach, port, service)
    except TimeoutError:
        return Outcome(ok=False, output=f'timeout: failed to connect service "{where}" within {timeout_seconds:g}s')
    except (OSError, EOFError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number).lower() if number else str(error)
        return Outcome(ok=False, output=f'error: failed to connect service at "{where}": {why}')
    if status is None:
        return Outcome(
            ok=False, output="error: this server does not implement the grpc health protocol for the service"
        )
    if status == _SERVING:
        return Outcome(ok=True)
    return Outcome(ok=False, output=f'service unhealthy (responded with "{_STATUSES.get(status, status)}")')


async def _status(reach: Reach, port: int, service: str) -> int | None:
    reader, writer = await reach.networks.connect(reach.address, port)
    try:
        writer.write(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
        writer.write(_frame(_HEADERS, _END_HEADERS, _STREAM, _request_headers(f"{reach.address}:{port}")))
        writer.write(_frame(_DATA, _END_STREAM, _STREAM, _message(service)))
        await writer.drain()
        return await _answer(reader, writer)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
    """The status in the first message; None: the stream ended without one. Raises OSError, EOFError, ValueError."""
    body = b""
    while True:
        kind, flags, stream, data = await _read_frame(reader)
        if kind == _SETTINGS and not flags & _ACK:
            writer.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            writer.write(_frame(_PING, _ACK, 0, data))
        elif kind == _GOAWAY or (kind == _RST_STREAM and stream == _STREAM):
            return None
        elif stream == _STREAM:
            if kind == _DATA:
                body += data
                end = 5 + int.from_bytes(body[1:5], "big")
                if 5 <= end <= len(body):
                    return _parse(body[5:end])
            if flags & _END_STREAM or len(body) > MAX_FRAME_BYTES:
                return None


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
    """Kind, flags, stream, data. Raises OSError, EOFError, ValueError."""
    try:
        head = await reader.readexactly(9)
        length = int.from_bytes(head[:3], "big")
        if length > MAX_FRAME_BYTES:
            raise ValueError("it does not speak HTTP/2")
        data = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise EOFError("it closed the connection") from error
    return head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFFFFFF, data


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def _request_headers(authority: str) -> bytes:
    fields = (
        (":method", "POST"), (":scheme", "http"), (":path", "/grpc.health.v1.Health/Check"), (":authority", authority),
        ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "kube-probe/1.34"),
    )  # fmt: skip
    # All shorter than 127 bytes, so each length is one byte.
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )


def _message(service: str) -> bytes:
    name = service.encode()
    body = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\0" + struct.pack(">I", len(body)) + body


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _parse(message: bytes) -> int:
    """Field 1 of a HealthCheckResponse, an enumeration; 0 when it is not there."""
    if len(message) >= 2 and message[0] == 0x08:
        return message[1]
    return 0
