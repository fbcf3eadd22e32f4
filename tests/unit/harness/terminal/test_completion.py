"""Completion as a real bash does it, with a stand-in for Invoke's own answers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from wasilet.errors import UsageError
from wasilet.terminal.completion import script

pytestmark = pytest.mark.unit


def complete(folder: Path, *words: str) -> list[str]:
    """What bash offers after ``words``, the last of which is being typed."""
    program = folder / "invoke"
    program.write_text('#!/bin/sh\ncase "$*" in "--complete --"*) printf "%s\\n" demo down doctor --name ;; esac\n')
    program.chmod(0o755)
    line = " ".join(f"'{word}'" for word in (str(program), *words))
    code = (
        f"{script('bash', str(program))}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
        '_wasilet_complete; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_tasks_come_from_invoke(tmp_path: Path) -> None:
    assert complete(tmp_path, "d") == ["demo", "down", "doctor"]
    assert complete(tmp_path, "demo", "--n") == ["--name"]


def test_samples_and_folders_follow_the_tasks_that_take_an_app(tmp_path: Path) -> None:
    (tmp_path / "help").mkdir()
    offered = complete(tmp_path, "demo", "he")
    assert {"hello-world", "hello-wasm", "help"} <= set(offered)
    assert "cat-facts" not in offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_parse_their_scripts(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-n", "-c", script(shell, "invoke")], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("shell", "program"), [("tcsh", "invoke"), ("bash", "x; rm -rf ~")])
def test_what_makes_no_script_is_refused(shell: str, program: str) -> None:
    with pytest.raises(UsageError):
        script(shell, program)
