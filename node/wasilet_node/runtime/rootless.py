"""A user namespace of an ordinary user, in which networks can be made without root.

The user's id is mapped to itself and no other is, so files, signals and D-Bus are as outside. What is made inside
belongs to the namespace, and the user has every right over it; over the machine's network and files it gains none. A
process keeps of these rights what networks need (``RIGHTS``). Since it is not uid 0, ``execve`` takes even that away,
unless a thread passes it on.

``python -P -m wasilet_node.runtime.rootless`` tries whether all of it is allowed, in a process of its own, since one
that has entered a user namespace cannot leave it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wasilet_node.runtime import linux, netns

RIGHTS = frozenset({linux.CAP_NET_ADMIN, linux.CAP_NET_RAW, linux.CAP_SYS_ADMIN})
"""To make and enter network namespaces and what is in them (``outward`` sends ICMP)."""

_TIMEOUT_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_NS_GET_USERNS = 0xB701
"""``linux/nsfs.h``."""

_SYSCTLS = (
    ("user/max_user_namespaces", "0", "user namespaces are switched off (user.max_user_namespaces is 0)"),
    (
        "kernel/unprivileged_userns_clone",
        "0",
        "user namespaces are switched off for ordinary users (kernel.unprivileged_userns_clone is 0)",
    ),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "AppArmor keeps ordinary users from user namespaces (kernel.apparmor_restrict_unprivileged_userns is 1)",
    ),
)


def obstacle() -> str:
    """Why this user can have no such namespace, in one line; empty: it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"whether user namespaces are allowed cannot be tried: {error}"
    if done.returncode == 0:
        return ""
    return done.stdout.strip() or f"no user namespace can be made (exit {done.returncode})"


def make() -> None:
    """Move this process, which must have one thread, into a new one. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    netns.unshare(netns.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    with contextlib.suppress(OSError):
        # A sandbox that nested one would have all rights there again.
        Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")


def join(network_namespace: int) -> None:
    """Move this process, which must have one thread, into the user namespace to which a network namespace of this user
    belongs. Raises OSError."""
    owner = fcntl.ioctl(network_namespace, _NS_GET_USERNS)
    try:
        netns.setns(owner, netns.CLONE_NEWUSER)
    finally:
        os.close(owner)


@dataclass(frozen=True)
class Handed:
    """What a keeper (``wasilet_node.network.keeper``) gives to who connects: descriptors, the caller's to close."""

    namespace: int
    """The network namespace that stands in for the machine's."""

    stream: int
    datagrams: int
    """Sockets that were made in it."""


KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
"""Of the sockets, in their order."""


def ask(keeper: Path) -> Handed:
    """Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_ANSWER_SECONDS)
        sock.connect(str(keeper))
        _, descriptors, _, _ = socket.recv_fds(sock, 64, 1 + len(KINDS), socket.MSG_CMSG_CLOEXEC)
    if len(descriptors) != 1 + len(KINDS):
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(errno.ECONNRESET, "the keeper of the pod network gave no answer")
    return Handed(*descriptors)


def socket_inside(keeper: Path, kind: socket.SocketKind) -> socket.socket:
    """A socket of the network that a keeper holds, not blocking. Raises OSError."""
    handed = ask(keeper)
    os.close(handed.namespace)
    stream, datagrams = socket.socket(fileno=handed.stream), socket.socket(fileno=handed.datagrams)
    wanted, other = (stream, datagrams) if kind == socket.SOCK_STREAM else (datagrams, stream)
    other.close()
    wanted.setblocking(False)  # noqa: FBT003
    return wanted


def is_inside() -> bool:
    """Whether this process is in such a namespace and has the rights over it."""
    try:
        inner, _, count = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False
    alone = (int(inner), int(count)) == (os.geteuid(), 1)
    return os.geteuid() != 0 and alone and bool(linux.effective_capabilities() >> linux.CAP_SYS_ADMIN & 1)


@contextlib.contextmanager
def passing_on() -> Iterator[None]:
    """What this thread executes meanwhile has the thread's rights. Raises OSError."""
    linux.pass_on_capabilities()
    try:
        yield
    finally:
        linux.stop_passing_on()


def _try() -> None:
    """Raises OSError."""
    make()
    netns.unshare(netns.CLONE_NEWNET)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")


def _reason(error: OSError, sysctls: Path = Path("/proc/sys")) -> str:
    for name, value, text in _SYSCTLS:
        with contextlib.suppress(OSError):
            if (sysctls / name).read_text(encoding="ascii").strip() == value:
                return text
    if error.errno == errno.ENOSPC:
        return "this user has as many user or network namespaces as user.max_user_namespaces allows"
    return f"ordinary users may make no networks in user namespaces: {error.strerror}"


def main() -> int:
    """Try it."""
    try:
        _try()
    except OSError as error:
        sys.stdout.write(f"{_reason(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
