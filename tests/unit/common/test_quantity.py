"""Quantities are read as apimachinery reads them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common import quantity

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "value", "milli"),
    [
        ("0", 0, 0),
        ("100m", 1, 100),
        ("1.5", 2, 1500),
        (".5", 1, 500),
        ("5.", 5, 5000),
        ("+3", 3, 3000),
        ("-2", -2, -2000),
        ("007", 7, 7000),
        ("1Ki", 1024, 1024_000),
        ("1.5Gi", 1610612736, 1610612736_000),
        ("64Mi", 67108864, 67108864_000),
        ("1k", 1000, 1000_000),
        ("2M", 2_000_000, 2_000_000_000),
        ("1e3", 1000, 1000_000),
        ("1E3", 1000, 1000_000),
        ("1E", 10**18, 10**21),
        ("12e-1", 2, 1200),
        ("1n", 1, 1),
        ("1u", 1, 1),
    ],
)
def test_a_quantity_has_the_value_that_kubernetes_gives_it(text: str, value: int, milli: int) -> None:
    assert quantity.value(text) == value
    assert quantity.milli_value(text) == milli


@pytest.mark.parametrize(
    "text", ["", "m", "1 Gi", "1gi", "1KI", "0x10", "1e", "--1", "1.2.3", "Ki", ".", "1Mi ", "٣", "1" * 200]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(quantity.QuantityError):
        quantity.parse(text)


def test_a_huge_exponent_is_refused_and_not_computed() -> None:
    with pytest.raises(quantity.QuantityError):
        quantity.parse("1e999999999")


def test_binary_quantities_are_capped_and_tiny_ones_are_rounded_up_to_a_nano() -> None:
    assert quantity.value("9999999Ei") == 2**63 - 1
    assert quantity.parse("0.0000000001") == Fraction(1, 10**9)


@given(st.integers(0, 10**9), st.sampled_from(["Ki", "Mi", "Gi"]))
def test_binary_suffixes_are_powers_of_1024(number: int, suffix: str) -> None:
    expected = number * 1024 ** (["Ki", "Mi", "Gi"].index(suffix) + 1)
    assert quantity.value(f"{number}{suffix}") == min(expected, 2**63 - 1)


@given(st.integers(0, 10**12))
def test_millis_survive_a_round_trip(number: int) -> None:
    assert quantity.milli_value(f"{number}m") == number


@given(st.text(alphabet="0123456789.+-eEnumkKMGTPi ", max_size=20))
def test_any_text_is_either_a_number_or_a_quantity_error(text: str) -> None:
    try:
        quantity.parse(text)
    except quantity.QuantityError:
        assert True


def test_a_missing_resource_reads_as_nought() -> None:
    assert quantity.lookup(None, "cpu") == "0"
    assert quantity.lookup({"cpu": "1"}, "cpu") == "1"


@pytest.mark.parametrize(
    ("number", "like", "text"),
    [
        (0, "1Mi", "0"),
        (1000, "1Ki", "1k"),
        (3 << 20, "1Ki", "3Mi"),
        ((1 << 30) + 1, "1Gi", "1073741825"),
        (1536 << 20, "1Gi", "1536Mi"),
        (1_500_000_000, "1G", "1500M"),
        (1024, "1", "1024"),
        (2_000_000, "1e6", "2e6"),
        (12, "1e6", "12"),
        (10**18, "1E", "1E"),
    ],
)
def test_a_number_is_written_as_the_api_server_would(number: int, like: str, text: str) -> None:
    assert quantity.canonical(number, like=like) == text


@given(st.integers(min_value=0, max_value=2**62), st.sampled_from(["1Mi", "1M", "1e3"]))
def test_what_is_written_is_read_again(number: int, like: str) -> None:
    assert quantity.value(quantity.canonical(number, like=like)) == number
