"""Finding and building the component host, with a cargo that is a script."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet_node.runtime.component_host import build, locate
from wasilet_node.runtime.component_host.library import HostUnavailableError, Library

pytestmark = pytest.mark.unit


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def environment(folder: Path, *, rustc: str = "rustc 1.95.0 (abc 2026-04-14)", cargo: str = "exit 1") -> dict[str, str]:
    script(folder / "bin" / "rustc", f"echo '{rustc}'")
    script(folder / "bin" / "cargo", cargo)
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "WASILET_CACHE": str(folder / "cache")}


def test_without_a_library_the_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailableError, match=locate.COMMAND):
        locate.find({"HOME": str(tmp_path), "WASILET_CACHE": str(tmp_path)})


def test_a_library_given_by_hand_is_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailableError, match=f"{locate.VARIABLE} names /no/such, which is no file"):
        locate.find({locate.VARIABLE: "/no/such", "WASILET_CACHE": str(tmp_path)})


def test_what_others_could_change_is_not_opened(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.touch()
    library.chmod(0o666)
    with pytest.raises(HostUnavailableError, match="can be changed by other users"):
        locate.load({locate.VARIABLE: str(library)})


def test_what_is_no_library_is_named(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_text("text", encoding="utf-8")
    library.chmod(0o600)
    with pytest.raises(HostUnavailableError, match="cannot be opened"):
        locate.load({locate.VARIABLE: str(library)})
    with pytest.raises(HostUnavailableError, match="cannot be opened"):
        Library(Path("libc.so.6"))


def test_no_rust_and_old_rust_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailableError, match="no cargo was found"):
        build.find_rust({"PATH": str(tmp_path), "HOME": str(tmp_path)})
    old = environment(tmp_path, rustc="rustc 1.63.0")
    with pytest.raises(HostUnavailableError, match=r"needs Rust 1.95, .* has rustc 1.63.0"):
        build.find_rust(old)
    assert str(build.find_rust(environment(tmp_path))) == "Rust 1.95.0"


def test_a_build_that_fails_says_cargos_last_words_and_leaves_nothing(tmp_path: Path) -> None:
    env = environment(tmp_path, cargo="echo '   Compiling a v1' >&2; echo 'error: no such crate' >&2; exit 101")
    said: list[str] = []
    (locate.built(env).parent / ".build-of-one-that-was-killed" / "deps").mkdir(parents=True)
    with pytest.raises(HostUnavailableError, match=r"cannot be built:\n(.*\n)*error: no such crate"):
        build.ensure(say=said.append, env=env)
    assert "Compiling a v1" in said
    assert [path.name for path in locate.built(env).parent.iterdir()] == ["lock"]


def test_a_build_is_done_once_and_kept(tmp_path: Path) -> None:
    try:
        library = locate.find()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    copy = f'while [ "$1" != --target-dir ]; do shift; done; mkdir -p "$2/release"; cp {library} "$2/release/"'
    counted = f"echo >> {tmp_path}/count; {copy}; mv $2/release/* $2/release/{locate.FILE_NAME} 2>/dev/null; true"
    env = environment(tmp_path, cargo=counted)
    first = build.ensure(say=lambda _: None, env=env)
    assert first == build.ensure(say=lambda _: None, env=env) == locate.built(env)
    assert (tmp_path / "count").read_text(encoding="utf-8") == "\n"
    assert first.stat().st_mode & 0o077 == 0
