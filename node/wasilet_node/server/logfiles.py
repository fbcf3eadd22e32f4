"""Container log files on disk: one instance's current file and its rotated ones, read as a single log.

Lines are in CRI format, ``<RFC 3339 time> stdout|stderr F|P <text>``; P is a piece of a line whose end comes later.
kubelet reads only the current file; here the rotated ones (``<n>.log.<timestamp>``, perhaps ``.gz``) come first, so
that a log does not lose its beginning at the moment of a rotation. All of them are opened before the first byte is
read: what is then rotated or removed can still be read. Source of the format: KEP-1602 (CRI logging) and
cri-client/pkg/logs.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from wasilet_common.time_format import parse_rfc3339_nano, rfc3339_nano

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024
MAX_LINE_BYTES = 1024 * 1024
"""A line without an end is given up beyond this; the runtime cuts lines into pieces far shorter."""

_FIXED_WIDTH = len(b"2016-10-06T00:17:09.669794202Z")


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What of the lines is wanted."""

    timestamps: bool = False
    since_ns: int | None = None
    limit_bytes: int | None = None
    stdout: bool = True
    stderr: bool = True


class Renderer:
    """Turns raw bytes of log files into what the user asked for. One for a whole answer: it carries unfinished lines
    from chunk to chunk, and counts ``limit_bytes``."""

    def __init__(self, options: RenderOptions) -> None:
        self._timestamps = options.timestamps
        self._since_ns = options.since_ns
        self._since = None if options.since_ns is None else rfc3339_nano(options.since_ns)
        self._remaining = options.limit_bytes
        self._wanted = {b"stdout": options.stdout, b"stderr": options.stderr}
        self._carry = b""
        self._line_start = True

    @property
    def done(self) -> bool:
        """``limit_bytes`` were given out."""
        return self._remaining is not None and self._remaining <= 0

    def feed(self, data: bytes) -> bytes:
        """The output for these bytes; what follows the last newline waits for the next call."""
        lines = (self._carry + data).split(b"\n")
        self._carry = lines.pop()
        if len(self._carry) > MAX_LINE_BYTES:
            logger.debug("a line of a container log has no end: it is left out")
            self._carry = b""
        return self._render(lines)

    def finish(self) -> bytes:
        """The output for a last line that was cut off, at the end of a file that grows no more."""
        carry, self._carry = self._carry, b""
        return self._render([carry]) if carry else b""

    def _render(self, lines: Sequence[bytes]) -> bytes:
        out: list[bytes] = []
        for line in lines:
            parts = line.split(b" ", 3)
            if len(parts) != 4:
                continue
            stamp, stream, tags, text = parts
            wanted = self._wanted.get(stream)
            if wanted is None:
                logger.debug("a line of a container log is not in CRI format: it is left out")
                continue
            if self._since is not None and not self._recent(stamp):
                continue
            partial = tags.split(b":", 1)[0] == b"P"
            if wanted:
                if self._timestamps and self._line_start:
                    out.append(self._stamp(stamp))
                out.append(text if partial else text + b"\n")
            self._line_start = not partial
        result = b"".join(out)
        if self._remaining is not None:
            result = result[: max(self._remaining, 0)]
            self._remaining -= len(result)
        return result

    def _recent(self, stamp: bytes) -> bool:
        if len(stamp) == _FIXED_WIDTH and stamp.endswith(b"Z"):
            return stamp >= cast("bytes", self._since)
        nanoseconds = parse_rfc3339_nano(stamp)
        return nanoseconds is not None and nanoseconds >= cast("int", self._since_ns)

    def _stamp(self, stamp: bytes) -> bytes:
        if len(stamp) != _FIXED_WIDTH or not stamp.endswith(b"Z"):
            nanoseconds = parse_rfc3339_nano(stamp)
            stamp = stamp if nanoseconds is None else rfc3339_nano(nanoseconds)
        return stamp + b" "


@dataclass(kw_only=True)
class Segment:
    """One opened file of a log. ``size`` is that of the moment it was opened (compressed, if it is)."""

    path: Path
    file: BinaryIO
    compressed: bool
    size: int
    inode: tuple[int, int]
    modified_ns: int
    start: int = 0
    """Where reading begins, in bytes of the uncompressed text."""

    def chunks(self) -> Iterator[bytes]:
        """The text from ``start`` to the end: for a plain file the end of the moment it was opened."""
        if self.compressed:
            yield from self._decompressed()
            return
        position = self.start
        while position < self.size:
            data = os.pread(self.file.fileno(), min(CHUNK_BYTES, self.size - position), position)
            if not data:
                return
            position += len(data)
            yield data

    def _decompressed(self) -> Iterator[bytes]:
        self.file.seek(0)
        skip = self.start
        try:
            with gzip.GzipFile(fileobj=self.file) as archive:
                while data := archive.read(CHUNK_BYTES):
                    if skip >= len(data):
                        skip -= len(data)
                    else:
                        yield data[skip:]
                        skip = 0
        except (OSError, EOFError) as error:
            logger.warning("the rotated log %s is damaged: %s", self.path.name, error)


