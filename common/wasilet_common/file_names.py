"""Names of Kubernetes objects as names of files: these may be longer than a file system takes."""

from __future__ import annotations

import hashlib

MAX_BYTES = 255
"""Linux' NAME_MAX."""

_HASH_DIGITS = 16


def shortened(name: str, max_bytes: int = MAX_BYTES) -> str:
    """``name`` where it fits; else its beginning and a hash of all of it, so that two names stay two."""
    data = name.encode()
    if len(data) <= max_bytes:
        return name
    digest = hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]
    kept = data[: max(0, max_bytes - _HASH_DIGITS - 1)].decode(errors="ignore")
    return f"{kept.rstrip('-.')}-{digest}"
