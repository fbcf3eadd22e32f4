"""Looks every ten seconds whether a pod has to go: the node runs short of something, or a pod wrote more than it may;
at memory volumes whose size nobody else holds, twice a second.

Who goes is decided in ``wasilet_node.pods.eviction`` and ``wasilet_node.pods.ephemeral_storage``; unused images go
before any pod does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from wasilet_node.pods import ephemeral_storage, eviction, log_layout, spec
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.nodeinfo import Pressure
from wasilet_node.pods.spec import Pod
from wasilet_node.pods.status import Verdict
from wasilet_node.pods.worker import PodWorker
from wasilet_node.volumes.removal import Usage as TreeUsage
from wasilet_node.volumes.removal import usage as tree_usage

logger = logging.getLogger(__name__)


@runtime_checkable
class ImageReclaimer(Protocol):
    """``wasilet_node.images.manager.ImageManager``, as far as it can make room."""

    async def delete_unused(self) -> int:
        """Bytes freed."""


@runtime_checkable
class VolumeMeter(Protocol):
    """``wasilet_node.volumes.manager.VolumeManager``, as far as it measures."""

    async def usage(self, pod: Pod) -> Mapping[str, Any]:
        """By volume name, something with ``bytes``."""

    def instance_folder(self, pod: Pod, container: str, attempt: int) -> Path:
        """Where one instance's root file system lies."""


@runtime_checkable
class MemoryVolumeMeter(Protocol):
    """``wasilet_node.volumes.manager.VolumeManager``, as far as it measures what fills fast."""

    async def loose_usage(self, pod: Pod) -> Mapping[str, Any]:
        """Of the memory volumes with a size that the kernel does not hold: by name, something with ``bytes``."""


class Evictor:
    """One a node. ``round`` looks once."""

    def __init__(self, services: PodDependencies) -> None:
        self._services = services

    async def round(self, workers: Mapping[str, PodWorker]) -> None:
        """Evict what has to go; raises RuntimeUnavailableError and OSError when that cannot be told."""
        active = {uid: worker for uid, worker in workers.items() if worker.holds_resources and worker.verdict is None}
        await self._check_storage_limits(active)
        pressures = self._services.node().pressures
        # One pod at a time: whether it helped shows once it has ended, in the next round.
        leaving = any(worker.verdict is not None and worker.holds_resources for worker in workers.values())
        if pressures and not leaving:
            await self._relieve(pressures[0], active)

    async def memory_round(self, workers: Mapping[str, PodWorker]) -> None:
        """Evict those that wrote more into memory than they may; for every half second, since memory is filled fast."""
        volumes = self._services.volumes
        if not isinstance(volumes, MemoryVolumeMeter):
            return
        for worker in list(workers.values()):
            if not worker.holds_resources or worker.verdict is not None or eviction.is_critical(worker.pod):
                continue
            sizes = {name: int(usage.bytes) for name, usage in (await volumes.loose_usage(worker.pod)).items()}
            verdict = ephemeral_storage.exceeded(worker.pod, ephemeral_storage.StorageUsage(volumes=sizes))
            if sizes and verdict is not None:
                self._evict(worker, verdict)

    async def _relieve(self, pressure: Pressure, active: Mapping[str, PodWorker]) -> None:
        images = self._services.images
        if pressure.resource != "memory" and isinstance(images, ImageReclaimer):
            freed = await images.delete_unused()
            if freed > 0:
                logger.warning("the disk is nearly full: %d bytes of unused images were removed", freed)
                return
        usages = await self._usages(active, pressure.resource)
        ranked = eviction.rank(usages, pressure.resource)
        if ranked:
            self._evict(active[spec.uid(ranked[0].pod)], eviction.verdict(ranked[0], pressure))

    def _evict(self, worker: PodWorker, verdict: Verdict) -> None:
        logger.warning("evicting %s: %s", spec.format_pod(worker.pod), verdict.message)
        self._services.events.event(worker.pod, "Warning", verdict.reason, verdict.message)
        worker.end(verdict, grace_seconds=0)

    async def _check_storage_limits(self, active: Mapping[str, PodWorker]) -> None:
        for worker in active.values():
            if eviction.is_critical(worker.pod) or not ephemeral_storage.is_limited(worker.pod):
                continue
            verdict = ephemeral_storage.exceeded(worker.pod, await self._storage(worker))
            if verdict is not None:
                self._evict(worker, verdict)

    async def _storage(self, worker: PodWorker) -> ephemeral_storage.StorageUsage:
        volumes = self._services.volumes
        if not isinstance(volumes, VolumeMeter):
            return ephemeral_storage.StorageUsage()
        logs = log_layout.pod_folder(self._services.paths, worker.pod)
        folders = {
            name: (logs / name, volumes.instance_folder(worker.pod, name, instance.attempt))
            for name, instance in worker.latest().items()
        }
        sizes = {name: int(usage.bytes) for name, usage in (await volumes.usage(worker.pod)).items()}
        containers = await asyncio.to_thread(lambda: {name: _bytes(found) for name, found in folders.items()})
        return ephemeral_storage.StorageUsage(containers=containers, volumes=sizes)

    async def _usages(self, active: Mapping[str, PodWorker], resource: str) -> list[eviction.Usage]:
        if resource != "memory":
            measure = self._inode_usage if resource == eviction.INODES else self._disk_usage
            return [await measure(uid, worker) for uid, worker in active.items()]
        owners = {i.id: (uid, name) for uid, worker in active.items() for name, i in worker.latest().items()}
        used: dict[str, dict[str, int]] = {}
        for usage in await self._services.runtime.usage():
            if usage.id in owners:
                uid, name = owners[usage.id]
                used.setdefault(uid, {})[name] = usage.memory_bytes
        return [eviction.Usage(pod=worker.pod, by_container=used.get(uid, {})) for uid, worker in active.items()]

    async def _inode_usage(self, uid: str, worker: PodWorker) -> eviction.Usage:
        """Files and folders that the pod made, whoever of its containers it was."""
        paths = self._services.paths
        everything = [paths.pods / uid, log_layout.pod_folder(paths, worker.pod)]
        return eviction.Usage(pod=worker.pod, by_container={}, elsewhere=await asyncio.to_thread(_inodes, everything))

    async def _disk_usage(self, uid: str, worker: PodWorker) -> eviction.Usage:
        paths = self._services.paths
        own = (await self._storage(worker)).containers
        everything = [paths.pods / uid, log_layout.pod_folder(paths, worker.pod)]
        total = await asyncio.to_thread(_bytes, everything)
        return eviction.Usage(pod=worker.pod, by_container=own, elsewhere=max(total - sum(own.values()), 0))


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
