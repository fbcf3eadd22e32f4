"""A Docker engine: the one that runs, else one of our own that leaves the machine as it found it.

An engine changes iptables, sysctls, links and cgroups of the host. What was there before is written down before it
starts and put back after it stops, also when the run that started it was killed: the next start looks for the note.
Test runs beside each other share one engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from wasilet import process
from wasilet.build import apt
from wasilet.errors import HarnessError

PACKAGES = ("docker.io", "iptables", "iproute2")
START_TIMEOUT_SECONDS = 60.0
_SYSCTLS = ("net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding", "net/ipv4/conf/default/forwarding")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A Docker engine that answers."""

    environment: dict[str, str]
    """What its clients need: PATH and the rest of the caller's, and DOCKER_HOST."""

    softened: bool
    """Whether containers go through softrunc, because the kernel grants this machine no CAP_SYS_RESOURCE."""

    def docker(self, *arguments: str, timeout_seconds: float = 120.0, check: bool = True) -> process.Completed:
        """Run the Docker client. Raises CommandError."""
        return process.run(["docker", *arguments], timeout_seconds=timeout_seconds, env=self.environment, check=check)


def lacks_sys_resource() -> bool:
    """Whether CAP_SYS_RESOURCE (24) is missing from the bounding set: then no privileged container starts as it is."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapBnd:"):
            return not int(line.split()[1], 16) >> 24 & 1
    return False


def answers(environment: dict[str, str], *, patience_seconds: float = 30.0) -> bool:
    """Whether a Docker engine answers a client with that environment."""
    try:
        done = process.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            timeout_seconds=patience_seconds,
            env=environment,
            check=False,
        )
    except HarnessError:
        return False
    return done.returncode == 0


@contextlib.contextmanager
def docker_engine(*, cache: Path, softrunc: Path, say: Callable[[str], None]) -> Iterator[Engine]:
    """An engine for as long as the block runs. Raises HarnessError when there is none and none can be started.

    Runs share it: each holds a lock for reading, and the last to leave stops it. The kernel lets go of the lock of a
    run that is killed; the next one takes over what it left, or puts the machine in order first."""
    environment = dict(os.environ)
    if answers(environment):
        yield Engine(environment=environment, softened=False)
        return
    if os.geteuid() != 0:
        raise HarnessError("no Docker engine runs, and only root can start one", hint="start Docker, or run as root")
    if missing := apt.missing(PACKAGES):
        apt.install(missing, why="a Docker engine for the kind tests", say=say)
    folder = cache / "docker"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "users.lock").open("w") as users:
        _take_part(users, folder, softrunc, environment, say)
        try:
            yield Engine(environment=environment, softened=lacks_sys_resource())
        finally:
            _leave(users, folder, say)


def _take_part(
    users: IO[str], folder: Path, softrunc: Path, environment: dict[str, str], say: Callable[[str], None]
) -> None:
    """Join the engine of another run, or start one; then ``users`` is held for reading."""
    with (folder / "start.lock").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        note = _note(folder)
        if "process" in note and process.is_alive(process.ProcessRecord.from_json(note["process"])):
            environment["DOCKER_HOST"] = f"unix://{note['sockets']}/docker.sock"
            if answers(environment, patience_seconds=START_TIMEOUT_SECONDS):
                fcntl.flock(users, fcntl.LOCK_SH)
                return
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HarnessError(
                "another run's Docker engine gives no answer", hint=f"see {folder}/dockerd.log"
            ) from None
        _restore(folder, say)
        sockets = Path(tempfile.mkdtemp(prefix="wasilet-docker-"))
        environment["DOCKER_HOST"] = f"unix://{sockets}/docker.sock"
        record = _start(folder, sockets, softrunc, say)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not answers(environment):
            if not process.is_alive(record) or time.monotonic() > deadline:
                tail = "\n".join(process.tail_of(folder / "dockerd.log", 5))
                _restore(folder, say)
                raise HarnessError(f"the Docker engine did not start:\n{tail}")
            time.sleep(0.1)
        fcntl.flock(users, fcntl.LOCK_SH)


def _leave(users: IO[str], folder: Path, say: Callable[[str], None]) -> None:
    """The last one stops the engine and puts the machine in order."""
    with (folder / "start.lock").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_UN)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _restore(folder, say)


def _start(folder: Path, sockets: Path, softrunc: Path, say: Callable[[str], None]) -> process.ProcessRecord:
    configuration: dict[str, object] = {
        "data-root": str(folder / "data"),
        "exec-root": str(sockets / "exec"),
        "pidfile": str(sockets / "docker.pid"),
        "hosts": [f"unix://{sockets}/docker.sock"],
        "storage-driver": "overlay2",
        "log-level": "warn",
    }
    if lacks_sys_resource():
        configuration |= {"default-runtime": "softrunc", "runtimes": {"softrunc": {"path": str(softrunc)}}}
    (sockets / "daemon.json").write_text(json.dumps(configuration), encoding="utf-8")
    before: dict[str, object] = {
        "iptables": process.run(["iptables-save"], timeout_seconds=20, check=False).stdout,
        "links": _links(),
        "sysctls": {name: Path("/proc/sys", name).read_text(encoding="ascii") for name in _SYSCTLS},
        "sockets": str(sockets),
    }
    note = folder / "before.json"
    note.write_text(json.dumps(before), encoding="utf-8")
    say("starting a Docker engine")
    record = process.spawn(
        ["dockerd", "--config-file", str(sockets / "daemon.json")],
        log=folder / "dockerd.log",
        env={**os.environ, "DOCKER_RAMDISK": "0"},
    )
    note.write_text(json.dumps(before | {"process": record.to_json()}), encoding="utf-8")
    return record


def _strays(sockets: str) -> list[process.ProcessRecord]:
    """What an engine that was killed left running: all that was started with its own folder's name, and their children
    (the containers)."""
    found: dict[int, process.ProcessRecord] = {}
    for started in psutil.process_iter(["cmdline"]):
        if any(sockets in word for word in started.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                for each in (started, *started.children(recursive=True)):
                    if record := process.find(each.pid):
                        found[each.pid] = record
    return list(found.values())


def _links() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def _note(folder: Path) -> dict[str, Any]:
    """What the machine was like before the engine; empty when none was started."""
    try:
        note: dict[str, Any] = json.loads((folder / "before.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return note


def _restore(folder: Path, say: Callable[[str], None]) -> None:
    """Stop the last engine of ``folder`` and put back what it changed; nothing to do where it left no note."""
    before = _note(folder)
    if not before:
        return
    if "process" in before:
        process.stop(process.ProcessRecord.from_json(before["process"]), grace_seconds=20)
    process.stop(_strays(before["sockets"]), grace_seconds=5)
    say("putting back the network as it was before the Docker engine")
    for link in set(_links()) - set(before["links"]):
        if link.startswith(("docker", "br-", "veth")):
            process.run(["ip", "link", "delete", link], timeout_seconds=10, check=False)
    # An empty dump means no tables at all; the three that Docker uses are then emptied.
    process.run(["iptables-restore"], input=before["iptables"] or _EMPTY_TABLES, timeout_seconds=20, check=False)
    for name, value in before["sysctls"].items():
        Path("/proc/sys", name).write_text(value, encoding="ascii")
    for group in (*Path("/sys/fs/cgroup").glob("*/docker"), Path("/sys/fs/cgroup/docker")):
        _remove_groups(group)
    shutil.rmtree(before["sockets"], ignore_errors=True)
    (folder / "before.json").unlink()


_EMPTY_TABLES = "".join(
    f"*{table}\n{''.join(f':{chain} ACCEPT [0:0]{chr(10)}' for chain in chains)}COMMIT\n"
    for table, chains in (
        ("filter", ("INPUT", "FORWARD", "OUTPUT")),
        ("nat", ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
    )
)


def _remove_groups(group: Path) -> None:
    """Remove a cgroup and those below it, as far as they are empty."""
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
