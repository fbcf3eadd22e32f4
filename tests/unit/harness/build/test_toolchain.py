"""Which Rust is taken, what is done to get one, and what is said when there is none. Compilers are small scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wasilet.build import apt
from wasilet.build.toolchain import OVERRIDE, RustToolchain, ensure_rust, find_rust
from wasilet.errors import HarnessError

pytestmark = pytest.mark.unit


class Machine:
    """A home and a PATH with nothing in them but what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.said: list[str] = []
        self.env = {"HOME": str(root), "PATH": str(self.bin)}

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def rust(self, sysroot: Path, *, version: str, cargo: str = "", bin_folder: Path | None = None) -> None:
        folder = bin_folder or sysroot / "bin"
        self.script(
            folder / "rustc",
            f'case "$1" in --print) echo {sysroot};; *) echo "rustc {version} (abc 2022-01-01)";; esac',
        )
        self.script(folder / "cargo", f'echo "cargo {cargo or version} (abc 2022-01-01)"')

    def target(self, sysroot: Path, name: str) -> None:
        library = sysroot / "lib" / "rustlib" / name / "lib"
        library.mkdir(parents=True)
        (library / "libstd-0123.rlib").touch()

    def rustup_toolchain(self, name: str, version: str, *targets: str) -> Path:
        sysroot = self.root / ".rustup" / "toolchains" / name
        self.rust(sysroot, version=version)
        self.script(sysroot / "lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld", "exit 0")
        for target in targets:
            self.target(sysroot, target)
        return sysroot

    def default_toolchain(self, name: str) -> None:
        (self.root / ".rustup").mkdir(exist_ok=True)
        (self.root / ".rustup" / "settings.toml").write_text(f'default_toolchain = "{name}"\nversion = "12"\n')

    def find(self) -> RustToolchain:
        found = find_rust(self.env)
        assert found is not None
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    # The folders that are looked into besides PATH are this very machine's.
    real = os.access
    monkeypatch.setattr(
        "wasilet.build.toolchain.os.access", lambda path, mode: Path(path).is_relative_to(tmp_path) and real(path, mode)
    )
    monkeypatch.setattr(apt, "may_install", lambda _: False)
    monkeypatch.setattr(apt, "available", lambda _: True)
    return made


