"""Control groups for sandboxes, version 1 and 2, where this process may make them; nothing where it may not.

Groups are made beneath the supervisor's own group, so that a limit on the agent's service still holds for its modules.
Layout: ``<own group>/wasilet-<pid>-<start time>/<container>``; the middle one names the supervisor, which also holds a
lock (``flock``) on it, so that groups left behind by a dead one are found and removed by the next, also when nothing
else is left of it. The next need not run in the same group: those beside its own are looked through too.

Version 1 has one tree a controller; memory and cpu are taken independently. Version 2 lets controllers be handed to
children only by a group without processes of its own (cgroup v2, "no internal process constraint"), so the supervisor
first moves itself and its neighbours of the same service into a leaf, and only in a group that was delegated to it,
that is: one that it may write, below the root, with no one else's processes in it, and neither a login session's nor a
systemd service's, which could not be restarted then; under systemd it has its own scope
(``wasilet_node.runtime.systemd_scope``).

Shares follow kubelet (``MilliCPUToShares``: 1024 per core, at least 2) and for version 2 the runtimes' conversion to
weights. A container without memory limit, cpu limit and cpu request gets no group, and yields by its nice value: moving
a process into a group waits for an RCU grace period with all forks of the machine held up, 5 to 25 ms each time, which
is several times what a whole start takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wasilet_node.runtime import linux

logger = logging.getLogger(__name__)

PERIOD_US = 100_000
MIN_QUOTA_US = 1_000
MIN_SHARES = 2
REMOVE_TIMEOUT_SECONDS = 2.0
SCOPE_PREFIX = "wasilet-supervisor-"
_PREFIX = "wasilet-"
_OWNER = re.compile(r"wasilet-(\d+)-(\d+)")
_LEAF = "wasilet-agent"


def cpu_shares(millicores: int | None) -> int:
    """Version 1 shares of a request in thousandths of a core."""
    return max(MIN_SHARES, (millicores or 0) * 1024 // 1000)


def cpu_weight(shares: int) -> int:
    """Version 2's weight (1 to 10000) of version 1's shares (2 to 262144), as OCI runtimes convert them."""
    return 1 + ((max(shares, 2) - 2) * 9999) // 262142


def cpu_quota_us(millicores: int) -> int:
    """Microseconds of cpu in each period of 100 ms; the kernel takes no less than 1 ms."""
    return max(MIN_QUOTA_US, millicores * PERIOD_US // 1000)


@dataclass(kw_only=True)
class Group:
    """The groups of one container. ``procs``: the files that a process writes "0" to in order to join."""

    directories: tuple[Path, ...]
    procs: tuple[Path, ...]
    memory: Path | None = None
    cpu: Path | None = None
    version: int = 1
    cpu_managed: bool = False
    """Whether the kernel weighs this container's cpu against the rest of the machine."""

    oom_kills_seen: int = field(default=0)

    def oom_kills(self) -> int:
        """How many processes the kernel killed here for memory, since the group was made."""
        if self.memory is None:
            return 0
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _flat_keyed(self.memory / name).get("oom_kill", 0)

    def new_oom_kill(self) -> bool:
        """Whether the count rose since this was asked last."""
        count = self.oom_kills()
        rose = count > self.oom_kills_seen
        self.oom_kills_seen = count
        return rose

    def memory_bytes(self) -> int | None:
        """All memory that counts against the limit; None: not known."""
        if self.memory is None:
            return None
        return _read_int(self.memory / ("memory.usage_in_bytes" if self.version == 1 else "memory.current"))

    def working_set_bytes(self) -> int | None:
        """Memory in use less the file cache that is easily given back, as kubelet reports it; None: not known."""
        if self.memory is None:
            return None
        inactive_name = "total_inactive_file" if self.version == 1 else "inactive_file"
        usage = self.memory_bytes()
        if usage is None:
            return None
        return max(usage - _flat_keyed(self.memory / "memory.stat").get(inactive_name, 0), 0)

    def remove(self) -> bool:
        """Remove the groups; False: a process is still leaving, try again."""
        done = True
        for directory in self.directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                done = False
        return done


