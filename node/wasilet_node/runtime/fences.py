"""Which fences sandboxes have on this machine, and why not where one is missing: ``python -P -m
wasilet_node.runtime.fences`` prints it as JSON.

What can be had depends on the kernel, the user and the container that the node runs in, so it is tried, by the
supervisor at its start and by this module's command alike. The supervisor's log, the node's log and ``doctor`` show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
from dataclasses import dataclass

from wasilet_node.runtime import landlock, own_user, pid_namespace, private_root, rootless, seccomp, user_namespace
from wasilet_node.runtime.protocol import Fence


@dataclass(frozen=True, kw_only=True)
class Fences:
    """Why each is missing; empty: it holds."""

    user: str
    files: str
    pids: str
    landlock: str
    seccomp: str

    def each(self) -> tuple[Fence, ...]:
        """One by one, with what they mean for a user."""
        threads = f"{own_user.MAX_THREADS:,} threads"
        shown = (
            (
                "own user",
                self.user,
                f"each is a user that no other process is, with {threads} at most",
                "they have the user of the node",
            ),
            (
                "own file tree",
                self.files,
                "a container's volumes, and with a network what name lookup and certificates need",
                "the machine's files are there, and Landlock alone keeps them off",
            ),
            ("own pid namespace", self.pids, "no other process can be named", "other processes can be named"),
            (
                "Landlock",
                self.landlock,
                f"version {landlock.abi()}: {', '.join(landlock.held_back())}",
                "native code reaches the files of its user that are in its tree",
            ),
            (
                "seccomp",
                self.seccomp,
                "a list of allowed system calls",
                "native code may make every system call",
            ),
        )
        return tuple(
            Fence(name=name, holds=not reason, detail=f"{without}: {reason}" if reason else with_it)
            for name, reason, with_it, without in shown
        )


def examine(not_isolated: str, *, rootless_rights: bool = False) -> Fences:
    """Try them, in a process of one thread whose children sandboxes are to be. ``not_isolated``: why it is in no user
    namespace that knows all ids (``user_namespace.enter``). ``rootless_rights``: it is in an ordinary user's
    (``rootless``), which knows one, so what takes another uid cannot be had there, and the rest can."""
    no_rights = "" if rootless_rights else not_isolated
    return Fences(
        user=not_isolated,
        files=no_rights or private_root.why_unavailable(),
        pids=no_rights or pid_namespace.why_unavailable(),
        landlock=_landlock(),
        seccomp="" if seccomp.available() else "the kernel has no such filter, or allows none",
    )


def _landlock() -> str:
    version = landlock.abi()
    if version >= landlock.LOWEST_ABI:
        return ""
    return f"the kernel has version {version} only" if version else "the kernel has none, or allows none"


def main() -> int:
    """Print what the supervisor of a node of this user would find."""
    inside, outside = socket.socketpair()
    pid = os.fork()
    if pid != 0:
        with outside:
            inside.close()
            user_namespace.map_child(pid, outside)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outside.close()
    reason = user_namespace.enter(inside)
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            rootless.make()
    found = examine(reason, rootless_rights=rootless.is_inside())
    sys.stdout.write(json.dumps([dataclasses.asdict(fence) for fence in found.each()]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
