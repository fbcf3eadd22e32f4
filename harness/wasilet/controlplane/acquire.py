"""Having the control plane's binaries: find them, download them, or build them.

The order: ``KUBEBUILDER_ASSETS`` and PATH (of the pinned minor version), Wasilet's cache, the official release, the
pinned Go module. One lock file in the cache makes two runs share one download or build. A binary appears in the cache
by a rename after it has reported its version, so a run that was killed leaves nothing that could be mistaken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from wasilet_common.file_lock import locked_file

from wasilet.controlplane.binaries import Binary, go_architecture
from wasilet.controlplane.binaries import binaries as all_binaries
from wasilet.controlplane.download import DownloadError, fetch
from wasilet.controlplane.gobuild import BuildError, Go, build, find_go, minimum_go
from wasilet.errors import HarnessError
from wasilet.process import run
from wasilet.storage import FULL_DISK_HINT, storage_errors

VERSION_TIMEOUT_SECONDS = 30.0
LOCK_TIMEOUT_SECONDS = 4500.0
"""Longer than the longest build, so that who waits never gives up before who builds."""


class AcquireError(HarnessError):
    """A binary could not be had; the message lists every source that was tried and why it failed."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A binary that can be used."""

    name: str
    path: Path
    version: str
    source: str
    """``KUBEBUILDER_ASSETS``, ``PATH``, ``cache``, ``download`` or ``go build``."""


def locate(name: str, *, cache: Path, environ: Mapping[str, str], kubernetes: str = "") -> Found | None:
    """Where ``name`` is on this machine, without changing anything but the memory of versions already asked for.
    ``kubernetes``: of which version or minor; empty: the newest."""
    binary = all_binaries(kubernetes)[name]
    places = [("KUBEBUILDER_ASSETS", environ.get("KUBEBUILDER_ASSETS", "")), ("PATH", environ.get("PATH", ""))]
    for source, folders in places:
        found = shutil.which(name, path=folders) if folders else None
        if found and (version := _version(binary, Path(found), cache=cache)) and _same_minor(version, binary.version):
            return Found(name=name, path=Path(found), version=version, source=source)
    cached = _cached(binary, cache)
    if os.access(cached, os.X_OK):
        return Found(name=name, path=cached, version=binary.version, source="cache")
    return None


def expected(name: str, *, cache: Path, environ: Mapping[str, str], kubernetes: str = "") -> Path:
    """Where ``name`` is, else where :func:`acquire` will put it."""
    found = locate(name, cache=cache, environ=environ, kubernetes=kubernetes)
    return found.path if found is not None else _cached(all_binaries(kubernetes)[name], cache)


def acquire(
    names: Sequence[str],
    *,
    cache: Path,
    environ: Mapping[str, str],
    progress: Callable[[str], None],
    mirror: str = "",
    allow_download: bool = True,
    toolchain: Callable[[Mapping[str, str]], Go] = find_go,
    kubernetes: str = "",
) -> dict[str, Found]:
    """Have every binary of ``names``; those of Kubernetes of version or minor ``kubernetes`` (empty: the newest).
    Raises AcquireError."""
    known = all_binaries(kubernetes)

    def look(name: str) -> Found | None:
        return locate(name, cache=cache, environ=environ, kubernetes=kubernetes)

    found = {name: place for name in names if (place := look(name))}
    missing = [name for name in names if name not in found]
    if missing:
        folder = cache / "binaries"
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with storage_errors(folder), _locked(folder / ".lock", progress):
            for leftover in folder.glob(".new-*"):
                shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed: the living run holds the lock
            found |= {name: place for name in missing if (place := look(name))}
            found |= _bring(
                [known[name] for name in names if name not in found],
                cache=cache,
                environ=environ,
                progress=progress,
                mirror=mirror,
                allow_download=allow_download,
                toolchain=toolchain,
            )
    return {name: found[name] for name in names}


