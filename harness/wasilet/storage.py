"""Files that are wholly the old or wholly the new ones, and what went wrong with a file in one clear line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wasilet_common.file_lock import locked_file

from wasilet.errors import StateError

NO_ROOM = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT})
FULL_DISK_HINT = "free some space, or set WASILET_STATE_HOME and WASILET_CACHE to folders on another disk"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of file work into one clear line."""
    try:
        yield
    except OSError as error:
        raise StateError(os_error_text(error, path), hint=_storage_hint(error)) from error


@contextlib.contextmanager
def locked_state(path: Path, *, timeout_seconds: float, late: str) -> Iterator[None]:
    """Hold a lock file of the state or the cache. ``late``: what StateError says after ``timeout_seconds``."""
    with contextlib.ExitStack() as held:
        with storage_errors(path):
            held.enter_context(
                locked_file(
                    path,
                    timeout_seconds=timeout_seconds,
                    late=lambda: StateError(late, hint=f"it holds {path}; wait for it, or end it"),
                )
            )
        yield


def os_error_text(error: OSError, path: Path | None = None) -> str:
    """``<what> <where>`` for the errors that people meet."""
    return f"cannot write {error.filename or path or 'a file'}: {os_error_reason(error)}"


def os_error_reason(error: OSError) -> str:
    """Why, for the errors that people meet."""
    return {
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission",
        errno.EPERM: "not permitted",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EMFILE: "too many open files",
    }.get(error.errno or 0, error.strerror or str(error))


def _storage_hint(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return FULL_DISK_HINT
    if error.errno in {errno.ENOENT, errno.EISDIR}:
        return ""  # of a path that was typed: Wasilet's folders are made
    return "set WASILET_STATE_HOME and WASILET_CACHE to folders that you can write to"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file does not exist. Raises StateError when it is damaged or unreadable."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}", hint="`invoke down --purge` removes the cluster") from error
    if not isinstance(data, dict):
        raise StateError(f"{path} is damaged: not a JSON object", hint="`invoke down --purge` removes the cluster")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file atomically, mode 0600."""
    write_file(path, json.dumps(data, indent=2, sort_keys=True).encode() + b"\n")


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file atomically: written beside it, renamed over it. Raises StateError."""
    with storage_errors(path):
        try:
            fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, mode)
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
