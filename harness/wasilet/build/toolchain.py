"""Rust that builds for WASI: found where it is, installed where it may be, else named with the commands to type.

The order is by what costs the user least: a toolchain that has a WASI target already; ``rustup target add`` on the
user's own default toolchain; Debian's packages by apt. Nothing that the user chose is changed: no default toolchain, no
PATH, no cargo configuration. A build gets the chosen folder first on *its* PATH, and that is all.

How a cargo that is older than the registry's sparse index (Debian 12's) gets its dependencies:
``wasilet.build.cargo_vendor``."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet import process
from wasilet.build import apt
from wasilet.errors import HarnessError

Say = Callable[[str], None]
Version = tuple[int, int, int]

TARGETS = ("wasm32-wasip1", "wasm32-wasi")
"""The names of WASI preview 1 in Rust, the current one first. 1.78 introduced the first, 1.84 dropped the second."""

DEBIAN_PACKAGES = ("rustc", "cargo", "libstd-rust-dev-wasm32", "lld")
"""``lld`` is the linker (``wasm-ld``) that Debian's rustc calls; rustup's toolchains have their own."""

OVERRIDE = "WASILET_RUST_BIN"
"""Environment name: the folder of the ``cargo`` and ``rustc`` to use, and no other."""

_WASIP1_SINCE: Version = (1, 78, 0)
_SPARSE_SINCE: Version = (1, 68, 0)
_CHOOSES_SINCE: Version = (1, 84, 0)
_VERSION = re.compile(r"\b(\d+)\.(\d+)\.(\d+)")
_QUERY_TIMEOUT_SECONDS = 30.0
_RUSTUP_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class RustToolchain:
    """A cargo and a rustc that fit each other, with the standard library of a WASI target."""

    bin: Path
    """The folder of ``cargo`` and ``rustc``."""

    target: str
    rustc_version: Version
    cargo_version: Version
    origin: str
    """Where it is from, for people: ``rustup toolchain stable-...`` or a path."""

    @property
    def cargo(self) -> Path:
        """The cargo that builds."""
        return self.bin / "cargo"

    @property
    def rustc(self) -> Path:
        """The compiler."""
        return self.bin / "rustc"

    @property
    def reads_sparse_index(self) -> bool:
        """Whether its cargo fetches dependencies without being asked in a special way."""
        return self.cargo_version >= _SPARSE_SINCE

    @property
    def identity(self) -> str:
        """Changes whenever what it builds may change: part of the key of a build."""
        return f"{self.bin}|{self.target}|{self.rustc_version}|{self.cargo_version}"

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """``env`` for one build: this toolchain's folder first on PATH, and no rustup in between."""
        built = {name: value for name, value in env.items() if name not in {"RUSTUP_TOOLCHAIN", "CARGO", "RUSTC"}}
        built["PATH"] = f"{self.bin}{os.pathsep}{env.get('PATH', os.defpath)}"
        built["RUSTC"] = str(self.rustc)
        built["CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS"] = "fallback"
        return built

    def __str__(self) -> str:
        """``Rust 1.63.0, target wasm32-wasi (/usr/bin)``."""
        return f"Rust {'.'.join(map(str, self.rustc_version))}, target {self.target} ({self.origin})"


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A compiler on this machine, with or without a WASI target."""

    bin: Path
    sysroot: Path
    origin: str
    rustup_name: str | None = None

    def target(self) -> str | None:
        for target in TARGETS:
            library = self.sysroot / "lib" / "rustlib" / target / "lib"
            if library.is_dir() and any(library.glob("libstd-*.rlib")):
                return target
        return None


def find_rust(env: Mapping[str, str] = os.environ) -> RustToolchain | None:
    """A toolchain that can build for WASI as it stands, or None. Changes nothing; starts some ``--version``."""
    for candidate in _candidates(env):
        target = candidate.target()
        if target is not None and _can_link(candidate, env):
            found = _describe(candidate, target, env)
            if found is not None:
                return found
    return None


def ensure_rust(*, say: Say, env: Mapping[str, str] = os.environ, install: bool = True) -> RustToolchain:
    """A toolchain that can build for WASI, installed when it must be and may be.

    Raises HarnessError (exit code 2) that names what is missing, what was tried, and the commands to type.
    """
    found = find_rust(env)
    if found is not None:
        return found
    tried: list[str] = []
    if install:
        for attempt in (_add_by_rustup, _install_by_apt):
            said = attempt(say, env)
            found = find_rust(env)
            if found is not None:
                return found
            if said:
                tried.append(said)
    raise HarnessError(_what_is_missing(env, tried), hint=_commands(env))


def resolving_cargo(env: Mapping[str, str] = os.environ) -> Path | None:
    """A cargo of this machine that chooses releases of crates by the Rust they want (1.84 or newer); None when there is
    none. It need not be able to build for WASI. A folder given by hand is the only one that is looked at."""
    for candidate in _candidates(env):
        version = _version([str(candidate.bin / "cargo"), "--version"], env)
        if version is not None and version >= _CHOOSES_SINCE:
            return candidate.bin / "cargo"
    return None


def _candidates(env: Mapping[str, str]) -> Iterator[_Candidate]:
    override = env.get(OVERRIDE)
    if override:
        found = _from_path(Path(override) / "rustc", env)
        if found is not None:
            yield found
        return
    yield from _rustup_candidates(env)
    seen: set[Path] = set()
    folders = [*env.get("PATH", os.defpath).split(os.pathsep), "/usr/local/bin", "/usr/bin"]
    for folder in folders:
        rustc = Path(folder) / "rustc"
        if not folder or not os.access(rustc, os.X_OK) or _is_rustup_proxy(rustc) or rustc.resolve() in seen:
            continue
        seen.add(rustc.resolve())
        found = _from_path(rustc, env)
        if found is not None:
            yield found


def _rustup_candidates(env: Mapping[str, str]) -> Iterator[_Candidate]:
    home = _rustup_home(env)
    try:
        names = [entry.name for entry in (home / "toolchains").iterdir()]
    except OSError:
        return
    preferred = [name for name in (env.get("RUSTUP_TOOLCHAIN"), _rustup_default(home)) if name]

    def rank(name: str) -> tuple[int, str]:
        for index, wanted in enumerate(preferred):
            if name == wanted or name.startswith(f"{wanted}-"):
                return index, name
        return (10 if name.startswith("stable") else 30 if name.startswith("nightly") else 20), name

    for name in sorted(names, key=rank):
        sysroot = home / "toolchains" / name
        if os.access(sysroot / "bin" / "rustc", os.X_OK) and os.access(sysroot / "bin" / "cargo", os.X_OK):
            yield _Candidate(bin=sysroot / "bin", sysroot=sysroot, origin=f"rustup toolchain {name}", rustup_name=name)


def _rustup_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("RUSTUP_HOME") or Path(env.get("HOME") or Path.home()) / ".rustup")


def _rustup_default(home: Path) -> str | None:
    try:
        settings = tomllib.loads((home / "settings.toml").read_text())
    except (OSError, ValueError):
        return None
    default = settings.get("default_toolchain")
    return default if isinstance(default, str) else None


def _is_rustup_proxy(rustc: Path) -> bool:
    """Rustup's ``rustc`` is a link, hard or symbolic, to ``rustup`` itself."""
    rustup = rustc.with_name("rustup")
    return rustc.resolve().name == "rustup" or (rustup.exists() and rustc.samefile(rustup))


