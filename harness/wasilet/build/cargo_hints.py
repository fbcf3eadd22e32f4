"""What to do about cargo's refusals, in one line that can be typed.

The one that meets most people: a crate wants a newer Rust than builds here. Cargo names the crate, seldom who asked
for it, and not what this machine offers: the lock file and the toolchains show it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wasilet.build.cargo_vendor import read_toml
from wasilet.build.toolchain import TARGETS, RustToolchain, resolving_cargo
from wasilet.errors import HarnessError
from wasilet.storage import FULL_DISK_HINT

_TOO_OLD = (
    re.compile(r"package `(?P<name>\S+) v(?P<version>[^ `]+)[^`]*`.*? requires rustc (?P<rust>\d+\.\d+(\.\d+)?)"),
    re.compile(r"^\s*(?P<name>[\w-]+)@(?P<version>\S+) requires rustc (?P<rust>\d+\.\d+(\.\d+)?)", re.MULTILINE),
)
_MANIFEST = re.compile(r"failed to parse manifest at `(?P<folder>[^`]+)/Cargo\.toml`")
_EDITION = re.compile(r"`edition(?P<feature>20\d\d)` is required|older than the `(?P<edition>20\d\d)` edition")
_EDITIONS = {"2021": "1.56", "2024": "1.85"}
_VERSIONED = re.compile(r"(?P<name>.+?)-(?P<version>\d+\.\d+\.\d+.*)")
_NOT_COMPILED = re.compile(r"could not compile `(?P<name>[^`]+)`")


def hint(output: str, *, folder: Path, toolchain: RustToolchain, env: Mapping[str, str]) -> str:
    """What to do about what cargo wrote; empty when there is nothing better than its own message."""
    have = _text(toolchain.rustc_version)
    if "lock file version" in output:
        return (
            f"Cargo.lock was written by a newer cargo than that of Rust {have}; remove it and put "
            f'rust-version = "{have}" into Cargo.toml, or use a newer Rust: {_newer_rust(env)}'
        )
    if "No space left on device" in output or "Read-only file system" in output:
        return FULL_DISK_HINT
    if "can't find crate for `std`" in output or "target may not be installed" in output:
        return "the WASI target of this Rust is incomplete; `invoke doctor` says what brings it"
    if wants := _wants_newer_rust(output):
        return _about_versions(wants, have, folder, env)
    if "Could not resolve host" in output or "failed to download" in output or "spurious network error" in output:
        return "cargo could not reach the crate registry: no network? A mirror is set in ~/.cargo/config.toml"
    foreign = {str(package.get("name")) for package in _locked(folder) if "source" in package}
    refused = [match["name"] for match in _NOT_COMPILED.finditer(output) if match["name"] in foreign]
    if not refused:
        return ""
    return f"{refused[0]} may want a newer Rust than {have}; type: {_choices(refused[0], folder, env)}"


def _wants_newer_rust(output: str) -> list[tuple[str, str, str]]:
    """Crate, its version, and the Rust that it wants."""
    found = [(match["name"], match["version"], match["rust"]) for regex in _TOO_OLD for match in regex.finditer(output)]
    manifest, edition = _MANIFEST.search(output), _EDITION.search(output)
    if not found and manifest and edition:
        crate = _VERSIONED.fullmatch(Path(manifest["folder"]).name)
        rust = _EDITIONS.get(edition["feature"] or edition["edition"], "")
        if rust:
            found.append((crate["name"], crate["version"], rust) if crate else ("", "", rust))
    return list(dict.fromkeys(found))


def _about_versions(wants: list[tuple[str, str, str]], have: str, folder: Path, env: Mapping[str, str]) -> str:
    name, version, rust = wants[0]
    if not name:
        return (
            f"the app's edition is one of Rust {rust}, and this is {have}; "
            f'write edition = "2021" into Cargo.toml, or use a newer Rust: {_newer_rust(env)}'
        )
    if name == _package(folder):
        return (
            f"the app's own rust-version asks for {rust}, and this is Rust {have}; "
            f"lower it in Cargo.toml, or use a newer Rust: {_newer_rust(env)}"
        )
    via = _asked_by(name, folder)
    brought = f", which {via} brings," if via and via != name else ""
    more = f" (and {len(wants) - 1} more do)" if len(wants) > 1 else ""
    return f"{name} {version}{brought} needs Rust {rust}{more}, and this is {have}; type: {_choices(name, folder, env)}"


def _choices(name: str, folder: Path, env: Mapping[str, str]) -> str:
    choices = []
    # Where the app's own configuration asks for it, it has been tried.
    chosen = (read_toml(folder / ".cargo" / "config.toml").get("resolver") or {}).get("incompatible-rust-versions")
    if chosen != "fallback" and (cargo := resolving_cargo(env)) is not None:
        choices.append(f"(cd {folder} && CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS=fallback {cargo} update)")
    choices += [f"an older version of {_asked_by(name, folder) or name} in Cargo.toml", _newer_rust(env)]
    return "   or: ".join(choices)


def _newer_rust(env: Mapping[str, str]) -> str:
    add = f"rustup target add {TARGETS[0]}"
    return add if shutil.which("rustup", path=env.get("PATH")) else f"install rustup (https://rustup.rs), then {add}"


def _asked_by(name: str, folder: Path) -> str:
    """Which of the app's own dependencies brings a crate: itself, another one, or empty when the lock is silent."""
    needs: dict[str, list[str]] = {}
    for package in _locked(folder):
        needs.setdefault(str(package.get("name")), []).extend(
            str(d).split()[0] for d in package.get("dependencies", [])
        )

    def brings(start: str) -> bool:
        seen, waiting = set[str](), [start]
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                waiting += needs.get(current, [])
        return name in seen

    return next((direct for direct in needs.get(_package(folder), []) if brings(direct)), "")


def _locked(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(read_toml(folder / "Cargo.lock").get("package", []))
    except HarnessError:
        return []


def _package(folder: Path) -> str:
    try:
        return str(read_toml(folder / "Cargo.toml").get("package", {}).get("name", folder.name))
    except HarnessError:
        return folder.name


def _text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version[:2]))
