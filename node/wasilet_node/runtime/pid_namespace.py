"""A pid namespace for each sandbox: it sees, and can name, no process but itself.

A sandbox is the first and only process of its own namespace, made by ``clone(2)`` with ``CLONE_NEWPID`` and, in place
of a process in between, ``CLONE_PARENT``: it is a child of the supervisor at once. To the supervisor all stays as it
was, since a namespace's processes have pids in those above it, too: waiting, pidfds, the death signal, usage by pid.

What is different for a first process: no signal ends it whose action is the default, but SIGKILL and those of its own
faults. So ``abort`` ends in SIGSEGV or SIGILL, as in any container, and the supervisor ends sandboxes by SIGKILL.

Python's ``os.fork`` cannot pass flags, and ``clone3`` is refused where systemd restricts namespaces, since its flags
cannot be looked at. The call is made while the interpreter's lock is held, by a process with one
thread: the child is an exact copy, in which no other thread held anything, so nothing has to be made whole afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os

from wasilet_node.runtime.trial import tried_by_child

_CLONE = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine)
_CLONE_PARENT = 0x00008000
_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_CHILD_SETTID = 0x01000000
_CLONE_NEWPID = 0x20000000
_PR_GET_TID_ADDRESS = 40

_libc = ctypes.PyDLL(None, use_errno=True)  # the lock stays held
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def clone_beside() -> int:
    """Like ``os.fork``, but the child is a sibling, and the first process of its own pid namespace: 0 there, its pid
    here. At its end the parent of both gets the signal that this process would have caused. Needs CAP_SYS_ADMIN, one
    thread, and no ``os.register_at_fork`` that matters. Raises OSError."""
    if _CLONE is None:
        raise OSError(errno.ENOSYS, f"the number of clone is not known for {os.uname().machine}")
    flags, thread_id = _CLONE_NEWPID | _CLONE_PARENT, ctypes.c_void_p()
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(thread_id), 0, 0, 0) == 0:
        # libc remembers the main thread's id; kernels without checkpoint/restore do not say where.
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    # Where the child's id goes is the last but one argument on x86_64 and the last on arm64, and the other one is the
    # address of thread storage, which is not asked for.
    pid = int(_syscall(ctypes.c_long(_CLONE), ctypes.c_ulong(flags), None, None, thread_id, thread_id))
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def why_unavailable() -> str:
    """Why this process's sandboxes cannot have one, tried by a child; empty: they can. One thread."""
    reported, _ = tried_by_child(_try)
    if reported.isdecimal():
        os.waitpid(int(reported), 0)
        return ""
    return reported or "the child that tried ended"


def _try(report: int) -> None:
    """What the zygote does. Raises OSError."""
    pid = clone_beside()
    if pid != 0:
        os.write(report, b"%d" % pid)