def _from_path(rustc: Path, env: Mapping[str, str]) -> _Candidate | None:
    if not os.access(rustc, os.X_OK) or not os.access(rustc.with_name("cargo"), os.X_OK):
        return None
    answer = _ask([str(rustc), "--print", "sysroot"], env)
    if not answer:
        return None
    return _Candidate(bin=rustc.parent, sysroot=Path(answer), origin=str(rustc.parent))


def _can_link(candidate: _Candidate, env: Mapping[str, str]) -> bool:
    """Rustup's toolchains carry ``rust-lld``; distributions call the system's."""
    if any(candidate.sysroot.glob("lib/rustlib/*/bin/rust-lld")):
        return True
    path = f"{candidate.bin}{os.pathsep}{env.get('PATH', os.defpath)}"
    return any(shutil.which(linker, path=path) for linker in ("rust-lld", "wasm-ld", "lld"))


def _describe(candidate: _Candidate, target: str, env: Mapping[str, str]) -> RustToolchain | None:
    rustc = _version([str(candidate.bin / "rustc"), "--version"], env)
    cargo = _version([str(candidate.bin / "cargo"), "--version"], env)
    if rustc is None or cargo is None:
        return None
    return RustToolchain(
        bin=candidate.bin,
        target=target,
        rustc_version=rustc,
        cargo_version=cargo,
        origin=candidate.origin,
    )


