"""Evicting pods when the node runs short of memory or disk, or when they wrote more than they may.

:class:`Evictor` looks every ten seconds; at memory volumes whose size the kernel does not hold, twice a second. Unused
images go before any pod does. Whether the node runs short is the node status's business; here it is decided who goes,
one pod at a time, and only one whose end would help. The order is kubelet's: pods that use more than they asked for
first, then low priority, then by how much they exceed their request. A pod that uses nothing of what is short is never
evicted, since its end would free nothing. What a pod may write is in ``wasilet_node.pods.ephemeral_storage``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet_common import pod_fields
from wasilet_common.cri_log import layout
from wasilet_common.pod_fields import Pod

from wasilet_node.pods import ephemeral_storage, resources
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.nodeinfo import Pressure
from wasilet_node.pods.status import Verdict
from wasilet_node.pods.worker import PodWorker
from wasilet_node.volumes.removal import Usage as TreeUsage
from wasilet_node.volumes.removal import usage as tree_usage

logger = logging.getLogger(__name__)

MINIMUM_BYTES = 1024 * 1024
MINIMUM_INODES = 1000
INODES = "inodes"
_SYSTEM_CRITICAL_PRIORITY = 2_000_000_000
_UNITS = (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10))


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the containers of a pod use of the resource that is short: bytes, or inodes."""

    pod: Pod
    by_container: Mapping[str, int]
    elsewhere: int = 0
    """Not any container's own: volumes on the node's disk, and what instances before the last one left."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_container.values()) + self.elsewhere


def is_critical(pod: Pod) -> bool:
    """kubelet's ``IsCriticalPod``: such a pod is never evicted, whatever it does."""
    return int(pod["spec"].get("priority") or 0) >= _SYSTEM_CRITICAL_PRIORITY


def rank(usages: Iterable[Usage], resource: str) -> list[Usage]:
    """Who goes first stands first; pods that must not or need not go are left out."""

    def requested(usage: Usage) -> int:
        if resource == INODES:
            return 0  # no one can ask for any
        asked = resources.pod_requests(usage.pod)
        return asked.memory if resource == "memory" else asked.ephemeral_storage

    def order(usage: Usage) -> tuple[bool, int, int]:
        over = usage.total - requested(usage)
        return (over <= 0, int(usage.pod["spec"].get("priority") or 0), -over)

    minimum = MINIMUM_INODES if resource == INODES else MINIMUM_BYTES
    candidates = [usage for usage in usages if usage.total >= minimum and not is_critical(usage.pod)]
    return sorted(candidates, key=order)


def verdict(usage: Usage, pressure: Pressure) -> Verdict:
    """kubelet's wording for an eviction."""
    quantity = str if pressure.resource == INODES else _quantity
    message = (
        f"The node was low on resource: {pressure.resource}. "
        f"Threshold quantity: {quantity(pressure.threshold_bytes)}, available: {quantity(pressure.available_bytes)}. "
    )
    for name, used in usage.by_container.items() if pressure.resource != INODES else ():
        found = pod_fields.find_container(usage.pod, name)
        asked = resources.request(found[1], pressure.resource) if found else None
        if used > (asked or 0):
            message += (
                f"Container {name} was using {_quantity(used)}, request is {_quantity(asked or 0)}, "
                f"has larger consumption of {pressure.resource}. "
            )
    return Verdict(reason="Evicted", message=message, disruption="TerminationByKubelet")


def _quantity(number: int) -> str:
    for suffix, unit in _UNITS:
        if number and number % unit == 0:
            return f"{number // unit}{suffix}"
    return f"{-(-number // 1024)}Ki" if number >= 1024 else str(number)


