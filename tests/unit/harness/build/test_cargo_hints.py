"""Cargo's refusals, in cargo's own words of several versions, and what a person is told to type."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet.build.cargo_hints import hint
from wasilet.build.toolchain import RustToolchain

pytestmark = pytest.mark.unit

MANIFEST = '[package]\nname = "cat-door"\nversion = "0.1.0"\n[dependencies]\nrand = "0.9"\nlog = "0.4"\n'
LOCK = """\
version = 3
[[package]]
name = "cat-door"
version = "0.1.0"
dependencies = ["log", "rand 0.9.5"]
[[package]]
name = "log"
version = "0.4.0"
source = "registry+elsewhere"
[[package]]
name = "rand"
version = "0.9.5"
source = "registry+elsewhere"
dependencies = ["wasip2"]
[[package]]
name = "wasip2"
version = "1.0.4+wasi-0.2.12"
source = "registry+elsewhere"
dependencies = ["wit-bindgen"]
[[package]]
name = "wit-bindgen"
version = "0.57.1"
source = "registry+elsewhere"
"""
EDITION_OF_A_CRATE = """\
error: failed to get `rand` as a dependency of package `cat-door v0.1.0 (/home/me/cat-door)`

Caused by:
  failed to parse manifest at `/home/me/.cache/wasilet/crates/0f/wit-bindgen-0.57.1/Cargo.toml`

Caused by:
  failed to parse the `edition` key

Caused by:
  this version of Cargo is older than the `2024` edition, and only supports `2015`, `2018`, and `2021` editions.
"""
EDITION_AS_A_FEATURE = """\
error: failed to parse manifest at `/home/me/.cargo/registry/src/x/wit-bindgen-0.57.1/Cargo.toml`

Caused by:
  feature `edition2024` is required
"""
EDITION_OF_THE_APP = """\
error: failed to parse manifest at `/home/me/cat-door/Cargo.toml`

Caused by:
  this version of Cargo is older than the `2024` edition, and only supports `2015`, `2018`, and `2021` editions.
"""
REFUSED_1_65 = """\
error: package `rand v0.9.5` cannot be built because it requires rustc 1.70 or newer, while the currently active \
rustc version is 1.63.0
Either upgrade to rustc 1.70 or newer, or use
cargo update -p rand@0.9.5 --precise ver
"""
REFUSED_1_95 = """\
error: rustc 1.75.0 is not supported by the following packages:
  wasip2@1.0.4+wasi-0.2.12 requires rustc 1.87.0
  log@0.4.0 requires rustc 1.80
"""
REFUSED_APP = (
    "error: package `cat-door v0.1.0 (/home/me/cat-door)` cannot be built because it requires rustc 1.90 or newer"
)
NOT_COMPILED = (
    "error[E0658]: use of unstable library feature\nerror: could not compile `log` due to 3 previous errors\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "cat-door"
    made.mkdir()
    (made / "Cargo.toml").write_text(MANIFEST)
    (made / "Cargo.lock").write_text(LOCK)
    return made


def told(output: str, folder: Path, **environ: str) -> str:
    toolchain = RustToolchain(
        bin=Path("/usr/bin"), target="wasm32-wasi", rustc_version=(1, 63, 0), cargo_version=(1, 65, 0), origin="a test"
    )
    # Nothing but what a test brings: no toolchain of this machine.
    env = {"WASILET_RUST_BIN": str(folder), "PATH": "", **environ}
    return hint(output, folder=folder, toolchain=toolchain, env=env)


@pytest.mark.parametrize(
    ("output", "begins"),
    [
        (EDITION_OF_A_CRATE, "wit-bindgen 0.57.1, which rand brings, needs Rust 1.85, and this is 1.63; type: "),
        (EDITION_AS_A_FEATURE, "wit-bindgen 0.57.1, which rand brings, needs Rust 1.85, and this is 1.63; type: "),
        (REFUSED_1_65, "rand 0.9.5 needs Rust 1.70, and this is 1.63; type: "),
        (
            REFUSED_1_95,
            "wasip2 1.0.4+wasi-0.2.12, which rand brings, needs Rust 1.87.0 (and 1 more do), and this is 1.63; type: ",
        ),
        (EDITION_OF_THE_APP, "the app's edition is one of Rust 1.85, and this is 1.63; write edition"),
        (REFUSED_APP, "the app's own rust-version asks for 1.90, and this is Rust 1.63; lower it"),
        (NOT_COMPILED, "log may want a newer Rust than 1.63; type: an older version of log in Cargo.toml"),
    ],
)
def test_the_crate_the_rust_it_wants_and_who_asked_for_it_are_named(folder: Path, output: str, begins: str) -> None:
    words = told(output, folder)
    assert words.startswith(begins)
    assert "\n" not in words
    assert words.endswith("install rustup (https://rustup.rs), then rustup target add wasm32-wasip1")


def test_what_is_told_to_type_is_what_this_machine_has(folder: Path, tmp_path: Path) -> None:
    for tool, version in {"rustup": "1.28.2", "cargo": "1.84.0", "rustc": "1.84.0"}.items():
        (tmp_path / tool).write_text(
            f'#!/bin/sh\ncase "$1" in --print) echo /nowhere;; *) echo {tool} {version};; esac\n'
        )
        (tmp_path / tool).chmod(0o755)
    words = told(REFUSED_1_65, folder, WASILET_RUST_BIN=str(tmp_path), PATH=str(tmp_path))
    assert words.partition("type: ")[2].split("   or: ") == [
        f"(cd {folder} && CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS=fallback {tmp_path}/cargo update)",
        "an older version of rand in Cargo.toml",
        "rustup target add wasm32-wasip1",
    ]
    (folder / ".cargo").mkdir()
    (folder / ".cargo" / "config.toml").write_text('[resolver]\nincompatible-rust-versions = "fallback"\n')
    words = told(REFUSED_1_65, folder, WASILET_RUST_BIN=str(tmp_path), PATH=str(tmp_path))
    assert "type: an older version of rand in Cargo.toml   or: rustup target" in words, (
        "what was tried is not told again"
    )


def test_the_apps_own_mistakes_are_left_to_the_compilers_words(folder: Path) -> None:
    assert told("error[E0308]: mismatched types\nerror: could not compile `cat-door` due to 1 error\n", folder) == ""


def test_a_lock_file_of_a_newer_cargo_is_told_with_the_way_out(folder: Path) -> None:
    words = told("lock file version `4` was found, but this version of Cargo does not understand it", folder)
    assert 'remove it and put rust-version = "1.63" into Cargo.toml' in words


def test_without_a_lock_file_the_crate_itself_is_named(folder: Path) -> None:
    (folder / "Cargo.lock").unlink()
    assert "an older version of wit-bindgen in Cargo.toml" in told(EDITION_OF_A_CRATE, folder)


@pytest.mark.parametrize("words", ["No space left on device (os error 28)", "Read-only file system (os error 30)"])
def test_a_cache_without_room_is_moved(folder: Path, words: str) -> None:
    assert "WASILET_CACHE" in told(f"error: failed to create a folder\n{words}\n", folder)
