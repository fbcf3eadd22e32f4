"""A fence around the sandbox process by Landlock, the kernel's own and open to everyone, root or not.

Should a guest break out of WebAssembly it would have the rights of the agent's user. With this it reaches the folders
that are mounted into its container and no other file, makes no TCP connections, and can neither signal nor trace
processes outside. A guest that may speak HTTP, or that has its pod's network, must resolve names and read certificates:
for it TCP stays allowed and those files can be read (``wasilet_node.runtime.resolving``).

Kernels without Landlock, or with its first version only (which forbids to rename from one folder into another), run
the sandbox without it, as do those whose file systems refuse: it is one fence more, never a condition. Numbers are
those of ``linux/landlock.h`` and the system call table; both are the same on x86_64 and arm64.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import open_directory

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
LOWEST_ABI = 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = (1 << bit for bit in range(13, 16))
_READ = _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
_NEVER = _EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _IOCTL_DEV
_FIRST_ABI_OF = {_TRUNCATE: 3, _IOCTL_DEV: 5}
_TCP = 0b11
_TCP_ABI = 4
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_SCOPE_ABI = 6

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def abi() -> int:
    """The kernel's version of Landlock; 0: it has none, or none is allowed."""
    return max(int(_syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))), 0)


def held_back() -> list[str]:
    """What the kernel's version of it keeps native code from."""
    version = abi()
    firsts = (("files", LOWEST_ABI), ("TCP", _TCP_ABI), ("signals", _SCOPE_ABI))
    return [what for what, first in firsts if version >= first]


def confine(mounts: Iterable[Mount], *, files: Iterable[str], tcp: bool) -> bool:
    """Confine this thread, and the threads and processes it will make, to ``mounts`` and to reading ``files`` (of a
    folder: the files in it).

    ``tcp``: whether it may connect and listen. False: the kernel does not offer it, and nothing has changed. Needs
    ``no_new_privs``.
    """
    version = abi()
    if version < LOWEST_ABI:
        return False
    known = ~sum(right for right, first in _FIRST_ABI_OF.items() if version < first)
    handled = (_WRITE | _NEVER | _READ) & known
    rules = _Ruleset(
        fs=handled,
        net=_TCP if version >= _TCP_ABI and not tcp else 0,
        scoped=_ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_ABI else 0,
    )
    size = 24 if version >= _SCOPE_ABI else 16 if version >= _TCP_ABI else 8
    ruleset = int(_syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0)))
    if ruleset < 0:
        return False
    try:
        for mount in mounts:
            _allow(ruleset, mount.host, (_READ if mount.read_only else _READ | _WRITE) & handled, root=mount.root)
        for file in files:
            _allow(ruleset, file, _READ_FILE & handled)
        return int(_syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))) == 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int, *, root: str = "") -> None:
    """What cannot be opened is reported by the code that needs it."""
    if not rights:
        return
    try:
        descriptor = open_directory(root, path) if root else os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = _PathBeneath(allowed=rights, parent=descriptor)
        _syscall(
            _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0)
        )
    finally:
        os.close(descriptor)
