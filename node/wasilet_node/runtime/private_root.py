"""A file tree of its own for a sandbox: its volumes, its compiled file, what name lookup needs, and nothing else.

A sandbox reaches files as root, to whom volumes belong. So that root's other files are not there at all, it gets a
mount namespace whose root is an empty tmpfs with what it may reach bound into it; ``pivot_root(2)`` and detaching what
was there before leave no path back. There is no ``/proc``, ``/sys`` or ``/dev``. Landlock allows the same set of files
where the kernel has it; this holds without it, and for sockets and devices too, which Landlock does not know.

Nothing is left behind: the namespace ends with the sandbox. It is made at the start and not ahead of time, since it
would not have the mounts that are made in between, as those of memory volumes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from wasilet_node.runtime import netns
from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import open_directory
from wasilet_node.runtime.trial import tried_by_child

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_MNT_DETACH = 2
_TMPFS_FLAGS = netns.MS_NOSUID | netns.MS_NODEV | netns.MS_NOEXEC
_TMPFS_OPTIONS = "size=64k,mode=755"
"""It holds folders and empty files that others are mounted on, and is made read-only."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def unshare_mounts() -> None:
    """Mounts from here on are this process's own. Raises OSError."""
    netns.unshare(netns.CLONE_NEWNS)
    netns.mount("none", "/", netns.MS_REC | netns.MS_PRIVATE)


def enter(place: str, *, file: str, shown: Iterable[str], mounts: Sequence[Mount]) -> tuple[str, tuple[Mount, ...]]:
    """Make the new root and enter it; afterwards nothing else can be reached. Needs ``unshare_mounts``.

    ``place``: a folder that is there, to build upon. ``file`` is shown as the first of what is returned, ``mounts`` as
    the second says, and ``shown`` (those that exist) under their own paths. Raises OSError with a text for the user."""
    trees: list[tuple[str, int]] = []
    try:
        # All before anything is mounted: a volume may hold the very folder that is built upon.
        for index, mount in enumerate(mounts):
            trees.append((f"mount{index}", _clone(_open_folder(mount))))
        trees.append(("artifact", _clone(os.open(file, os.O_PATH | os.O_CLOEXEC))))
        links, places = _sorted_out(shown)
        for path in places:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # name lookup says what it misses
            trees.append((path.lstrip("/"), _clone(descriptor)))
        netns.mount("tmpfs", place, _TMPFS_FLAGS, kind="tmpfs", options=_TMPFS_OPTIONS)
        os.chdir(place)
        for name, tree in trees:
            _attach(tree, name)
        for path, target in links:
            link = Path(path.lstrip("/"))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
    finally:
        for _, tree in trees:
            os.close(tree)
    for index, mount in enumerate(mounts):
        if mount.read_only:
            _make_read_only(f"mount{index}", _AT_RECURSIVE)
    _pivot()
    _make_read_only("/", 0)
    inside = (replace(mount, host=f"/mount{index}", root="") for index, mount in enumerate(mounts))
    return "/artifact", tuple(inside)


def why_unavailable() -> str:
    """Why this process's children cannot have it, tried by one of them; empty: they can. One thread."""
    reason, status = tried_by_child(_try)
    return reason or ("" if status == 0 else f"wait status {status}")


def _try(_report: int) -> None:
    """With this file as the one that is shown. Raises OSError."""
    unshare_mounts()
    enter(str(Path(__file__).parent), file=__file__, shown=(), mounts=())


def _open_folder(mount: Mount) -> int:
    try:
        if mount.root:
            # Guests write above this folder: a path could lead elsewhere by now, a descriptor cannot.
            return open_directory(mount.root, mount.host)
        return os.open(mount.host, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"mount {mount.guest}: {error.strerror}: {mount.host}") from error


def _sorted_out(paths: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Links into folders that are shown, with what they lead to, and the outermost of the rest. A ``resolv.conf`` that
    is a link stays one, so that what its folder's owner puts there later is seen. Nothing is beneath another."""
    links, places = list[tuple[str, str]](), list[str]()
    every = sorted(set(paths))
    for path in every:
        if any(_beneath(path, folder) for folder in (*places, *(link for link, _ in links))):
            continue
        target = os.path.realpath(path)
        if target != path and any(_beneath(target, folder) for folder in every):
            links.append((path, target))
        else:
            places.append(path)
    return links, places


def _beneath(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _clone(descriptor: int) -> int:
    """What is mounted there and beneath, as a tree that is not mounted anywhere yet. Takes the descriptor. Raises
    OSError."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE
    try:
        tree = _syscall(ctypes.c_long(_OPEN_TREE), ctypes.c_int(descriptor), b"", ctypes.c_uint(flags))
        if tree < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"open_tree: {os.strerror(number)}")
        return int(tree)
    finally:
        os.close(descriptor)


def _attach(tree: int, name: str) -> None:
    """At ``name`` beneath the working directory. Raises OSError."""
    folder = os.path.dirname(name)  # noqa: PTH120 - a fresh fork pays 0.1 ms for each first use of a path's class
    if folder:
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name)  # noqa: PTH102
    else:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    where = ctypes.c_int(_AT_FDCWD)
    if _syscall(ctypes.c_long(_MOVE_MOUNT), ctypes.c_int(tree), b"", where, os.fsencode(name), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"move_mount: {os.strerror(number)}")


def _make_read_only(path: str, flags: int) -> None:
    """Nothing changes on kernels before 5.12; Landlock and WASI refuse to write there, too."""
    attributes = _MountAttributes(set=_MOUNT_ATTR_RDONLY)
    result = _syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        path.encode(),
        ctypes.c_uint(flags),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    if result != 0 and (number := ctypes.get_errno()) != errno.ENOSYS:
        raise OSError(number, f"cannot mount {path} read-only: {os.strerror(number)}")


def _pivot() -> None:
    """The working directory becomes the root, and what was the root is gone."""
    if _PIVOT_ROOT is None:
        raise OSError(errno.ENOSYS, f"the number of pivot_root is not known for {os.uname().machine}")
    if _syscall(ctypes.c_long(_PIVOT_ROOT), b".", b".") != 0 or _libc.umount2(b".", _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pivot_root: {os.strerror(number)}")
    os.chdir("/")
