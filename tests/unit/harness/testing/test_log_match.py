"""What is asserted of a log, without a cluster."""

from __future__ import annotations

import re

import pytest
from wasilet.testing.log_match import Judge, explain, numbered, printable, texts

pytestmark = pytest.mark.unit


def judged(lines: list[str], **wanted: object) -> Judge:
    judge = Judge(**wanted)  # type: ignore[arg-type]
    for line in lines:
        judge.feed([line])
    return judge


def test_contains_is_satisfied_in_any_order() -> None:
    assert judged(["b", "a"], contains=("a", "b")).missing == []


def test_in_order_wants_each_text_in_a_later_line_than_the_one_before() -> None:
    assert judged(["a", "b"], in_order=("a", "b")).missing == []
    assert [want.text for want in judged(["b", "a"], in_order=("a", "b")).missing] == ["b"]
    assert [want.text for want in judged(["a b"], in_order=("a", "b")).missing] == ["b"]


def test_the_same_text_twice_in_order_wants_two_lines() -> None:
    assert judged(["tick"], in_order=("tick", "tick")).missing
    assert not judged(["tick", "tick"], in_order=("tick", "tick")).missing


def test_a_forbidden_line_is_seen_even_when_everything_else_is_there() -> None:
    judge = judged(["fine", "panic: x"], contains=("fine",), absent=("panic",))
    assert judge.forbidden == [(2, "panic")]


def test_a_regular_expression_is_found_anywhere_in_a_line() -> None:
    assert not judged(["took 12 ms"], contains=texts(r"\d+ ms", pattern=True)).missing


@pytest.mark.parametrize("given", ["", [""], [re.compile("")]])
def test_an_empty_text_is_refused_because_it_would_assert_nothing(given: object) -> None:
    with pytest.raises(ValueError, match="asserts nothing"):
        texts(given)  # type: ignore[arg-type]


def test_asserting_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is asserted"):
        Judge()


def test_what_is_no_regular_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        texts("(", pattern=True)


def test_a_missing_text_is_shown_beside_the_line_that_is_most_like_it() -> None:
    lines = ["something else", "Hello, World!"]
    said = "\n".join(explain(judged(lines, contains=("Hello, Wrold!",)), lines))
    assert "MISSING  contains 'Hello, Wrold!'" in said
    assert "line 2 is most like it" in said
    assert "+ Hello, World!" in said


def test_a_text_in_the_wrong_place_is_said_to_be_there() -> None:
    lines = ["second", "first"]
    said = "\n".join(explain(judged(lines, in_order=("first", "second")), lines))
    assert "line 1 has it, but it is wanted after line 2" in said


def test_a_long_log_shows_its_end_with_true_line_numbers() -> None:
    lines = [f"line {number}" for number in range(1, 101)]
    shown = numbered(lines, judged(lines, contains=("line 99",)), shown=3)
    assert shown[0] == "  ... 97 lines before ..."
    assert [text.split()[0] for text in shown[1:]] == ["98", ">", "100"]


def test_control_characters_cannot_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07") == "a\\x1b[2Jb\\x0d\\x07"


def test_a_hostile_line_of_a_megabyte_is_compared_in_bounded_time() -> None:
    lines = ["x" * 1_000_000] * 20
    assert explain(judged(lines, contains=("xy" * 50_000,)), lines)
