"""A node's link to its machine: how its two ends are called."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

UPLINK = "uplink"
LINK_PREFIX = "wl"


def interface_prefix(data: Path) -> str:
    """What the machine's ends of this node's veths begin with: by it a leftover is known."""
    return LINK_PREFIX + hashlib.sha256(str(data.absolute()).encode()).hexdigest()[:6]


def interface_name(data: Path) -> str:
    """Of a new one: never the name of one that the kernel may still be taking down."""
    return f"{interface_prefix(data)}{secrets.token_hex(3)}"
