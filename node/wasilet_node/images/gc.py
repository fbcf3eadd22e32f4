"""Garbage collection of images by disk use, with the rules of kubelet's image_gc_manager.go.

Above the high threshold, images that no running pod uses go, least recently used first, until use is down to the low
threshold; an image younger than the minimum age, or used within it, stays. Compiled files go with the modules that they
were made from: they can be made again, but never outlive their source. Blobs without an image (left by a crash), and
downloads that no one resumed for a day, go whatever the disk use is; above the threshold, downloads go before images.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from wasilet_node.images.store import ImageRecord, Store
from wasilet_node.settings import ImageSettings

logger = logging.getLogger(__name__)

_PARTIAL_AGE_SECONDS: Final = 24 * 3600.0


class Usage(Protocol):
    """What ``shutil.disk_usage`` gives; ``free`` is what this user may still write."""

    @property
    def total(self) -> int: ...

    @property
    def free(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Collected:
    """``wanted_bytes`` is more than ``freed_bytes`` when not enough could go (kubelet's ``FreeDiskSpaceFailed``)."""

    freed_bytes: int = 0
    wanted_bytes: int = 0
    usage_percent: int = 0


class GarbageCollector:
    """Decides and deletes; the caller decides when."""

    def __init__(
        self,
        *,
        store: Store,
        settings: ImageSettings,
        in_use: Callable[[], frozenset[str]],
        prune: Callable[[Collection[str]], Awaitable[None]],
        disk_usage: Callable[[Path], Usage] = shutil.disk_usage,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._in_use = in_use
        self._prune = prune
        self._disk_usage = disk_usage
        self._clock = clock

    async def collect(self) -> Collected:
        """One round. Raises OSError."""
        await self._clear_leftovers()
        usage = await asyncio.to_thread(self._disk_usage, self._store.directory)
        percent = 100 - usage.free * 100 // max(usage.total, 1)
        wanted = freed = 0
        if percent >= self._settings.gc_high_threshold_percent:
            wanted = usage.total * (100 - self._settings.gc_low_threshold_percent) // 100 - usage.free
            logger.info(
                "disk use of images is %d%%, over the threshold of %d%%: trying to free %d bytes",
                percent,
                self._settings.gc_high_threshold_percent,
                wanted,
            )
            freed = await self._free(wanted)
            if freed < wanted:
                logger.warning("%d bytes of images were to be freed, but only %d could be", wanted, freed)
        await self._prune_compiled()
        return Collected(freed_bytes=freed, wanted_bytes=max(wanted, 0), usage_percent=percent)

    async def delete_unused(self) -> int:
        """Under disk pressure: all that no running pod uses and that is old enough. Returns the bytes freed.

        Raises OSError.
        """
        freed = await self._free(sys.maxsize)
        await self._prune_compiled()
        return freed

    async def _free(self, wanted: int) -> int:
        # Downloads that no one goes on with just now first: a registry that breaks off could fill the disk with them.
        young = self._clock() - self._settings.gc_minimum_age_seconds
        freed = await asyncio.to_thread(self._store.clear_partials, older_than=young)
        candidates = sorted(self._store.records(), key=lambda record: self._store.last_used(record.digest))
        for record in candidates:
            if freed >= wanted:
                break
            # Asked again for each: a pod may have begun to use the image while another one was deleted.
            if self._may_go(record):
                freed += await self._store.remove(record.digest)
                logger.info("removed image %s, unused", record.digest)
        return freed

    def _may_go(self, record: ImageRecord) -> bool:
        young = self._clock() - self._settings.gc_minimum_age_seconds
        return (
            record.module_digest not in self._in_use()
            and self._store.last_used(record.digest) <= young
            and record.pulled_at <= young
        )

    async def _clear_leftovers(self) -> None:
        now = self._clock()
        in_use = self._in_use()
        orphans = await self._store.orphans(older_than=now - self._settings.gc_minimum_age_seconds)
        await self._store.delete_blobs(orphans - in_use)
        await asyncio.to_thread(self._store.clear_partials, older_than=now - _PARTIAL_AGE_SECONDS)

    async def _prune_compiled(self) -> None:
        await self._prune(self._store.module_digests() | self._in_use())
