"""SPDY/3.1 frames: bytes to frames and back, without any I/O.

The API server still speaks SPDY to kubelets (it translates kubectl's WebSockets), and no maintained Python
implementation exists. This is the part of "SPDY Protocol - Draft 3.1" that its streams need: SYN_STREAM, SYN_REPLY,
RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE and data. Header blocks share one zlib context for the life
of a connection, so every block must be decoded, also that of a stream no one wants.

Input is hostile: frames have a largest size, and header blocks a largest decompressed one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

VERSION = 3
MAX_CONTROL_BYTES = 64 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128

SYN_STREAM = 1
SYN_REPLY = 2
RST_STREAM = 3
SETTINGS = 4
PING = 6
GOAWAY = 7
HEADERS = 8
WINDOW_UPDATE = 9

FLAG_FIN = 0x01

PROTOCOL_ERROR = 1
REFUSED_STREAM = 3
CANCEL = 5

_STREAM_MASK = 0x7FFF_FFFF

_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie "
    "keep-alive origin"
)
_REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = (
    b"".join(struct.pack("!I", len(word)) + word.replace("_", " ").encode() for word in _WORDS.split()) + _REST.encode()
)
"""The preset dictionary of section 2.6.10.1: words with their length, then text without."""


class SpdyError(Exception):
    """The peer broke the protocol: the connection cannot go on, because its compression state is lost."""


@dataclass(frozen=True, kw_only=True)
class ControlFrame:
    """A control frame. ``stream_id`` is 0 where a frame has none; ``value`` is the status of RST_STREAM and GOAWAY,
    the delta of WINDOW_UPDATE and the id of PING."""

    type: int
    flags: int = 0
    stream_id: int = 0
    value: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataFrame:
    """A piece of a stream's data: a large frame arrives as several of these, FIN on the last."""

    stream_id: int
    data: bytes
    fin: bool = False


Frame = ControlFrame | DataFrame


class FrameDecoder:
    """Bytes to frames. Data is passed on as it comes, so that a large frame needs no large buffer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._data_left = 0
        self._data_stream = 0
        self._data_fin = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that these bytes complete. Raises SpdyError."""
        self.add(data)
        return self.frames()

    def add(self, data: bytes | bytearray) -> None:
        """Take bytes in, and look at none of them."""
        self._buffer += data

    def frames(self) -> Iterator[Frame]:
        """The frames that are here; a caller that stops half-way gets the rest by calling again. Raises SpdyError."""
        while True:
            if self._data_left:
                if not self._buffer:
                    return
                piece = bytes(self._buffer[: self._data_left])
                del self._buffer[: len(piece)]
                self._data_left -= len(piece)
                yield DataFrame(stream_id=self._data_stream, data=piece, fin=self._data_fin and not self._data_left)
                continue
            if len(self._buffer) < 8:
                return
            first, second = struct.unpack_from("!II", self._buffer)
            flags, length = second >> 24, second & 0xFF_FFFF
            if not first >> 31:
                del self._buffer[:8]
                self._data_stream, self._data_left, self._data_fin = (
                    first & _STREAM_MASK,
                    length,
                    bool(flags & FLAG_FIN),
                )
                if not length:
                    yield DataFrame(stream_id=self._data_stream, data=b"", fin=self._data_fin)
                continue
            version, kind = (first >> 16) & 0x7FFF, first & 0xFFFF
            if version != VERSION:
                raise SpdyError(f"SPDY version {version} is not spoken here")
            if length > MAX_CONTROL_BYTES:
                raise SpdyError(f"a control frame of {length} bytes is too large")
            if len(self._buffer) < 8 + length:
                return
            body = bytes(self._buffer[8 : 8 + length])
            del self._buffer[: 8 + length]
            frame = self._control(kind, flags, body)
            if frame is not None:
                yield frame

    def _control(self, kind: int, flags: int, body: bytes) -> ControlFrame | None:
        try:
            if kind == SYN_STREAM:
                stream, _, _ = struct.unpack_from("!IIH", body)
                return self._with_headers(kind, flags, stream, body[10:])
            if kind in {SYN_REPLY, HEADERS}:
                (stream,) = struct.unpack_from("!I", body)
                return self._with_headers(kind, flags, stream, body[4:])
            if kind in {RST_STREAM, GOAWAY, WINDOW_UPDATE}:
                stream, value = struct.unpack("!II", body)
                return ControlFrame(type=kind, flags=flags, stream_id=stream & _STREAM_MASK, value=value)
            if kind == PING:
                (value,) = struct.unpack("!I", body)
                return ControlFrame(type=kind, flags=flags, value=value)
        except struct.error as error:
            raise SpdyError(f"a control frame of type {kind} has the wrong length") from error
        return None

    def _with_headers(self, kind: int, flags: int, stream: int, block: bytes) -> ControlFrame:
        try:
            text = self._inflate.decompress(block, MAX_HEADER_BYTES)
        except zlib.error as error:
            raise SpdyError("a header block cannot be decompressed") from error
        if self._inflate.unconsumed_tail:
            raise SpdyError("a header block is too large")
        return ControlFrame(type=kind, flags=flags, stream_id=stream & _STREAM_MASK, headers=_parse_headers(text))


