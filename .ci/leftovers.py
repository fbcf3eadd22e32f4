"""What a test run left on the machine: `leftovers.py save FILE` before it, `leftovers.py compare FILE` after it.

Compared are processes, listening ports, mounts, network links, control groups, shared memory, temporary folders of
ours and kubeconfig contexts. What is new is printed; a new process, port, mount or link makes the exit code 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

FATAL = frozenset({"processes", "listening ports", "mounts", "network links", "routes"})
SETTLE_SECONDS = 10.0
"""A process that was told to end may take a moment to do so."""

_OURS = re.compile(
    r"wasilet|kube-|kubelet|coredns|etcd|registry serve|-m (wasilet\w*|pytest|invoke)\b|dockerd|containerd"
    r"|runc|\bkind\b|chromium|cargo|rustc|go build|e2e\.test"
)
"""What the tests start, by command line: a machine has others that come and go."""


def facts() -> dict[str, list[str]]:
    """Everything that is compared, by kind."""
    return {
        "processes": sorted(_processes()),
        "listening ports": sorted(
            f"{connection.laddr.ip}:{connection.laddr.port}"
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and _OURS.search(_command_line(connection.pid))
        ),
        "mounts": sorted(line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()),
        "network links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": sorted(" ".join(line.split()[:3]) for line in Path("/proc/net/route").read_text().splitlines()[1:]),
        "packet filter": _rules(),
        "forwarding": sorted(
            f"{path.parent.name} {path.read_text().strip()}"
            for path in Path("/proc/sys/net/ipv4/conf").glob("*/forwarding")
        ),
        "control groups": sorted(
            str(path) for path in Path("/sys/fs/cgroup").glob("**/") if re.search(r"wasilet|docker|kubelet", path.name)
        ),
        "shared memory": sorted(path.name for path in Path("/dev/shm").iterdir()),
        "temporary folders": sorted(path.name for path in Path("/tmp").glob("wasilet*")),
        "kubeconfig contexts": _contexts(),
    }


def _rules() -> list[str]:
    """Of the machine's own namespace; none where there is no nft, or not the right to ask."""
    nft = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if nft is None or os.geteuid() != 0:
        return []
    done = subprocess.run([nft, "list", "ruleset"], capture_output=True, text=True, timeout=30, check=False)
    return sorted(done.stdout.splitlines())


def _processes() -> list[str]:
    mine = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["pid", "create_time", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        line = " ".join(words)[:200]
        ended = process.info["status"] == psutil.STATUS_ZOMBIE
        if line and not ended and process.info["pid"] not in mine and _OURS.search(line):
            found.append(f"{process.info['pid']} {process.info['create_time']:.0f} {line}")
    return found


def _command_line(pid: int | None) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) if pid else ""
    except psutil.Error:
        return ""


def _contexts() -> list[str]:
    path = Path(os.environ.get("KUBECONFIG", "").split(":")[0] or Path.home() / ".kube/config")
    return (
        sorted(re.findall(r"^ *-? *name: *(wasilet\S*|kind-\S*)", path.read_text(), re.MULTILINE))
        if path.is_file()
        else []
    )


def main(action: str, file: Path) -> int:
    """Save, or compare and say what is new."""
    if action == "save":
        file.write_text(json.dumps(facts()))
        return 0
    before = json.loads(file.read_text())
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = facts()
        new = {kind: sorted(set(entries) - set(before[kind])) for kind, entries in now.items()}
        if not any(new.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for kind, entries in new.items():
        for entry in entries:
            sys.stdout.write(f"left behind ({kind}): {entry}\n")
    if not any(new.values()):
        sys.stdout.write(f"nothing was left behind: {', '.join(new)}\n")
    return int(any(new[kind] for kind in FATAL))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
