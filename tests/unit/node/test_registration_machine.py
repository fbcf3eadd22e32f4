from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest
import wasilet_node.machine
from wasilet_node.machine import ControlGroups, facts, find_address, is_advertisable, levels

pytestmark = pytest.mark.unit


def test_facts_are_those_of_this_machine(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
    assert 0 < found.cpu_millicores <= (psutil.cpu_count() or 0) * 1000
    assert found.disk_bytes > 0
    assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert found.kernel_version
    assert found.os_image


def test_levels_are_within_the_facts(tmp_path: Path) -> None:
    found = levels(tmp_path)
    assert 0 < found.memory_available_bytes <= facts(tmp_path).memory_bytes
    assert 0 < found.disk_available_bytes <= found.disk_bytes
    assert 0 < found.pids_free < found.pids


def test_the_nearest_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "unit.service"
    own = parent / "agent"
    own.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (own / "memory.max").write_text("max\n")
    (own / "cpu.max").write_text("max 100000\n")
    (parent / "memory.max").write_text("104857600\n")
    (parent / "memory.current").write_text("62914560\n")
    (parent / "memory.stat").write_text("anon 5\ninactive_file 10485760\n")
    (parent / "cpu.max").write_text("50000 100000\n")
    (parent / "pids.max").write_text("200\n")
    (parent / "pids.current").write_text("150\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/unit.service/agent\n")
    cgroups = ControlGroups(tmp_path, membership)

    assert facts(tmp_path, cgroups=cgroups).memory_bytes == 104857600
    assert facts(tmp_path, cgroups=cgroups).cpu_millicores == 500
    found = levels(tmp_path, cgroups=cgroups)
    assert found.memory_available_bytes == 104857600 - 62914560 + 10485760
    assert (found.pids, found.pids_free) == (200, 50)


def test_the_limits_of_cgroup_v1_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "memory" / "docker" / "x"
    memory.mkdir(parents=True)
    (memory / "memory.limit_in_bytes").write_text("104857600\n")
    (memory.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    cpu = tmp_path / "cpu,cpuacct" / "docker" / "x"
    cpu.mkdir(parents=True)
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n0::/\n")
    cgroups = ControlGroups(tmp_path, membership)
    found = facts(tmp_path, cgroups=cgroups)
    assert found.memory_bytes == 104857600
    assert found.cpu_millicores >= 1000


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.5", True),
        ("2001:db8::5", True),
        ("127.0.0.1", False),
        ("::1", False),
        ("169.254.3.4", False),
        ("fe80::1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("not-an-address", False),
    ],
)
def test_what_others_can_reach(address: str, *, expected: bool) -> None:
    assert is_advertisable(address) is expected


def test_an_address_is_always_found_and_is_one_of_this_machine() -> None:
    address = find_address("https://127.0.0.1:6443")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))


def test_the_address_that_reaches_the_api_server_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def route(host: str) -> str | None:
        asked.append(host)
        return {"api.example": "10.1.2.3", "192.0.2.1": "10.9.9.9"}.get(host)

    assert find_address("https://api.example:6443", route_to=route) == "10.1.2.3"
    assert find_address("https://127.0.0.1:6443", route_to=route) == "10.9.9.9"
    assert asked == ["api.example", "127.0.0.1", "192.0.2.1"]


def test_a_machine_without_a_network_advertises_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasilet_node.machine, "interface_addresses", lambda: iter(()))
    assert find_address("https://api.example:6443", route_to=lambda _: None) == "127.0.0.1"
