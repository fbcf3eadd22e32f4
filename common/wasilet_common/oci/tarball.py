"""Takes one file out of a container image's layer, without ever unpacking it.

A layer is hostile input. ``tarfile`` reads whatever length a pax header claims into memory, and knows links, sparse
files and devices that no one needs here. A wrapped module is one regular file at a known path, so this reader streams
past everything else: 512-byte headers (ustar, pax and GNU long names), bounded names, a bounded number of members, and
a bound on what the decompressor may yield. Nothing of the archive becomes a path on this machine.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from wasilet_common.oci import mediatypes

_BLOCK: Final = 512
_CHUNK: Final = 64 * 1024
_MAX_MEMBERS: Final = 200_000
_MAX_EXTENDED_HEADER: Final = 64 * 1024
_REGULAR: Final = frozenset({b"0", b"\0", b"7"})
_LINKS: Final = {b"1": "a hard link", b"2": "a symbolic link"}


class LayerError(Exception):
    """The layer cannot be read, or the file in it is not one to use; the message names neither image nor layer."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one layer states about the file: it is there (``size`` bytes were written), or it was deleted here."""

    size: int = 0
    deleted: bool = False


@dataclass(kw_only=True)
class Budget:
    """What all layers of one image may decompress to: many small bombs are one large one."""

    total_bytes: int
    used_bytes: int = 0

    def take(self, count: int) -> None:
        """Raises LayerError when nothing is left for ``count`` more."""
        self.used_bytes += count
        if self.used_bytes > self.total_bytes:
            raise LayerError(f"the image's layers decompress to more than the {self.total_bytes} bytes allowed")


def extract(layer: Path, *, media_type: str, name: str, out: BinaryIO, budget: Budget) -> Found | None:
    """Write the file ``name`` (as ``app/main.wasm``, no leading slash) of a layer to ``out``. Blocking.

    None: this layer says nothing about it, look in the one below, with the same ``budget``. Where a name occurs twice,
    the first one counts. Raises LayerError, OSError.
    """
    with layer.open("rb") as source:
        stream = _Stream(_decompressed(source, media_type), budget)
        deletions = _deletions(name)
        deleted = False
        for member in _members(stream):
            if member.name == name:
                if member.kind in _LINKS:
                    raise LayerError(f"/{name} is {_LINKS[member.kind]} in the image's layer, not a regular file")
                if member.kind not in _REGULAR:
                    raise LayerError(f"/{name} is not a regular file in the image's layer")
                stream.copy(member.size, out)
                return Found(size=member.size)
            deleted = deleted or member.name in deletions
            stream.skip(member.padded)
        return Found(deleted=True) if deleted else None


def walk(layer: Path, *, media_type: str, budget: Budget) -> Iterator[tuple[Member, Content]]:
    """Every member of a layer, in its order, with what to read its content by; what is not read is passed over.
    Blocking. Raises LayerError, OSError."""
    with layer.open("rb") as source:
        stream = _Stream(_decompressed(source, media_type), budget)
        for member in _members(stream):
            content = Content(stream, member)
            yield member, content
            content.finish()


