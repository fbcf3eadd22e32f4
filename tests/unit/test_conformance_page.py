from __future__ import annotations

import pytest

from tests.e2e.casefiles import load
from tests.e2e.conformance import PAGE, page
from tests.e2e.matching import mismatches

pytestmark = pytest.mark.unit


def test_the_page_of_what_is_supported_is_what_the_cases_say() -> None:
    assert PAGE.read_text() == page(), "run python -P -m tests.e2e.conformance"


def test_every_case_can_be_read_and_demands_something() -> None:
    assert len(load()) > 150


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}),
        ({"main": {"ready": True}}, [{"name": "main", "ready": True}]),
        ({"Ready": {"status": "True"}}, [{"type": "Ready", "status": "True"}]),
        ([{"ip": "1"}], [{"ip": "2"}, {"ip": "1"}]),
        ({"a": "absent"}, {}),
        ({"a": "present"}, {"a": "x"}),
        ({"a": "~^x+$"}, {"a": "xx"}),
        ({"a": ">= 2"}, {"a": 2}),
    ],
)
def test_what_matches(expected: object, actual: object) -> None:
    assert mismatches(expected, actual) == []


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}),
        ({"a": {"b": 1}}, {}),
        ({"main": {"ready": True}}, [{"name": "other", "ready": True}]),
        ([{"ip": "1"}], [{"ip": "2"}]),
        ({"a": "absent"}, {"a": "x"}),
        ({"a": "present"}, {"a": ""}),
        ({"a": "~^x+$"}, {"a": "y"}),
        ({"a": "~x"}, {}),
        ({"a": ">= 2"}, {"a": 1}),
        ({"a": True}, {"a": 1}),
        ({"a": "x"}, {}),
    ],
)
def test_what_does_not_match(expected: object, actual: object) -> None:
    assert mismatches(expected, actual)
