"""Entering and making namespaces, by ctypes: ``os.setns`` and ``os.unshare`` came with Python 3.12.

A network namespace is entered by one thread; the others of the process stay where they are.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def setns(descriptor: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into a namespace. Raises OSError (EPERM without CAP_SYS_ADMIN over its owner)."""
    if _libc.setns(descriptor, kind) != 0:
        raise _error("setns")


def unshare(kinds: int) -> None:
    """Move the calling thread into new namespaces. Raises OSError."""
    if _libc.unshare(kinds) != 0:
        raise _error("unshare")


def mount(source: str, target: str, flags: int, *, kind: str = "", options: str = "") -> None:
    """``mount(2)``. Raises OSError."""
    type_name = kind.encode() if kind else None
    if _libc.mount(source.encode(), target.encode(), type_name, flags, options.encode() if options else None) != 0:
        raise _error(f"mount {source} on {target}")


def open_own() -> int:
    """A descriptor of the calling thread's network namespace, which lives while any is open. Raises OSError."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
