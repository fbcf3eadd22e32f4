"""An allow-list of system calls for processes that run or parse foreign code, as a classic BPF program by ctypes alone.

Landlock guards files and TCP; everything else that the kernel offers is guarded here: a process under this filter
starts no process, changes no mode, traces and signals no one, and reaches no kernel subsystem that WASI does not need
(io_uring, userfaultfd, keyrings, namespaces, BPF, vsock, netlink, MPTCP). A call that is not on the list fails with
EPERM and is not run; one of another architecture's table (32-bit, x32) ends the process, since its numbers mean other
calls.

The list comes from what wasmtime, Rust's standard library, glibc and CPython call between the filter and the exit,
found by running all tests of the runtime under it. Some calls are allowed with certain arguments only. Arguments behind
pointers cannot be looked at, so a path can never be judged here: that is why ``utimensat`` is allowed for open
descriptors alone.

Numbers are the kernel's (``asm/unistd_64.h`` for x86_64, ``asm-generic/unistd.h`` for arm64). Where the kernel has no
seccomp, or on another architecture, ``confine`` returns False and nothing changes: it is one fence more, never a
condition.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Network(Enum):
    """Which socket calls a process needs."""

    NONE = "none"
    """Not even ``socket``."""

    ACCEPT = "accept"
    """No socket of its own, but it may accept connections on one that it was given, and speak on them."""

    CLIENT = "client"
    """TCP and UDP over IPv4 and IPv6, outward: requests and name look-ups."""

    SERVER = "server"
    """Likewise, and it may bind, listen and accept: for sandboxes with their own network."""


@dataclass(frozen=True)
class Architecture:
    """One table of system calls."""

    audit: int
    """The kernel's ``AUDIT_ARCH_*``."""

    column: int
    """Of the tables below."""

    seccomp: int
    """The number of ``seccomp(2)`` itself."""

    x32: bool = False
    """Whether numbers from 2**30 up are those of another binary interface."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "x86_64": Architecture(0xC000003E, 0, 317, x32=True),
    "aarch64": Architecture(0xC00000B7, 1, 277),
}

_ABSENT = -1

ALLOWED: Mapping[str, tuple[int, int]] = {
    # files, by descriptor or beneath what Landlock allows
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "lseek": (8, 62),
    "dup": (32, 23),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "copy_file_range": (326, 285),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "openat": (257, 56),
    "openat2": (437, 437),
    "faccessat2": (439, 439),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # threads, signals of its own, and the end
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # time, chance, waiting
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "getrandom": (318, 278),
    "poll": (7, _ABSENT),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, _ABSENT),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
}
"""Whatever the arguments are: name to number on x86_64 and on arm64."""

CLIENT_ALLOWED: Mapping[str, tuple[int, int]] = {
    "connect": (42, 203),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
    "uname": (63, 160),
    "stat": (4, _ABSENT),  # of Debian's OpenSSL and glibc's resolver
    "access": (21, _ABSENT),
    "faccessat": (269, 48),
}
_TALK = ("recvfrom", "recvmsg", "shutdown", "getsockname", "getpeername", "getsockopt")
ACCEPT_ALLOWED: Mapping[str, tuple[int, int]] = {
    "accept4": (288, 242),
    **{name: CLIENT_ALLOWED[name] for name in _TALK},
}
SERVER_ALLOWED: Mapping[str, tuple[int, int]] = {
    "bind": (49, 200),
    "listen": (50, 201),
    "accept4": (288, 242),
}


@dataclass(frozen=True)
class Test:
    """One argument must be one of ``values`` (or none of them); the kernel's ``int`` arguments are their lower half."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    none_of: bool = False
    pointer: bool = False
    """Compare all 64 bits."""


_OWN_PID = -2
"""Stands for this process's pid, which is known when the filter is installed."""

_CLONE_THREAD = 0x00000100 | 0x00010000  # CLONE_VM, CLONE_THREAD
_CLONE_NAMESPACES = 0x7E020000 | 0x00000080
_SOCK_TYPE = 0xF
_MSG_FASTOPEN = 0x20000000
_AF_INET, _AF_INET6 = 2, 10
_STREAM, _DATAGRAM = 1, 2
_TCP, _UDP = 6, 17
_SOL_SOCKET, _SOL_IP, _SOL_IPV6 = 1, 0, 41
_BPF_OPTIONS = (26, 50, 51, 52)
"""SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF and _EBPF: programs that the kernel would run."""

