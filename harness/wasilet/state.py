"""What is remembered of a cluster: one folder, ``<state root>/<name>``, all of it private to the user.

::

    cluster.json      provider, run id, ports, addresses: written atomically
    run/<component>.json   pid and start time of each long-lived process
    run/*.argv        the command line it was started with
    lock              held (flock) by the run that changes the cluster; holds its pid
    pki/ etc/ logs/ etcd/ registry/ nodes/<node>/

A file is written beside its target and renamed, so that a run killed at any moment leaves the old or the new one. The
run id is random, and in the environment of every process of the cluster: it finds a process that was started by a run
that died before it could write the record.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet.cluster_record import VERSION, ClusterRecord
from wasilet.errors import PortTakenError, StateError
from wasilet.ports import EVERYWHERE, port_is_free, port_taken
from wasilet.process import ProcessRecord, check_cancelled, is_alive, with_environment
from wasilet.settings import DEFAULT_NAME, Settings
from wasilet.storage import locked_state, read_json, storage_errors, write_json

RUN_ID_VARIABLE = "WASILET_RUN_ID"
LOCK_POLL_SECONDS = 0.1
ROOT_LOCK_TIMEOUT_SECONDS = 120.0
"""Ports and ranges are chosen in milliseconds; a run that is stopped meanwhile would hold up all others."""
PREFERRED_PORTS = {"apiserver": 6443, "registry": 5000, "kubelet": 10250}
"""What the cluster ``wasilet`` takes when it is free; any other cluster gets ports of its own range."""

CLUSTER_LOGIN = "etc/registry-login/config.json"
"""Within a cluster's folder: the login of its registry, as docker writes one."""

_FIRST_PORT, _LAST_PORT = 20000, 32000
"""Below Linux's ephemeral range (32768), so that no outgoing connection sits on a port of Wasilet's."""


@dataclass(frozen=True)
class ComponentRecord:
    """A long-lived process of a cluster."""

    name: str
    process: ProcessRecord
    log: Path
    argv_digest: str
    """SHA-256 of the command line and configuration it was started with: another one means a restart."""

    log_start_bytes: int = 0
    """How long the log was before: what precedes is an earlier process's."""


