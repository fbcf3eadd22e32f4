"""Resource usage of the node, its pods and their containers, and ``GET /stats/summary``.

One reading of the runtime serves everyone who asks within a moment. Usage per second (``usageNanoCores``) is the
difference between two readings at least five seconds apart; before there are two, the average since the start. What
this node cannot know is left out rather than given as zero: there is no pod network, and no writable image layer.
Source of the shapes: k8s.io/kubelet/pkg/apis/stats/v1alpha1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from wasilet_common import pod_fields
from wasilet_common.cri_log.layout import pod_folder
from wasilet_common.time_format import rfc3339

from wasilet_node import machine
from wasilet_node.runtime import linux
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, HttpCounters, Runtime
from wasilet_node.server.pods import PodSource
from wasilet_node.settings import NodeSettings

SNAPSHOT_SECONDS = 0.2
"""Short enough that a client that saw a pod become Ready finds it; scrapes are seconds apart."""

RATE_SECONDS = 5.0
IMAGE_SIZE_SECONDS = 60.0
_BILLION = 1_000_000_000
_CPU_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq, steal of /proc/stat: not idle, iowait, nor guest (which user counts already)."""


@dataclass(frozen=True, kw_only=True)
class ContainerSample:
    """One running instance."""

    status: ContainerStatus
    cpu_nanoseconds: int
    cpu_nanocores: int
    working_set_bytes: int
    rss_bytes: int
    taken_at_ns: int
    http: HttpCounters | None = None
    """Of one that serves HTTP."""


@dataclass(frozen=True, kw_only=True)
class PodSample:
    """The running instances of a pod."""

    namespace: str
    name: str
    uid: str
    start_time: str
    containers: tuple[ContainerSample, ...]


