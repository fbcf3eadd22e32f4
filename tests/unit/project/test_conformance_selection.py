"""What is run of Kubernetes' own tests, and how their report is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wasilet.controlplane.versions import versions
from wasilet.errors import HarnessError

from tests.rigs.conformance import report, suite
from tests.rigs.conformance.report import Result, Selection, Skip

pytestmark = pytest.mark.unit

SELECTION = Selection(
    labels="Conformance", groups=("sig-node",), skips=(Skip(reason="no ports", tests=("listens on a port",)),)
)


def spec(name: str, state: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {
        "LeafNodeType": "It",
        "ContainerHierarchyTexts": ["[sig-node] Pods"],
        "LeafNodeText": name,
        "LeafNodeLabels": ["Conformance"],
        "State": state,
        "RunTime": 1_500_000_000,
        **({"Failure": {"Message": message}} if message else {}),
        **more,
    }


def read(tmp_path: Path, *specs: dict[str, Any]) -> list[Result]:
    file = tmp_path / "report.json"
    file.write_text(json.dumps([{"SpecReports": list(specs)}]))
    return report.read(file, SELECTION)


def test_each_state_is_told_apart(tmp_path: Path) -> None:
    results = read(
        tmp_path,
        spec("a", "passed"),
        spec("b", "failed", "expected\n  one"),
        spec("c", "timedout"),
        spec("d", "skipped", "needs two nodes"),
        spec("e listens on a port", "skipped"),
        spec("not in focus", "skipped"),
        spec("of no conformance", "passed", LeafNodeLabels=[]),
        spec("of others", "passed", ContainerHierarchyTexts=["[sig-network] Services"]),
        spec("set-up", "failed", LeafNodeType="BeforeEach"),
    )
    assert [(result.name.removeprefix("[sig-node] Pods "), result.state, result.why) for result in results] == [
        ("a", "passed", ""),
        ("b", "failed", "expected one"),
        ("c", "failed", "timedout"),
        ("d", "skipped", "needs two nodes"),
        ("e listens on a port", "excluded", "no ports"),
    ]
    assert [result.name[-1] for result in report.failures(results)] == ["b", "c"]


def test_the_page_counts_and_lists(tmp_path: Path) -> None:
    results = read(tmp_path, spec("a [Conformance]", "passed"), spec("b", "failed", "got <nil> | x"))
    page = report.page(results, version="1.36.3", part="those of Pods")
    assert "| sig-node | 1 | 1 | 0 | 0 |" in page
    assert "- sig-node: Pods a\n" in page
    assert "- sig-node: Pods b (got  nil    x)" in page
    assert "--minor 1.36 " in page
    assert "Of these a part was run: those of Pods.\n" in page


def test_the_page_says_what_became_of_what_the_minor_before_did_not_have(tmp_path: Path) -> None:
    results = read(tmp_path, spec("a [Conformance] [Slow]", "passed"), spec("b", "passed"))
    names = ["[sig-node] Pods a [Slow] [Conformance]", "[sig-node] Pods b", "[sig-node] Pods c", "[sig-apps] Jobs d"]
    new = report.new_names(names, ["[sig-node] Pods b [Serial]"])
    page = report.page(results, version="1.36.3", new=new, before="1.35.4")
    assert page.partition("that 1.35.4 did not have")[2].splitlines()[2:] == [
        "- sig-node: Pods a: passed",
        "- sig-node: Pods c: not run",
    ], "groups of which nothing was run are not on it"


def test_the_tests_of_each_minor_that_is_brought_are_pinned() -> None:
    assert {minor: suite.pin(minor).version for minor in suite.minors()} == dict(versions().kubernetes)
    assert suite.pin().page.name == "conformance.md"
    assert suite.pin().page.exists()
    for pinned in map(suite.pin, suite.minors()):
        assert not pinned.page.exists() or pinned.page.read_text().startswith(
            f"# Kubernetes' own tests on a Wasilet node: {pinned.version}\n"
        )
        assert pinned.before < pinned.version


def test_tests_of_a_minor_that_is_not_pinned_are_refused() -> None:
    with pytest.raises(HarnessError, match=r"no tests of Kubernetes 1\.2 are pinned"):
        suite.pin("1.2")


def test_a_part_of_a_name_that_matches_no_test_is_stale() -> None:
    assert SELECTION.stale(["[sig-node] x listens on a port"]) == []
    assert SELECTION.stale(["[sig-node] x"]) == ["listens on a port"]


def test_the_selection_of_the_repository_gives_each_skip_a_reason() -> None:
    selection = Selection.load()
    assert selection.groups
    assert all(skip.reason and skip.tests for skip in selection.skips)


def test_what_a_run_of_a_part_did_not_run_is_taken_from_the_one_before() -> None:
    earlier = [
        report.Result(name="[sig-node] a", state="failed", why="one node"),
        report.Result(name="[sig-node] b", state="passed"),
        report.Result(name="[sig-node] c", state="excluded", why="no port"),
    ]
    part = [report.Result(name="[sig-node] a", state="passed"), earlier[2]]
    found = report.merged(part, earlier)
    assert [(result.title, result.state) for result in found] == [("a", "passed"), ("b", "passed"), ("c", "excluded")]
