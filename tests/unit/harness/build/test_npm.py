from __future__ import annotations

from pathlib import Path

import pytest
from wasilet.build import npm
from wasilet.errors import HarnessError

pytestmark = pytest.mark.unit

TOOL = Path("node_modules/tool/bin.js")
INSTALLS = 'test -f package-lock.json && mkdir -p node_modules/tool && echo "$*" > node_modules/tool/bin.js'


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine with Node.js 22 and an npm that installs."""
    machine(tmp_path, node="echo v22.1.0", npm=INSTALLS)
    return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "WASILET_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "app"
    made.mkdir()
    for name in ("package.json", "package-lock.json"):
        (made / name).write_text("{}")
    return made


def machine(root: Path, **programs: str) -> None:
    (root / "bin").mkdir(exist_ok=True)
    for name, script in programs.items():
        program = root / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)


def install(folder: Path, environ: dict[str, str], said: list[str]) -> Path:
    return npm.install(folder, (TOOL,), "the tool", said.append, environ)


def test_what_the_lock_file_names_is_installed_once_and_outside_of_its_folder(
    folder: Path, environ: dict[str, str]
) -> None:
    said: list[str] = []
    installed = install(folder, environ, said)
    assert (installed / TOOL).read_text().startswith("ci --ignore-scripts")
    assert said == ["fetching the tool that package-lock.json names (npm ci)"]
    assert install(folder, environ, said) == installed
    assert len(said) == 1
    assert sorted(entry.name for entry in folder.iterdir()) == ["package-lock.json", "package.json"]
    (folder / "package-lock.json").write_text("{ }")
    assert install(folder, environ, said) != installed


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo no such host >&2; exit 1", "npm could not install the tool: no such host"),
        ("exit 0", "it lacks .*bin.js"),
    ],
)
def test_an_install_that_fails_leaves_nothing(
    tmp_path: Path, folder: Path, environ: dict[str, str], script: str, why: str
) -> None:
    machine(tmp_path, npm=script)
    with pytest.raises(HarnessError, match=why):
        install(folder, environ, [])
    assert list((tmp_path / "cache" / "npm").iterdir()) == []


def test_a_machine_without_node_or_with_an_old_one_says_so(tmp_path: Path, environ: dict[str, str]) -> None:
    assert npm.find_node("the tool", environ) == tmp_path / "bin" / "node"
    machine(tmp_path, node="echo v18.19.0")
    with pytest.raises(HarnessError, match=r"the tool needs a newer Node\.js than v18\.19\.0"):
        npm.find_node("the tool", environ)
    (tmp_path / "bin" / "npm").unlink()
    with pytest.raises(HarnessError, match=r"the tool needs Node\.js and npm, which are not installed"):
        npm.find_node("the tool", {**environ, "PATH": str(tmp_path / "bin")})