_TCP_OPTIONS_REFUSED = (23, 30, 31)
"""TCP_FASTOPEN and TCP_FASTOPEN_CONNECT, which connect past Landlock's check, and TCP_ULP, which loads modules."""


@dataclass(frozen=True)
class Guarded:
    """A call that is allowed when all tests of one of its ``ways`` hold."""

    numbers: tuple[int, int]
    ways: tuple[tuple[Test, ...], ...]
    error: int = errno.EPERM


GUARDED: Mapping[str, Guarded] = {
    "clone": Guarded((56, 220), ((Test(0, (_CLONE_THREAD,), mask=_CLONE_THREAD | _CLONE_NAMESPACES),),)),
    # Its flags lie behind a pointer. With ENOSYS glibc takes clone.
    "clone3": Guarded((435, 435), (), errno.ENOSYS),
    # What abort() does.
    "tgkill": Guarded((234, 131), ((Test(0, (_OWN_PID,)),),)),
    # Only to read limits of its own.
    "prlimit64": Guarded((302, 261), ((Test(0, (0,)), Test(2, (0,), pointer=True)),)),
    # Only its own niceness (PRIO_PROCESS, 0), which can but rise.
    "setpriority": Guarded((141, 140), ((Test(0, (0,)), Test(1, (0,))),)),
    "getpriority": Guarded((140, 141), ((Test(0, (0,)), Test(1, (0,))),)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
    "fcntl": Guarded((72, 25), ((Test(1, (0, 1, 2, 3, 4, 1030)),),)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX
    "ioctl": Guarded((16, 29), ((Test(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5451)),),), errno.ENOTTY),
    # futimens, for a file that is open: with a path it would reach files that Landlock lets no one write.
    "utimensat": Guarded((280, 88), ((Test(1, (0,), pointer=True),),)),
}
CLIENT_GUARDED: Mapping[str, Guarded] = {
    "socket": Guarded(
        (41, 198),
        (
            (Test(0, (_AF_INET, _AF_INET6)), Test(1, (_STREAM,), mask=_SOCK_TYPE), Test(2, (0, _TCP))),
            (Test(0, (_AF_INET, _AF_INET6)), Test(1, (_DATAGRAM,), mask=_SOCK_TYPE), Test(2, (0, _UDP))),
        ),
        errno.EAFNOSUPPORT,
    ),
    "setsockopt": Guarded(
        (54, 208),
        (
            (Test(1, (_SOL_SOCKET,)), Test(2, _BPF_OPTIONS, none_of=True)),
            (Test(1, (_TCP,)), Test(2, _TCP_OPTIONS_REFUSED, none_of=True)),
            (Test(1, (_SOL_IP, _SOL_IPV6)),),
        ),
    ),
    "sendto": Guarded((44, 206), ((Test(3, (0,), mask=_MSG_FASTOPEN),),)),
    "sendmsg": Guarded((46, 211), ((Test(2, (0,), mask=_MSG_FASTOPEN),),)),
    "sendmmsg": Guarded((307, 269), ((Test(3, (0,), mask=_MSG_FASTOPEN),),)),
}

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x40000000
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1
_INSTRUCTION = struct.Struct("=HBBI")
_FAIL = -1
"""A jump to the end of the way that an instruction belongs to."""

Instruction = tuple[int, int, int, int]
"""Code, jump when true, jump when false, operand: ``struct sock_filter``."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def allowed_calls(network: Network) -> Mapping[str, tuple[int, int]]:
    """The calls that pass with any arguments."""
    calls = dict(ALLOWED)
    if network is Network.ACCEPT:
        calls |= ACCEPT_ALLOWED
    elif network is not Network.NONE:
        calls |= CLIENT_ALLOWED
    if network is Network.SERVER:
        calls |= SERVER_ALLOWED
    return calls


def guarded_calls(network: Network) -> Mapping[str, Guarded]:
    """The calls whose arguments are looked at."""
    if network is Network.NONE:
        return GUARDED
    guarded = {name: rule for name, rule in CLIENT_GUARDED.items() if network is not Network.ACCEPT or name != "socket"}
    return {**GUARDED, **guarded}


def program(architecture: Architecture, network: Network) -> list[Instruction]:
    """The filter; operands may still hold ``_OWN_PID``."""
    out: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if architecture.x32:
        out += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _RET_KILL)]
    for numbers in allowed_calls(network).values():
        if numbers[architecture.column] != _ABSENT:
            out += [(_EQUAL, 0, 1, numbers[architecture.column]), (_RETURN, 0, 0, _RET_ALLOW)]
    for rule in guarded_calls(network).values():
        body = [instruction for way in rule.ways for instruction in _way(way)]
        body.append((_RETURN, 0, 0, _RET_ERRNO | rule.error))
        out += [(_EQUAL, 0, len(body), rule.numbers[architecture.column]), *body]
    out.append((_RETURN, 0, 0, _RET_ERRNO | errno.EPERM))
    return out


def _way(tests: Iterable[Test]) -> list[Instruction]:
    """Allow when all hold, else fall out at its end."""
    body: list[Instruction] = []
    for test in tests:
        body += _instructions(test)
    body.append((_RETURN, 0, 0, _RET_ALLOW))
    end = len(body)
    return [
        (code, end - at - 1 if true == _FAIL else true, end - at - 1 if false == _FAIL else false, operand)
        for at, (code, true, false, operand) in enumerate(body)
    ]


def _instructions(test: Test) -> list[Instruction]:
    lower = _ARGUMENTS_AT + 8 * test.argument  # both architectures are little-endian
    body: list[Instruction] = []
    if test.pointer:
        body += [(_LOAD, 0, 0, lower + 4), (_EQUAL, 0, _FAIL, 0)]
    body.append((_LOAD, 0, 0, lower))
    if test.mask != 0xFFFFFFFF:
        body.append((_AND, 0, 0, test.mask))
    last = len(test.values) - 1
    for index, value in enumerate(test.values):
        if test.none_of:
            body.append((_EQUAL, _FAIL, 0, value))
        else:
            body.append((_EQUAL, last - index, _FAIL if index == last else 0, value))
    return body


def _packed(network: Network) -> tuple[bytes, tuple[int, ...]] | None:
    """The program for this machine, and at which offsets the pid belongs."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return None
    instructions = program(architecture, network)
    places = tuple(
        index * _INSTRUCTION.size + 4 for index, instruction in enumerate(instructions) if instruction[3] == _OWN_PID
    )
    code = b"".join(_INSTRUCTION.pack(*instruction[:3], instruction[3] & 0xFFFFFFFF) for instruction in instructions)
    return code, places


_PACKED = {network: _packed(network) for network in Network}
"""Made at import, so that a forked child has nothing to compute."""


def confine(network: Network) -> bool:
    """Put this process, all of its threads and what they become under the filter, for good.

    False: the kernel or the architecture does not offer it, and nothing has changed. Needs ``no_new_privs``.
    """
    packed = _PACKED[network]
    if packed is None:
        return False
    code = bytearray(packed[0])
    for place in packed[1]:
        struct.pack_into("=I", code, place, os.getpid())
    filter_program = _Program(len(code) // _INSTRUCTION.size, bytes(code))
    number = ARCHITECTURES[platform.machine()].seccomp
    return bool(
        _syscall(
            ctypes.c_long(number),
            ctypes.c_ulong(_SET_MODE_FILTER),
            ctypes.c_ulong(_FLAG_TSYNC),
            ctypes.byref(filter_program),
        )
        == 0
    )


def available() -> bool:
    """Whether this kernel takes filters: ``SECCOMP_GET_ACTION_AVAIL`` for errors."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    action = ctypes.c_uint32(_RET_ERRNO)
    return bool(
        _syscall(ctypes.c_long(architecture.seccomp), ctypes.c_ulong(2), ctypes.c_ulong(0), ctypes.byref(action)) == 0
    )
