"""From a module to a component, and the Python wheels that do it: which module, found once, and what fails says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wasilet.apps.samples import App, Demo
from wasilet.build import component, python_tools
from wasilet.build.cargo import CompileError, is_library
from wasilet.build.component import carries_world
from wasilet.build.componentize_py import build_python
from wasilet.errors import HarnessError

pytestmark = pytest.mark.unit

PREAMBLE = b"\0asm\x01\0\0\0"
TOOL = Path("tool/bin")


def custom(name: bytes, content: bytes = b"") -> bytes:
    body = bytes([len(name)]) + name + content
    return b"\0" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("sections", "carries"),
    [
        (b"", False),
        (custom(b"name"), False),
        (custom(b"component-type:wit-bindgen:0.35.0:wasi:http:proxy:encoded world", b"x"), True),
        (custom(b"name", b"component-type") + b"\x01\x01\0", False),
        (b"\x01\x01\0" + custom(b"producers") + custom(b"component-type:app"), True),
    ],
)
def test_a_module_says_its_world_in_a_section(tmp_path: Path, sections: bytes, *, carries: bool) -> None:
    module = tmp_path / "a.wasm"
    module.write_bytes(PREAMBLE + sections)
    assert carries_world(module) is carries


@pytest.mark.parametrize("sections", [b"\x01\xff", b"\x01\x7f\0", b"\x01\xff\xff\xff\xff\xff\xff", b"\0\x03\xff"])
def test_a_module_that_ends_too_early_is_none(tmp_path: Path, sections: bytes) -> None:
    module = tmp_path / "a.wasm"
    module.write_bytes(PREAMBLE + sections)
    with pytest.raises(HarnessError, match=r"no whole WebAssembly module|a number in it has no end"):
        carries_world(module)


@pytest.mark.parametrize(
    ("manifest", "main", "library"),
    [
        ('[lib]\ncrate-type = ["cdylib"]\n', False, True),
        ('[lib]\ncrate-type = ["cdylib"]\n', True, False),
        ('[lib]\ncrate-type = ["cdylib"]\n[[bin]]\nname = "a"\n', False, False),
        ("", False, False),
    ],
)
def test_a_crate_without_main_is_built_as_a_library(
    tmp_path: Path, manifest: str, *, main: bool, library: bool
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "Cargo.toml").write_text(f'[package]\nname = "a"\n{manifest}')
    if main:
        (tmp_path / "src" / "main.rs").touch()
    assert is_library(tmp_path) is library


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    """A folder of lock files."""
    folder = tmp_path / "locks"
    folder.mkdir()
    return folder


@pytest.fixture
def environ(tmp_path: Path, locks: Path) -> dict[str, str]:
    """A package source in a folder, of one wheel whose digest a lock file names."""
    import hashlib
    import zipfile

    wheel = tmp_path / "wheels" / "wasilet_test_tool-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tool/bin", "a tool")
        archive.writestr(
            "wasilet_test_tool-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: wasilet-test-tool\nVersion: 1.0\n"
        )
        archive.writestr(
            "wasilet_test_tool-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("wasilet_test_tool-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (locks / "tool.lock").write_text(f"wasilet-test-tool==1.0 --hash=sha256:{digest}\n")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "WASILET_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
    }


def test_a_tool_is_fetched_once(environ: dict[str, str], locks: Path) -> None:
    said: list[str] = []
    first = python_tools.install("tool", TOOL, "the tool", said.append, environ, locks=locks)
    cache = {"WASILET_CACHE": environ["WASILET_CACHE"]}
    second = python_tools.install("tool", TOOL, "the tool", said.append, cache, locks=locks)
    assert first == second
    assert (first / TOOL).read_text() == "a tool"
    assert said == ["fetching the tool (pip install, by tool.lock)"]


def test_a_wheel_of_another_digest_is_refused_and_leaves_nothing(environ: dict[str, str], locks: Path) -> None:
    lock = locks / "tool.lock"
    lock.write_text(lock.read_text()[:-65] + "0" * 64 + "\n")
    with pytest.raises(HarnessError, match="pip could not install the tool"):
        python_tools.install("tool", TOOL, "the tool", lambda _: None, environ, locks=locks)
    assert list((Path(environ["WASILET_CACHE"]) / "python-tools").iterdir()) == []


def test_a_wheel_without_the_tool_is_no_use(environ: dict[str, str], locks: Path) -> None:
    with pytest.raises(HarnessError, match="it lacks tool/other"):
        python_tools.install("tool", Path("tool/other"), "the tool", lambda _: None, environ, locks=locks)


def test_python_without_the_tools_answer_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool is a stand-in, a module that copies what it is given, or refuses it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "componentize_py.py").write_text(
        "import pathlib, sys\n"
        "def script():\n"
        "    given = sys.argv\n"
        "    source = pathlib.Path(given[given.index('-p') + 1]) / 'app.py'\n"
        "    if 'broken' in source.read_text(): sys.exit('SyntaxError: broken')\n"
        "    listed = ' '.join(sorted(found.name for found in source.parent.iterdir()))\n"
        "    pathlib.Path(given[given.index('-o') + 1]).write_text(listed)\n"
    )
    monkeypatch.setattr(python_tools, "install", lambda *_: tools)
    app, folder = tmp_path / "app", tmp_path / "work"
    app.mkdir()
    folder.mkdir()
    for name in ("app.py", "book.py", "test_app.py", "README.md", "pod.yaml.j2"):
        (app / name).write_text("")
    given = App(name="app", folder=app, demo=Demo())
    made = build_python(given, folder, lambda _: None, os.environ)
    assert made.module.read_text() == "app.py book.py"
    assert made.toolchain == "componentize-py 0.25.1"
    (app / "app.py").write_text("broken")
    with pytest.raises(CompileError, match="app does not compile\nSyntaxError: broken"):
        build_python(given, folder, lambda _: None, os.environ)
    assert [file.name for file in folder.iterdir()] == ["component.wasm"]


def test_every_lock_names_one_version_by_digests() -> None:
    locks = sorted(python_tools.LOCKS.glob("*.lock"))
    assert f"{component.TOOL_LOCK}.lock" in [lock.name for lock in locks]
    for lock in locks:
        text = lock.read_text()
        assert text.count("==") == 1
        assert text.count("--hash=sha256:") == 2