class Evictor:
    """One per node. ``round`` looks once."""

    def __init__(self, dependencies: PodDependencies) -> None:
        self._dependencies = dependencies

    async def round(self, workers: Mapping[str, PodWorker]) -> None:
        """Evict what has to go; raises RuntimeUnavailableError and OSError when that cannot be found out."""
        active = {uid: worker for uid, worker in workers.items() if worker.holds_resources and worker.verdict is None}
        await self._check_storage_limits(active)
        pressures = self._dependencies.node().pressures
        # One pod at a time: whether it helped shows once it has ended, in the next round.
        leaving = any(worker.verdict is not None and worker.holds_resources for worker in workers.values())
        if pressures and not leaving:
            await self._relieve(pressures[0], active)

    async def memory_round(self, workers: Mapping[str, PodWorker]) -> None:
        """Evict those that wrote more into memory than they may; for every half second, since memory is filled fast."""
        volumes = self._dependencies.volumes
        for uid in volumes.loose_pods():
            worker = workers.get(uid)
            if worker is None or not worker.holds_resources or worker.verdict is not None or is_critical(worker.pod):
                continue
            sizes = {name: int(usage.bytes) for name, usage in (await volumes.loose_usage(worker.pod)).items()}
            if not sizes:
                continue
            verdict = ephemeral_storage.exceeded(worker.pod, ephemeral_storage.StorageUsage(volumes=sizes))
            if verdict is not None:
                self._evict(worker, verdict)

    async def _relieve(self, pressure: Pressure, active: Mapping[str, PodWorker]) -> None:
        if pressure.resource != "memory":
            freed = await self._dependencies.images.delete_unused()
            if freed > 0:
                logger.warning("the disk is nearly full: %d bytes of unused images were removed", freed)
                return
        usages = await self._usages(active, pressure.resource)
        ranked = rank(usages, pressure.resource)
        if ranked:
            self._evict(active[pod_fields.uid(ranked[0].pod)], verdict(ranked[0], pressure))

    def _evict(self, worker: PodWorker, verdict: Verdict) -> None:
        logger.warning("evicting %s: %s", pod_fields.format_pod(worker.pod), verdict.message)
        self._dependencies.events.event(worker.pod, "Warning", verdict.reason, verdict.message)
        worker.end(verdict, grace_seconds=0)

    async def _check_storage_limits(self, active: Mapping[str, PodWorker]) -> None:
        for worker in active.values():
            if is_critical(worker.pod) or not ephemeral_storage.is_limited(worker.pod):
                continue
            verdict = ephemeral_storage.exceeded(worker.pod, await self._storage(worker))
            if verdict is not None:
                self._evict(worker, verdict)

    async def _storage(self, worker: PodWorker) -> ephemeral_storage.StorageUsage:
        volumes = self._dependencies.volumes
        logs = layout.folder_of_pod(self._dependencies.paths.logs, worker.pod)
        folders = {
            name: (logs / name, volumes.instance_folder(worker.pod, name, instance.attempt))
            for name, instance in worker.latest().items()
        }
        sizes = {name: int(usage.bytes) for name, usage in (await volumes.usage(worker.pod)).items()}
        containers = await asyncio.to_thread(lambda: {name: _bytes(found) for name, found in folders.items()})
        return ephemeral_storage.StorageUsage(containers=containers, volumes=sizes)

    async def _usages(self, active: Mapping[str, PodWorker], resource: str) -> list[Usage]:
        if resource != "memory":
            measure = self._inode_usage if resource == INODES else self._disk_usage
            return [await measure(uid, worker) for uid, worker in active.items()]
        owners = {i.id: (uid, name) for uid, worker in active.items() for name, i in worker.latest().items()}
        used: dict[str, dict[str, int]] = {}
        for usage in await self._dependencies.runtime.usage():
            if usage.id in owners:
                uid, name = owners[usage.id]
                used.setdefault(uid, {})[name] = usage.memory_bytes
        return [Usage(pod=worker.pod, by_container=used.get(uid, {})) for uid, worker in active.items()]

    async def _inode_usage(self, uid: str, worker: PodWorker) -> Usage:
        """Files and folders that the pod made, by whichever of its containers."""
        paths = self._dependencies.paths
        everything = [paths.pods / uid, layout.folder_of_pod(paths.logs, worker.pod)]
        return Usage(pod=worker.pod, by_container={}, elsewhere=await asyncio.to_thread(_inodes, everything))

    async def _disk_usage(self, uid: str, worker: PodWorker) -> Usage:
        paths = self._dependencies.paths
        own = (await self._storage(worker)).containers
        everything = [paths.pods / uid, layout.folder_of_pod(paths.logs, worker.pod)]
        total = await asyncio.to_thread(_bytes, everything)
        return Usage(pod=worker.pod, by_container=own, elsewhere=max(total - sum(own.values()), 0))


def _bytes(folders: Iterable[Path]) -> int:
    """On disk, of trees that guests may have made. Blocks."""
    return sum(usage.bytes for usage in _measured(folders))


def _inodes(folders: Iterable[Path]) -> int:
    """As :func:`_bytes`. Blocks."""
    return sum(usage.inodes for usage in _measured(folders))


def _measured(folders: Iterable[Path]) -> Iterator[TreeUsage]:
    for folder in folders:
        try:
            yield tree_usage(folder)
        except OSError:
            continue  # not made yet, or just removed
