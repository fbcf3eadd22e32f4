"""What typing in ``kubectl exec -it`` comes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.server.streams.terminal import MAX_LINE_BYTES, LineDiscipline, to_screen

pytestmark = pytest.mark.unit


def test_a_line_is_echoed_as_it_is_typed_and_sent_when_it_is_whole() -> None:
    terminal = LineDiscipline()
    typed = terminal.type(b"hi")
    assert (typed.input, typed.echo) == (b"", b"hi")
    typed = terminal.type(b"\r")
    assert (typed.input, typed.echo) == (b"hi\n", b"\r\n")


def test_backspace_takes_back_a_character_of_several_bytes() -> None:
    typed = LineDiscipline().type("aé".encode() + b"\x7fb\r")
    assert typed.input == b"ab\n"
    assert typed.echo.endswith(b"\b \bb\r\n")


def test_backspace_at_the_beginning_does_nothing() -> None:
    typed = LineDiscipline().type(b"\x7f\x08")
    assert typed.echo == typed.input == b""


def test_ctrl_u_clears_the_line() -> None:
    assert LineDiscipline().type(b"abc\x15d\r").input == b"d\n"


def test_ctrl_c_interrupts_and_drops_the_rest() -> None:
    typed = LineDiscipline().type(b"one\rtwo\x03three\r")
    assert typed.interrupt
    assert typed.input == b"one\n"
    assert typed.echo.endswith(b"^C\r\n")


def test_ctrl_d_ends_an_empty_line_and_hands_over_a_begun_one() -> None:
    terminal = LineDiscipline()
    typed = terminal.type(b"ab\x04")
    assert (typed.input, typed.end) == (b"ab", False)
    assert terminal.type(b"\x04").end


def test_a_line_without_end_is_limited() -> None:
    terminal = LineDiscipline()
    terminal.type(b"x" * (2 * MAX_LINE_BYTES))
    assert len(terminal.type(b"\r").input) == MAX_LINE_BYTES + 1


@given(st.binary(max_size=60).filter(lambda data: not set(data) & {3, 4, 8, 0x15, 0x7F}))
def test_ordinary_bytes_reach_the_guest(data: bytes) -> None:
    assert LineDiscipline().type(data + b"\r").input == data.replace(b"\r", b"\n") + b"\n"


def test_the_screen_gets_carriage_returns_once() -> None:
    assert to_screen(b"a\nb\r\n") == b"a\r\nb\r\n"
