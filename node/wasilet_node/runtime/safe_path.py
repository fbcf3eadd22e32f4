"""Reaching files in folders that guests write to, without ever leaving them.

A guest may replace any name in its volume by a link, a FIFO or another folder at any moment, so a path that was checked
by name proves nothing. Everything here walks one component at a time from an open descriptor with ``O_NOFOLLOW``, which
is what ``openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`` does, but also works on kernels and seccomp profiles without
that call. ``O_PATH`` comes first wherever the kind of a file is unknown: opening a FIFO or a device has effects.

Both the agent (subPath, termination messages, clean-up) and the sandbox (preopens) use it, hence this low layer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

_MAX_LINKS = 40
"""As the kernel's own limit for one path."""

_MAX_PATH_BYTES = 4096
"""Likewise, the NUL at the end included."""

_MAX_NAMES = 1024
"""Looked up for one path, those in its links included: each ``..`` begins at the root again."""

_OPEN_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class EscapeError(OSError):
    """A path leads out of its root: ``..``, an absolute path or link, or a link that climbs too far."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EXDEV, "path leads out of its root", path)


def components(path: str) -> tuple[str, ...]:
    """The names of a relative path; empty and ``.`` drop out. Raises EscapeError for ``..``, absolute paths and NUL,
    and OSError (ENAMETOOLONG) for what no system call would take."""
    if len(os.fsencode(path)) >= _MAX_PATH_BYTES:
        raise _too_long()
    if path.startswith("/") or "\0" in path:
        raise EscapeError(path)
    names = tuple(name for name in path.split("/") if name not in {"", "."})
    if ".." in names:
        raise EscapeError(path)
    return names


def _too_long() -> OSError:
    return OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """Closes ``fd`` at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def open_root(root: str | Path) -> int:
    """An ``O_PATH`` descriptor of a trusted folder; links in its own path are followed. Raises OSError."""
    return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def walk(root_fd: int, names: Sequence[str]) -> int:
    """An ``O_PATH`` descriptor of the last of ``names``, each looked up in the one before. No link is followed, the
    last included (a link gives a descriptor of the link itself). Raises OSError; NotADirectoryError for a link on the
    way."""
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    for index, name in enumerate(names):
        if name in {"", ".", ".."} or "/" in name:
            os.close(current)
            raise EscapeError("/".join(names))
        flags = _OPEN_PATH if index == len(names) - 1 else _OPEN_PATH | os.O_DIRECTORY
        try:
            following = os.open(name, flags, dir_fd=current)
        finally:
            os.close(current)
        current = following
    return current


def open_directory(root: str | Path, path: str | Path) -> int:
    """An ``O_PATH`` descriptor of the folder ``path``, which must lie in ``root`` by name and is reached from there
    without following a link. Meant for the sandbox: preopen ``/proc/self/fd/<fd>`` of the result. Raises OSError."""
    relative = os.path.relpath(path, root)
    with opened(open_root(root)) as root_fd:
        fd = walk(root_fd, components(relative))
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return fd


def resolve(root_fd: int, path: str) -> tuple[tuple[str, ...], int | None]:
    """Follow the links of ``path`` inside the root, as a chroot would but without mercy: an absolute link, or one that
    climbs above the root, is an error.

    Returns the names that remain (free of links when they were read) and the index of the first one that does not
    exist, None when all do. Raises EscapeError, and OSError (ELOOP after 40 links, ENAMETOOLONG above 1,024 names).
    What it returns can be stale at once; use it through ``walk``.
    """
    pending = list(reversed(components(path)))
    done: list[str] = []
    links = names = 0
    here = walk(root_fd, ())
    try:
        while pending:
            name = pending.pop()
            if name in {"", "."}:
                continue
            names += 1
            # Those to come count too: a path that is too long must not pass only because it is not there yet.
            if names + len(pending) > _MAX_NAMES:
                raise _too_long()
            if name == "..":
                if not done:
                    raise EscapeError(path)
                done.pop()
                # Not by "..": a folder that was moved meanwhile may have another parent, outside of the root.
                above = walk(root_fd, done)
                os.close(here)
                here = above
                continue
            try:
                fd = os.open(name, _OPEN_PATH, dir_fd=here)
            except FileNotFoundError:
                missing = len(done)
                rest = [name, *reversed(pending)]
                if ".." in rest:
                    raise
                return (*done, *(part for part in rest if part not in {"", "."})), missing
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                os.close(here)
                here = fd
                done.append(name)
                continue
            with opened(fd):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink("", dir_fd=fd)
            if target.startswith("/"):
                raise EscapeError(path)
            pending.extend(reversed(target.split("/")))
        return tuple(done), None
    finally:
        os.close(here)


def make_directories(root_fd: int, names: Sequence[str], mode: int) -> None:
    """Make each folder of ``names`` that is missing, with exactly ``mode``. Follows no link. Raises OSError."""
    current = os.open(".", _OPEN_FOLDER, dir_fd=root_fd)
    try:
        for name in names:
            made = True
            try:
                os.mkdir(name, mode, dir_fd=current)
            except FileExistsError:
                made = False
            following = os.open(name, _OPEN_FOLDER, dir_fd=current)
            os.close(current)
            current = following
            if made:
                os.fchmod(current, mode)
    finally:
        os.close(current)


def read_whole(root_fd: int, names: Sequence[str], limit_bytes: int) -> bytes:
    """All of a regular file, as ``read_tail``. A longer one raises OSError (EFBIG)."""
    data = read_tail(root_fd, names, limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"more than {limit_bytes} bytes", "/".join(names))
    return data


def read_tail(root_fd: int, names: Sequence[str], limit_bytes: int) -> bytes:
    """The last ``limit_bytes`` of a regular file. Anything else (link, FIFO, device, folder) raises OSError (EINVAL)
    without being opened; a missing file raises FileNotFoundError."""
    with opened(walk(root_fd, names)) as path_fd:
        if not stat.S_ISREG(os.fstat(path_fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", "/".join(names))
        # /proc reopens the very file that was checked, whatever its name points at by now.
        with opened(os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
            size = os.fstat(fd).st_size
            return os.pread(fd, limit_bytes, max(0, size - limit_bytes))
