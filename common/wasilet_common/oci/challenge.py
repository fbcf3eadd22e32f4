"""``WWW-Authenticate`` headers (RFC 9110, section 11.6.1): a registry's demand for authentication.

One header may hold several challenges, and the commas between those are the same as between their parameters. Python's
standard library has no parser for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a pattern of the RFC's "token", not a secret
_PART = re.compile(
    rf"""[\s,]*(?:
        (?P<name>{_TOKEN})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>{_TOKEN}))
        |(?P<scheme>{_TOKEN})
    )""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """``scheme`` and parameter names are lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges, in order. What does not parse ends its header; it never raises."""
    challenges: list[Challenge] = []
    for header in headers:
        current: Challenge | None = None
        position = 0
        while match := _PART.match(header, position):
            position = match.end()
            if match["scheme"] is not None:
                current = Challenge(scheme=match["scheme"].lower(), parameters={})
                challenges.append(current)
            elif current is not None:
                quoted = match["quoted"]
                value = match["bare"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
                current.parameters.setdefault(match["name"].lower(), value)
    return challenges
