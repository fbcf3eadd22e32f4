"""What the live view makes of keys, and what it refuses."""

from __future__ import annotations

import io

import pytest
from wasilet.errors import UsageError
from wasilet.settings import Settings
from wasilet.terminal.ui import _named, show

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (b"j", ["down"]),
        (b"\x1b[A\x1b[B", ["up", "down"]),
        (b"\x1bOA", ["up"]),
        (b"xyz\x1b[5~q", ["quit"]),
        (b"", []),
    ],
)
def test_keys_are_named_and_others_passed_over(sent: bytes, keys: list[str]) -> None:
    assert _named(sent) == keys


def test_without_a_terminal_it_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match=r"needs a terminal.*invoke status"):
        show(Settings())
