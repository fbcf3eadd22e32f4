"""Control groups, on made-up trees: the kernel's files are plain files here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from wasilet_node.runtime import linux, systemd_scope
from wasilet_node.runtime.cgroups import CgroupManager, Group, cpu_quota_us, cpu_shares, cpu_weight

pytestmark = pytest.mark.unit


class Tree:
    """A fake /sys/fs/cgroup and /proc/self."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.process = folder / "proc" / "self"
        self.root.mkdir(parents=True)
        self.process.mkdir(parents=True)

    def v1(self, *, own: str = "/service", controllers: tuple[str, ...] = ("memory", "cpu,cpuacct")) -> None:
        """A version 1 tree."""
        groups, mounts = [], []
        for number, names in enumerate(controllers):
            (self.root / names / own.lstrip("/")).mkdir(parents=True)
            groups.append(f"{number}:{names}:{own}")
            mounts.append(f"3{number} 1 0:2{number} / {self.root / names} rw - cgroup cgroup rw,{names}")
        self._write(groups, mounts)

    def v2(self, *, own: str, controllers: str = "cpu memory pids") -> Path:
        """A version 2 tree; the group of this process."""
        folder = self.root / own.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("cgroup.controllers", controllers), ("cgroup.procs", ""), ("cgroup.subtree_control", "")):
            (folder / name).write_text(text)
        self._write([f"0::{own}"], [f"30 1 0:20 / {self.root} rw - cgroup2 cgroup2 rw,nsdelegate"])
        return folder

    def manager(self) -> CgroupManager:
        """A manager on this tree."""
        return CgroupManager("1-2", root=self.root, process=self.process)

    def _write(self, groups: list[str], mounts: list[str]) -> None:
        (self.process / "cgroup").write_text("\n".join(groups) + "\n")
        (self.process / "mountinfo").write_text("\n".join(mounts) + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def prepare(folder: Path, *names: str) -> None:
    """Make the files that the kernel would have made in a new group."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_shares_and_quotas_are_kubelets() -> None:
    assert [cpu_shares(request) for request in (None, 0, 1, 100, 1000)] == [2, 2, 2, 102, 1024]
    assert [cpu_quota_us(limit) for limit in (1, 10, 100, 1500)] == [1000, 1000, 10000, 150000]
    assert [cpu_weight(shares) for shares in (2, 1024, 262144)] == [1, 39, 10000]


def test_without_any_tree_nothing_is_enforced(tree: Tree) -> None:
    manager = tree.manager()
    assert not manager.memory
    assert not manager.cpu
    assert manager.make("a", memory_bytes=1, cpu_limit=1, cpu_request=1) is None


def test_version_1_limits_lie_beneath_our_own_group(tree: Tree) -> None:
    tree.v1()
    cpu = tree.root / "cpu,cpuacct" / "service" / "wasilet-1-2"
    memory = tree.root / "memory" / "service" / "wasilet-1-2"
    prepare(cpu, "cpu.shares")
    manager = tree.manager()
    assert manager.memory
    assert manager.cpu
    assert int((cpu / "cpu.shares").read_text()) == 1024 * (os.cpu_count() or 1)
    assert manager.directories == tuple(sorted((str(cpu), str(memory))))
    prepare(memory, "x")
    prepare(memory / "a", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    prepare(cpu / "a", "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us")
    group = manager.make("a", memory_bytes=1 << 20, cpu_limit=500, cpu_request=250)
    assert group is not None
    assert (memory / "a" / "memory.limit_in_bytes").read_text() == "1048576"
    assert (cpu / "a" / "cpu.cfs_quota_us").read_text() == "50000"
    assert (cpu / "a" / "cpu.shares").read_text() == "256"
    assert group.procs == (memory / "a" / "cgroup.procs", cpu / "a" / "cgroup.procs")
    assert group.cpu_managed


def test_version_1_limits_move_and_a_cpu_limit_may_be_added(tree: Tree) -> None:
    tree.v1()
    cpu = tree.root / "cpu,cpuacct" / "service" / "wasilet-1-2"
    memory = tree.root / "memory" / "service" / "wasilet-1-2"
    prepare(cpu, "cpu.shares")
    manager = tree.manager()
    prepare(memory, "x")
    prepare(memory / "a", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    prepare(cpu / "a", "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cgroup.procs")
    group = manager.make("a", memory_bytes=1 << 20, cpu_limit=None, cpu_request=None)
    assert group is not None
    assert group.cpu is None
    changed = manager.change("a", group, pid=77, memory_bytes=2 << 20, cpu_limit=500, cpu_request=250)
    assert changed is group
    assert (memory / "a" / "memory.limit_in_bytes").read_text() == str(2 << 20)
    assert (memory / "a" / "memory.memsw.limit_in_bytes").read_text() == str(2 << 20)
    assert (cpu / "a" / "cgroup.procs").read_text() == "77"
    assert group.procs == (memory / "a" / "cgroup.procs", cpu / "a" / "cgroup.procs")
    manager.change("a", group, pid=77, memory_bytes=2 << 20, cpu_limit=100, cpu_request=1000)
    assert (cpu / "a" / "cpu.cfs_quota_us").read_text().startswith("10000")
    assert (cpu / "a" / "cpu.shares").read_text().startswith("1024")


def test_without_groups_a_change_of_requests_changes_nothing(tree: Tree) -> None:
    assert tree.manager().change("a", None, pid=1, memory_bytes=None, cpu_limit=None, cpu_request=100) is None


def test_a_container_that_asks_for_nothing_gets_no_group(tree: Tree) -> None:
    tree.v1()
    prepare(tree.root / "cpu,cpuacct" / "service" / "wasilet-1-2", "cpu.shares")
    assert tree.manager().make("a", memory_bytes=None, cpu_limit=None, cpu_request=0) is None


def test_a_group_that_cannot_be_limited_is_not_left_behind(tree: Tree) -> None:
    tree.v1(controllers=("memory",))
    manager = tree.manager()
    with pytest.raises(OSError, match="limit_in_bytes"):
        manager.make("a", memory_bytes=1, cpu_limit=None, cpu_request=None)
    assert not (tree.root / "memory" / "service" / "wasilet-1-2" / "a").exists()


def test_oom_kills_are_counted_once(tmp_path: Path) -> None:
    group = Group(directories=(tmp_path,), procs=(), memory=tmp_path)
    control = tmp_path / "memory.oom_control"
    assert not group.new_oom_kill()
    control.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert group.new_oom_kill()
    assert not group.new_oom_kill()


@pytest.mark.parametrize(
    ("version", "usage", "key"),
    [(1, "memory.usage_in_bytes", "total_inactive_file"), (2, "memory.current", "inactive_file")],
)
def test_the_working_set_leaves_out_idle_file_cache(tmp_path: Path, version: int, usage: str, key: str) -> None:
    (tmp_path / usage).write_text("1000\n")
    (tmp_path / "memory.stat").write_text(f"cache 5\n{key} 300\n")
    group = Group(directories=(), procs=(), memory=tmp_path, version=version)
    assert group.working_set_bytes() == 700


@pytest.mark.parametrize("own", ["/system.slice/wasilet-supervisor-0123456789abcdef.scope", "/somebodys/own/group"])
def test_version_2_vacates_a_delegated_group_and_limits_beneath_it(tree: Tree, own: str) -> None:
    base = tree.v2(own=own)
    (base / "cgroup.procs").write_text(f"{os.getpid()}\n")
    (tree.process.parent / str(os.getpid())).mkdir()
    prepare(base / "wasilet-agent", "cgroup.procs")
    ours = base / "wasilet-1-2"
    prepare(ours, "cgroup.subtree_control", "cpu.weight")
    (ours / "cgroup.controllers").write_text("cpu memory")
    prepare(ours / "a", "memory.max", "cpu.max", "cpu.weight")
    manager = tree.manager()
    assert manager.memory
    assert manager.cpu
    assert (base / "wasilet-agent" / "cgroup.procs").read_text() == str(os.getpid())
    group = manager.make("a", memory_bytes=4096, cpu_limit=1500, cpu_request=1000)
    assert group is not None
    assert (ours / "a" / "memory.max").read_text() == "4096"
    assert (ours / "a" / "cpu.max").read_text() == "150000 100000"
    assert (ours / "a" / "cpu.weight").read_text() == "39"


def test_version_2_finds_the_group_that_an_earlier_supervisor_vacated(tree: Tree) -> None:
    base = tree.v2(own="/wasilet.service")
    tree.v2(own="/wasilet.service/wasilet-agent")
    ours = base / "wasilet-1-2"
    prepare(ours, "cgroup.subtree_control", "cpu.weight")
    (ours / "cgroup.controllers").write_text("cpu memory")
    assert tree.manager().directories == (str(ours),)


@pytest.mark.parametrize(
    "own", ["/user.slice/session-3.scope", "/a.slice/vte-1.scope", "/system.slice/wasilet.service"]
)
def test_version_2_leaves_login_sessions_and_services_alone(tree: Tree, own: str) -> None:
    """A service whose group has controllers beneath it cannot be restarted while they are in use."""
    base = tree.v2(own=own)
    (base / "cgroup.procs").write_text(f"{os.getpid()}\n")
    (tree.process.parent / str(os.getpid())).mkdir()
    manager = tree.manager()
    assert not manager.memory
    assert not (base / "wasilet-agent").exists()
    assert (base / "cgroup.subtree_control").read_text() == ""


def test_version_2_without_controllers_is_nothing(tree: Tree) -> None:
    base = tree.v2(own="/service", controllers="hugetlb")
    manager = tree.manager()
    assert not manager.memory
    assert not manager.cpu
    assert not (base / "wasilet-1-2").exists()


def test_groups_of_supervisors_that_are_gone_are_removed_and_no_others(tree: Tree) -> None:
    tree.v1(controllers=("memory",))
    parent = tree.root / "memory" / "service"
    alive = f"wasilet-{os.getpid()}-{linux.start_time(os.getpid())}"
    for name in ("wasilet-1-1/container", f"{alive}/container", "wasilet-agent", "wasilet-1-1x", "other-1-1"):
        (parent / name).mkdir(parents=True)
    tree.manager()
    assert {path.name for path in parent.iterdir()} == {
        alive,
        "wasilet-1-2",
        "wasilet-agent",
        "wasilet-1-1x",
        "other-1-1",
    }


def test_groups_left_in_the_groups_beside_ours_are_removed_too(tree: Tree) -> None:
    """The next supervisor may be started from another session or service."""
    tree.v1(controllers=("memory",), own="/sessions/b")
    other = tree.root / "memory" / "sessions" / "a"
    (other / "wasilet-1-1" / "container").mkdir(parents=True)
    (tree.root / "memory" / "wasilet-1-1").mkdir()
    tree.manager()
    assert list(other.iterdir()) == []
    assert (tree.root / "memory" / "wasilet-1-1").exists(), "what lies above is not looked at"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes folders of others")
def test_groups_of_others_and_groups_that_are_held_are_left_alone(tree: Tree) -> None:
    """A pid of another namespace looks dead from here."""
    tree.v1(controllers=("memory",))
    parent = tree.root / "memory" / "service"
    for name in ("wasilet-1-1", "wasilet-1-3"):
        (parent / name).mkdir()
    os.chown(parent / "wasilet-1-1", 12345, -1)
    held = os.open(parent / "wasilet-1-3", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        tree.manager()
        assert (parent / "wasilet-1-1").is_dir()
        assert (parent / "wasilet-1-3").is_dir()
    finally:
        os.close(held)
    CgroupManager("5-6", root=tree.root, process=tree.process)
    assert not (parent / "wasilet-1-3").exists()


def test_a_supervisor_holds_its_own_groups(tree: Tree) -> None:
    tree.v1(controllers=("memory",))
    first = tree.manager()
    second = CgroupManager("5-6", root=tree.root, process=tree.process)
    assert all(Path(group).is_dir() for group in (*first.directories, *second.directories))
    first.close()
    second.close()
    assert not any(Path(group).exists() for group in (*first.directories, *second.directories))


@pytest.mark.parametrize(
    ("own", "uid", "user"),
    [
        ("/system.slice/wasilet-node.service", 0, False),
        ("/system.slice/wasilet-node.service/wasilet-agent", 0, False),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/wasilet.service", 1000, True),
    ],
)
def test_a_service_starts_its_supervisor_in_a_scope(
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    uid: int,
    user: bool,  # noqa: FBT001
) -> None:
    tree.v2(own=own)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    prefix = systemd_scope.command_prefix(root=tree.root, process=tree.process, systemd_run="true")
    assert Path(prefix[0]).name == "true"
    assert prefix[-1] == "--"
    assert ("--user" in prefix) is user
    assert {"--scope", "--property=Delegate=yes", "--property=TasksMax=16384"} < set(prefix)
    assert f"--property=Before={next(part for part in reversed(Path(own).parts) if '.service' in part)}" in prefix


@pytest.mark.parametrize(
    ("own", "uid"),
    [
        ("/", 0),
        ("/user.slice/user-0.slice/session-3.scope", 0),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/vte-1.scope", 1000),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/wasilet.service", 0),
        ("/system.slice/wasilet-node.service", 1000),
    ],
)
def test_elsewhere_it_needs_none_or_can_have_none(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, own: str, uid: int
) -> None:
    tree.v2(own=own)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert systemd_scope.command_prefix(root=tree.root, process=tree.process, systemd_run="true") == ()


def test_version_1_and_machines_without_systemd_need_no_scope(tree: Tree, tmp_path: Path) -> None:
    tree.v2(own="/system.slice/wasilet-node.service")
    assert systemd_scope.command_prefix(root=tree.root, process=tree.process, systemd_run="no-such-program") == ()
    assert systemd_scope.command_prefix(root=tree.root, process=tmp_path / "nothing", systemd_run="true") == ()
    other = Tree(tmp_path / "v1")
    other.v1()
    assert systemd_scope.command_prefix(root=other.root, process=other.process, systemd_run="true") == ()
