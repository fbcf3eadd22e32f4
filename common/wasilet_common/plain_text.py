"""Text of other programs without what is meant for their terminal: colours, links, cursor movements."""

from __future__ import annotations

import re

_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor; its end may be cut off
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS and their kin: titles, links
    r"|\x1b[ -/]*[0-~]?"  # two characters, or what a cut-off line left
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """``text`` without control sequences (ECMA-48) and control characters; tabs and line ends stay. A line that was
    redrawn (``\\r`` within it) is what was drawn last."""
    text = _CONTROLS.sub("", _SEQUENCES.sub("", text))
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
