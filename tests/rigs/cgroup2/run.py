"""The supervisor on a kernel whose control groups are version 2, and under systemd: ``python -P -m
tests.rigs.cgroup2.run``.

For machines that have version 1, or no systemd. The kernel is User Mode Linux (Debian's package ``user-mode-linux``,
unpacked into a temporary folder): an ordinary process, up in two seconds, whose root is this machine's, read-only. So
what runs inside is this very checkout. First the supervisor's own tests run in a group that was delegated to them, then
an agent's part of a systemd service, hardened as a node's is, is restarted while a container of its runs.

Takes about four minutes, most of it the tests on an emulated memory management. Exit code 0: all of it holds.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wasilet.cluster.join import systemd_unit

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
BOOT_SECONDS = 600
MARK = "# --- what neither the node nor a container needs ---"
SELECTION = "its_output or oomkilled or cpu_limit or control_groups or an_older"
PASSED = "RIG: all of it holds"


def kernel(folder: Path) -> str:
    """The program, unpacked when the machine does not have it. Raises CalledProcessError."""
    found = shutil.which("linux.uml")
    if found is not None:
        return found
    subprocess.run(["apt-get", "download", "user-mode-linux"], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("user-mode-linux_*.deb")
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    return str(folder / "usr/bin/linux.uml")


def hardening() -> str:
    """What the unit of a node that runs as root takes away."""
    unit = systemd_unit(node="rig", data_dir="/mnt/data", bootstrap_file="/mnt/none")
    return unit.partition(MARK)[2].partition("[Install]")[0]


def boot(program: str, folder: Path, script: str) -> bool:
    """Run one of the scripts as the first process of a machine; whether it said that all holds."""
    init = folder / "init.sh"
    settings = {"PYTHON": sys.executable, "REPOSITORY": str(REPOSITORY), "SELECTION": SELECTION, "PASSED": PASSED}
    settings["HARDENING"] = hardening()
    assignments = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    init.write_text(f"#!/bin/sh\n{assignments}. {shlex.quote(str(HERE / script))}\n")
    init.chmod(0o700)
    command = [
        *(program, "mem=2500M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}"),
        *("con=null", "con0=fd:0,fd:1", "con1=null", "ssl=null", "quiet", f"uml_dir={folder}/uml"),
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BOOT_SECONDS,
        check=False,
    )
    sys.stdout.write(done.stdout)
    return PASSED in done.stdout.splitlines()


def main() -> int:
    """Both, one after the other."""
    with tempfile.TemporaryDirectory(prefix="wasilet-cgroup2-") as name:
        program = kernel(Path(name))
        results = {script: boot(program, Path(name), script) for script in ("supervisor.sh", "systemd.sh")}
    for script, holds in results.items():
        sys.stdout.write(f"{script}: {'holds' if holds else 'does not hold'}\n")
    return os.EX_OK if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
