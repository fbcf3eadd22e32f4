"""``$(NAME)`` is expanded as Kubernetes expands it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.kube.expansion import expand, mapping_for

pytestmark = pytest.mark.unit

VARIABLES = {"VAR_A": "A", "VAR_B": "B", "VAR_C": "C", "VAR_REF": "$(VAR_A)", "VAR_EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(VAR_A)", "A"),
        ("___$(VAR_B)___", "___B___"),
        ("$(VAR_A)-$(VAR_B)", "A-B"),
        ("$(VAR_REF)", "$(VAR_A)"),
        ("$(VAR_EMPTY)x", "x"),
        ("$(MISSING)", "$(MISSING)"),
        ("$()", "$()"),
        ("$$(VAR_A)", "$(VAR_A)"),
        ("$$$(VAR_A)", "$A"),
        ("$$$$(VAR_A)", "$$(VAR_A)"),
        ("$VAR_A", "$VAR_A"),
        ("${VAR_A}", "${VAR_A}"),
        ("$(VAR_A", "$(VAR_A"),
        ("$(VAR_A$(VAR_B)", "$(VAR_A$(VAR_B)"),
        ("$(VAR_A))", "A)"),
        ("($(VAR_A))", "(A)"),
        ("end$", "end$"),
        ("end$$", "end$"),
        ("$", "$"),
        ("$%$(VAR_A)", "$%A"),
        ("$\u00e9$(VAR_A)", "$\u00e9A"),
        ("\n$(VAR_A)\n", "\nA\n"),
        ("$(VAR_A VAR_B)", "$(VAR_A VAR_B)"),
    ],
)
def test_references_are_replaced_and_everything_else_stays(text: str, expected: str) -> None:
    assert expand(text, mapping_for(VARIABLES)) == expected


def test_the_first_context_that_knows_a_name_wins() -> None:
    assert expand("$(A)$(B)", mapping_for({"A": "1"}, {"A": "2", "B": "3"})) == "13"


@given(st.text(alphabet="$()AB x"))
def test_escaping_every_dollar_gives_the_text_back(text: str) -> None:
    assert expand(text.replace("$", "$$"), mapping_for({"A": "boom", "B": "boom", "": "boom"})) == text


@given(st.text(alphabet=st.characters(exclude_characters="$")))
def test_a_text_without_a_dollar_is_left_alone(text: str) -> None:
    assert expand(text, mapping_for(VARIABLES)) == text


@given(st.text(alphabet="()AB"), st.text(alphabet="$()AB"))
def test_what_a_value_brings_in_is_not_expanded_again(before: str, value: str) -> None:
    assert expand(before + "$(X)", mapping_for({"X": value, "A": "boom"})) == before + value
