"""The workflow that users copy: what it names exists, and what it keeps is what a run leaves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.build.toolchain import TARGETS
from wasilet.settings import cache_root

pytestmark = pytest.mark.unit

FILE = Path(__file__).parents[3] / "docs" / "github-actions.yaml"
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/cache", "actions/upload-artifact"}


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] <= 60
    return list(job["steps"])


def typed(steps: list[dict[str, Any]], program: str) -> list[str]:
    (line,) = [step["run"] for step in steps if str(step.get("run", "")).startswith(f"{program} ")]
    return shlex.split(line)


def used(steps: list[dict[str, Any]], action: str) -> dict[str, Any]:
    (step,) = [step for step in steps if str(step.get("uses", "")).startswith(f"{action}@")]
    return dict(step)


def test_it_runs_on_pushes_with_no_more_rights_than_reading(workflow: dict[Any, Any]) -> None:
    # YAML 1.1 takes the key `on` for a truth.
    assert {"push", "pull_request"} <= {*workflow[True]}
    assert workflow["permissions"] == {"contents": "read"}


def test_every_step_does_one_thing_that_is_known(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert action in ACTIONS
            assert re.fullmatch(r"v\d+", version)


def test_the_options_of_pytest_are_there(steps: list[dict[str, Any]], pytestconfig: pytest.Config) -> None:
    words = typed(steps, "pytest")
    known = pytestconfig._parser.optparser._option_string_actions
    assert [word for word in words if word.startswith("-") and word not in known] == []
    assert "pytest-xdist" in typed(steps, "pip"), "-n is its option"


def test_what_is_kept_is_what_a_run_leaves(steps: list[dict[str, Any]], pytestconfig: pytest.Config) -> None:
    words = typed(steps, "pytest")
    kept = used(steps, "actions/upload-artifact")["with"]["path"].split()
    artifacts = pytestconfig._parser.optparser.get_default("wasilet_artifacts")
    assert kept == [
        f"{artifacts}/",
        words[words.index("--wasilet-report") + 1],
        words[words.index("--junitxml") + 1],
    ]
    assert used(steps, "actions/upload-artifact")["if"] == "${{ !cancelled() }}", "also after a failure"


def test_the_caches_are_where_things_are_and_named_by_what_is_there(steps: list[dict[str, Any]]) -> None:
    path = Path(used(steps, "actions/cache")["with"]["path"]).expanduser()
    assert path == cache_root({}) / "binaries"
    python = used(steps, "actions/setup-python")["with"]
    # setup-python fails where no file of that name is; the workflow itself always is.
    assert (python["cache"], python["cache-dependency-path"]) == ("pip", ".github/workflows/test.yaml")
    assert typed(steps, "rustup") == ["rustup", "target", "add", TARGETS[0]]
