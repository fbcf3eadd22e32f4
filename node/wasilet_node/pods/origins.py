"""Origins as people write them, in annotations, flags and files: scheme, host and port, and nothing more."""

from __future__ import annotations

from urllib.parse import urlsplit

Origin = tuple[str, str, int]
"""Scheme, host in lower case, and port."""


class OriginError(ValueError):
    """A text is no origin; to be read after the text itself."""


def checked(text: str) -> str:
    """An origin with its host in lower case. Raises OriginError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise OriginError(f"is no origin: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OriginError("is no origin: write it as https://host or http://host:port")
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise OriginError("is more than an origin: leave out user, path and query")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def key(origin: str) -> Origin:
    """By what two origins are the same, of one that was checked."""
    parts = urlsplit(origin)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)
