"""Modules and components are told apart by their first eight bytes."""

from __future__ import annotations

import pytest
from wasilet_common.oci.layouts import LayoutError
from wasilet_node.images.kinds import detect_kind
from wasilet_node.runtime.protocol import GuestKind

from tests.unit.node.images.fakes import COMPONENT, MODULE

pytestmark = pytest.mark.unit


def test_the_preamble_tells_modules_from_components() -> None:
    assert detect_kind(MODULE[:8]) is GuestKind.MODULE
    assert detect_kind(COMPONENT[:8]) is GuestKind.COMPONENT


@pytest.mark.parametrize(
    ("preamble", "words"),
    [
        (b"", "not WebAssembly"),
        (b"\0asm", "not WebAssembly"),
        (b"(module)", "not WebAssembly"),
        (b"\x7fELF\x02\x01\x01\0", "not WebAssembly"),
        (b"\0asm\x02\0\0\0", "module of version 2"),
        (b"\0asm\x0a\0\x01\0", "component of version 10"),
    ],
)
def test_what_is_not_webassembly_is_refused(preamble: bytes, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        detect_kind(preamble)