class CgroupManager:
    """Makes and removes groups. ``memory`` and ``cpu`` say what can be enforced."""

    def __init__(
        self,
        owner: str,
        *,
        enabled: bool = True,
        root: Path = Path("/sys/fs/cgroup"),
        process: Path = Path("/proc/self"),
    ) -> None:
        self._owner = f"{_PREFIX}{owner}"
        self._locks: list[int] = []
        self._version = 1
        self._memory: Path | None = None
        self._cpu: Path | None = None
        if not enabled:
            return
        try:
            own = own_groups(process)
            mounts = controller_mounts(process, root)
            if "memory" in mounts or "cpu" in mounts:
                self._memory = self._make_v1(mounts.get("memory"), own.get("memory"))
                self._cpu = self._make_v1(mounts.get("cpu"), own.get("cpu"))
                self._prepare_v1()
            elif "" in mounts:
                self._version = 2
                self._make_v2(mounts[""], own.get("", "/"), process)
        except OSError as error:
            logger.warning("no control groups: %s", error)

    @property
    def memory(self) -> bool:
        """Whether memory limits are kept by the kernel."""
        return self._memory is not None

    @property
    def cpu(self) -> bool:
        """Whether cpu limits are kept by the kernel."""
        return self._cpu is not None

    @property
    def directories(self) -> tuple[str, ...]:
        """The groups of this supervisor, for the process that has to clean up after it."""
        return tuple(sorted({str(path) for path in (self._memory, self._cpu) if path is not None}))

    def make(
        self, name: str, *, memory_bytes: int | None, cpu_limit: int | None, cpu_request: int | None
    ) -> Group | None:
        """The groups of one container; None: it needs none, or none can be made. Cpu in millicores. Raises OSError."""
        if self._version == 2:
            return self._make_group_v2(name, memory_bytes, cpu_limit, cpu_request)
        directories: list[Path] = []
        procs: list[Path] = []
        memory = cpu = None
        try:
            if self._memory is not None and memory_bytes is not None:
                memory = self._memory / name
                memory.mkdir(mode=0o755, exist_ok=True)
                directories.append(memory)
                _write_memory(memory, memory_bytes, version=1)
                procs.append(memory / "cgroup.procs")
            if self._cpu is not None and (cpu_limit is not None or cpu_request):
                cpu = self._cpu / name
                cpu.mkdir(mode=0o755, exist_ok=True)
                directories.append(cpu)
                _write_cpu(cpu, cpu_limit, cpu_request, version=1)
                procs.append(cpu / "cgroup.procs")
        except OSError:
            Group(directories=tuple(directories), procs=()).remove()
            raise
        if not procs:
            return None
        return Group(
            directories=tuple(directories),
            procs=tuple(procs),
            memory=memory,
            cpu=cpu,
            cpu_managed=cpu is not None,
        )

    def change(
        self,
        name: str,
        group: Group | None,
        *,
        pid: int,
        memory_bytes: int | None,
        cpu_limit: int | None,
        cpu_request: int | None,
    ) -> Group | None:
        """Move the limits of a running container; its groups as they then are. A container that had no cpu limit and no
        request is put into a group now. A memory limit moves only where the container was started with one, since what
        it has touched before would not count. Raises OSError."""
        if group is not None and group.memory is not None and memory_bytes is not None:
            _write_memory(group.memory, memory_bytes, version=group.version)
        if self._cpu is None:
            return group
        if group is None or group.cpu is None:
            made = self.make(name, memory_bytes=None, cpu_limit=cpu_limit, cpu_request=cpu_request)
            return group if made is None else self._joined(group, made, pid)
        _write_cpu(group.cpu, cpu_limit, cpu_request, version=group.version)
        return group

    @staticmethod
    def _joined(group: Group | None, made: Group, pid: int) -> Group:
        """Put a process into groups that it was not started in. Raises OSError."""
        try:
            for procs in made.procs:
                _write(procs, str(pid))
        except OSError:
            made.remove()
            raise
        if group is None:
            return made
        group.directories += made.directories
        group.procs += made.procs
        group.cpu, group.cpu_managed = made.cpu, made.cpu_managed
        return group

    def close(self) -> None:
        """Remove this supervisor's groups, when all containers are gone."""
        for directory in self.directories:
            remove_tree(Path(directory))
        while self._locks:
            os.close(self._locks.pop())

    def _make_v1(self, mount: Path | None, own: str | None) -> Path | None:
        if mount is None:
            return None
        parent = mount / (own or "/").lstrip("/")
        if not parent.is_dir():
            parent = mount  # the mount shows another part of the tree than /proc names
        return self._mkdir(parent, mount)

    def _mkdir(self, parent: Path, mount: Path) -> Path | None:
        directory = parent / self._owner
        with contextlib.suppress(OSError):
            for place in parent.parent.iterdir() if parent != mount else (parent,):
                _remove_orphans(place)
        try:
            directory.mkdir(mode=0o755, exist_ok=True)
            self._locks.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return directory

    def _prepare_v1(self) -> None:
        if self._cpu is not None:
            try:
                # All containers together against the rest of the machine, as kubelet's kubepods group.
                _write(self._cpu / "cpu.shares", str((os.cpu_count() or 1) * 1024))
            except OSError:
                self._cpu = None

    def _make_v2(self, mount: Path, own: str, process: Path) -> None:
        base = mount / own.lstrip("/")
        vacated = base.name == _LEAF  # by the supervisor before this one
        if vacated:
            base = base.parent
        if not base.is_dir() or not os.access(base, os.W_OK):
            return
        if not {"memory", "cpu"} & set(_read_words(base / "cgroup.controllers")):
            return
        if base != mount and not vacated and not self._vacate(base, process):
            return
        for controller in ("memory", "cpu"):
            with contextlib.suppress(OSError):
                _write(base / "cgroup.subtree_control", f"+{controller}")
        directory = self._mkdir(base, mount)
        if directory is None:
            return
        enabled = []
        for controller in ("memory", "cpu"):
            if controller in _read_words(directory / "cgroup.controllers"):
                with contextlib.suppress(OSError):
                    _write(directory / "cgroup.subtree_control", f"+{controller}")
                    enabled.append(controller)
        self._memory = directory if "memory" in enabled else None
        self._cpu = directory if "cpu" in enabled else None
        if self._cpu is not None:
            _write(directory / "cpu.weight", str(cpu_weight((os.cpu_count() or 1) * 1024)))
        if not enabled:
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _vacate(self, base: Path, process: Path) -> bool:
        """Move every process of ``base`` into a leaf; False: someone else's are among them."""
        pids = [int(word) for word in _read_words(base / "cgroup.procs")]
        uid = os.geteuid()
        for pid in pids:
            with contextlib.suppress(OSError):
                if (process.parent / str(pid)).stat().st_uid != uid:
                    return False
        own_scope = base.name.startswith(SCOPE_PREFIX)
        if "session" in base.name or base.suffix == ".service" or (base.suffix == ".scope" and not own_scope):
            return False
        leaf = base / _LEAF
        try:
            leaf.mkdir(mode=0o755, exist_ok=True)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _write(leaf / "cgroup.procs", str(pid))
        except OSError:
            return False
        return True

    def _make_group_v2(
        self, name: str, memory_bytes: int | None, cpu_limit: int | None, cpu_request: int | None
    ) -> Group | None:
        parent = self._memory or self._cpu
        if parent is None:
            return None
        if memory_bytes is None and cpu_limit is None and not cpu_request:
            return None
        directory = parent / name
        directory.mkdir(mode=0o755, exist_ok=True)
        try:
            if self._memory is not None and memory_bytes is not None:
                _write_memory(directory, memory_bytes, version=2)
                with contextlib.suppress(OSError):
                    _write(directory / "memory.swap.max", "0")
                with contextlib.suppress(OSError):
                    _write(directory / "memory.oom.group", "0")
            if self._cpu is not None:
                _write_cpu(directory, cpu_limit, cpu_request, version=2)
        except OSError:
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise
        has_memory = self._memory is not None and memory_bytes is not None
        return Group(
            directories=(directory,),
            procs=(directory / "cgroup.procs",),
            memory=directory if has_memory else None,
            cpu=directory if self._cpu is not None else None,
            version=2,
            cpu_managed=self._cpu is not None,
        )


