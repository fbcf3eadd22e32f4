"""Times and durations as Kubernetes and Go write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.time_format import (
    go_duration,
    parse_rfc3339,
    parse_rfc3339_nano,
    rfc3339,
    rfc3339_micro,
    rfc3339_nano,
    rfc3339_of,
    seconds_of,
)

pytestmark = pytest.mark.unit

MOMENT = 1_475_713_029_669_794_202
"""2016-10-06T00:17:09.669794202Z"""


def test_a_time_is_written_in_three_precisions() -> None:
    assert rfc3339(MOMENT) == "2016-10-06T00:17:09Z"
    assert rfc3339_micro(MOMENT) == "2016-10-06T00:17:09.669794Z"
    assert rfc3339_nano(MOMENT) == b"2016-10-06T00:17:09.669794202Z"
    assert rfc3339_nano(-1) == b"1969-12-31T23:59:59.999999999Z"
    assert rfc3339_of(datetime(2016, 10, 6, 2, 17, 9, 669794, tzinfo=timezone(timedelta(hours=2)))) == rfc3339(MOMENT)


def test_what_no_year_of_four_digits_holds_is_the_first_or_last_second() -> None:
    assert rfc3339(10**30) == "9999-12-31T23:59:59Z"
    assert rfc3339_nano(-(10**30)).startswith(b"0001-01-01T00:00:00.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2016-10-06T00:17:09.669794202Z", MOMENT),
        ("2016-10-06t02:17:09.669794202+02:00", MOMENT),
        ("2016-10-05T22:17:09.6697942029-02:00", MOMENT),
        ("2016-10-06T00:17:09Z", MOMENT - 669_794_202),
        ("1969-12-31T23:59:59.5Z", -500_000_000),
        ("2016-10-06 00:17:09Z", None),
        ("2016-10-06T00:17:09", None),
        ("2016-13-06T00:17:09Z", None),
        ("2016-10-06T00:17:60Z", None),
        ("", None),
        ("ü", None),
    ],
)
def test_a_time_of_any_precision_is_read(text: str, expected: int | None) -> None:
    assert parse_rfc3339_nano(text) == parse_rfc3339_nano(text.encode()) == expected
    assert parse_rfc3339(text) == (None if expected is None else expected / 1e9)
    assert parse_rfc3339(None) is None


@given(st.integers(0, 4_000_000_000_000_000_000))
def test_what_is_written_is_read_again(nanoseconds: int) -> None:
    assert parse_rfc3339_nano(rfc3339_nano(nanoseconds)) == nanoseconds
    assert parse_rfc3339_nano(rfc3339(nanoseconds)) == nanoseconds // 10**9 * 10**9
    assert rfc3339(nanoseconds) == datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0004, "0s"), (0.85, "850ms"), (1.2, "1.2s"), (80, "1m20s"), (300, "5m0s"), (3602.5, "1h0m2.5s")],
)
def test_a_duration_is_written_as_go_does(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


@pytest.mark.parametrize("text", [None, "", "soon", 5, "2026-13-01T00:00:00Z"])
def test_what_has_to_be_a_time_and_is_none_is_an_error(text: object) -> None:
    assert seconds_of("1970-01-01T00:00:01.5Z") == 1.5
    with pytest.raises(ValueError, match="is no RFC 3339 time"):
        seconds_of(text)