class State:
    """The folder of one cluster. Nothing is made before :meth:`create`."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.path = root / name
        self._updating = threading.Lock()
        self._parsed: tuple[tuple[int, int, int] | None, dict[str, Any], ClusterRecord] | None = None

    @classmethod
    def of(cls, settings: Settings) -> State:
        """The state of ``settings.name``."""
        return cls(settings.state_root, settings.name)

    # --- folders ---------------------------------------------------------------------------------------------------

    @property
    def logs(self) -> Path:
        """``<component>.log`` each."""
        return self.path / "logs"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.path / "pki"

    @property
    def etc(self) -> Path:
        """Configuration files and kubeconfigs of components."""
        return self.path / "etc"

    @property
    def run(self) -> Path:
        """Process records."""
        return self.path / "run"

    @property
    def admin_kubeconfig(self) -> Path:
        """The administrator's kubeconfig, which the harness itself uses."""
        return self.etc / "admin.conf"

    @property
    def bootstrap_file(self) -> Path:
        """The kubeconfig with the bootstrap token."""
        return self.etc / "bootstrap.conf"

    def node(self, node: str) -> Path:
        """The data folder of a node agent."""
        return self.path / "nodes" / node

    def log(self, component: str) -> Path:
        """The log of a component."""
        return self.logs / f"{component}.log"

    def exists(self) -> bool:
        """Whether the cluster was ever begun (and not deleted)."""
        return (self.path / "cluster.json").is_file()

    def create(self) -> None:
        """Make the folders. Raises StateError in one clear line when that cannot be."""
        with storage_errors(self.path):
            for folder in (self.path, self.logs, self.pki, self.etc, self.run):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the whole folder, the lock last: a run that waits for it then finds nothing half-gone."""
        if not self.path.is_dir():
            return
        with storage_errors(self.path):
            for entry in sorted(self.path.iterdir(), key=lambda p: p.name != "cluster.json"):
                if entry.name == "lock":
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            (self.path / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    # --- facts -----------------------------------------------------------------------------------------------------

    @property
    def cluster(self) -> ClusterRecord:
        """What ``cluster.json`` holds; all empty when there is none. Raises StateError when it is damaged."""
        return self._current()[1]

    def read(self) -> dict[str, Any]:
        """``cluster.json`` as it is, but for its version. Raises StateError when it is damaged."""
        return copy.deepcopy(self._current()[0])

    def _current(self) -> tuple[dict[str, Any], ClusterRecord]:
        """Parsed once as long as the file is the same: each write makes another one, of this run or of another."""
        path = self.path / "cluster.json"
        identity = _identity(path)
        known = self._parsed
        if known is None or identity is None or known[0] != identity:
            data = read_json(path)
            record = ClusterRecord.from_json(data, path)
            data.pop("version", None)
            known = self._parsed = (identity, data, record)
        return known[1], known[2]

    def update(self, **values: Any) -> dict[str, Any]:
        """Merge ``values`` into ``cluster.json`` and return the whole."""
        # Steps that run beside each other all write here.
        with self._updating:
            data = self.read() | values
            self.create()
            write_json(self.path / "cluster.json", {"version": VERSION, **data})
            return data

    def run_id(self) -> str:
        """The random name that every process of this cluster carries in its environment; made when missing."""
        return self.cluster.run_id or str(self.update(run_id=secrets.token_hex(16))["run_id"])

    # --- processes -------------------------------------------------------------------------------------------------

    def record(self, component: str) -> ComponentRecord | None:
        """What was started as ``component``; None when nothing was or the record is unreadable."""
        try:
            data = json.loads((self.run / f"{component}.json").read_text())
            return ComponentRecord(
                name=component,
                process=ProcessRecord.from_json(data["process"]),
                log=Path(data["log"]),
                argv_digest=str(data["argv_digest"]),
                log_start_bytes=int(data.get("log_start_bytes", 0)),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def records(self) -> list[ComponentRecord]:
        """Every component that was started, in the order of starting."""
        try:
            files = sorted(self.run.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        except OSError:
            return []
        return [record for file in files if (record := self.record(file.stem))]

    def remember(self, record: ComponentRecord) -> None:
        """Write a component's record."""
        self.create()
        write_json(
            self.run / f"{record.name}.json",
            {
                "process": record.process.to_json(),
                "log": str(record.log),
                "argv_digest": record.argv_digest,
                "log_start_bytes": record.log_start_bytes,
            },
        )

    def forget(self, component: str) -> None:
        """Drop a component's record."""
        (self.run / f"{component}.json").unlink(missing_ok=True)

    def alive(self, component: str) -> ComponentRecord | None:
        """The record of a component whose process runs."""
        record = self.record(component)
        return record if record is not None and is_alive(record.process) else None

    def stray_processes(self) -> list[ProcessRecord]:
        """Processes that carry this cluster's run id, whether recorded or not."""
        run_id = self.cluster.run_id
        return with_environment(RUN_ID_VARIABLE, run_id) if run_id else []

    # --- the lock --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(
        self, *, timeout_seconds: float, say: Callable[[str], None] = lambda _: None, what: str = "changing the cluster"
    ) -> Iterator[None]:
        """Hold the cluster's lock. While another run holds it, ``say`` receives the holder, once. Raises StateError
        after ``timeout_seconds``. The kernel lets go of the lock when its holder dies, however it dies."""
        path = self.path / "lock"
        deadline = time.monotonic() + timeout_seconds
        said = False
        while (fd := self._try_lock(path)) is None:
            holder = _holder(path)
            if time.monotonic() >= deadline:
                raise StateError(f"cluster {self.name!r} is still locked by {holder}", hint="wait for it, or end it")
            if not said:
                say(f"waiting for {holder}, which works on cluster {self.name!r}")
                said = True
            check_cancelled()
            time.sleep(LOCK_POLL_SECONDS)
        try:
            # The name is for those who wait; on a full disk the lock is held without one, or nothing could be ended.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"pid {os.getpid()} ({what})\n".encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)

    def _try_lock(self, path: Path) -> int | None:
        """The descriptor that holds the lock; None while another run has it."""
        while True:
            self.create()
            with storage_errors(path):
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                except FileNotFoundError:
                    continue  # `down --purge` removed the folder this very moment: it is made again
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            if _same_file(fd, path):
                return fd
            # The file was removed between open and lock: this lock guards nothing any more.
            os.close(fd)

    # --- ports -----------------------------------------------------------------------------------------------------

    def allocate_ports(self, wanted: dict[str, int], *, addresses: tuple[str, ...] = ("127.0.0.1",)) -> dict[str, int]:
        """A port for each name, remembered in ``cluster.json``. ``wanted``: the port the user asks for, or 0.

        A port that this cluster already has stays. Clusters do not clash: the choice is made under a lock of the state
        root, knowing the ports of all its clusters. A port that is chosen has no listener anywhere on this machine; of
        one that is asked for only ``addresses`` matter, which it will be used on. Raises PortTakenError when it cannot
        be had."""
        with self.locked_root(".ports.lock"):
            ports = dict(self.cluster.ports)
            others = self._ports_of_others()
            for name, port in wanted.items():
                if port and ports.get(name) != port:
                    if port in others:
                        raise PortTakenError(f"port {port} ({name}) belongs to cluster {others[port]!r}")
                    if twice := [other for other in ports if ports[other] == port]:
                        raise PortTakenError(f"port {port} is asked for twice: {twice[0]}, {name}")
                    if not all(port_is_free(port, address) for address in addresses):
                        raise port_taken(port, name)
                    ports[name] = port
                elif name not in ports:
                    ports[name] = self._free_port(name, set(others) | set(ports.values()))
            self.update(ports=ports)
            return {name: ports[name] for name in wanted}

    def _free_port(self, name: str, taken: set[int]) -> int:
        if self.name == DEFAULT_NAME and "WASILET_STATE_HOME" not in os.environ and name in PREFERRED_PORTS:
            port = PREFERRED_PORTS[name]
            if port not in taken and port_is_free(port, EVERYWHERE):
                return port
        size = _LAST_PORT - _FIRST_PORT
        # Two state roots know nothing of each other: each begins at its own place.
        start = int.from_bytes(hashlib.sha256(os.fsencode(self.path)).digest()[:4], "big") % size
        for offset in range(size):
            port = _FIRST_PORT + (start + offset) % size
            if port not in taken and port_is_free(port, EVERYWHERE):
                return port
        raise PortTakenError(f"no free TCP port between {_FIRST_PORT} and {_LAST_PORT}")

    def _ports_of_others(self) -> dict[int, str]:
        others: dict[int, str] = {}
        for file in self.root.glob("*/cluster.json"):
            if file.parent.name != self.name:
                with contextlib.suppress(StateError):
                    other = ClusterRecord.from_json(read_json(file), file)
                    others |= dict.fromkeys(other.ports.values(), file.parent.name)
        return others

    @contextlib.contextmanager
    def locked_root(self, name: str) -> Iterator[None]:
        """While something is chosen that no other cluster may have: ports, ranges of addresses. ``name``: of the lock's
        file; it is held for a moment, and ends with its holder."""
        self.create()
        path = self.root / name
        late = f"another run has been choosing ports or addresses for {ROOT_LOCK_TIMEOUT_SECONDS:g} s"
        with locked_state(path, timeout_seconds=ROOT_LOCK_TIMEOUT_SECONDS, late=late):
            yield


def clusters(root: Path) -> list[str]:
    """The names of all clusters under a state root."""
    return sorted(file.parent.name for file in root.glob("*/cluster.json"))


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200].strip() or "another run"
    except OSError:
        return "another run"


def _same_file(fd: int, path: Path) -> bool:
    try:
        ours, theirs = os.fstat(fd), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
