"""What ``invoke logs`` prints, and the contract of ``status --output json`` where nothing runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from wasilet.cluster import status as statuses
from wasilet.cluster.status import log_file, log_lines
from wasilet.errors import UsageError
from wasilet.settings import Settings, load
from wasilet.state import State

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = load(environ={"WASILET_STATE_HOME": str(tmp_path), "WASILET_CACHE": str(tmp_path / "cache"), "PATH": ""})
    State.of(made).update(name=made.name, provider="host", nodes=1)
    return made


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "x.log"
    path.write_bytes(b"one\n\nthree\nf\xc3\xbcnf \xff\nlast without end")
    return path


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (0, ["one", "", "three", "fünf \ufffd", "last without end"]),
        (2, ["fünf \ufffd", "last without end"]),
        (99, ["one", "", "three", "fünf \ufffd", "last without end"]),
    ],
)
def test_the_last_lines_are_printed_as_they_are(log: Path, tail: int, expected: list[str]) -> None:
    assert list(log_lines(log, tail=tail, follow=False)) == expected


def test_of_a_huge_log_only_whole_lines_of_its_end_are_printed(log: Path) -> None:
    log.write_text("".join(f"line {number:>20}\n" for number in range(60_000)))
    lines = list(log_lines(log, tail=59_000, follow=False))
    assert 30_000 < len(lines) < 59_000
    assert lines[-1].split() == ["line", "59999"]
    assert all(len(line) == 25 for line in lines)


def test_less_than_no_lines_is_refused(log: Path) -> None:
    with pytest.raises(UsageError, match="--lines -1"):
        list(log_lines(log, tail=-1, follow=False))


def test_following_goes_on_after_a_line_that_was_half_there_and_after_rotation(log: Path) -> None:
    log.write_text("one\nhal")
    lines = log_lines(log, tail=1, follow=True, poll_seconds=0.001)
    with log.open("a") as file:
        file.write("f\n")
    assert next(lines) == "half"
    log.write_text("new\n")
    assert list(itertools.islice(lines, 1)) == ["new"]


@pytest.mark.parametrize(
    ("typed", "file"),
    [("apiserver", "kube-apiserver"), ("kube-apiserver", "kube-apiserver"), ("wasilet-1", "node-wasilet-1")],
)
def test_a_log_is_named_as_people_name_it(settings: Settings, typed: str, file: str) -> None:
    for name in ("kube-apiserver", "node-wasilet-1"):
        State.of(settings).log(name).touch()
    assert log_file(settings, typed).name == f"{file}.log"


def test_an_unknown_component_names_those_there_are(settings: Settings) -> None:
    State.of(settings).log("etcd").touch()
    with pytest.raises(UsageError) as error:
        log_file(settings, "x")
    assert "there are: etcd" in error.value.hint


def test_the_keys_of_status_stay_even_when_nothing_runs(settings: Settings) -> None:
    """Other programs build on them: one may be added here, none changed or taken away."""
    data = statuses.status(settings)
    assert {*data} == {
        *("name", "provider", "kubeconfig", "context", "server", "registry", "registry_login", "state_dir"),
        *("pod_network", "pod_security", "components", "nodes", "ready"),
    }
    assert data["ready"] is False
    assert [entry["name"] for entry in data["components"]] == [
        *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "registry", "approver"),
    ]
    assert all({*entry} == {"name", "pid", "ready", "log"} for entry in data["components"])
    assert all(entry["pid"] is None and not entry["ready"] for entry in data["components"])
    (node,) = data["nodes"]
    assert {*node} == {"name", "address", "port", "pid", "supervisor_pid", "data_dir", "ready", "log"}
    assert (node["name"], node["pid"], node["supervisor_pid"], node["ready"]) == ("wasilet-1", None, None, False)