def _deletions(name: str) -> frozenset[str]:
    """The whiteout files (OCI image specification, layer.md) that hide ``name`` in the layers below."""
    parts = name.split("/")
    names = set()
    for depth in range(len(parts)):
        folder = "".join(f"{part}/" for part in parts[:depth])
        names |= {f"{folder}.wh.{parts[depth]}", f"{folder}.wh..wh..opq"}
    return frozenset(names)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of an archive. ``name`` is relative and clean but for ``..``; ``link`` is as it is written."""

    name: str
    kind: bytes
    size: int
    link: str = ""
    executable: bool = False

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return self.kind in _REGULAR

    @property
    def is_folder(self) -> bool:
        """A folder."""
        return self.kind == b"5"

    @property
    def is_hard_link(self) -> bool:
        """Another name for a member that came before."""
        return self.kind == b"1"

    @property
    def is_symbolic_link(self) -> bool:
        """A symbolic link."""
        return self.kind == b"2"

    @property
    def padded(self) -> int:
        """What its content takes in the archive."""
        return -(-self.size // _BLOCK) * _BLOCK


class Content:
    """Of one member, while it is the current one."""

    def __init__(self, stream: _Stream, member: Member) -> None:
        self._stream = stream
        self._member = member
        self._left = member.padded

    def copy(self, out: BinaryIO) -> None:
        """Write the content to a file, once. Raises LayerError, OSError."""
        self._stream.copy(self._member.size, out)
        self._left -= self._member.size

    def finish(self) -> None:
        """Pass over what was not read."""
        left, self._left = self._left, 0
        self._stream.skip(left)


def _members(stream: _Stream) -> Iterator[Member]:
    extended = _Extended()
    for _ in range(_MAX_MEMBERS):
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK or not header.strip(b"\0"):
            return
        member = _parse(header)
        if member.kind in {b"x", b"L", b"K"}:
            extended = _extend(extended, member.kind, stream.read_padded(member.size))
        elif member.kind == b"g":
            stream.read_padded(member.size)
        elif member.kind == b"S":
            raise LayerError("the image's layer holds a sparse file, which is not supported")
        else:
            # Links and folders have no content, whatever their header claims.
            length = 0 if member.kind in {b"1", b"2", b"3", b"4", b"5", b"6"} else member.size
            length = extended.size if extended.size is not None and member.is_file else length
            name = _relative(extended.name or member.name)
            yield replace(member, name=name, size=length, link=extended.link or member.link)
            extended = _Extended()
    raise LayerError(f"the image's layer has more than {_MAX_MEMBERS} members")


@dataclass(frozen=True, kw_only=True)
class _Extended:
    """What extended headers say of the member after them."""

    name: str = ""
    link: str = ""
    size: int | None = None


def _extend(known: _Extended, kind: bytes, content: bytes) -> _Extended:
    if kind == b"L":
        return replace(known, name=_text(content.rstrip(b"\0")))
    if kind == b"K":
        return replace(known, link=_text(content.rstrip(b"\0")))
    found = _pax(content)
    return _Extended(
        name=found.name or known.name,
        link=found.link or known.link,
        size=found.size if found.size is not None else known.size,
    )


def _parse(header: bytes) -> Member:
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    if _number(header[148:156]) != unsigned:
        raise LayerError("the image's layer is not a tar archive: a header's checksum is wrong")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return Member(
        name=_text(name),
        kind=header[156:157],
        size=_number(header[124:136]),
        link=_text(header[157:257].split(b"\0", 1)[0]),
        executable=bool(_number(header[100:108]) & 0o100),
    )


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256; anything else is an error, also what is negative."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0")
        if digits.translate(None, b"01234567"):
            raise LayerError("the image's layer is not a tar archive: a header's number is wrong")
        number = int(digits or b"0", 8)
    if number > 1 << 62:
        raise LayerError("the image's layer is not a tar archive: a header's number is wrong")
    return number


def _pax(content: bytes) -> _Extended:
    """``path``, ``linkpath`` and ``size`` of the records ``<length> <key>=<value>\\n``."""
    path, link, size = "", "", None
    start = 0
    while start < len(content):
        digits, space, _ = content[start : start + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise LayerError("the image's layer has a pax header that does not parse")
        end = start + int(digits)
        record = content[start + len(digits) + 1 : end]
        if end > len(content) or not record.endswith(b"\n"):
            raise LayerError("the image's layer has a pax header that does not parse")
        key, _, value = record[:-1].partition(b"=")
        if key == b"path":
            path = _text(value)
        elif key == b"linkpath":
            link = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise LayerError("the image's layer has a pax header that does not parse")
            size = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise LayerError("the image's layer holds a sparse file, which is not supported")
        start = end
    return _Extended(name=path, link=link, size=size)


def _relative(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _Stream:
    """Exact reads from an iterator of chunks, and the bound on their sum."""

    def __init__(self, chunks: Iterator[bytes], budget: Budget) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self._budget = budget

    def read(self, count: int) -> bytes:
        """``count`` bytes, fewer only at the end."""
        return b"".join(self._take(count))

    def read_padded(self, count: int) -> bytes:
        """An extended header's content."""
        if count > _MAX_EXTENDED_HEADER:
            raise LayerError("the image's layer has an extended header that is too large")
        content = self.read(-(-count // _BLOCK) * _BLOCK)
        if len(content) < count:
            raise LayerError("the image's layer ends within a header")
        return content[:count]

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        if sum(len(piece) for piece in self._take(count)) < count:
            raise LayerError("the image's layer ends within a file")

    def copy(self, count: int, out: BinaryIO) -> None:
        """Write ``count`` bytes to a file."""
        limit = self._budget.total_bytes
        if count > limit:
            raise LayerError(f"the module in the image's layer has {count} bytes, more than the {limit} allowed")
        copied = 0
        for piece in self._take(count):
            out.write(piece)
            copied += len(piece)
        if copied < count:
            raise LayerError("the image's layer ends within a file")

    def _take(self, count: int) -> Iterator[memoryview]:
        while count > 0:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._budget.take(len(chunk))
                self._rest = memoryview(chunk)
            piece, self._rest = self._rest[:count], self._rest[count:]
            count -= len(piece)
            yield piece


def _decompressed(source: BinaryIO, media_type: str) -> Iterator[bytes]:
    raw = iter(lambda: source.read(_CHUNK), b"")
    if media_type in mediatypes.TAR_LAYERS:
        return raw
    if media_type in mediatypes.TAR_GZIP_LAYERS:
        return _inflate(raw, _new_gzip, zlib.error, "gzip")
    if media_type in mediatypes.TAR_ZSTD_LAYERS:
        try:
            # In the standard library from Python 3.14 on; by name, since older type stubs lack it.
            zstd: Any = importlib.import_module("compression.zstd")
        except ImportError:
            raise LayerError(
                f"the image's layer is of media type {media_type}, which this node's Python cannot decompress"
                " (3.14 or newer can); build the image with gzip compression"
            ) from None
        return _inflate(raw, zstd.ZstdDecompressor, zstd.ZstdError, "zstd")
    raise LayerError(f"a layer's media type {media_type} is not one that an image may have")


def _new_gzip() -> Any:
    return _Gzip()


class _Gzip:
    """zlib with the interface that the standard library's newer decompressors share."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _inflate(raw: Iterator[bytes], new: Callable[[], Any], failure: type[Exception], name: str) -> Iterator[bytes]:
    """Bounded pieces of a stream of one or more members, so that a bomb costs one piece before it is noticed."""
    decompressor = new()
    streams = 1
    pending = b""
    try:
        while True:
            ended = False
            if decompressor.eof:
                pending = decompressor.unused_data or next(raw, b"")
                if not pending.strip(b"\0"):
                    return
                streams += 1
                if streams > _MAX_MEMBERS:
                    raise LayerError(f"the image's layer has more than {_MAX_MEMBERS} {name} streams")
                decompressor = new()
            elif decompressor.needs_input:
                pending = next(raw, b"")
                ended = not pending
            piece = decompressor.decompress(pending, _CHUNK)
            pending = b""
            if piece:
                yield piece
            elif ended and not decompressor.eof:
                raise LayerError(f"the image's layer ends within its {name} stream")
    except failure as error:
        raise LayerError(f"the image's layer is not {name}, though its media type says so") from error
