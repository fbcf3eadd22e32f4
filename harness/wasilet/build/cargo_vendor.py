"""The crates that an app asks for, fetched for a cargo that cannot fetch them by itself.

Debian 12's cargo (1.65) reads the registry's sparse index only behind an unstable flag, and takes the newest releases
whether its rustc compiles them or not. Where a newer cargo is on the machine, that one resolves and fetches, for the
old rustc: it takes releases whose ``rust-version`` fits. Else the old one does, with the flag; its ``RUSTC_BOOTSTRAP``
would also reach compiler and build scripts, and crates that probe for nightly features would then use them, so it is
given to ``cargo vendor`` alone. Either way the build itself runs offline and stable on the vendored sources, which
cargo checks against the lock file's checksums.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wasilet import process
from wasilet.build.toolchain import RustToolchain, resolving_cargo
from wasilet.errors import CommandError, HarnessError

Say = Callable[[str], None]

FETCH_TIMEOUT_SECONDS = 600.0
PROGRESS = (
    "Adding ",
    "Blocking ",
    "Compiling ",
    "Downloaded ",
    "Downloading ",
    "Locking ",
    "Updating ",
    "Vendoring ",
)
"""How the lines begin that cargo writes while all is well."""


def has_dependencies(folder: Path) -> bool:
    """Whether anything comes from a registry. The manifest has its say too: a lock file may be older than it. Raises
    HarnessError for a file that cannot be read."""
    if any("source" in package for package in read_toml(folder / "Cargo.lock").get("package", [])):
        return True
    manifest = read_toml(folder / "Cargo.toml")
    return bool(manifest.get("dependencies") or manifest.get("target") or manifest.get("workspace"))


def read_toml(file: Path) -> dict[str, Any]:
    """A file of cargo's; empty when there is none. Raises HarnessError."""
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HarnessError(f"{file} cannot be read: {error}") from error


def vendor(
    folder: Path,
    *,
    toolchain: RustToolchain,
    root: Path,
    say: Say,
    env: Mapping[str, str],
    explain: Callable[[str], str],
) -> Path:
    """The sources of what ``Cargo.toml`` and ``Cargo.lock`` name, fetched once, in a folder below ``root``.

    The lock file is made, or brought up to date with the manifest, as ``cargo build`` would do. ``explain`` turns
    cargo's message into a hint. Raises CommandError with this message."""
    lock = folder / "Cargo.lock"
    known = lock.exists()
    if known and (vendored := root / _key(folder)).is_dir():
        return vendored
    say("fetching the dependencies that Cargo.toml names")
    root.mkdir(parents=True, exist_ok=True)
    newer = resolving_cargo(env)
    environment = toolchain.environment(env)
    if newer is not None:
        argv = [str(newer)]
    else:
        argv = [str(toolchain.cargo), "-Z", "sparse-registry"]
        environment["RUSTC_BOOTSTRAP"] = "1"
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetching-") as temporary:
        sources = Path(temporary) / "sources"
        argv += ["vendor", "--versioned-dirs", "--manifest-path", str(folder / "Cargo.toml"), str(sources)]
        _fetch(argv, folder, environment, say, explain)
        if not known:
            _make_readable(lock)
        vendored = root / _key(folder)
        try:
            sources.rename(vendored)
        except OSError:
            if not vendored.is_dir():
                raise
            shutil.rmtree(sources)
    return vendored


def _key(folder: Path) -> str:
    """A folder's name for what the two files name."""
    # A member of a workspace has no lock file of its own.
    files = [file.read_bytes() if file.exists() else b"" for file in (folder / "Cargo.lock", folder / "Cargo.toml")]
    return hashlib.sha256(b"\0".join(files)).hexdigest()[:32]


def _make_readable(lock: Path) -> None:
    """Let the old cargo read a lock file that the new one has just made. Version 4 differs from 3 in how the addresses
    of git repositories are written, and in nothing else."""
    text = lock.read_text() if lock.exists() else ""
    if "\nversion = 4\n" in text and '"git+' not in text:
        lock.write_text(text.replace("\nversion = 4\n", "\nversion = 3\n", 1))


def _fetch(argv: list[str], folder: Path, environment: dict[str, str], say: Say, explain: Callable[[str], str]) -> None:
    done = process.run(
        argv,
        timeout_seconds=FETCH_TIMEOUT_SECONDS,
        cwd=folder,
        env=environment,
        check=False,
        on_line=lambda line: report_progress(line, say),
    )
    if done.returncode != 0:
        tail = process.last_lines(done.stderr)
        raise CommandError(
            "cargo could not fetch the dependencies: " + ("\n".join(tail) or "it gave no reason"),
            argv=tuple(argv),
            returncode=done.returncode,
            tail=tail,
            hint=explain(done.stderr) or "is there a network?",
        )


def report_progress(line: str, say: Say) -> None:
    """Pass on a line of cargo's that reports progress."""
    text = line.strip()
    if text.startswith(PROGRESS):
        say(text.partition(" (")[0])
