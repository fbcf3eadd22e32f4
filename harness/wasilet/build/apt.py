"""System packages by apt: what is missing is installed as root, and named as one command to type otherwise.

``--no-remove`` guards the machine: a package whose conflicts would throw out something the user has (Debian's ``rustc``
and ``rustup`` exclude each other) is a failure, never a removal. The package lists are fetched only when apt does not
know a package or its download fails, because a fresh list costs seconds and most machines have one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence

from wasilet import process
from wasilet.errors import HarnessError
from wasilet.settings import environment_flag

Say = Callable[[str], None]

_UPDATE_TIMEOUT_SECONDS = 300.0
_INSTALL_TIMEOUT_SECONDS = 900.0
_LOCK_WAIT_SECONDS = 120


def available(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine has apt at all."""
    return shutil.which("apt-get", path=env.get("PATH")) is not None


def may_install(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process may install packages: apt is there, the user is root and did not say no
    (``WASILET_INSTALL=0``)."""
    return available(env) and os.geteuid() == 0 and wanted(env)


def wanted(env: Mapping[str, str]) -> bool:
    """Whether anything may be installed at all: ``WASILET_INSTALL`` does not say no. Raises UsageError."""
    return environment_flag(env, "WASILET_INSTALL", default=True)


def command(packages: Sequence[str]) -> str:
    """The command a user types to install ``packages``."""
    return "sudo apt-get install --no-install-recommends " + " ".join(packages)


def missing(packages: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """Those of ``packages`` that are not installed, in their order."""
    done = process.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *packages],
        timeout_seconds=30,
        env=_environment(env),
        check=False,
    )
    installed = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def install(packages: Sequence[str], *, why: str, say: Say, env: Mapping[str, str] = os.environ) -> None:
    """Install ``packages`` after saying which and why. Raises HarnessError (exit code 2) with apt's last output."""
    if not may_install(env):
        raise HarnessError(f"{why} needs {', '.join(packages)}", hint=f"type: {command(packages)}")
    say(f"installing {', '.join(packages)} by apt: {why}")
    if not _known(packages, env):
        _update(say, env)
    first = _install(packages, say, env)
    if first.returncode == 0:
        return
    _update(say, env)
    second = _install(packages, say, env)
    if second.returncode != 0:
        last = [line for line in second.stderr.splitlines() if line.strip()][-5:]
        raise HarnessError(
            f"apt-get could not install {', '.join(packages)}: " + ("\n".join(last) or "it gave no reason"),
            hint=f"{why}; see what apt says: {command(packages)}",
        )


def _known(packages: Sequence[str], env: Mapping[str, str]) -> bool:
    done = process.run(
        ["apt-cache", "show", "--no-all-versions", *packages],
        timeout_seconds=60,
        env=_environment(env),
        check=False,
    )
    found = {line.partition(":")[2].strip() for line in done.stdout.splitlines() if line.startswith("Package:")}
    return found.issuperset(packages)


def _update(say: Say, env: Mapping[str, str]) -> None:
    say("fetching the package lists (apt-get update)")
    process.run(["apt-get", "update"], timeout_seconds=_UPDATE_TIMEOUT_SECONDS, env=_environment(env), check=False)


def _install(packages: Sequence[str], say: Say, env: Mapping[str, str]) -> process.Completed:
    def progress(line: str) -> None:
        if line.startswith(("Get:", "Setting up ")):
            say(line.strip())

    return process.run(
        [
            "apt-get",
            "install",
            "--yes",
            "--no-install-recommends",
            "--no-remove",
            "-o",
            f"DPkg::Lock::Timeout={_LOCK_WAIT_SECONDS}",
            *packages,
        ],
        timeout_seconds=_INSTALL_TIMEOUT_SECONDS,
        env=_environment(env),
        check=False,
        on_line=progress,
    )


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    return {**env, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