@dataclass(frozen=True, kw_only=True)
class NodeSample:
    """The machine."""

    cpu_nanoseconds: int
    cpu_nanocores: int
    working_set_bytes: int
    available_bytes: int
    rss_bytes: int
    swap_used_bytes: int
    swap_free_bytes: int
    page_faults: int
    major_page_faults: int
    taken_at_ns: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All of it at one moment."""

    node: NodeSample
    pods: tuple[PodSample, ...]


class UsageReader:
    """Reads usage from the runtime and /proc; shared by summary and metrics."""

    def __init__(
        self,
        *,
        pods: PodSource,
        runtime: Runtime,
        data: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pods = pods
        self._runtime = runtime
        self._data = data
        self._clock = clock
        self._lock = asyncio.Lock()
        self._latest: tuple[float, Snapshot] | None = None
        self._rates: dict[str, _Rate] = {}
        self._memory_bytes: int | None = None

    async def snapshot(self) -> Snapshot:
        """At most ``SNAPSHOT_SECONDS`` old. Raises RuntimeUnavailableError."""
        async with self._lock:
            if self._latest is not None and self._clock() - self._latest[0] < SNAPSHOT_SECONDS:
                return self._latest[1]
            usages = {usage.id: usage for usage in await self._runtime.usage()}
            statuses = [each for each in await self._runtime.list() if each.state is ContainerState.RUNNING]
            self._rates = {key: rate for key, rate in self._rates.items() if key in usages or key == ""}
            by_uid: dict[str, list[ContainerSample]] = {}
            for status in statuses:
                usage = usages.get(status.id)
                if usage is None:
                    continue
                rss = linux.resident_bytes(status.pid) if status.pid is not None else 0
                by_uid.setdefault(status.pod_uid, []).append(
                    ContainerSample(
                        status=status,
                        # metrics-server drops a whole pod when one value is 0, which no live process truly has
                        cpu_nanoseconds=max(usage.cpu_nanoseconds, 1),
                        cpu_nanocores=self._rate(
                            status.id, usage.cpu_nanoseconds, usage.timestamp_ns, status.started_at_ns
                        ),
                        working_set_bytes=max(usage.memory_bytes or rss, 1),
                        rss_bytes=rss,
                        taken_at_ns=usage.timestamp_ns,
                        http=usage.http,
                    )
                )
            start_times = {pod_fields.uid(pod): pod.get("status", {}).get("startTime", "") for pod in self._pods.pods()}
            pods = tuple(
                PodSample(
                    namespace=group[0].status.pod_namespace,
                    name=group[0].status.pod_name,
                    uid=uid,
                    start_time=start_times.get(uid) or rfc3339(min(each.status.started_at_ns for each in group)),
                    containers=tuple(group),
                )
                for uid, group in by_uid.items()
            )
            snapshot = Snapshot(node=self._node(), pods=pods)
            self._latest = (self._clock(), snapshot)
            return snapshot

    def _node(self) -> NodeSample:
        now_ns = time.time_ns()
        memory = _keyed(Path("/proc/meminfo"))
        faults = _keyed(Path("/proc/vmstat"))
        cpu, boot_ns = _node_cpu()
        available = machine.levels(self._data).memory_available_bytes
        if self._memory_bytes is None:
            self._memory_bytes = machine.facts(self._data).memory_bytes
        swap_free = memory.get("SwapFree", 0) * 1024
        return NodeSample(
            cpu_nanoseconds=cpu,
            cpu_nanocores=self._rate("", cpu, now_ns, boot_ns),
            working_set_bytes=max(self._memory_bytes - available, 1),
            available_bytes=available,
            rss_bytes=memory.get("AnonPages", 0) * 1024,
            swap_used_bytes=memory.get("SwapTotal", 0) * 1024 - swap_free,
            swap_free_bytes=swap_free,
            page_faults=faults.get("pgfault", 0),
            major_page_faults=faults.get("pgmajfault", 0),
            taken_at_ns=now_ns,
        )

    def _rate(self, key: str, cpu_ns: int, now_ns: int, started_ns: int) -> int:
        rate = self._rates.get(key)
        if rate is None:
            elapsed = max(now_ns - started_ns, 1)
            rate = self._rates[key] = _Rate(
                since_ns=now_ns, cpu_ns=cpu_ns, nanocores=cpu_ns * _BILLION // elapsed if started_ns else 0
            )
        elif now_ns - rate.since_ns >= RATE_SECONDS * _BILLION:
            used = max(cpu_ns - rate.cpu_ns, 0)
            rate.nanocores = used * _BILLION // (now_ns - rate.since_ns)
            rate.since_ns, rate.cpu_ns = now_ns, cpu_ns
        return rate.nanocores


@dataclass(kw_only=True)
class _Rate:
    since_ns: int
    cpu_ns: int
    nanocores: int


class SummaryView:
    """The handler of ``/stats/summary``."""

    def __init__(self, *, settings: NodeSettings, usage: UsageReader, log_root: Path) -> None:
        self._node_name = settings.node_name
        self._paths = settings.paths
        self._usage = usage
        self._log_root = log_root
        self._image_bytes: tuple[float, int] | None = None
        self._started = rfc3339(_boot_ns())

    async def summary(self, request: web.Request) -> web.Response:
        """``GET /stats/summary``; ``only_cpu_and_memory=true`` leaves out what must be read from disks."""
        snapshot = await self._usage.snapshot()
        brief = request.query.get("only_cpu_and_memory", "").lower() in {"true", "1", "t"}
        disk = None if brief else await self._disk()
        pods = [self._pod(pod, disk) for pod in snapshot.pods]
        node = self._node(snapshot)
        if disk is not None:
            node["fs"] = disk
            node["runtime"] = {"imageFs": {**disk, "usedBytes": await self._images()}, "containerFs": disk}
            levels = await asyncio.to_thread(machine.levels, self._paths.data)
            node["rlimit"] = {
                "time": rfc3339(snapshot.node.taken_at_ns),
                "maxpid": levels.pids,
                "curproc": levels.pids - levels.pids_free,
            }
        return web.json_response({"node": node, "pods": pods})

    def _node(self, snapshot: Snapshot) -> dict[str, Any]:
        sample = snapshot.node
        moment = rfc3339(sample.taken_at_ns)
        samples = [container for pod in snapshot.pods for container in pod.containers]
        agent = os.times()
        agent_ns = int((agent.user + agent.system) * _BILLION)
        return {
            "nodeName": self._node_name,
            "startTime": self._started,
            "cpu": _cpu(moment, sample.cpu_nanocores, sample.cpu_nanoseconds),
            "memory": {
                "time": moment,
                "availableBytes": sample.available_bytes,
                "usageBytes": sample.working_set_bytes,
                "workingSetBytes": sample.working_set_bytes,
                "rssBytes": sample.rss_bytes,
                "pageFaults": sample.page_faults,
                "majorPageFaults": sample.major_page_faults,
            },
            "swap": {
                "time": moment,
                "swapAvailableBytes": sample.swap_free_bytes,
                "swapUsageBytes": sample.swap_used_bytes,
            },
            "systemContainers": [
                {
                    "name": "kubelet",
                    "startTime": self._started,
                    "cpu": {"time": moment, "usageCoreNanoSeconds": agent_ns},
                    "memory": _memory(moment, linux.resident_bytes(os.getpid())),
                },
                {
                    "name": "pods",
                    "startTime": self._started,
                    "cpu": _cpu(
                        moment,
                        sum(each.cpu_nanocores for each in samples),
                        sum(each.cpu_nanoseconds for each in samples),
                    ),
                    "memory": _memory(moment, sum(each.working_set_bytes for each in samples)),
                },
            ],
        }

    def _pod(self, pod: PodSample, disk: dict[str, Any] | None) -> dict[str, Any]:
        moment = rfc3339(max(each.taken_at_ns for each in pod.containers))
        return {
            "podRef": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
            "startTime": pod.start_time,
            "containers": [self._container(pod, each, disk) for each in pod.containers],
            "cpu": _cpu(
                moment,
                sum(each.cpu_nanocores for each in pod.containers),
                sum(each.cpu_nanoseconds for each in pod.containers),
            ),
            "memory": _memory(
                moment,
                sum(each.working_set_bytes for each in pod.containers),
                sum(each.rss_bytes for each in pod.containers),
            ),
            "process_stats": {"process_count": len(pod.containers)},
        }

    def _container(self, pod: PodSample, sample: ContainerSample, disk: dict[str, Any] | None) -> dict[str, Any]:
        moment = rfc3339(sample.taken_at_ns)
        name = sample.status.container_name
        entry: dict[str, Any] = {
            "name": name,
            "startTime": rfc3339(sample.status.started_at_ns),
            "cpu": _cpu(moment, sample.cpu_nanocores, sample.cpu_nanoseconds),
            "memory": _memory(moment, sample.working_set_bytes, sample.rss_bytes),
        }
        if disk is not None:
            folder = pod_folder(self._log_root, namespace=pod.namespace, name=pod.name, uid=pod.uid) / name
            entry["rootfs"] = {**disk, "usedBytes": 0}
            entry["logs"] = {**disk, "usedBytes": sum(_file_sizes(folder))}
        return entry

    async def _disk(self) -> dict[str, Any]:
        disk = await asyncio.to_thread(os.statvfs, self._paths.data)
        stats: dict[str, Any] = {
            "time": rfc3339(time.time_ns()),
            "availableBytes": disk.f_bavail * disk.f_frsize,
            "capacityBytes": disk.f_blocks * disk.f_frsize,
            "usedBytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        }
        if disk.f_files:
            stats |= {
                "inodesFree": disk.f_favail,
                "inodes": disk.f_files,
                "inodesUsed": disk.f_files - disk.f_ffree,
            }
        return stats

    async def _images(self) -> int:
        now = time.monotonic()
        if self._image_bytes is None or now - self._image_bytes[0] > IMAGE_SIZE_SECONDS:
            size = await asyncio.to_thread(lambda: sum(_tree_sizes(self._paths.images)))
            self._image_bytes = (now, size)
        return self._image_bytes[1]


def _cpu(moment: str, nanocores: int, nanoseconds: int) -> dict[str, Any]:
    return {"time": moment, "usageNanoCores": nanocores, "usageCoreNanoSeconds": nanoseconds}


def _memory(moment: str, working_set: int, rss: int | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"time": moment, "usageBytes": working_set, "workingSetBytes": working_set}
    return entry if rss is None else {**entry, "rssBytes": rss}


def _node_cpu() -> tuple[int, int]:
    """(nanoseconds of all cores since boot, boot time in nanoseconds since the epoch)."""
    total, boot = 0, 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[0] == "cpu":
            ticks = sum(int(fields[1 + index]) for index in _CPU_FIELDS)
            total = ticks * (_BILLION // os.sysconf("SC_CLK_TCK"))
        elif fields[0] == "btime":
            boot = int(fields[1]) * _BILLION
    return total, boot


def _boot_ns() -> int:
    return _node_cpu()[1]


def _keyed(path: Path) -> dict[str, int]:
    """``key[:] number ...`` lines, as in /proc/meminfo and /proc/vmstat."""
    values = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            key, _, rest = line.partition(" ")
            with contextlib.suppress(ValueError, IndexError):
                values[key.rstrip(":")] = int(rest.split()[0])
    return values


def _file_sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield entry.stat(follow_symlinks=False).st_size


def _tree_sizes(root: Path) -> Iterator[int]:
    for folder, _, _ in os.walk(root):
        yield from _file_sizes(Path(folder))
