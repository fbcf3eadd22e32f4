"""Folders for single files, since a module can be given folders only.

A file that stands alone in a container (a subPath or hostPath that is a file, ``/etc/hosts``, the termination log) is
put into a private folder that is preopened as the file's parent; files with the same parent share the folder. How it
gets there depends on what may happen to it:

* writable: a hard link, so that writes go through to the original; on another file system that cannot be, and is
  refused by name;
* read-only, alone with others of its kind: a hard link where possible (in-place changes stay visible), else a copy;
* read-only in a folder that must be writable for another file's sake, or part of a volume that swaps whole files: a
  copy.

The source is reached beneath its root without following links and must be a regular file. The link is made first and
looked at then, so there is no moment in which a guest could swap it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wasilet_node.runtime.safe_path import open_root, opened, walk
from wasilet_node.volumes.base import ContainerConfigError
from wasilet_node.volumes.pod_dirs import make_private

_MAX_COPY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """One file. Either ``content`` or a source: ``root`` (trusted) and the ``names`` below it."""

    guest: str
    """Absolute path in the container."""

    what: str
    """For messages: ``volumeMount "x" of container "y"``."""

    content: bytes | None = None
    root: Path | None = None
    names: tuple[str, ...] = ()
    read_only: bool = True
    copied: bool = False
    """Never linked: the source's files are replaced as a whole."""

    in_memory: bool = False


def compose(folder: Path, files: Sequence[SingleFile]) -> bool:
    """Fill ``folder`` with ``files``, which share a parent; whether the folder may be preopened read-only.

    The folder appears complete or not at all; one that is there already is left as it is (the instance was set up
    before). Raises ContainerConfigError, OSError.
    """
    read_only = all(file.read_only for file in files)
    if folder.is_dir():
        return read_only
    make_private(folder.parent)
    making = folder.with_name(f"{folder.name}.making-{os.urandom(4).hex()}")
    making.mkdir(mode=0o700)
    try:
        for file in files:
            _put(file, making / file.guest.rpartition("/")[2], writable_folder=not read_only)
        making.rename(folder)
    except BaseException:
        for path in making.iterdir():
            path.unlink()
        making.rmdir()
        raise
    return read_only


def _put(file: SingleFile, target: Path, *, writable_folder: bool) -> None:
    if file.content is not None:
        _write(target, file.content, 0o644)
        return
    assert file.root is not None  # noqa: S101 - narrowing
    with contextlib.ExitStack() as stack:
        root_fd = stack.enter_context(opened(open_root(file.root)))
        parent_fd = stack.enter_context(opened(walk(root_fd, file.names[:-1])))
        if not file.copied and not (file.read_only and writable_folder):
            try:
                os.link(file.names[-1], target, src_dir_fd=parent_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK}:
                    raise
                if not file.read_only:
                    raise ContainerConfigError(
                        f"{file.what}: a writable single file needs a hard link, which is not possible here "
                        f"({os.strerror(error.errno or 0)}); mount its folder, or mount it read-only"
                    ) from error
            else:
                if not stat.S_ISREG(target.lstat().st_mode):
                    target.unlink()
                    raise ContainerConfigError(f"{file.what} is not a regular file")
                return
        with opened(walk(parent_fd, file.names[-1:])) as path_fd:
            status = os.fstat(path_fd)
            if not stat.S_ISREG(status.st_mode):
                raise ContainerConfigError(f"{file.what} is not a regular file")
            if status.st_size > _MAX_COPY_BYTES:
                raise ContainerConfigError(f"{file.what} is too large to be copied ({status.st_size} bytes)")
            with Path(f"/proc/self/fd/{path_fd}").open("rb") as source:
                _write(target, source.read(_MAX_COPY_BYTES), status.st_mode & 0o500)


def _write(target: Path, content: bytes, mode: int) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(content)
        os.fchmod(fd, mode)
