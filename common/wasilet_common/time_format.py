"""Points in time and durations as Kubernetes and Go write them: RFC 3339 in three precisions, and ``1m20s``.

Points in time are whole nanoseconds since the epoch: a float does not hold as many digits as a log line has.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

NANOSECONDS = 1_000_000_000
"""Of a second."""

_RFC3339 = re.compile(rb"(\d{4})-(\d{2})-(\d{2})[Tt](\d{2}):(\d{2}):(\d{2})(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d{2}:\d{2})")
_FIRST_SECOND = -62_135_596_800
_LAST_SECOND = 253_402_300_799
"""Of the years 1 to 9999, which RFC 3339 can write."""


def rfc3339(nanoseconds: int) -> str:
    """``metav1.Time``: whole seconds, UTC."""
    return _moment(nanoseconds // NANOSECONDS) + "Z"


def rfc3339_micro(nanoseconds: int) -> str:
    """``metav1.MicroTime``: six digits, UTC."""
    seconds, rest = divmod(nanoseconds, NANOSECONDS)
    return f"{_moment(seconds)}.{rest // 1000:06d}Z"


def rfc3339_nano(nanoseconds: int) -> bytes:
    """Nine digits always, UTC: as a log line begins, and as kubelet answers ``timestamps=true``. What lies before the
    year 1 or after 9999 becomes the first or last second of those."""
    seconds, rest = divmod(nanoseconds, NANOSECONDS)
    return b"%b.%09dZ" % (_moment(seconds).encode(), rest)


def rfc3339_of(moment: datetime) -> str:
    """Whole seconds of a datetime that knows its zone."""
    return rfc3339(int(moment.timestamp() // 1) * NANOSECONDS)


def parse_rfc3339_nano(text: bytes | str) -> int | None:
    """Nanoseconds since the epoch of an RFC 3339 time of any precision; None when it is none."""
    match = _RFC3339.fullmatch(text.encode(errors="replace") if isinstance(text, str) else text)
    if match is None:
        return None
    *whole, fraction, zone = match.groups()
    seconds = _seconds(tuple(whole), zone)
    return None if seconds is None else seconds * NANOSECONDS + int((fraction or b"").ljust(9, b"0"))


def parse_rfc3339(text: str | None) -> float | None:
    """Seconds since the epoch; None for an empty or unreadable time."""
    nanoseconds = parse_rfc3339_nano(text) if text else None
    return None if nanoseconds is None else nanoseconds / NANOSECONDS


def seconds_of(text: object) -> float:
    """Seconds since the epoch of an RFC 3339 time that has to be one. Raises ValueError."""
    seconds = parse_rfc3339(text) if isinstance(text, str) else None
    if seconds is None:
        raise ValueError(f"{text!r} is no RFC 3339 time")
    return seconds


def go_duration(seconds: float) -> str:
    """A duration as Go prints it, cut to milliseconds: ``850ms``, ``1.2s``, ``1m20s``, ``1h0m2.5s``."""
    milliseconds = max(0, int(seconds * 1000))
    if milliseconds == 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{text}"


@lru_cache(maxsize=256)
def _moment(seconds: int) -> str:
    """Cached, since one status names the same second a dozen times, and so do many lines of a log."""
    moment = datetime.fromtimestamp(min(max(seconds, _FIRST_SECOND), _LAST_SECOND), UTC)
    return moment.replace(tzinfo=None).isoformat(timespec="seconds")


@lru_cache(maxsize=256)
def _seconds(whole: tuple[bytes, ...], zone: bytes) -> int | None:
    """Cached, since the lines of a log come many a second."""
    try:
        moment = datetime(*map(int, whole), tzinfo=UTC)  # type: ignore[arg-type, misc]
    except ValueError:
        return None
    seconds = int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    if zone in {b"Z", b"z"}:
        return seconds
    offset = (int(zone[1:3]) * 60 + int(zone[4:6])) * 60
    return seconds - offset if zone[:1] == b"+" else seconds + offset