def _bring(
    binaries: Sequence[Binary],
    *,
    cache: Path,
    environ: Mapping[str, str],
    progress: Callable[[str], None],
    mirror: str,
    allow_download: bool,
    toolchain: Callable[[Mapping[str, str]], Go],
) -> dict[str, Found]:
    architecture = go_architecture()
    brought: dict[str, Found] = {}
    reasons: list[str] = []
    with TemporaryDirectory(dir=cache / "binaries", prefix=".new-") as temporary:
        folder = Path(temporary)
        for binary in binaries if allow_download else ():
            try:
                fetch(
                    binary,
                    version=binary.version,
                    architecture=architecture,
                    destination=folder / binary.name,
                    mirror=mirror,
                    progress=progress,
                )
            except DownloadError as error:
                reasons.append(str(error))
                progress(f"{binary.name}: {error}")
                if "does not resolve" in str(error):
                    break
            else:
                brought[binary.name] = _keep(binary, folder / binary.name, cache=cache, source="download")
        rest = [binary for binary in binaries if binary.name not in brought]
        if rest:
            brought |= _build(
                rest,
                folder,
                cache=cache,
                environ=environ,
                progress=progress,
                reasons=reasons,
                go=toolchain(environ),
            )
    return brought


def _build(
    binaries: Sequence[Binary],
    folder: Path,
    *,
    cache: Path,
    environ: Mapping[str, str],
    progress: Callable[[str], None],
    reasons: Sequence[str],
    go: Go,
) -> dict[str, Found]:
    names = ", ".join(binary.name for binary in binaries)
    if go.path is None:
        tried = "; ".join([*reasons, go.problem])
        raise AcquireError(
            f"cannot have {names}: {tried}",
            hint=f"install Go {'.'.join(map(str, minimum_go()))} or newer, or put the binaries into a folder that "
            "KUBEBUILDER_ASSETS names, or name a mirror of the releases in WASILET_MIRROR",
        )
    built: dict[str, Found] = {}
    for pin in dict.fromkeys(binary.pin for binary in binaries):
        group = [binary for binary in binaries if binary.pin == pin]
        try:
            build(
                group,
                go=go.path,
                output=folder,
                architecture=go_architecture(),
                environ=environ,
                progress=progress,
            )
        except BuildError as error:
            full = "no space left on device" in str(error)
            hint = FULL_DISK_HINT if full else "Go modules come through GOPROXY: is there a network?"
            raise AcquireError("; ".join([*reasons, str(error)]), hint=hint) from error
        for binary in group:
            built[binary.name] = _keep(binary, folder / binary.name, cache=cache, source="go build")
    return built


def _cached(binary: Binary, cache: Path) -> Path:
    folder = f"{binary.name}-v{binary.version}-linux-{go_architecture()}"
    return cache / "binaries" / folder / binary.name


def _keep(binary: Binary, new: Path, *, cache: Path, source: str) -> Found:
    """Move a new binary into the cache, when it runs and is what it should be. Raises AcquireError."""
    version = _ask_version(binary, new)
    if version != binary.version:
        raise AcquireError(f"the {source} of {binary.name} is version {version or 'unknown'}, not {binary.version}")
    target = _cached(binary, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    new.replace(target)
    return Found(name=binary.name, path=target, version=version, source=source)


def _same_minor(version: str, wanted: str) -> bool:
    return version.split(".")[:2] == wanted.split(".")[:2]


def _ask_version(binary: Binary, path: Path) -> str:
    try:
        done = run([str(path), *binary.version_argv], timeout_seconds=VERSION_TIMEOUT_SECONDS)
    except HarnessError:
        return ""
    match = re.search(binary.version_pattern, f" {done.stdout}")
    return match.group(1) if match else ""


def _version(binary: Binary, path: Path, *, cache: Path) -> str:
    """The version of a foreign binary. Asking takes up to 0.2 s, so the answer is kept by path, size and time."""
    memory = cache / "versions.json"
    try:
        stat = path.stat()
    except OSError:
        return ""
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    if key not in known:
        known[key] = _ask_version(binary, path)
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known), encoding="utf-8")
            temporary.replace(memory)
        except OSError:
            pass  # a cache that can't be written costs time, not truth
    return str(known[key])


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel lets go of it when the holder dies. Raises AcquireError after a while."""
    reported = -10.0

    def waiting(seconds: float) -> None:
        nonlocal reported
        if seconds - reported >= 10:
            reported = seconds
            progress(f"waiting for another run (pid {_holder(path)}) that fetches the binaries: {seconds:.0f} s")

    def late() -> AcquireError:
        return AcquireError(f"gave up waiting for pid {_holder(path)}, which holds {path}")

    with locked_file(path, timeout_seconds=LOCK_TIMEOUT_SECONDS, late=late, waiting=waiting) as descriptor:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    return "unknown"
