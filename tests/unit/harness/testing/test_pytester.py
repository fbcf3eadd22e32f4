"""The plugin inside pytest, as far as that goes without a cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.unit

PROJECT = """
import pytest

def test_plain():
    pass

async def test_asynchronous():
    pass

@pytest.mark.wasilet_provider("kind")
def test_only_on_kind():
    raise AssertionError("must not run")

@pytest.mark.wasilet_within(3)
def test_on_a_cluster(cluster):
    pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of somebody else's, on a machine where no cluster runs."""
    pytester.makepyfile(test_it=PROJECT)
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    monkeypatch.setenv("WASILET_STATE_HOME", str(pytester.path / "state"))
    monkeypatch.delenv("WASILET_PROVIDER", raising=False)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return pytester


def test_the_entry_point_imports_nothing_but_pytest() -> None:
    code = (
        "import pytest, sys; before = set(sys.modules); import wasilet.testing.pytest_plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["wasilet", "wasilet.testing", "wasilet.testing.pytest_plugin", "wasilet_common"]


def test_markers_are_registered(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--strict-markers", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*4 tests collected*"])


def test_tests_that_use_a_cluster_can_be_chosen_by_marker(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-m", "wasilet", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["test_it.py::test_on_a_cluster", "*1/4 tests collected*"])
    project.runpytest_subprocess("-m", "not wasilet").assert_outcomes(passed=2, skipped=1)


def test_every_option_begins_with_the_projects_name(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--help")
    section = result.stdout.str().partition("Wasilet:")[2].partition("\n\n")[0]
    options = [word for word in section.split() if word.startswith("--")]
    assert len(options) >= 8
    assert all(option.startswith("--wasilet-") for option in options)


def test_a_test_for_another_provider_is_skipped_with_the_reason(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-k", "only_on_kind", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*for kind only; the provider is host*"])


def test_a_cluster_that_cannot_be_reached_is_one_clear_error(project: pytest.Pytester) -> None:
    config = project.path / "kubeconfig"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {}}]\n"
    )
    result = project.runpytest_subprocess("-k", "on_a_cluster", "--wasilet-kubeconfig", "kubeconfig")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the API server at http://127.0.0.1:1 gave no answer*"])
    assert "Traceback" not in result.stdout.str()


def test_an_unknown_provider_says_which_there_are(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-k", "on_a_cluster", "--wasilet-provider", "docker-desktop")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*docker-desktop*host*"])


def test_a_run_without_a_cluster_writes_nothing(project: pytest.Pytester) -> None:
    project.runpytest_subprocess("-k", "plain or asynchronous").assert_outcomes(passed=2)
    assert not (project.path / "state").exists()
    assert not (project.path / "wasilet-artifacts").exists()
