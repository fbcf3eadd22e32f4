"""A systemd scope for the supervisor, where the agent is a systemd service and control groups are version 2.

There a service whose group has handed controllers to groups beneath it cannot be started again while one of them is in
use: systemd cannot put the new process into the service's group ("Device or resource busy", status 219/CGROUP; seen
with systemd 252, and so by the kernel's rule that inner groups hold no processes). That is just what an agent does that
is restarted while its containers run on. So the supervisor gets its own unit, delegated to it, in the service's
slice; ``systemd-run --scope`` makes one and becomes the supervisor, so that it still is a child of the agent.

It needs a manager that lets this user make units: the system's for root, the user's own for services beneath it. Where
there is none, the supervisor stays in the service's group and makes no groups (``wasilet_node.runtime.cgroups``).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from wasilet_node.runtime.cgroups import SCOPE_PREFIX, controller_mounts, own_groups

MAX_TASKS = 16_384
"""Processes and threads of all sandboxes of a node together: what RLIMIT_NPROC is for an ordinary user's, which the
kernel does not count for root. A burst of threads then ends at the node's sandboxes, and the machine has pids left."""


def command_prefix(
    *, root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self"), systemd_run: str = "systemd-run"
) -> tuple[str, ...]:
    """What to put before the supervisor's command line; empty where it needs no scope, or can have none."""
    try:
        mounts = controller_mounts(process, root)
        path = Path(own_groups(process).get("", "/"))
    except (OSError, ValueError):
        return ()
    service = next((part for part in reversed(path.parts) if part.endswith((".service", ".scope"))), "")
    program = shutil.which(systemd_run)
    if set(mounts) != {""} or not service.endswith(".service") or program is None:
        return ()
    managers = re.findall(r"/user@(\d+)\.service/", str(path))
    if managers:
        if managers != [str(os.geteuid())]:
            return ()
    elif os.geteuid() != 0:
        return ()
    return (
        program,
        *(["--user"] if managers else []),
        "--scope",
        "--slice-inherit",
        "--quiet",
        "--collect",
        f"--unit={SCOPE_PREFIX}{secrets.token_hex(8)}",
        f"--description=Containers of {service}",
        "--property=Delegate=yes",
        f"--property=TasksMax={MAX_TASKS}",
        # At the machine's end the agent goes first, or it would report containers that failed.
        f"--property=Before={service}",
        "--",
    )
