"""hostPath volumes: a folder or file of the machine, with the type checks and messages of kubelet's host_path.go.

Links in the path are followed, as everywhere in Kubernetes: a user who may create hostPath pods has the machine's
files. The checks run in their own threads, since a path can be on a file system that hangs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from wasilet_node.volumes.base import Pod, VolumeError
from wasilet_node.volumes.host_threads import HostThreads
from wasilet_node.volumes.kinds import Place, Shared, Source

_KINDS: dict[str, tuple[Callable[[int], bool], str]] = {
    "DirectoryOrCreate": (stat.S_ISDIR, "a directory"),
    "Directory": (stat.S_ISDIR, "a directory"),
    "FileOrCreate": (stat.S_ISREG, "a file"),
    "File": (stat.S_ISREG, "a file"),
    "Socket": (stat.S_ISSOCK, "a socket file"),
    "CharDevice": (stat.S_ISCHR, "a character device"),
    "BlockDevice": (stat.S_ISBLK, "a block device"),
}


def _mode(path: Path) -> int | None:
    """``st_mode`` of what the path leads to; None when there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def locate(path: Path, type_: str, *, read_only: bool = False) -> Place:
    """Check the path against its type, make it where the type asks for it. Blocks. Raises VolumeError, OSError."""
    if type_ and type_ not in _KINDS:
        raise VolumeError(f"{type_} is an invalid volume type")
    if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise VolumeError(f"hostPath {path} must be an absolute path without '..'")
    mode = _mode(path)
    if mode is None:
        if type_ in {"", "DirectoryOrCreate"}:
            # Without a type kubelet checks nothing, and container runtimes make a missing folder.
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        elif type_ == "FileOrCreate":
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        mode = _mode(path)
    if type_ and (mode is None or not _KINDS[type_][0](mode)):
        raise VolumeError(f"hostPath type check failed: {path} is not {_KINDS[type_][1]}")
    if mode is None:
        raise VolumeError(f"hostPath {path} vanished while it was being set up")
    unusable = ""
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        unusable = f"{path} is neither a folder nor a regular file, which is all that a WASI module can open"
    return Place(path=path, read_only=read_only, is_file=stat.S_ISREG(mode), unusable=unusable)


async def locate_in_thread(threads: HostThreads, path: Path, type_: str, *, read_only: bool = False) -> Place:
    """``locate`` with a limit. Raises VolumeError."""
    try:
        return await threads.run(str(path), lambda: locate(path, type_, read_only=read_only))
    except OSError as error:
        raise VolumeError(f"{path}: {error.strerror or error}") from error


class HostPaths:
    """A path of the machine."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """Whether a path will do depends on the machine's files, which admission does not read."""
        return ""

    async def place(self, pod: Pod, name: str, source: Source) -> Place:  # noqa: ARG002 - the interface of kinds
        """See ``Placing``."""
        return await locate_in_thread(
            self._shared.host_threads, Path(str(source.get("path", ""))), str(source.get("type") or "")
        )
