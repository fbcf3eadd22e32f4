"""What the machine is and how full it is: pure reads of /proc, /sys and the data folder's file system.

The agent may itself live in a container or a systemd unit with limits, and so will its pods; so the capacity is the
machine's or the limit of the nearest control group that has one, whichever is less.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_UNLIMITED_V1 = 1 << 62
"""cgroup v1 writes a number near 2^63 for "no limit"."""

_TEST_NETWORK_V4 = "192.0.2.1"
"""RFC 5737: never routed to a real host, and connecting a UDP socket sends nothing; it only asks the routing table."""

_TEST_NETWORK_V6 = "2001:db8::1"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What does not change while the agent lives (the disk may be resized)."""

    cpu_millicores: int
    memory_bytes: int
    disk_bytes: int
    """The size of the file system that holds the data folder."""

    boot_id: str
    machine_id: str
    system_uuid: str
    kernel_version: str
    os_image: str


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What is left now."""

    memory_available_bytes: int
    disk_bytes: int
    disk_available_bytes: int
    inodes: int
    """0: the file system does not count them (btrfs)."""

    inodes_free: int
    pids: int
    pids_free: int


@dataclass(frozen=True)
class ControlGroups:
    """Where the kernel shows them."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def folders(self, controller: str) -> Iterator[Path]:
        """The control group of this process and its parents, in the hierarchy that has the controller."""
        for line in _text(self.membership).splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" and not controllers:
                root = self.root if (self.root / "cgroup.controllers").exists() else self.root / "unified"
            elif controller in controllers.split(","):
                root = self.root / controllers
            else:
                continue
            folder = root / path.lstrip("/")
            while folder.is_relative_to(root):
                # Inside a container the path may be that of the host and not exist; its parents then do.
                if folder.is_dir():
                    yield folder
                folder = folder.parent


def facts(data: Path, *, cgroups: ControlGroups = ControlGroups()) -> Facts:
    """Read once at start; ``data`` must exist."""
    disk = os.statvfs(data)
    machine_id = _text(Path("/etc/machine-id")) or _text(Path("/var/lib/dbus/machine-id"))
    return Facts(
        cpu_millicores=_cpu_millicores(cgroups),
        memory_bytes=_memory_total(cgroups),
        disk_bytes=disk.f_blocks * disk.f_frsize,
        boot_id=_text(Path("/proc/sys/kernel/random/boot_id")),
        machine_id=machine_id,
        # The firmware's number is for root only; kubelet falls back to the machine id too.
        system_uuid=_text(Path("/sys/class/dmi/id/product_uuid")) or machine_id,
        kernel_version=platform.release(),
        os_image=_os_image(),
    )


def levels(data: Path, *, cgroups: ControlGroups = ControlGroups()) -> Levels:
    """Read now; ``data`` must exist."""
    disk = os.statvfs(data)
    pids, pids_free = _pids(cgroups)
    return Levels(
        memory_available_bytes=_memory_available(cgroups),
        disk_bytes=disk.f_blocks * disk.f_frsize,
        disk_available_bytes=disk.f_bavail * disk.f_frsize,
        inodes=disk.f_files,
        inodes_free=disk.f_favail,
        pids=pids,
        pids_free=pids_free,
    )


def route_to(host: str) -> str | None:
    """The address of this machine from which packets to a host leave; None: there is no way, or no such host."""
    if not host:
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            found = str(probe.getsockname()[0])
    except OSError:
        return None
    return found.partition("%")[0]


def find_address(server: str, *, route_to: Callable[[str], str | None] = route_to) -> str:
    """The address under which the rest of the cluster reaches this machine; ``server``: the API server's URL.

    The one from which the API server is reached, unless that is loopback; else the one of the default route; else the
    first address of an interface; else loopback, which the API server's node proxy refuses.
    """
    host = urlsplit(server).hostname or ""
    for target in (host, _TEST_NETWORK_V4, _TEST_NETWORK_V6):
        address = route_to(target)
        if address is not None and is_advertisable(address):
            return address
    return next(interface_addresses(), "127.0.0.1")


def is_advertisable(address: str) -> bool:
    """Whether others can reach it: not loopback, link-local, multicast or unspecified."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_multicast or parsed.is_unspecified)


def interface_addresses() -> Iterator[str]:
    """Of all interfaces that are up, IPv4 first; not loopback or link-local ones."""
    import psutil

    try:
        up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
        interfaces = psutil.net_if_addrs()
    except OSError:
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in sorted(interfaces.items()):
            for entry in addresses:
                address = entry.address.partition("%")[0]
                if name in up and entry.family == family and is_advertisable(address):
                    yield address


def _cpu_millicores(cgroups: ControlGroups) -> int:
    millicores = len(os.sched_getaffinity(0)) * 1000
    for folder in cgroups.folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota = _text(folder / "cpu.cfs_quota_us")
            period = _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            millicores = min(millicores, max(1, int(quota) * 1000 // int(period)))
    return millicores


def _memory_total(cgroups: ControlGroups) -> int:
    total = _meminfo()["MemTotal"]
    for folder in cgroups.folders("memory"):
        limit = _memory_limit(folder)
        if limit is not None:
            total = min(total, limit)
    return total


def _memory_available(cgroups: ControlGroups) -> int:
    """As kubelet's memory.available: what could be had without swapping, page cache counted as free."""
    available = _meminfo()["MemAvailable"]
    for folder in cgroups.folders("memory"):
        limit = _memory_limit(folder)
        if limit is None:
            continue
        usage = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
        inactive = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
        available = min(available, max(0, limit - usage + int(inactive)))
    return available


def _memory_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = _number(folder / name)
        if limit is not None and limit < _UNLIMITED_V1:
            return limit
    return None


def _pids(cgroups: ControlGroups) -> tuple[int, int]:
    limits = [_number(Path("/proc/sys/kernel/pid_max")), _number(Path("/proc/sys/kernel/threads-max"))]
    total = min((limit for limit in limits if limit), default=32768)
    running = int(_text(Path("/proc/loadavg")).split()[3].partition("/")[2])
    free = max(0, total - running)
    for folder in cgroups.folders("pids"):
        limit = _number(folder / "pids.max")
        current = _number(folder / "pids.current")
        if limit is not None and current is not None and limit - current < free:
            total, free = limit, max(0, limit - current)
    return total, free


def _meminfo() -> dict[str, int]:
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values


def _os_image() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