def rotated_names(directory: Path, base: str) -> list[str]:
    """Names of the rotated files of ``base`` without ``.gz``, oldest first: their suffix is a timestamp that sorts."""
    prefix = base + "."
    names = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            if entry.name.startswith(prefix) and not entry.name.endswith(".tmp"):
                names.add(entry.name.removesuffix(".gz"))
    return sorted(names)


def open_segment(path: Path) -> Segment | None:
    """Open a plain file or its compressed successor; None when neither exists."""
    for candidate, compressed in ((path, False), (path.with_name(path.name + ".gz"), True)):
        try:
            file = candidate.open("rb", buffering=0)
        except FileNotFoundError:
            continue
        status = os.fstat(file.fileno())
        return Segment(
            path=candidate,
            file=cast("BinaryIO", file),
            compressed=compressed,
            size=status.st_size,
            inode=(status.st_dev, status.st_ino),
            modified_ns=status.st_mtime_ns,
        )
    return None


def open_log(path: Path, stack: contextlib.ExitStack) -> list[Segment]:
    """All files of one instance's log, oldest first; empty when there are none. ``stack`` closes them.

    The current file is opened first: if it is rotated in between, the same inode is met again under its new name, and
    is left out there.
    """
    current = open_segment(path)
    segments: list[Segment] = []
    for name in rotated_names(path.parent, path.name):
        segment = open_segment(path.with_name(name))
        if segment is None:
            continue
        stack.callback(segment.file.close)
        if current is None or segment.inode != current.inode:
            segments.append(segment)
    if current is not None:
        stack.callback(current.file.close)
        segments.append(current)
    return segments


def skip_to_tail(segments: list[Segment], lines: int) -> list[Segment]:
    """The segments, with ``start`` set, that hold the last ``lines`` lines. Pieces (P) count with the line they end in.

    Plain files are read backwards from their end, so the cost is that of the answer; a compressed file is read whole.
    """
    kept: list[Segment] = []
    newest = True
    for segment in reversed(segments):
        find = _tail_compressed if segment.compressed else _tail_plain
        segment.start, found = find(segment, lines, newest=newest)
        kept.append(segment)
        lines -= found
        newest = newest and segment.size == 0
        if segment.start > 0:
            break
    return kept[::-1]


def _ends_line(line: bytes) -> bool:
    """Whether a raw line is the end of a logical one (tag F)."""
    parts = line.split(b" ", 3)
    return len(parts) > 2 and parts[2].split(b":", 1)[0] != b"P"


def _tail_plain(segment: Segment, lines: int, *, newest: bool) -> tuple[int, int]:
    """Where the last lines start, and how many end from there on; at the end of the newest file, an unfinished line
    counts too."""
    found = 0
    for start, line, terminated in _lines_backwards(segment.file.fileno(), segment.size):
        if (terminated and _ends_line(line)) or newest:
            if found == lines:
                return min(start + len(line) + 1, segment.size), found
            found += 1
        newest = False
    return 0, found


def _lines_backwards(descriptor: int, size: int) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, text, whether a newline follows) of each raw line, the last one first."""
    position = size
    buffer = b""
    terminated = False
    while position > 0:
        count = min(CHUNK_BYTES, position)
        position -= count
        buffer = os.pread(descriptor, count, position) + buffer
        stop = len(buffer)
        while (cut := buffer.rfind(b"\n", 0, stop)) >= 0:
            if terminated or cut + 1 < stop:
                yield position + cut + 1, buffer[cut + 1 : stop], terminated
            terminated = True
            stop = cut
        buffer = buffer[:stop]
    if terminated or buffer:
        yield 0, buffer, terminated


def _tail_compressed(segment: Segment, lines: int, *, newest: bool) -> tuple[int, int]:
    """As ``_tail_plain``, in two passes over the text, so that memory stays bounded."""
    total, finished, size = 0, True, 0
    for size, finished in _lines_of(segment):  # noqa: B007 - their last values are wanted
        total += finished
    units = total + (newest and not finished)
    skip = units - lines
    if skip <= 0:
        return 0, units
    for end, ends in _lines_of(segment):
        skip -= ends
        if skip == 0:
            return end, lines
    return size, lines


def _lines_of(segment: Segment) -> Iterator[tuple[int, bool]]:
    """(offset behind the line, whether it ends a logical line) of each raw line of the whole text."""
    offset = 0
    carry = b""
    for chunk in replace(segment, start=0).chunks():
        pieces = (carry + chunk).split(b"\n")
        carry = pieces.pop()
        for piece in pieces:
            offset += len(piece) + 1
            yield offset, _ends_line(piece)
    if carry:
        yield offset + len(carry), False
