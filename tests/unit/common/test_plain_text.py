from __future__ import annotations

import pytest
from wasilet_common.plain_text import plain

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as it is\tæøå 日本\n", "as it is\tæøå 日本\n"),
        ("\x1b[36mINFO\x1b[0m[0000] Prep", "INFO[0000] Prep"),
        ("\x1b[1;38;5;208mbold\x1b[m", "bold"),
        ("\x1b[2K\x1b[1A\x1b[?25lhidden\x1b[?25h", "hidden"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b(Bcharset\x1b7\x1b8", "charset"),
        ("cut off \x1b[3", "cut off "),
        ("cut off \x1b", "cut off "),
        ("bell\x07 nul\x00 back\x08 c1\x9b", "bell nul back c1"),
        (" 10%\r 50%\r100%\nnext\r\n", "100%\nnext\n"),
        ("", ""),
    ],
)
def test_only_what_is_text_stays(text: str, expected: str) -> None:
    assert plain(text) == expected
