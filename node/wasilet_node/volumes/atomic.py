"""Publishing the files of a configMap, secret, projected or downwardAPI volume all at once.

The layout is that of Kubernetes' AtomicWriter, which programs and file watchers rely on: the files live in
``..<timestamp>.<random>/``, the link ``..data`` names that folder, and each top-level name is a link through it. An
update writes a new folder and renames one link; a reader sees the old files or the new ones, never a mixture. All links
are relative, so they work inside a module's preopened folder too.

Guests see these volumes read-only, so plain paths are safe here.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DATA_LINK = "..data"
_NEW_DATA_LINK = "..data_tmp"
_MAX_NAME = 255
_MAX_PATH = 4096


@dataclass(frozen=True)
class FileProjection:
    """One file: its bytes and permission bits."""

    data: bytes
    mode: int


Payload = Mapping[str, FileProjection]
"""Relative path: file."""


class PayloadError(ValueError):
    """A payload cannot be written: a path that AtomicWriter refuses, or two that exclude each other."""


def validate_path(path: str) -> str:
    """The cleaned path. Refuses what AtomicWriter refuses, with its messages. Raises PayloadError."""
    if not path:
        raise PayloadError('invalid path: must not be empty: ""')
    if path.startswith("/"):
        raise PayloadError(f"invalid path: must be relative path: {path}")
    if len(path.encode()) > _MAX_PATH:
        raise PayloadError(f"invalid path: must be less than or equal to {_MAX_PATH} characters")
    items = path.split("/")
    if ".." in items:
        raise PayloadError(f"invalid path: must not contain '..': {path}")
    if any(len(item.encode()) > _MAX_NAME for item in items):
        raise PayloadError(f"invalid path: filenames must be less than or equal to {_MAX_NAME} characters")
    clean = posixpath.normpath(path)
    if items[0].startswith("..") or clean.startswith(".."):
        raise PayloadError(f"invalid path: must not start with '..': {path}")
    if clean == "." or "\0" in path:
        raise PayloadError(f"invalid path: names no file: {path!r}")
    return clean


def _clean(payload: Payload) -> dict[str, FileProjection]:
    clean = {validate_path(path): projection for path, projection in payload.items()}
    for path in clean:
        parent = posixpath.dirname(path)
        while parent:
            if parent in clean:
                raise PayloadError(f"invalid path: {path} needs a folder where {parent} is a file")
            parent = posixpath.dirname(parent)
    return clean


def _published(folder: Path) -> Path | None:
    """The folder that ``..data`` names."""
    try:
        return folder / (folder / DATA_LINK).readlink()
    except FileNotFoundError:
        return None


def _tree(folder: Path) -> dict[str, Path]:
    """Relative path: file, for everything below ``folder`` that is not a folder."""
    return {
        str(Path(at, name).relative_to(folder)): Path(at, name) for at, _, names in os.walk(folder) for name in names
    }


def _is_current(payload: Mapping[str, FileProjection], folder: Path) -> bool:
    present = _tree(folder)
    if present.keys() != payload.keys():
        return False
    for path, file in present.items():
        status = file.lstat()
        wanted = payload[path]
        if status.st_size != len(wanted.data) or (status.st_mode & 0o7777) != wanted.mode:
            return False
        if _read(file) != wanted.data:
            return False
    return True


def _read(file: Path) -> bytes | None:
    """None when the file's own mode keeps the agent from reading it."""
    try:
        return file.read_bytes()
    except PermissionError:
        return None


def _write(payload: Mapping[str, FileProjection], folder: Path) -> None:
    for path, projection in payload.items():
        file = folder / path
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", closefd=False) as stream:
                stream.write(projection.data)
            os.fchmod(fd, projection.mode)
        finally:
            os.close(fd)


def read(folder: Path, path: str) -> bytes | None:
    """A published file, None when there is none."""
    with contextlib.suppress(OSError):
        return (folder / DATA_LINK / path).read_bytes()
    return None


def is_published(folder: Path) -> bool:
    """Whether a payload was written to ``folder`` before."""
    return (folder / DATA_LINK).is_dir()


def write(folder: Path, payload: Payload) -> bool:
    """Make ``payload`` the contents of ``folder``, which is made when missing; whether anything changed.

    Dying at any line leaves the old state or the new one; the next call clears what was left behind.
    Raises PayloadError, OSError.
    """
    clean = _clean(payload)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    current = _published(folder)
    changed = current is None or not current.is_dir() or not _is_current(clean, current)
    if changed:
        new = Path(tempfile.mkdtemp(prefix=time.strftime("..%Y_%m_%d_%H_%M_%S.", time.gmtime()), dir=folder))
        try:
            new.chmod(0o755)
            _write(clean, new)
            link = folder / _NEW_DATA_LINK
            link.unlink(missing_ok=True)
            link.symlink_to(new.name)
            link.replace(folder / DATA_LINK)
        except OSError:
            # On a full disk each attempt would leave as much as still fits.
            shutil.rmtree(new, ignore_errors=True)
            raise
        current = new
    wanted = {path.split("/", 1)[0] for path in clean}
    for name in wanted:
        visible = folder / name
        if not visible.is_symlink():
            # A folder in the way can only be one that a subPath mount of a then missing key has made.
            with contextlib.suppress(FileNotFoundError):
                visible.rmdir()
            visible.symlink_to(f"{DATA_LINK}/{name}")
    for entry in list(os.scandir(folder)):
        if entry.name == DATA_LINK or (current is not None and entry.name == current.name):
            continue
        if entry.is_symlink() and entry.name not in wanted:
            Path(entry.path).unlink(missing_ok=True)
        elif entry.name.startswith("..") and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
    return changed
