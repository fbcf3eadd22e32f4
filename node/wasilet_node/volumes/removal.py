"""Removing and measuring trees that guests made: any depth, any names, any permissions, any links.

Removal works with three descriptors at most, however deep the tree is: a folder found inside another is first moved up
into the root under a short name of Wasilet's, then emptied from there. Nothing is opened by a path longer than one
name, no link is followed, and another file system mounted inside is left alone and reported.

Every call can be repeated after dying half-way: what is left is still below the root.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wasilet_node.runtime.safe_path import open_root, opened

_BATCH = 4096
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_PASSES = 100_000
"""Passes over one folder, of 4,096 names each, before giving up: something goes on making files in it."""

MOST_PENDING = 16 * _BATCH
"""Names of folders that are held at a time; the rest is found again by the next pass over the root."""


def _open_folder(name: str, dir_fd: int) -> int:
    """A readable descriptor of a folder, whose owner's permissions are repaired first if they must be."""
    try:
        fd = os.open(name, _OPEN_FOLDER, dir_fd=dir_fd)
    except PermissionError:
        with opened(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)) as path_fd:
            Path(f"/proc/self/fd/{path_fd}").chmod(0o700)
        fd = os.open(name, _OPEN_FOLDER, dir_fd=dir_fd)
    return fd


def _entries(fd: int) -> list[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        return list(itertools.islice(entries, _BATCH))


def _empty(fd: int, root_fd: int, names: Iterator[str], device: int, most: int) -> list[str]:
    """Unlink the files of a folder and move its folders up into the root; their names there."""
    if os.fstat(fd).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.fchmod(fd, 0o700)
    moved: list[str] = []
    for _ in range(_MAX_PASSES):
        entries = _entries(fd)
        if not entries or len(moved) > most:
            return moved
        for entry in entries:
            # A name that changed its kind meanwhile is met again in the next pass.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=fd)
                    continue
                _refuse_mount(entry.name, fd, device)
                name = next(names)
                try:
                    os.rename(entry.name, name, src_dir_fd=fd, dst_dir_fd=root_fd)
                except PermissionError:
                    # Moving a folder rewrites its "..", for which it must be writable.
                    with opened(_open_folder(entry.name, fd)) as child:
                        os.fchmod(child, 0o700)
                    os.rename(entry.name, name, src_dir_fd=fd, dst_dir_fd=root_fd)
                moved.append(name)
    raise OSError(errno.EBUSY, "files go on appearing in a folder that is being removed")


def empty_root(root_fd: int, device: int, most: int) -> list[str]:
    """Unlink the files of the root; the names of its folders, which stay where they are. Of very many folders these
    are the first ``most``: a guest may have made ten million names."""
    if os.fstat(root_fd).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.fchmod(root_fd, 0o700)
    folders: list[str] = []
    # A name that the kernel passes over because its neighbour goes meanwhile is met by the next pass.
    with os.scandir(root_fd) as found:
        for entry in found:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=root_fd)
                    continue
                _refuse_mount(entry.name, root_fd, device)
                folders.append(entry.name)
                if len(folders) >= most:
                    break
    return folders


def _refuse_mount(name: str, dir_fd: int, device: int) -> None:
    if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_dev != device:
        raise OSError(errno.EBUSY, "a file system is mounted inside", name)


def remove_tree(parent: Path, name: str, *, most_pending: int = MOST_PENDING) -> None:
    """Remove ``parent/name`` and all below it; missing is fine. ``name`` is one component, ``parent`` is trusted.
    ``most_pending``: see ``MOST_PENDING``.
    Raises OSError (EBUSY for a mounted file system, or when a guest goes on writing)."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"not a name: {name!r}")
    with contextlib.suppress(FileNotFoundError), opened(open_root(parent)) as parent_fd:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent_fd)
            return
        with opened(_open_folder(name, parent_fd)) as root_fd:
            names = (f"..removing-{number}-{os.urandom(8).hex()}" for number in itertools.count())
            for _ in range(_MAX_PASSES):
                _empty_tree(root_fd, names, most_pending)
                try:
                    os.rmdir(name, dir_fd=parent_fd)
                    return
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
    if (parent / name).is_symlink() or (parent / name).exists():
        raise OSError(errno.EBUSY, "files go on appearing in a folder that is being removed", name)


def _empty_tree(root_fd: int, names: Iterator[str], most: int) -> None:
    device = os.fstat(root_fd).st_dev
    pending = empty_root(root_fd, device, most)
    while pending and len(pending) <= 2 * most:
        folder = pending.pop()
        try:
            with opened(_open_folder(folder, root_fd)) as fd:
                pending += _empty(fd, root_fd, names, device, most)
            os.rmdir(folder, dir_fd=root_fd)
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder, dir_fd=root_fd)
        except OSError as error:
            # Refilled by a guest that still runs: the next pass over the root meets it again.
            if error.errno != errno.ENOTEMPTY:
                raise


@dataclass(frozen=True)
class Usage:
    """What a tree takes: bytes of disk blocks, and inodes."""

    bytes: int
    inodes: int


class _Measure:
    def __init__(self, device: int) -> None:
        self.device = device
        self.bytes = 0
        self.inodes = 0
        self._linked: set[int] = set()

    def add(self, status: os.stat_result) -> None:
        if status.st_dev != self.device:
            return
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self.bytes += status.st_blocks * 512
        self.inodes += 1

    def scan(self, fd: int) -> list[str]:
        """Count the entries of a folder; the names of its folders."""
        folders: list[str] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    self.add(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
        return folders


def usage(folder: Path) -> Usage:
    """The usage of a tree, hard links counted once. Follows no link and leaves the file system never; any depth, with
    two descriptors. Folders that vanish or may not be read are skipped, and a folder that a guest moves away under the
    walk ends it: an estimate that is off is better than none. Raises OSError when ``folder`` cannot be read."""
    current = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(current)
        measure = _Measure(status.st_dev)
        measure.add(status)
        levels = [((status.st_dev, status.st_ino), measure.scan(current))]
        while True:
            names = levels[-1][1]
            if names:
                with contextlib.suppress(OSError):
                    child = os.open(names.pop(), _OPEN_FOLDER, dir_fd=current)
                    status = os.fstat(child)
                    if status.st_dev != measure.device:
                        os.close(child)
                        continue
                    os.close(current)
                    current = child
                    levels.append(((status.st_dev, status.st_ino), []))
                    levels[-1][1].extend(measure.scan(current))
                continue
            levels.pop()
            if not levels:
                break
            parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = parent
            status = os.fstat(current)
            if (status.st_dev, status.st_ino) != levels[-1][0]:
                break
        return Usage(measure.bytes, measure.inodes)
    finally:
        os.close(current)
