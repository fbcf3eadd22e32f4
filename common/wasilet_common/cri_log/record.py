"""One record of a CRI log: ``<RFC 3339 time> stdout|stderr F|P <text>``.

``P`` marks a piece of a line that goes on in the next record of its stream, ``F`` a whole line or its last piece. A tag
may carry more after a colon, which readers ignore.
"""

from __future__ import annotations

MAX_LINE_BYTES = 16 * 1024
"""Longer lines are written in pieces, as containerd does."""

STREAMS = frozenset({b"stdout", b"stderr"})


Record = tuple[bytes, bytes, bool, bytes]
"""Time, stream, whether the line goes on in another record, and text. A plain tuple, as logs are read line by line: one
with names took twice the time of all the rest."""


def prefix(stream: str, *, partial: bool) -> bytes:
    """What stands between the time and the text."""
    return f" {stream} {'P' if partial else 'F'} ".encode()


def parse(line: bytes) -> Record | None:
    """The record in a line without its newline; None when it is none: torn, or written by something else."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[1] not in STREAMS:
        return None
    tags = parts[2]
    return parts[0], parts[1], tags != b"F" and tags.split(b":", 1)[0] == b"P", parts[3]
