"""Building the component host, once, into the cache.

By the cargo of this machine: the crates are pinned by a lock file and come from the registry that cargo is set up for.
They ask for a newer rustc than they need, so cargo is told to ignore that; ``OLDEST_RUSTC`` is what was tried. A build
takes four minutes of processor time and 1.5 GB of disk, of which the library's 12 MB are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet_common.file_lock import locked_file

from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError, Library

OLDEST_RUSTC = (1, 95)
BUILD_TIMEOUT_SECONDS = 3600.0
_OTHERS_BUILD_SECONDS = BUILD_TIMEOUT_SECONDS + 60.0
_VERSION_TIMEOUT_SECONDS = 30.0
_VERSION = re.compile(r"rustc (\d+)\.(\d+)\.(\d+)")
_PROGRESS = re.compile(r"^\s*(Compiling|Downloading|Finished) ")
_LAST_LINES = 30
_WORK_PREFIX = ".build-"
_HINT = "install Rust from your distribution or with rustup, or set CARGO to a newer cargo"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Rust:
    """A cargo and the version of its rustc."""

    cargo: str
    version: tuple[int, int, int]

    def __str__(self) -> str:
        """``Rust 1.95.0``."""
        return "Rust " + ".".join(map(str, self.version))


def find_rust(env: Mapping[str, str] = os.environ) -> Rust:
    """The cargo that ``CARGO`` or PATH names. Raises HostUnavailableError where there is none, or an old one."""
    cargo = env.get("CARGO") or shutil.which("cargo", path=env.get("PATH")) or _rustup_cargo(env)
    if cargo is None:
        raise HostUnavailableError(f"no cargo was found to build the component host with; {_HINT}")
    rustc = str(Path(cargo).with_name("rustc"))
    try:
        answer = subprocess.run(
            [rustc, "--version"],
            capture_output=True,
            text=True,
            check=False,
            env=dict(env),
            timeout=_VERSION_TIMEOUT_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HostUnavailableError(f"{rustc} does not say its version: {error}") from error
    found = _VERSION.search(answer)
    if found is None:
        raise HostUnavailableError(f"{rustc} does not say its version")
    version = int(found[1]), int(found[2]), int(found[3])
    if version[:2] < OLDEST_RUSTC:
        needed = ".".join(map(str, OLDEST_RUSTC))
        raise HostUnavailableError(f"the component host needs Rust {needed}, {cargo} has {found[0]}; {_HINT}")
    return Rust(cargo=cargo, version=version)


def _rustup_cargo(env: Mapping[str, str]) -> str | None:
    home = Path(env.get("CARGO_HOME") or Path(env.get("HOME") or "/").joinpath(".cargo"))
    cargo = home / "bin" / "cargo"
    return str(cargo) if cargo.is_file() else None


def ensure(*, say: Say, env: Mapping[str, str] = os.environ) -> Path:
    """The library's path: found, or built now, by one of however many callers. Raises HostUnavailableError."""
    try:
        return locate.load(env).path
    except HostUnavailableError:
        if env.get(locate.VARIABLE) or locate.sources() is None:
            raise
    target = locate.built(env)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_build_at_a_time(target.parent / "lock", say):
        if not target.is_file():
            _build(target, find_rust(env), say, env)
        return Library(target).path


@contextlib.contextmanager
def _one_build_at_a_time(lock: Path, say: Say) -> Iterator[None]:
    reported = False

    def waiting(_seconds: float) -> None:
        nonlocal reported
        if not reported:
            reported = True
            say("another process is building the component host: waiting for it")

    def late() -> HostUnavailableError:
        return HostUnavailableError(
            f"another process has been building the component host for {_OTHERS_BUILD_SECONDS:g} s; it holds {lock}"
        )

    with locked_file(lock, timeout_seconds=_OTHERS_BUILD_SECONDS, late=late, waiting=waiting):
        yield


def _build(target: Path, rust: Rust, say: Say, env: Mapping[str, str]) -> None:
    crate = locate.sources()
    if crate is None:
        raise HostUnavailableError("this installation has no sources of the component host")
    # Under the lock: what is there belongs to a build that was killed.
    for left in target.parent.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    say(f"building the component host with {rust}, once; this takes some minutes")
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=target.parent) as folder:
        _cargo(crate, Path(folder), rust, say, env)
        made = Path(folder) / "release" / locate.FILE_NAME
        Library(made)
        made.chmod(0o700)
        about = {"rustc": str(rust), "crate": str(crate)}
        target.with_name("built-with.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        made.replace(target)
    say(f"the component host is at {target}")


def _cargo(crate: Path, folder: Path, rust: Rust, say: Say, env: Mapping[str, str]) -> None:
    argv = [rust.cargo, "build", "--release", "--lib", "--locked", "--ignore-rust-version", "--target-dir", str(folder)]
    clean = {name: value for name, value in env.items() if not name.startswith(("CARGO_TARGET", "CARGO_PROFILE"))}
    last: list[str] = []
    with subprocess.Popen(
        argv,
        cwd=crate,
        env={**clean, "CARGO_TERM_COLOR": "never"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            if process.stderr is None:
                raise RuntimeError("cargo's messages have no pipe")
            for line in process.stderr:
                last = [*last[-_LAST_LINES:], line.rstrip()]
                if _PROGRESS.match(line):
                    say(line.strip())
            code = process.wait(BUILD_TIMEOUT_SECONDS)
        except BaseException:
            process.kill()
            raise
    if code != 0:
        raise HostUnavailableError("the component host cannot be built:\n" + "\n".join(last))
