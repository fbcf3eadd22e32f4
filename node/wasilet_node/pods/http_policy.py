"""Krustlet's annotations for wasi-experimental-http: which origins a pod's modules may call, and how many at once.

Without the annotation there is no outbound HTTP at all. What cannot be read fails the container with the parser's
message, rather than running it with another policy than its author wrote.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from wasilet_node.pods.spec import Pod
from wasilet_node.runtime.protocol import HttpPolicy
from wasilet_node.volumes.base import ContainerConfigError

ALLOWED_DOMAINS = "alpha.wasi.krustlet.dev/allowed-domains"
MAX_CONCURRENT_REQUESTS = "alpha.wasi.krustlet.dev/max-concurrent-requests"
_MAX_REQUESTS = 2**32 - 1
_MAX_DIGITS = 20


def http_policy(pod: Pod) -> HttpPolicy | None:
    """The pod's policy; None: no outbound HTTP. Raises ContainerConfigError naming the annotation."""
    annotations = pod["metadata"].get("annotations") or {}
    limit = _limit(annotations.get(MAX_CONCURRENT_REQUESTS))
    text = annotations.get(ALLOWED_DOMAINS)
    if text is None:
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS} is not a JSON array of origins: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS} is not a JSON array of strings: {text[:200]!r}")
    return HttpPolicy(allowed_origins=tuple(_origin(item) for item in listed), max_concurrent_requests=limit)


def _origin(text: str) -> str:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS}: {text[:200]!r} is no origin: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ContainerConfigError(
            f"annotation {ALLOWED_DOMAINS}: {text[:200]!r} is no origin: write it as https://host or http://host:port"
        )
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ContainerConfigError(
            f"annotation {ALLOWED_DOMAINS}: {text[:200]!r} is more than an origin: leave out user, path and query"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > _MAX_DIGITS or int(digits) > _MAX_REQUESTS:
        raise ContainerConfigError(f"annotation {MAX_CONCURRENT_REQUESTS} is not a whole number: {text[:200]!r}")
    return int(digits)