class FrameEncoder:
    """Frames to bytes. Header blocks must be sent in the order in which they were encoded."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def syn_stream(self, stream_id: int, headers: Mapping[str, str], *, fin: bool = False) -> bytes:
        """Open a stream; the tests' clients do, a kubelet never does."""
        body = struct.pack("!IIH", stream_id, 0, 0) + self._headers(headers)
        return _control_frame(SYN_STREAM, FLAG_FIN if fin else 0, body)

    def syn_reply(self, stream_id: int, headers: Mapping[str, str] | None = None) -> bytes:
        """Accept a stream."""
        return _control_frame(SYN_REPLY, 0, struct.pack("!I", stream_id) + self._headers(headers or {}))

    def _headers(self, headers: Mapping[str, str]) -> bytes:
        block = struct.pack("!I", len(headers))
        for name, value in headers.items():
            for text in (name.lower(), value):
                encoded = text.encode()
                block += struct.pack("!I", len(encoded)) + encoded
        return self._deflate.compress(block) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def data_frame(stream_id: int, data: bytes, *, fin: bool = False) -> bytes:
    """A piece of a stream, below 16 MiB."""
    return struct.pack("!II", stream_id & _STREAM_MASK, (FLAG_FIN if fin else 0) << 24 | len(data)) + data


def rst_stream(stream_id: int, status: int) -> bytes:
    """End a stream at once, in both directions."""
    return _control_frame(RST_STREAM, 0, struct.pack("!II", stream_id, status))


def ping(value: int) -> bytes:
    """A ping, or the answer to one: the same bytes."""
    return _control_frame(PING, 0, struct.pack("!I", value))


def goaway(last_stream_id: int) -> bytes:
    """No more streams are accepted."""
    return _control_frame(GOAWAY, 0, struct.pack("!II", last_stream_id, 0))


def window_update(stream_id: int, delta: int) -> bytes:
    """The reader took ``delta`` bytes."""
    return _control_frame(WINDOW_UPDATE, 0, struct.pack("!II", stream_id, delta))


def _control_frame(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("!HHI", 0x8000 | VERSION, kind, flags << 24 | len(body)) + body


def _parse_headers(block: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    try:
        (count,) = struct.unpack_from("!I", block)
        if count > MAX_HEADERS:
            raise SpdyError(f"{count} headers are too many")
        offset = 4
        for _ in range(count):
            texts = []
            for _ in range(2):
                (length,) = struct.unpack_from("!I", block, offset)
                offset += 4
                if offset + length > len(block):
                    raise SpdyError("a header block ends early")
                texts.append(block[offset : offset + length].decode("latin-1"))
                offset += length
            headers[texts[0].lower()] = texts[1]
    except struct.error as error:
        raise SpdyError("a header block ends early") from error
    return headers
