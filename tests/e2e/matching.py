"""Whether an object holds what a case expects: a part of it, written as plain YAML.

==================  ================================================================================================
expected            holds when the actual value
==================  ================================================================================================
mapping             has each of the keys with a value that matches; of a list of objects, the key is the ``name`` (or
                    ``type``, ``ip``) of the one that must match
list                has, for each expected entry, one that matches, in any order
``~text``           contains this regular expression
``absent``          is missing, null or empty
``present``         is there and not empty
``>= 3`` ...        is a number for which that is true (``>=``, ``<=``, ``>``, ``<``)
anything else       is equal
==================  ================================================================================================
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

_MISSING: Any = object()
_KEYS = ("name", "type", "ip", "containerName")
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_COMPARISON = re.compile(r"(>=|<=|>|<) ?(-?\d+(?:\.\d+)?)")
_SHOWN = 300


def mismatches(expected: Any, actual: Any, where: str = "") -> list[str]:
    """What is not as expected, one line each; empty when all is."""
    return list(_compare(expected, actual, where))


def _compare(expected: Any, actual: Any, where: str) -> Iterator[str]:
    if isinstance(expected, Mapping):
        yield from _compare_mapping(expected, actual, where)
    elif isinstance(expected, list):
        if not isinstance(actual, list):
            yield f"{where} is {_show(actual)}, not a list"
            return
        for entry in expected:
            if not any(not mismatches(entry, each) for each in actual):
                yield f"{where} has no entry like {_show(entry)}: {_show(actual)}"
    elif isinstance(expected, str) and (reason := _compare_text(expected, actual)) is not None:
        if reason:
            yield f"{where} is {_show(actual)}, {reason}"
    elif actual is _MISSING:
        yield f"{where} is missing; expected {_show(expected)}"
    elif expected != actual or isinstance(expected, bool) is not isinstance(actual, bool):
        yield f"{where} is {_show(actual)}, not {_show(expected)}"


def _compare_mapping(expected: Mapping[str, Any], actual: Any, where: str) -> Iterator[str]:
    if isinstance(actual, list):
        actual = {next((str(e[k]) for k in _KEYS if k in e), ""): e for e in actual if isinstance(e, Mapping)}
    if actual is _MISSING or actual is None:
        actual = {}
    if not isinstance(actual, Mapping):
        yield f"{where} is {_show(actual)}, not an object"
        return
    for key, value in expected.items():
        yield from _compare(value, actual.get(key, _MISSING), f"{where}.{key}" if where else str(key))


def _compare_text(expected: str, actual: Any) -> str | None:
    """None: compare for equality. Empty: it matches. Else what was expected."""
    if expected == "absent":
        return "" if actual is _MISSING or actual in (None, "", [], {}) else "but should be absent"
    if expected == "present":
        return "" if actual is not _MISSING and actual not in (None, "", [], {}) else "but should be present"
    if expected.startswith("~"):
        found = actual is not _MISSING and re.search(expected[1:], str(actual), re.DOTALL)
        return "" if found else f"not like {expected[1:]!r}"
    if comparison := _COMPARISON.fullmatch(expected):
        is_number = isinstance(actual, int | float) and not isinstance(actual, bool)
        holds = is_number and _COMPARISONS[comparison[1]](actual, float(comparison[2]))
        return "" if holds else f"not {expected}"
    return None


def _show(value: Any) -> str:
    text = "missing" if value is _MISSING else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
