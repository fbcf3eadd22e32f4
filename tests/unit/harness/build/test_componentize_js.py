"""What the build of an app in JavaScript checks and hands to its tools. The tools themselves: tests/e2e."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from wasilet.apps.samples import App, find_app
from wasilet.build import npm
from wasilet.build.cargo import CompileError
from wasilet.build.componentize_js import LOCK, build_javascript, entry_of
from wasilet.errors import UsageError

pytestmark = pytest.mark.unit

NODE = """#!/bin/sh
[ "$1" = --version ] && { echo v22.1.0; exit; }
app=$(dirname "$2"); cd "$app" || exit 3
grep -q broken app.* && { echo "$app/app.js: Unexpected token" >&2; exit 1; }
{ ls; ls node_modules 2>/dev/null; grep -h "^package" "$3"/app.wit "$3"/deps/http.wit; echo "$4"; } > "$5"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my-app"
    made.mkdir()
    for name in ("app.js", "book.js", "test_app.py", "README.md", "pod.yaml.j2"):
        (made / name).write_text("")
    return made


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with a Node.js that writes down what it was given, and with tools that npm installed before."""
    (tmp_path / "bin").mkdir()
    for name, script in (
        ("node", NODE),
        ("npm", "#!/bin/sh\nmkdir -p node_modules/ms; touch node_modules/ms/package.json\n"),
    ):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    tools = tmp_path / "lock"
    (tools / "node_modules/@bytecodealliance/componentize-js").mkdir(parents=True)
    (tools / "node_modules/@bytecodealliance/componentize-js/package.json").write_text('{"version": "9.9.9"}')
    real = npm.install

    def install(lock: Path, *arguments: Any) -> Path:
        return tools if lock == LOCK else real(lock, *arguments)

    monkeypatch.setattr(npm, "install", install)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "WASILET_CACHE": str(tmp_path / "cache")}


def build(folder: Path, environ: dict[str, str]) -> list[str]:
    work = folder.parent / "work"
    work.mkdir(exist_ok=True)
    made = build_javascript(
        App(name="my-app", folder=folder, demo=find_app("http-js").demo), work, lambda _: None, environ
    )
    assert made.toolchain == "componentize-js 9.9.9"
    assert [path.name for path in work.iterdir()] == ["component.wasm"], "what was made on the way is gone"
    return made.module.read_text().split("\n")


@pytest.mark.parametrize(
    ("files", "entry"), [(["app.ts", "b.js"], "app.ts"), (["app.mjs"], "app.mjs"), (["main.js", "package.json"], None)]
)
def test_the_entry_decides_that_it_is_javascript(tmp_path: Path, files: list[str], entry: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert entry_of(tmp_path) == entry


def test_the_tools_get_the_modules_and_the_interfaces_of_the_engines_version(
    folder: Path, environ: dict[str, str]
) -> None:
    assert build(folder, environ) == [
        *("app.js", "book.js", "package wasilet:app;", "package wasi:http@0.2.10;", "javascript-service", ""),
    ]


def test_packages_come_from_the_apps_own_lock_file(folder: Path, environ: dict[str, str]) -> None:
    (folder / "package.json").write_text(json.dumps({"dependencies": {"ms": "2.1.3"}}))
    with pytest.raises(UsageError, match=r"no package-lock\.json") as failure:
        build(folder, environ)
    assert failure.value.hint == f"type: npm --prefix {folder} install --package-lock-only"
    (folder / "package-lock.json").write_text("{}")
    assert "ms" in build(folder, environ)
    assert not (folder / "node_modules").exists()


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_package_json_that_is_none_is_named(folder: Path, environ: dict[str, str], text: str) -> None:
    (folder / "package.json").write_text(text)
    with pytest.raises(UsageError, match=r"my-app/package.json is no description of an npm package"):
        build(folder, environ)


def test_a_mistake_is_told_by_the_file_as_its_author_knows_it(folder: Path, environ: dict[str, str]) -> None:
    (folder / "app.js").write_text("broken")
    with pytest.raises(CompileError, match=r"(?m)^app\.js: Unexpected token"):
        build(folder, environ)