def _write_memory(directory: Path, limit: int, *, version: int) -> None:
    """Version 1 refuses a limit of memory that is over that of memory and swap, whichever way it moves."""
    if version == 2:
        _write(directory / "memory.max", str(limit))
        return
    both = directory / "memory.memsw.limit_in_bytes"  # there only where the kernel accounts for swap
    with contextlib.suppress(OSError):
        _write(both, str(limit))
    _write(directory / "memory.limit_in_bytes", str(limit))
    with contextlib.suppress(OSError):
        _write(both, str(limit))


def _write_cpu(directory: Path, limit: int | None, request: int | None, *, version: int) -> None:
    """A new group has no limit, so that none need be written there."""
    if version == 2:
        _write(directory / "cpu.weight", str(cpu_weight(cpu_shares(request))))
        if limit is not None:
            _write(directory / "cpu.max", f"{cpu_quota_us(limit)} {PERIOD_US}")
        return
    _write(directory / "cpu.shares", str(cpu_shares(request)))
    if limit is not None:
        _write(directory / "cpu.cfs_period_us", str(PERIOD_US))
        _write(directory / "cpu.cfs_quota_us", str(cpu_quota_us(limit)))


def own_groups(process: Path) -> Mapping[str, str]:
    """Controller to path of this process's group, of /proc/self/cgroup; "" is version 2."""
    groups = {}
    for line in (process / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def controller_mounts(process: Path, root: Path) -> Mapping[str, Path]:
    """Controller to mount point beneath ``root``, of /proc/self/mountinfo; "" is version 2."""
    mounts = {}
    for line in (process / "mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4]))
        if not point.is_relative_to(root):
            continue
        if kind == "cgroup2":
            mounts[""] = point
        elif kind == "cgroup":
            for option in options.split(" ")[-1].split(","):
                mounts[option] = point
    return mounts


def _remove_orphans(parent: Path) -> None:
    """Empty groups of this user's supervisors that are gone. None is emptied: what runs in it is someone's."""
    for directory in parent.glob(f"{_PREFIX}*-*"):
        match = _OWNER.fullmatch(directory.name)
        if match is None or linux.start_time(int(match[1])) == int(match[2]) or not _is_abandoned(directory):
            continue
        for folder in _deepest_first(directory):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _is_abandoned(directory: Path) -> bool:
    """A pid of another namespace looks dead from here, but the lock on its group is the kernel's."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_uid == os.geteuid()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _deepest_first(directory: Path) -> list[Path]:
    return sorted((Path(path) for path, _, _ in os.walk(directory)), key=lambda path: -len(path.parts))


def remove_tree(directory: Path) -> None:
    """Remove a group and those beneath it, killing what still runs there; waits at most 2 s, never raises."""
    deadline = time.monotonic() + REMOVE_TIMEOUT_SECONDS
    if not directory.name.startswith(_PREFIX):
        return
    for folder in _deepest_first(directory):
        while True:
            for word in _read_words(folder / "cgroup.procs"):
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int(word), 9)
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _flat_keyed(path: Path) -> dict[str, int]:
    values = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            with contextlib.suppress(ValueError):
                values[name] = int(value)
    return values
