"""What of a log's records a reader asked for (``v1.PodLogOptions``), as the bytes to give out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from wasilet_common.cri_log import record
from wasilet_common.time_format import parse_rfc3339_nano, rfc3339_nano

logger = logging.getLogger(__name__)

MAX_UNENDED_BYTES = 1024 * 1024
"""A line without an end is given up beyond this; the writer cuts lines into pieces far shorter."""

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
        if len(self._carry) > MAX_UNENDED_BYTES:
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
            parsed = record.parse(line)
            if parsed is None:
                if line:
                    logger.debug("a line of a container log is not in CRI format: it is left out")
                continue
            stamp, stream, partial, text = parsed
            if self._since is not None and not self._recent(stamp):
                continue
            if self._wanted[stream]:
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
