"""Certificates in PEM (RFC 7468), as other programs write them: with remarks, headers and lines of any length."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----\s(.*?)-----END CERTIFICATE-----", re.DOTALL)
_LINE_CHARACTERS = 64


def certificates(text: str) -> Iterator[bytes]:
    """Each certificate, DER, in their order; what is none is passed over."""
    for block in _BLOCK.findall(text):
        try:
            yield base64.b64decode("".join(block.split()), validate=True)
        except binascii.Error:
            continue


def encoded(der: bytes) -> str:
    """One certificate and nothing else."""
    text = base64.b64encode(der).decode("ascii")
    lines = [text[start : start + _LINE_CHARACTERS] for start in range(0, len(text), _LINE_CHARACTERS)]
    return "\n".join(("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""))
