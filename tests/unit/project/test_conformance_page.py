from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.e2e.casefiles import load
from tests.e2e.conformance import PAGE, page
from tests.e2e.matching import mismatches

pytestmark = pytest.mark.unit


def test_the_page_of_what_is_supported_is_what_the_cases_say() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.e2e.conformance"


def test_every_case_can_be_read_and_demands_something() -> None:
    assert len(load()) > 150


def test_a_case_may_run_a_second_time_with_the_component() -> None:
    cases = {case.id: case for case in load()}
    twice = [case for case in cases.values() if case.also_component]
    assert len(twice) > 20
    for case in twice:
        second = cases[f"component-{case.id}"]
        assert second.component
        assert (second.steps, second.within) == (case.steps, case.within)
    values = {f"{what}:toolbox{kind}": what + kind for what in ("image", "digest") for kind in ("", "-component")}
    assert twice[0].values(values) == values
    assert cases[f"component-{twice[0].id}"].values(values)["image:toolbox"] == "image-component"


@pytest.mark.parametrize("entry", [{"also": "module"}, {"also": "component", "only": "component"}, {"only": "both"}])
def test_what_a_case_cannot_mean_is_refused(tmp_path: Path, entry: dict[str, str]) -> None:
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump({"area": "x", "cases": [{"case": "x", "see": {"pod": {}}, **entry}]})
    )
    with pytest.raises(ValueError, match="also or only"):
        load(tmp_path)


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