def test_the_default_toolchain_goes_before_others_that_have_the_target_too(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0", "wasm32-wasip1")
    machine.rustup_toolchain("1.80.0-x", "1.80.0", "wasm32-wasip1")
    machine.default_toolchain("1.80.0-x")
    assert machine.find().rustc_version == (1, 80, 0)


def test_a_toolchain_with_the_target_goes_before_a_default_without(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0")
    machine.rustup_toolchain("1.70.0-x", "1.70.0", "wasm32-wasi")
    machine.default_toolchain("stable-x")
    found = machine.find()
    assert (found.target, found.rustc_version) == ("wasm32-wasi", (1, 70, 0))
    assert found.origin == "rustup toolchain 1.70.0-x"


def test_the_current_name_of_the_target_goes_before_the_old_one(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.80.0", "wasm32-wasi", "wasm32-wasip1")
    assert machine.find().target == "wasm32-wasip1"


def test_a_distributions_rust_is_found_by_its_sysroot(machine: Machine) -> None:
    sysroot = machine.root / "usr"
    machine.rust(sysroot, version="1.63.0", cargo="1.65.0", bin_folder=machine.bin)
    machine.target(sysroot, "wasm32-wasi")
    machine.script(machine.bin / "wasm-ld", "exit 0")
    found = machine.find()
    assert (found.bin, found.target) == (machine.bin, "wasm32-wasi")
    assert not found.reads_sparse_index


def test_a_distributions_rust_without_a_linker_is_not_enough_and_the_linker_is_named(machine: Machine) -> None:
    sysroot = machine.root / "usr"
    machine.rust(sysroot, version="1.63.0", bin_folder=machine.bin)
    machine.target(sysroot, "wasm32-wasi")
    assert find_rust(machine.env) is None
    with pytest.raises(HarnessError, match="the linker wasm-ld is missing"):
        ensure_rust(say=machine.said.append, env=machine.env)


def test_rustups_proxies_on_path_are_not_taken_for_a_compiler(machine: Machine) -> None:
    rustup = machine.script(machine.bin / "rustup", "exit 1")
    (machine.bin / "rustc").hardlink_to(rustup)
    (machine.bin / "cargo").symlink_to(rustup)
    assert find_rust(machine.env) is None


def test_a_folder_given_by_hand_is_the_only_one_looked_at(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0", "wasm32-wasip1")
    machine.env[OVERRIDE] = str(machine.root / "elsewhere")
    assert find_rust(machine.env) is None
    with pytest.raises(HarnessError, match=f"elsewhere \\({OVERRIDE}\\) has no cargo and rustc"):
        ensure_rust(say=machine.said.append, env=machine.env)


def test_the_build_gets_the_toolchain_first_on_path_and_nothing_else_changes(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0", "wasm32-wasip1")
    before = {**machine.env, "RUSTUP_TOOLCHAIN": "nightly", "LANG": "C"}
    toolchain = machine.find()
    after = toolchain.environment(before)
    assert after["PATH"] == f"{toolchain.bin}:{machine.bin}"
    assert after["LANG"] == "C"
    assert "RUSTUP_TOOLCHAIN" not in after
    assert before["RUSTUP_TOOLCHAIN"] == "nightly"


def test_a_missing_target_is_added_by_rustup_to_the_default_toolchain(machine: Machine) -> None:
    sysroot = machine.rustup_toolchain("stable-x", "1.95.0")
    library = sysroot / "lib/rustlib/wasm32-wasip1/lib"
    machine.script(
        machine.bin / "rustup",
        f'/bin/mkdir -p {library} && /usr/bin/touch {library}/libstd-1.rlib && echo "$@" > {machine.root}/called',
    )
    found = ensure_rust(say=machine.said.append, env=machine.env)
    assert found.target == "wasm32-wasip1"
    assert (machine.root / "called").read_text().split() == [
        "target",
        "add",
        "--toolchain",
        "stable-x",
        "wasm32-wasip1",
    ]
    assert "wasm32-wasip1" in machine.said[0]


def test_an_old_rust_is_given_the_old_name_of_the_target(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.70.0")
    machine.script(machine.bin / "rustup", f'echo "$@" > {machine.root}/called; exit 1')
    with pytest.raises(HarnessError):
        ensure_rust(say=machine.said.append, env=machine.env)
    assert (machine.root / "called").read_text().split()[-1] == "wasm32-wasi"


def test_a_rustup_without_network_is_quoted_and_the_commands_are_named(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0")
    machine.script(machine.bin / "rustup", 'echo "error: could not download file" >&2; exit 1')
    with pytest.raises(HarnessError, match="error: could not download file") as error:
        ensure_rust(say=machine.said.append, env=machine.env)
    assert error.value.exit_code == 2
    assert "rustup target add wasm32-wasip1" in error.value.hint
    assert "sudo apt-get install --no-install-recommends rustc cargo libstd-rust-dev-wasm32 lld" in error.value.hint


def test_no_rust_at_all_says_so(machine: Machine) -> None:
    with pytest.raises(HarnessError, match="Rust is not installed"):
        ensure_rust(say=machine.said.append, env=machine.env)


def test_nothing_is_installed_when_that_is_forbidden(machine: Machine) -> None:
    machine.rustup_toolchain("stable-x", "1.95.0")
    machine.script(machine.bin / "rustup", f"/usr/bin/touch {machine.root}/called")
    machine.env["WASILET_INSTALL"] = "no"
    with pytest.raises(HarnessError, match="without a WASI target"):
        ensure_rust(say=machine.said.append, env=machine.env)
    assert not (machine.root / "called").exists()
