"""The few Linux calls that Python's ``os`` lacks, by ctypes, resolved at import so that a forked child imports nothing.

Numbers come from the kernel's user API headers (``linux/prctl.h``, ``linux/capability.h``); they are the same on x86_64
and arm64.
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.ascii  # noqa: F401 - used below where nothing can be imported any more
import errno
import os
import resource
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

CAP_DAC_OVERRIDE = 1
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
MOST_EXPENDABLE = 1000
"""For ``set_oom_score``."""

_CAPABILITY_VERSION_3 = 0x20080522
_SYS_CLOSE_RANGE = 436
_MAX_GENERATIONS = 64
_CLOSE_RANGE_END = 2**32 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.restype = ctypes.c_int
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_capset = _libc.capset
_capset.restype = ctypes.c_int
_NOBODY_CHANGES = ctypes.c_uint(2**32 - 1)
"""For ``setfsuid`` and ``setfsgid``, which answer with the number before and report no error."""


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def prctl(option: int, arg2: int = 0, arg3: int = 0) -> None:
    """``prctl(2)``. Raises OSError."""
    if _prctl(option, arg2, arg3, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def set_parent_death_signal() -> None:
    """SIGKILL for this process when the thread that forked it ends; survives neither exec of a setuid file nor fork."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def become_subreaper() -> None:
    """Descendants whose parents end become children of this process, so that it can wait for them."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def set_name(name: str) -> None:
    """What ``ps`` and /proc/PID/comm show of this thread: at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode())
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def set_no_new_privs() -> None:
    """No exec after this gains privileges."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def close_range_except(keep: tuple[int, ...]) -> None:
    """Close every descriptor from 3 up that is not in ``keep``; 0, 1 and 2 stay.

    ``close_range(2)`` itself (Linux 5.9), because ``os.closerange`` may have been built to close one by one. An older
    kernel is served from /proc/self/fd.
    """
    low = 3
    for fd in (*sorted(fd for fd in set(keep) if fd >= 3), None):
        high = _CLOSE_RANGE_END if fd is None else fd - 1
        if high >= low and _syscall(_SYS_CLOSE_RANGE, ctypes.c_uint(low), ctypes.c_uint(high), 0) != 0:
            for other in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
                if other >= 3 and other not in keep:
                    with contextlib.suppress(OSError):
                        os.close(other)
            return
        if fd is not None:
            low = fd + 1


def keep_only_capabilities(keep: frozenset[int]) -> None:
    """Drop all capabilities but ``keep`` from this process: bounding, ambient, permitted, effective, inheritable.

    Needs no capability where nothing is held (then nothing changes). Raises OSError.
    """
    _bound_capabilities(keep)
    _hold_capabilities(keep)


def _bound_capabilities(keep: frozenset[int]) -> None:
    """What no exec can bring back."""
    for capability in range(64):
        held = _prctl(PR_CAPBSET_READ, capability, 0, 0, 0)
        if held < 0:
            break  # the kernel knows no more of them
        if held and capability not in keep:
            # EPERM: CAP_SETPCAP is not held, and then the set below can only shrink by no_new_privs.
            with contextlib.suppress(PermissionError):
                prctl(PR_CAPBSET_DROP, capability)
    with contextlib.suppress(OSError):
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def _hold_capabilities(keep: frozenset[int]) -> None:
    held = effective_capabilities()
    _set_capabilities(frozenset(capability for capability in keep if held >> capability & 1))


def pass_on_capabilities() -> None:
    """What this thread executes from here on has the capabilities that the thread has. Raises OSError."""
    held = effective_capabilities()
    found = frozenset(capability for capability in range(64) if held >> capability & 1)
    _set_capabilities(found, inheritable=found)
    for capability in found:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def stop_passing_on() -> None:
    """The opposite, for an ordinary user. Raises OSError."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def _set_capabilities(keep: frozenset[int], *, inheritable: frozenset[int] = frozenset()) -> None:
    """Permitted and effective; and what an exec may leave. Raises OSError."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    for capability in keep:
        data[capability // 32].effective |= 1 << (capability % 32)
        data[capability // 32].permitted |= 1 << (capability % 32)
    for capability in inheritable:
        data[capability // 32].inheritable |= 1 << (capability % 32)
    if _capset(ctypes.byref(header), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")


def drop_privileges(*, keep: frozenset[int] = frozenset({CAP_DAC_OVERRIDE}), uids: Iterable[int] = ()) -> None:
    """For this process and all that it forks: ``no_new_privs``, and no capabilities but ``keep``. Root also becomes
    the first of ``uids`` that there is here (a user namespace may lack it), and the group of that number.
    Raises OSError."""
    set_no_new_privs()
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # root of a user namespace that denies setgroups
            os.setgroups([])
        if uids:
            _bound_capabilities(keep)  # while CAP_SETPCAP is held
        for uid in uids:
            with contextlib.suppress(OSError):
                become(uid)
                break
    keep_only_capabilities(keep)


def become(uid: int) -> None:
    """Another user and the group of the same number, for good. The signal at the parent's death, which the kernel
    forgets then, is set again. Raises OSError."""
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    set_parent_death_signal()


def become_but_for_files(uid: int, *, keep: frozenset[int]) -> None:
    """Root becomes another user and the group of the same number, for good, with ``no_new_privs``, no capability but
    ``keep`` and no supplementary group. Files are reached, and new ones belong to, root as before (``setfsuid(2)``).
    The signal at the parent's death is set again; whether the parent still lives is the caller's to check. One thread.
    Raises OSError.

    All that the kernel judges by uid instead of files is the other user's: signals, limits of processes, ptrace and
    what /proc shows of others, /proc/sys, RLIMIT_NPROC.
    """
    set_no_new_privs()
    os.setgroups([])
    _bound_capabilities(keep)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setresgid(uid, uid, uid)
    _libc.setfsgid(0)
    os.setresuid(uid, uid, uid)
    _set_capabilities(keep | {CAP_SETUID})
    _libc.setfsuid(0)
    prctl(PR_SET_KEEPCAPS, 0)
    _set_capabilities(keep)
    if _libc.setfsuid(_NOBODY_CHANGES) != 0 or _libc.setfsgid(_NOBODY_CHANGES) != 0:
        raise OSError(errno.EPERM, "setfsuid: the kernel did not leave root's files")
    # A process that changed its user is closed even to the supervisor, which measures its memory. Nobody else has
    # this uid.
    prctl(PR_SET_DUMPABLE, 1)
    set_parent_death_signal()


def set_oom_score(adjustment: int) -> bool:
    """From -1000 (when the machine's memory ends, never this process) to 1000 (this one first). False: to be lowered it
    needs CAP_SYS_RESOURCE; to be raised nothing."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, str(adjustment).encode())
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def effective_capabilities() -> int:
    """The bit set of capabilities in effect for this process. Works without /proc."""
    data = (_CapData * 2)()
    _libc.capget(ctypes.byref(_CapHeader(_CAPABILITY_VERSION_3, 0)), data)
    return int(data[0].effective) | int(data[1].effective) << 32


def raise_open_files_limit() -> int:
    """Raise RLIMIT_NOFILE to its hard limit and return it; a thousand containers need thousands of descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def thread_count() -> int:
    """Threads of this process."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def process_cpu_nanoseconds(pid: int) -> int | None:
    """CPU time of all threads of ``pid``; None when it is gone.

    The clock id is the kernel's own encoding (``clock_getcpuclockid(3)``): exact, where /proc/PID/stat counts ticks.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: clock ticks since boot when ``pid`` started; None when it is gone or a zombie.

    A pid with its start time names a process for as long as the machine is up, which a pid alone does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def is_descendant(pid: int, ancestor: int) -> bool:
    """Whether ``pid`` is ``ancestor`` or was forked by it, through however many others; False for one that is gone."""
    for _ in range(_MAX_GENERATIONS):
        if pid == ancestor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        pid = int(stat[stat.rindex(b")") + 2 :].split()[1])
        if pid <= 1:
            return False
    return True


def resident_bytes(pid: int) -> int:
    """Resident set of ``pid``, pages shared with others included; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def private_bytes(pid: int) -> int:
    """Memory that would be freed if ``pid`` ended (Private_Clean + Private_Dirty + swap); 0 when it is gone.

    A sandbox shares most of its resident set with the supervisor it was forked from, and must not pay for that.
    """
    total = 0
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith((b"Private_Clean:", b"Private_Dirty:", b"SwapPss:")):
            total += int(line.split()[1]) * 1024
    return total
