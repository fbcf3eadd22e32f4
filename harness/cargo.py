"""A Rust application becomes a wasm module: cargo, in release, offline where its cargo cannot go online by itself.

Debian 12's cargo (1.65) reads the registry's sparse index only behind an unstable flag. Its ``RUSTC_BOOTSTRAP`` would
also reach compiler and build scripts, and crates that probe for nightly features would then use them. So the flag is
given to ``cargo vendor`` alone, into a cache named by the lock file's hash, and the build itself runs offline and
stable on those sources. cargo checks the vendored files against the lock file's checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from harness import process
from harness.errors import CommandError, HarnessError
from harness.toolchain import RustToolchain

Say = Callable[[str], None]

_FETCH_TIMEOUT_SECONDS = 600.0
_BUILD_TIMEOUT_SECONDS = 1800.0
_SHOWN = ("Compiling ", "Updating ", "Downloading ", "Downloaded ", "Vendoring ", "Blocking ")


def compile_module(
    folder: Path,
    *,
    toolchain: RustToolchain,
    target_dir: Path,
    vendor_root: Path,
    say: Say,
    binary: str | None = None,
    env: Mapping[str, str] = os.environ,
) -> Path:
    """Build the application in ``folder`` and return the module that cargo made, inside ``target_dir``.

    Raises HarnessError with cargo's and the compiler's own words when the build fails; UsageError-like messages when
    ``folder`` makes no program, or several and none is named by ``binary``.
    """
    environment = toolchain.environment(env)
    offline: list[str] = []
    if not toolchain.reads_sparse_index and _has_dependencies(folder):
        vendored = _vendor(folder, toolchain, vendor_root, say, environment)
        offline = [
            "--offline",
            "--config",
            'source.crates-io.replace-with="vendored-sources"',
            "--config",
            f"source.vendored-sources.directory={json.dumps(str(vendored))}",
        ]
    argv = [
        str(toolchain.cargo),
        "build",
        "--release",
        "--target",
        toolchain.target,
        "--manifest-path",
        str(folder / "Cargo.toml"),
        "--target-dir",
        str(target_dir),
        "--message-format",
        "json-render-diagnostics",
        *offline,
    ]
    if binary is not None:
        argv += ["--bin", binary]
    else:
        argv += ["--bins"]
    done = process.run(
        argv,
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
        env=environment,
        check=False,
        on_line=lambda line: _progress(line, say),
    )
    if done.returncode != 0:
        raise CompileError(folder.name, done.stderr, hint=_hint(done.stderr))
    modules = _modules(done.stdout)
    if len(modules) == 1:
        return modules[0]
    if not modules:
        raise HarnessError(
            f"{folder} builds no program", hint="a crate needs src/main.rs or a [[bin]] to become a module"
        )
    names = ", ".join(sorted(module.stem for module in modules))
    raise HarnessError(f"{folder} builds several programs: {names}", hint="name the one to use with --bin")


class CompileError(HarnessError):
    """The compiler refused the program; the message is what the compiler said."""

    def __init__(self, name: str, output: str, *, hint: str = "") -> None:
        super().__init__(f"{name} does not compile\n{_relevant(output)}", hint=hint)
        self.output = output


def _relevant(output: str) -> str:
    """Without cargo's progress, from the first diagnostic on."""
    lines = [line for line in output.splitlines() if not line.strip().startswith(_SHOWN)]
    return "\n".join(lines).strip()


def _hint(output: str) -> str:
    if "lock file version" in output:
        return "Cargo.lock was written by a newer cargo than this one; use a newer Rust, or remove Cargo.lock"
    if "can't find crate for `std`" in output or "target may not be installed" in output:
        return "the WASI target of this Rust is incomplete; `invoke doctor` says what brings it"
    if "rustc" in output and ("requires rustc" in output or "is not supported by the following package" in output):
        return (
            "a dependency wants a newer Rust; set rust-version in Cargo.toml and make the lock file with "
            "CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS=fallback cargo generate-lockfile, or install a newer Rust"
        )
    if "Could not resolve host" in output or "failed to download" in output or "spurious network error" in output:
        return "cargo could not reach the crate registry: no network? A mirror is set in ~/.cargo/config.toml"
    return ""


def _progress(line: str, say: Say) -> None:
    text = line.strip()
    if text.startswith(_SHOWN):
        say(text.partition(" (")[0])


def _modules(output: str) -> list[Path]:
    found: list[Path] = []
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or "bin" not in message["target"]["kind"]:
            continue
        found += [Path(name) for name in message["filenames"] if name.endswith(".wasm")]
    return found


def _has_dependencies(folder: Path) -> bool:
    """Whether anything comes from a registry. The manifest has its say too: a lock file may be older than it."""
    try:
        lock = tomllib.loads((folder / "Cargo.lock").read_text())
        if any("source" in package for package in lock.get("package", [])):
            return True
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise HarnessError(f"{folder / 'Cargo.lock'} cannot be read: {error}") from error
    try:
        manifest = tomllib.loads((folder / "Cargo.toml").read_text())
    except (OSError, ValueError) as error:
        raise HarnessError(f"{folder / 'Cargo.toml'} cannot be read: {error}") from error
    return bool(manifest.get("dependencies") or manifest.get("target") or manifest.get("workspace"))


def _vendor(folder: Path, toolchain: RustToolchain, root: Path, say: Say, environment: dict[str, str]) -> Path:
    """The sources that the lock file names, fetched once; the folder is renamed into place when it is complete."""
    lock = folder / "Cargo.lock"
    base = [str(toolchain.cargo), "-Z", "sparse-registry"]
    manifest = ["--manifest-path", str(folder / "Cargo.toml")]
    fetching = {**environment, "RUSTC_BOOTSTRAP": "1"}
    if not lock.exists():
        _fetch([*base, "generate-lockfile", *manifest], fetching, say)
    vendored = root / hashlib.sha256(lock.read_bytes()).hexdigest()[:32]
    if vendored.is_dir():
        return vendored
    say("fetching the dependencies that Cargo.lock names")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetching-") as temporary:
        sources = Path(temporary) / "sources"
        _fetch([*base, "vendor", "--locked", "--versioned-dirs", *manifest, str(sources)], fetching, say)
        try:
            sources.rename(vendored)
        except OSError:
            if not vendored.is_dir():
                raise
            shutil.rmtree(sources)
    return vendored


def _fetch(argv: list[str], environment: dict[str, str], say: Say) -> None:
    done = process.run(
        argv,
        timeout_seconds=_FETCH_TIMEOUT_SECONDS,
        env=environment,
        check=False,
        on_line=lambda line: _progress(line, say),
    )
    if done.returncode != 0:
        tail = process.last_lines(done.stderr)
        raise CommandError(
            "cargo could not fetch the dependencies: " + ("\n".join(tail) or "it gave no reason"),
            argv=tuple(argv),
            returncode=done.returncode,
            tail=tail,
            hint=_hint(done.stderr) or "is there a network?",
        )
