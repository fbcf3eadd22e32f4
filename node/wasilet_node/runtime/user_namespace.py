"""The supervisor's user namespace: it owns the pods' network namespaces, so that sandboxes may be put into them.

All ids are mapped to themselves, so files, modes and control groups are as outside; but the capabilities that the
supervisor keeps hold over what was made inside only. It can neither enter the machine's network namespace nor mount
anything for others, and root outside (the agent) can plug interfaces into what it owns.

Only a process outside may write such a map. That is the one which the agent started and which ends when the supervisor
runs: it forks, waits until the child is in its namespace, writes the maps, and goes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from wasilet_node.runtime import linux, netns

IDENTITY_MAP = "0 0 4294967295"
_TIMEOUT_SECONDS = 10.0
_CAPABILITIES = (linux.CAP_SETUID, linux.CAP_SETGID, linux.CAP_SYS_ADMIN)


def may_be_had() -> bool:
    """Whether this process may map every id into a user namespace: it is root, in earnest."""
    held = linux.effective_capabilities()
    return os.geteuid() == 0 and all(held >> capability & 1 for capability in _CAPABILITIES)


def enter(outside: socket.socket) -> str:
    """Enter a new user namespace, whose maps the process at the other end of ``outside`` writes (``map_child``).

    Empty: it is entered; otherwise why not, and nothing has changed. Raises OSError when the maps did not come."""
    if os.geteuid() != 0:
        return "that needs root"
    if not may_be_had():
        return "root without CAP_SYS_ADMIN, CAP_SETUID or CAP_SETGID"
    outside.settimeout(_TIMEOUT_SECONDS)
    try:
        netns.unshare(netns.CLONE_NEWUSER)
    except OSError as error:
        outside.send(b"no")
        return f"no user namespace: {error.strerror}"
    outside.send(b"entered")
    if outside.recv(16) != b"mapped":
        raise OSError("the user namespace of the supervisor could not be mapped")
    with contextlib.suppress(OSError):
        # A sandbox that nested one would have all capabilities there again.
        Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")
    return ""


def map_child(pid: int, inside: socket.socket) -> None:
    """Write the maps for a child that calls ``enter``. Raises OSError."""
    inside.settimeout(_TIMEOUT_SECONDS)
    if inside.recv(16) != b"entered":
        return
    for kind in ("uid", "gid"):
        Path(f"/proc/{pid}/{kind}_map").write_text(IDENTITY_MAP, encoding="ascii")
    inside.send(b"mapped")
