"""Writes container logs: bytes of a stream become CRI records, and a file that has reached its size is rotated.

A line over 16 KiB is written as parts tagged P with an F at its end. Bytes are kept as they are.
When a file has reached its size it is renamed to ``<n>.log.<YYYYMMDD>-<HHMMSS>.<nanoseconds>`` and a new one begins; at
most ``max_files`` are kept, the current one included. That is kubelet's container log manager, with two differences:
the nanoseconds, since a busy module fills a file many times a second, and no gzip, since rotated files are few, and a
reader may still be in one of them. All lines of one read carry one timestamp: formatting one each would cost more than
all the rest.

A full disk loses log lines, never the container: what cannot be written is dropped and counted.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from wasilet_common.cri_log.layout import rotated_files
from wasilet_common.cri_log.record import MAX_LINE_BYTES, prefix

READ_BYTES = 64 * 1024


class LineFramer:
    """Turns the bytes of one stream into CRI lines; keeps an unfinished line until its end or 16 KiB are there."""

    def __init__(self, stream: str) -> None:
        self._full = prefix(stream, partial=False)
        self._partial = prefix(stream, partial=True)
        self._pending = b""

    def feed(self, data: bytes, timestamp: bytes) -> bytes:
        """CRI lines for what is complete now."""
        data = self._pending + data if self._pending else data
        cut = data.rfind(b"\n") + 1
        self._pending = data[cut:]
        out = self._lines(data[:cut], timestamp) if cut else b""
        if len(self._pending) > MAX_LINE_BYTES:
            pieces = [out]
            while len(self._pending) > MAX_LINE_BYTES:
                pieces.append(timestamp + self._partial + self._pending[:MAX_LINE_BYTES] + b"\n")
                self._pending = self._pending[MAX_LINE_BYTES:]
            out = b"".join(pieces)
        return out

    def finish(self, timestamp: bytes) -> bytes:
        """The last line, if it had no end: a part, as containerd has it, so that no reader adds an end to it."""
        rest, self._pending = self._pending, b""
        return timestamp + self._partial + rest + b"\n" if rest else b""

    def _lines(self, data: bytes, timestamp: bytes) -> bytes:
        start = timestamp + self._full
        if len(data) > MAX_LINE_BYTES:
            lines = data[:-1].split(b"\n")
            if max(map(len, lines)) > MAX_LINE_BYTES:
                return b"".join(self._cut(line, timestamp) for line in lines)
        return start + data[:-1].replace(b"\n", b"\n" + start) + b"\n"

    def _cut(self, line: bytes, timestamp: bytes) -> bytes:
        pieces = []
        while len(line) > MAX_LINE_BYTES:
            pieces.append(timestamp + self._partial + line[:MAX_LINE_BYTES] + b"\n")
            line = line[MAX_LINE_BYTES:]
        pieces.append(timestamp + self._full + line + b"\n")
        return b"".join(pieces)


class LogFile:
    """One container's current log file, appended to and rotated."""

    def __init__(self, path: Path, *, max_size_bytes: int, max_files: int) -> None:
        self._path = path
        self._max_size_bytes = max_size_bytes
        self._max_files = max(max_files, 1)
        self._torn = False
        self.dropped_bytes = 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append whole lines; never raises for what the disk does."""
        if self._size >= self._max_size_bytes:
            self._rotate()
        view = memoryview(b"\n" + data if self._torn else data)
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError:
                self.dropped_bytes += len(view)
                return
            self._size += written
            view = view[written:]
            # While anything is left the file ends in the middle of a line, be it of this call or of one before.
            self._torn = bool(view)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o600)

    def _rotate(self) -> None:
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seconds))
        aside = self._path.with_name(f"{self._path.name}.{stamp}.{rest:09d}")
        try:
            self._path.rename(aside)
            fresh = self._open()
        except OSError:
            # Better one file that is too long, under its own name, than a container that cannot write.
            with contextlib.suppress(OSError):
                aside.rename(self._path)
            self._size = 0
            return
        os.close(self._fd)
        self._fd = fresh
        self._size = 0
        with contextlib.suppress(OSError):
            for old in rotated_files(self._path)[: -(self._max_files - 1) or None]:
                with contextlib.suppress(OSError):
                    old.unlink()
