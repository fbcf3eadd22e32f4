"""From an answer of the API server, or the lack of one, to the error tree of ``wasilet_node.kube.base``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from wasilet_node.kube.base import (
    ApiStatusError,
    ConflictError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    TooManyRequestsError,
)

_MAX_MESSAGE_CHARACTERS = 2048
_BY_CODE: Mapping[int, type[ApiStatusError]] = {
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    410: GoneError,
    429: TooManyRequestsError,
}


def from_response(code: int, body: bytes, *, retry_after: str | None = None) -> ApiStatusError:
    """The error for an HTTP answer; ``body`` is a Status where Kubernetes wrote it, else a proxy's text."""
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    if isinstance(decoded, dict) and decoded.get("kind") == "Status":
        error = from_status(decoded, default_code=code)
    else:
        text = body.decode("utf-8", "replace").strip()
        error = _make(code, _phrase(code), text or _phrase(code), {})
    if isinstance(error, TooManyRequestsError):
        seconds = seconds_of(retry_after)
        if seconds is None:
            seconds = seconds_of(error.details.get("retryAfterSeconds"))
        if seconds is not None:
            error.retry_after_seconds = seconds
    return error


def from_status(status: Mapping[str, Any], *, default_code: int = 500) -> ApiStatusError:
    """The error for a metav1.Status, which is also what an ERROR event of a watch carries."""
    code = status.get("code")
    code = code if isinstance(code, int) and code else default_code
    reason = str(status.get("reason") or _phrase(code))
    message = str(status.get("message") or reason)
    details = status.get("details")
    return _make(code, reason, message, details if isinstance(details, dict) else {})


def seconds_of(value: object) -> float | None:
    """A Retry-After in seconds; None where it is missing or a date (Kubernetes sends seconds)."""
    try:
        seconds = float(str(value))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _make(code: int, reason: str, message: str, details: Mapping[str, Any]) -> ApiStatusError:
    kind = _BY_CODE.get(code, ApiStatusError)
    return kind(code, reason, message[:_MAX_MESSAGE_CHARACTERS], details=details)


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return f"HTTP {code}"
