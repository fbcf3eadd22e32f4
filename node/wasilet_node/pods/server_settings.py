"""How a component that answers HTTP requests is served: its port, and limits by annotations of the pod.

The port is the first ``containerPort`` of TCP, else 8080. All annotations are optional; what cannot be read, or is out
of range, fails the container with a message, rather than serving it with other limits than its author wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from wasilet_common import quantity
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.runtime.protocol import ServerSettings
from wasilet_node.volumes.base import ContainerConfigError

PREFIX = "wasilet.dev/http-"
DEFAULT_PORT = 8080
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_SECONDS = 86400.0

Parse = Callable[[str], Any]


def server_settings(pod: Pod, container: Container) -> ServerSettings:
    """What the pod asks for. Raises ContainerConfigError naming the annotation."""
    annotations: Mapping[str, str] = pod["metadata"].get("annotations") or {}
    given: dict[str, Any] = {}
    for name, (field, parse) in _ANNOTATIONS.items():
        text = annotations.get(PREFIX + name)
        if text is None:
            continue
        try:
            given[field] = parse(str(text).strip())
        except ValueError as error:
            raise ContainerConfigError(f"annotation {PREFIX}{name}: {str(text)[:100]!r} {error}") from None
    return ServerSettings(port=_port(container), **given)


def _port(container: Container) -> int:
    for port in container.get("ports") or ():
        if (port.get("protocol") or "TCP") == "TCP":
            return int(port["containerPort"])
    return DEFAULT_PORT


def _count(most: int) -> Parse:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > 12 or not 1 <= int(text) <= most:
            raise ValueError(f"is not a whole number from 1 to {most}")
        return int(text)

    return parse


def _duration(text: str) -> float:
    found = _DURATION.fullmatch(text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0.001 <= seconds <= _MAX_SECONDS:
        raise ValueError("is not a duration from 1ms to 24h, as 500ms, 30s or 5m")
    return seconds


def _bytes(most: int) -> Parse:
    def parse(text: str) -> int:
        try:
            amount = quantity.parse(text)
        except quantity.QuantityError:
            amount = Fraction(0)
        if not 1 <= amount <= most:
            raise ValueError(f"is not an amount of bytes from 1 to {most}, as 64Ki or 10M")
        return int(amount)

    return parse


_ANNOTATIONS: Mapping[str, tuple[str, Parse]] = {
    "instance-reuse": ("reuse", _count(1_000_000)),
    "max-concurrent-requests": ("max_concurrent_requests", _count(10_000)),
    "max-connections": ("max_connections", _count(100_000)),
    "request-timeout": ("request_timeout_seconds", _duration),
    "idle-timeout": ("idle_timeout_seconds", _duration),
    "header-timeout": ("header_timeout_seconds", _duration),
    "max-header-size": ("max_header_bytes", _bytes(2**20)),
    "max-body-size": ("max_body_bytes", _bytes(2**50)),
}
