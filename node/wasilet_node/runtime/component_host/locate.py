"""Where the component host is: a library given by hand, one inside the wheel, or one that was built into the cache.

Nothing is built or fetched here, since a node must not compile Rust in the middle of a pod's start. ``build`` does it,
by ``wasilet-node component-host`` or by whatever of the harness first needs it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from wasilet_node.runtime.component_host.library import HostUnavailableError, Library

VARIABLE = "WASILET_COMPONENT_HOST"
"""Environment name: the library to use, and no other."""

FILE_NAME = "libwasilet_component_host.so"
COMMAND = "wasilet-node component-host"
"""What installs it."""

_PACKAGED = Path(__file__).resolve().parent / FILE_NAME
"""Where a wheel has it."""

_SOURCES = (
    Path(__file__).resolve().parents[3] / "component_host",
    Path(__file__).resolve().parents[2] / "data" / "component_host",
)
"""The crate, in a source checkout and in a wheel."""

_SOURCE_PATTERNS = ("Cargo.toml", "Cargo.lock", "src/**/*.rs")


def sources() -> Path | None:
    """The crate's folder; None: this installation was made without it."""
    return next((folder for folder in _SOURCES if (folder / "Cargo.lock").is_file()), None)


def cache_directory(env: Mapping[str, str] = os.environ) -> Path:
    """Where built libraries are kept, one folder per key; with ``WASILET_CACHE``, where the harness keeps all else."""
    if env.get("WASILET_CACHE"):
        return Path(env["WASILET_CACHE"]) / "component-host"
    base = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME") or "~").expanduser() / ".cache")
    return Path(base) / "wasilet" / "component-host"


@functools.lru_cache(maxsize=1)
def key() -> str:
    """16 hex digits of the crate's sources, its lock file and the architecture. Raises HostUnavailableError."""
    crate = sources()
    if crate is None:
        raise HostUnavailableError("this installation has no sources of the component host")
    digest = hashlib.sha256(platform.machine().encode())
    for pattern in _SOURCE_PATTERNS:
        for path in sorted(crate.glob(pattern)):
            digest.update(f"\0{path.relative_to(crate)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def built(env: Mapping[str, str] = os.environ) -> Path:
    """Where a library that is built from these sources is, or would be. Raises HostUnavailableError."""
    return cache_directory(env) / key() / FILE_NAME


def candidates(env: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Where it may be, the first that exists counts."""
    given = env.get(VARIABLE)
    if given:
        yield Path(given)
        return
    yield _PACKAGED
    if sources() is not None:
        yield built(env)


def find(env: Mapping[str, str] = os.environ) -> Path:
    """The library's path. Raises HostUnavailableError with the command that installs it."""
    for path in candidates(env):
        if path.is_file():
            _check_owner(path)
            return path
    given = env.get(VARIABLE)
    if given:
        raise HostUnavailableError(f"{VARIABLE} names {given}, which is no file")
    raise HostUnavailableError(f"this node has no component host, which runs such components; {COMMAND} builds it once")


def load(env: Mapping[str, str] = os.environ) -> Library:
    """Find and open it. Raises HostUnavailableError."""
    return Library(find(env))


def _root() -> int:
    """Whom root's files belong to, as seen from here: in an ordinary user's user namespace that is no one, whom all
    other users are as well. What others can write is refused there, too."""
    return Path("/").stat().st_uid


def _check_owner(path: Path) -> None:
    """Opening a library is running it: it must be this user's or root's, and writable by no one else."""
    try:
        found = path.stat()
    except OSError as error:
        raise HostUnavailableError(f"the component host {path} cannot be used: {error.strerror}") from error
    if found.st_uid not in {_root(), os.geteuid()} or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HostUnavailableError(f"the component host {path} can be changed by other users, so it is not opened")
