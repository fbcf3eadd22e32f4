"""Reads container logs: one instance's current file and its rotated ones, as a single log.

kubelet reads only the current file; here the rotated ones (``<n>.log.<timestamp>``, perhaps ``.gz``) come first, so
that a log does not lose its beginning at the moment of a rotation. All of them are opened before the first byte is
read: what is then rotated or removed can still be read.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from wasilet_common.cri_log import record
from wasilet_common.cri_log.layout import rotated_files

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024
MAX_LAST_TEXT_BYTES = 2048
MAX_LAST_TEXT_LINES = 80


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


def rotated_names(path: Path) -> list[str]:
    """Names of the rotated files of ``path`` without ``.gz``, oldest first; none that is still being made."""
    return sorted({found.name.removesuffix(".gz") for found in rotated_files(path) if found.suffix != ".tmp"})


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
    for name in rotated_names(path):
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


def last_text(path: str | Path) -> str:
    """At most 2048 bytes and 80 lines of what the container wrote last (``FallbackToLogsOnError``); "" on any error."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - CHUNK_BYTES))
            data = file.read(CHUNK_BYTES)
    except OSError:
        return ""
    lines = data.split(b"\n")
    if size > CHUNK_BYTES:
        del lines[0]
    text = b""
    taken = 0
    for line in reversed(lines):
        parsed = record.parse(line)
        if parsed is None:
            continue
        if taken == MAX_LAST_TEXT_LINES:
            break
        _, _, partial, piece = parsed
        text = piece + (b"" if partial else b"\n") + text
        taken += 1
        if len(text) >= MAX_LAST_TEXT_BYTES:
            break
    return text[-MAX_LAST_TEXT_BYTES:].decode(errors="ignore")


def _ends_line(line: bytes) -> bool:
    """Whether a raw line is the end of a logical one (tag F)."""
    parsed = record.parse(line)
    return parsed is not None and not parsed[2]


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