def _add_by_rustup(say: Say, env: Mapping[str, str]) -> str:
    if env.get(OVERRIDE) or not apt.wanted(env):
        return ""
    rustup = shutil.which("rustup", path=env.get("PATH"))
    first = next(_rustup_candidates(env), None)
    if rustup is None or first is None or first.rustup_name is None:
        return ""
    version = _version([str(first.bin / "rustc"), "--version"], env) or _WASIP1_SINCE
    target = TARGETS[0] if version >= _WASIP1_SINCE else TARGETS[1]
    argv = [rustup, "target", "add", "--toolchain", first.rustup_name, target]
    say(f"adding Rust's target {target} to the rustup toolchain {first.rustup_name}")
    try:
        done = process.run(
            argv,
            timeout_seconds=_RUSTUP_TIMEOUT_SECONDS,
            env={**env, "RUSTUP_MAX_RETRIES": "1"},
            check=False,
            on_line=lambda line: say(line.strip()),
        )
    except HarnessError as error:
        return f"rustup target add {target}: {error.message}"
    if done.returncode == 0:
        return ""
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in last if line.startswith("error")), last[-1] if last else "it gave no reason")
    return f"rustup target add {target}: {reason} (no network?)"


def _install_by_apt(say: Say, env: Mapping[str, str]) -> str:
    override = env.get(OVERRIDE)
    if (override and Path(override) != Path("/usr/bin")) or not apt.may_install(env):
        return ""
    try:
        apt.install(DEBIAN_PACKAGES, why="Rust with a WASI target builds the samples", say=say, env=env)
    except HarnessError as error:
        return error.message
    return ""


def _what_is_missing(env: Mapping[str, str], tried: list[str]) -> str:
    override = env.get(OVERRIDE)
    if override:
        found = f"{override} ({OVERRIDE}) has no cargo and rustc with a WASI target"
    elif next(_candidates(env), None) is None:
        found = "Rust is not installed: there is neither a rustup toolchain nor a rustc and cargo on PATH"
    elif any(candidate.target() is not None for candidate in _candidates(env)):
        found = "Rust has a WASI target here, but the linker wasm-ld is missing"
    else:
        found = f"Rust is installed, but without a WASI target ({' or '.join(TARGETS)})"
    return "; ".join([found, *tried])


def _commands(env: Mapping[str, str]) -> str:
    choices = []
    if shutil.which("rustup", path=env.get("PATH")):
        choices.append(f"rustup target add {TARGETS[0]}")
    elif not apt.available(env):
        choices.append(f"install rustup (https://rustup.rs), then: rustup target add {TARGETS[0]}")
    if apt.available(env):
        choices.append(apt.command(DEBIAN_PACKAGES))
    return "type: " + "   or: ".join(choices)


def _version(argv: list[str], env: Mapping[str, str]) -> Version | None:
    match = _VERSION.search(_ask(argv, env) or "")
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _ask(argv: list[str], env: Mapping[str, str]) -> str | None:
    try:
        done = process.run(argv, timeout_seconds=_QUERY_TIMEOUT_SECONDS, env=env, check=False)
    except HarnessError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
