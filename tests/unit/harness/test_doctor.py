"""What `doctor` says of machines that have, and of machines that lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wasilet import doctor
from wasilet.controlplane.gobuild import Go
from wasilet.settings import Settings, load

pytestmark = pytest.mark.unit


def settings(folder: Path, **environ: str) -> Settings:
    return load(
        environ={
            "PATH": str(folder / "bin"),
            "WASILET_CACHE": str(folder / "cache"),
            "WASILET_STATE_HOME": str(folder / "state"),
            "HOME": str(folder),
            **environ,
        }
    )


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def found(folder: Path, **environ: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.doctor(settings(folder, **environ))}


def test_a_bare_machine_gets_a_line_and_a_way_for_everything(tmp_path: Path) -> None:
    checks = found(tmp_path)
    for name, check in checks.items():
        assert check.detail, name
        if check.status in {"missing", "optional"}:
            assert check.hint, name


def test_binaries_that_cannot_be_had_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_go", lambda _: Go(path=None, problem="Go is not installed"))
    checks = found(tmp_path, WASILET_DOWNLOAD="false")
    assert checks["etcd"].status == "missing"
    assert "KUBEBUILDER_ASSETS" in checks["etcd"].hint
    assert not doctor.is_fit(list(checks.values()))


def test_docker_without_an_engine_is_told_apart_from_no_docker(tmp_path: Path) -> None:
    assert "no engine" not in found(tmp_path)["docker"].detail
    executable(tmp_path / "bin/docker", 'case "$*" in *Client*) echo 28.0.0;; *) exit 1;; esac')
    assert "no engine answers" in found(tmp_path)["docker"].detail
    executable(tmp_path / "bin/docker", "echo 28.0.0")
    assert found(tmp_path)["docker"].detail == "engine 28.0.0"


def test_a_folder_that_cannot_be_written_to_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert found(tmp_path)["state folder"].status == "missing"


FENCES = ("own user", "own file tree", "own pid namespace", "Landlock", "seccomp")


def test_each_fence_of_sandboxes_has_a_line(tmp_path: Path) -> None:
    checks = found(tmp_path)
    for name in FENCES:
        assert checks[f"sandbox: {name}"].status in {"ok", "optional"}


def test_a_fence_that_is_missing_says_what_is_without_it_and_harms_nothing_else(tmp_path: Path) -> None:
    answer = [{"name": "own user", "holds": False, "detail": "they have the user of the node: that needs root"}]
    executable(tmp_path / "python", f"echo '{json.dumps(answer)}'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(tmp_path / "python"))
        checks = found(tmp_path)
        assert checks["sandbox: own user"].status == "optional"
        assert checks["sandbox: own user"].detail == answer[0]["detail"]
        executable(tmp_path / "python", "exit 1")
        assert found(tmp_path)["sandbox fences"].detail == "they could not be tried"


def test_lines_carry_their_hints_below_them() -> None:
    lines = list(doctor.check_lines([doctor.Check(name="x", status="missing", detail="gone", hint="type: bring x")]))
    assert lines[0].split() == ["missing", "x", "gone"]
    assert lines[1].strip() == "-> type: bring x"
