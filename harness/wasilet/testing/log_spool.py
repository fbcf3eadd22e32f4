"""The log of one container instance as it was read: all of its lines, in bounded memory.

An assertion judges the whole log, however long it is, so nothing that was read is dropped. The first lines are kept in
memory, as most logs are short; a longer log goes to a file that has no name, which the kernel removes with the last
descriptor, however the process ends. Lines are kept as the API server sent them, each with its time stamp.

One thread appends, any number of others read. Readers see whole lines only.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import weakref
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wasilet_common.time_format import NANOSECONDS, parse_rfc3339_nano

MEMORY_BYTES = 64 * 1024
"""A log that is longer is kept on disk."""

BLOCK_BYTES = 256 * 1024
"""Read from the disk at once."""

MAX_BYTES = 8 * 1024**3
"""A log that is longer cannot be kept, and is not judged: a program that floods its log must not fill the disk."""

TAIL_LINES = 1000
"""What a :class:`LogTail` keeps."""

_MARK_LINES = 1024
_MARK_BYTES = 64 * 1024
_STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d) ")


class SpoolError(Exception):
    """A log cannot be kept any further: the disk is full, or the log is longer than :data:`MAX_BYTES`."""


@dataclass(frozen=True)
class LogLine:
    """One line of a container's log."""

    at: float
    """When it was written, by the node's clock, in seconds since the epoch; 0.0 when the node did not report it."""

    text: str


def text_of(raw: bytes) -> str:
    """The line without its time stamp; undecodable bytes are replaced."""
    stamp = _STAMP.match(raw)
    return (raw[stamp.end() :] if stamp else raw).decode(errors="replace")


def nanoseconds_of(raw: bytes) -> int:
    """When the line was written, since the epoch; 0 when it has no time stamp."""
    stamp = _STAMP.match(raw)
    if stamp is None:
        return 0
    return parse_rfc3339_nano(stamp[0][:-1]) or 0


def line_of(raw: bytes) -> LogLine:
    """Both."""
    return LogLine(nanoseconds_of(raw) / NANOSECONDS, text_of(raw))


class LogSpool:
    """All lines of a log."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, max_bytes: int = MAX_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._memory = bytearray()
        self._file = -1
        self._size = 0
        self._count = 0
        self._mark_lines = array("Q", [0])
        self._mark_offsets = array("Q", [0])
        """Where some lines begin, so that any line is found without reading all before it."""

    @property
    def count(self) -> int:
        """How many lines there are."""
        return self._count

    def append(self, data: bytes) -> None:
        """Further lines, each with its newline. Raises SpoolError when they cannot be kept."""
        with self._lock:
            if self._size + len(data) > self._max_bytes:
                raise SpoolError(f"it is longer than {self._max_bytes // 1024**2} MiB")
            try:
                self._store(data)
            except OSError as error:
                raise SpoolError(f"no place for it on the disk: {error.strerror}") from error
            if self._count - self._mark_lines[-1] >= _MARK_LINES or self._size - self._mark_offsets[-1] >= _MARK_BYTES:
                self._mark_lines.append(self._count)
                self._mark_offsets.append(self._size)
            self._size += len(data)
            self._count += data.count(b"\n")

    def _store(self, data: bytes) -> None:
        if self._file < 0 and self._size + len(data) <= self._memory_bytes:
            self._memory += data
            return
        if self._file < 0:
            self._file = _nameless_file()
            weakref.finalize(self, os.close, self._file)
            _write_all(self._file, bytes(self._memory), 0)
            self._memory = bytearray()
        _write_all(self._file, data, self._size)

    def read(self, offset: int) -> bytes:
        """Whole lines from a byte offset, some :data:`BLOCK_BYTES`; empty at the end of what there is."""
        with self._lock:
            size = self._size
            if self._file < 0:
                return bytes(self._memory[offset:])
        wanted = BLOCK_BYTES
        while offset < size:
            data = os.pread(self._file, min(wanted, size - offset), offset)
            end = data.rfind(b"\n") + 1
            if end or not data:
                return data[:end]
            wanted *= 2
        return b""

    def lines(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Lines by number (from 0), with their time stamps and without their ends."""
        stop = self._count if stop is None else min(stop, self._count)
        with self._lock:
            mark = bisect_right(self._mark_lines, start) - 1
            number, offset = self._mark_lines[mark], self._mark_offsets[mark]
        while number < stop:
            block = self.read(offset)
            if not block:
                return
            offset += len(block)
            for raw in block.split(b"\n")[:-1]:
                if number >= stop:
                    return
                if number >= start:
                    yield raw
                number += 1

    def tail(self, count: int) -> list[LogLine]:
        """The last lines."""
        return [line_of(raw) for raw in self.lines(max(0, self._count - count))]

    @property
    def first(self) -> bytes | None:
        """The first line, as it was sent."""
        return next(self.lines(0, 1), None)

    @property
    def last(self) -> bytes | None:
        """The last line, as it was sent."""
        return next(self.lines(self._count - 1), None) if self._count else None


class LogTail:
    """The end of a log, for those who only show it."""

    def __init__(self, lines: int = TAIL_LINES) -> None:
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._lock = threading.Lock()
        self.count = 0
        self.first: bytes | None = None

    def append(self, data: bytes) -> None:
        """Further lines, each with its newline."""
        lines = data.split(b"\n")[:-1]
        with self._lock:
            if self.first is None and lines:
                self.first = lines[0]
            self.count += len(lines)
            self._lines.extend(lines)

    def tail(self, count: int) -> list[LogLine]:
        """The last lines."""
        with self._lock:
            shown = list(self._lines)[-count:] if count > 0 else []
        return [line_of(raw) for raw in shown]

    @property
    def last(self) -> bytes | None:
        """The last line, as it was sent."""
        with self._lock:
            return self._lines[-1] if self._lines else None


def _nameless_file() -> int:
    """A file of this process alone, on a disk where that can be had: /tmp is memory on many machines."""
    folder = Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108  (the file has no name there)
    if not os.access(folder, os.W_OK | os.X_OK):
        folder = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fd, name = tempfile.mkstemp(prefix="wasilet-log-", dir=folder)
    os.unlink(name)  # noqa: PTH108
    return fd


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
