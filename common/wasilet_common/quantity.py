"""Kubernetes quantities (``100m``, ``64Mi``, ``1e3``), as exact numbers.

The grammar and the rounding are those of apimachinery's ``resource.Quantity``: what is finer than a nano is rounded
away from zero ("if you want some resources, you should get some"), binary quantities are capped at 2^63 - 1, and
whole-number views round up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

_GRAMMAR = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?(n|u|m|k|[KMGTPE]i|[MGTPE]|[eE][+-]?\d+)?", re.ASCII)
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_NANO = 10**9
_MAXIMUM = (1 << 63) - 1
_MAX_TEXT = 128
_MAX_EXPONENT = 100


class QuantityError(ValueError):
    """The text is no quantity. The message is apimachinery's."""


def parse(text: str | float) -> Fraction:
    """The exact value. JSON manifests may hold a bare number, hence int and float. Raises QuantityError."""
    text = str(text)
    return _parsed(text if len(text) <= _MAX_TEXT else "")


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Fraction:
    """Cached, since pods of one template name the same few, and each is asked for many times."""
    match = _GRAMMAR.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        raise QuantityError(
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        )
    sign, whole, decimals, suffix = match[1], match[2], match[3] or "", match[4] or ""
    amount = Fraction(int(whole + decimals), 10 ** len(decimals))
    if suffix in _BINARY:
        amount *= 1 << _BINARY[suffix]
    elif suffix in _DECIMAL:
        amount *= Fraction(10) ** _DECIMAL[suffix]
    else:
        exponent = int(suffix[1:])
        if abs(exponent) > _MAX_EXPONENT:
            raise QuantityError("unable to parse quantity's suffix")
        amount *= Fraction(10) ** exponent
    amount = Fraction(math.ceil(amount * _NANO), _NANO)
    if suffix in _BINARY:
        amount = min(amount, Fraction(_MAXIMUM))
    return -amount if sign == "-" else amount


def value(text: str | float) -> int:
    """The next whole number above: bytes of a memory quantity. Raises QuantityError."""
    return math.ceil(parse(text))


def milli_value(text: str | float) -> int:
    """Thousandths, rounded up: millicores of a cpu quantity. Raises QuantityError."""
    return math.ceil(parse(text) * 1000)


def canonical(number: int, *, like: str) -> str:
    """A whole number in the shortest exact form of the family of ``like``: binary, decimal or with an exponent."""
    if like.endswith("i") and abs(number) >= 1 << 10:
        fits = [name for name, shift in _BINARY.items() if number % (1 << shift) == 0]
        return f"{number >> _BINARY[fits[-1]]}{fits[-1]}" if fits else str(number)
    power = max((p for p in (3, 6, 9, 12, 15, 18) if number and number % 10**p == 0), default=0)
    with_exponent = power and re.search(r"[eE][+-]?\d", like)
    suffix = f"e{power}" if with_exponent else next(name for name, p in _DECIMAL.items() if p == power)
    return f"{number // 10**power}{suffix}"


def lookup(resources: Mapping[str, str] | None, name: str) -> str:
    """An entry of ``limits`` or ``requests``; ``"0"`` when there is none."""
    return (resources or {}).get(name) or "0"
