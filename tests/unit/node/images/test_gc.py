"""Garbage collection: what goes, in which order, and what never does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
from wasilet_common.oci.reference import parse
from wasilet_node.images.gc import GarbageCollector
from wasilet_node.images.store import ImageRecord, Store
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

from tests.unit.node.images.fakes import digest_of

pytestmark = pytest.mark.unit

SIZE = 100


@dataclass
class Disk:
    """1,000 bytes; ``used_otherwise`` of them by others, the rest by the store's blobs."""

    directory: Path
    used_otherwise: int = 0
    total: int = 1000

    @property
    def free(self) -> int:
        blobs = sum(path.stat().st_size for path in (self.directory / "blobs").rglob("*") if path.is_file())
        return self.total - self.used_otherwise - blobs


class Rig:
    """A store of five images, the first of them used longest ago."""

    def __init__(self, directory: Path) -> None:
        self.now = 1_000_000.0
        self.store = Store(directory=directory, clock=lambda: self.now)
        self.disk = Disk(directory)
        self.in_use: frozenset[str] = frozenset()
        self.kept: set[str] = set()
        self.collector = GarbageCollector(
            store=self.store,
            settings=ImageSettings(),
            in_use=lambda: self.in_use,
            prune=self.prune,
            disk_usage=lambda _: self.disk,
            clock=lambda: self.now,
        )

    async def prune(self, keep_digests: Collection[str]) -> None:
        self.kept = set(keep_digests)

    async def add(self, number: int) -> None:
        data = str(number).encode() * SIZE
        with self.store.temporary() as (path, file):
            file.write(data)
            self.store.adopt(path, file, digest_of(data))
        os.utime(self.store.blob_path(digest_of(data)), (self.now, self.now))
        record = ImageRecord(
            digest=digest_of(f"manifest {number}".encode()),
            module_digest=digest_of(data),
            module_size_bytes=SIZE,
            kind=GuestKind.MODULE,
            size_bytes=SIZE,
        )
        await self.store.add(parse(f"ghcr.io/a:{number}"), record)

    def left(self) -> list[int]:
        return [number for number in range(10) if self.store.lookup(parse(f"ghcr.io/a:{number}"))]

    def module(self, number: int) -> str:
        return digest_of(str(number).encode() * SIZE)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "images")
    await rig.store.open()
    for number in range(5):
        await rig.add(number)
        rig.now += 10
    rig.now += 1000
    yield rig
    rig.store.close()


async def test_below_the_high_threshold_nothing_goes(rig: Rig) -> None:
    rig.disk.used_otherwise = 340
    collected = await rig.collector.collect()
    assert (collected.usage_percent, collected.freed_bytes) == (84, 0)
    assert rig.left() == [0, 1, 2, 3, 4]
    assert rig.kept == {rig.module(number) for number in range(5)}


async def test_above_it_the_least_recently_used_go_down_to_the_low_threshold(rig: Rig) -> None:
    rig.disk.used_otherwise = 450
    rig.store.touch(digest_of(b"manifest 0"))
    rig.now += 1000
    collected = await rig.collector.collect()
    assert (collected.usage_percent, collected.wanted_bytes, collected.freed_bytes) == (95, 150, 200)
    assert rig.left() == [0, 3, 4]
    assert rig.kept == {rig.module(number) for number in (0, 3, 4)}
    assert not rig.store.blob_path(rig.module(1)).exists()


async def test_images_in_use_stay_whatever_the_disk_use(rig: Rig) -> None:
    rig.disk.used_otherwise = 500
    rig.in_use = frozenset({rig.module(0), rig.module(2)})
    collected = await rig.collector.collect()
    assert rig.left() == [0, 2, 4]
    assert collected.freed_bytes == 200
    rig.disk.used_otherwise = 700
    collected = await rig.collector.collect()
    assert rig.left() == [0, 2]
    assert (collected.wanted_bytes, collected.freed_bytes) == (200, 100)


async def test_young_images_stay(rig: Rig) -> None:
    rig.disk.used_otherwise = 480
    await rig.add(7)
    rig.now += 60
    for number in range(1, 5):
        rig.store.touch(digest_of(f"manifest {number}".encode()))
    collected = await rig.collector.collect()
    assert rig.left() == [1, 2, 3, 4, 7]
    assert (collected.freed_bytes, collected.wanted_bytes) == (100, 280)


async def test_eviction_takes_all_that_is_unused_and_old_enough(rig: Rig) -> None:
    rig.in_use = frozenset({rig.module(3)})
    await rig.add(7)
    assert await rig.collector.delete_unused() == 4 * SIZE
    assert rig.left() == [3, 7]


async def test_leftovers_of_crashes_go_whatever_the_disk_use(rig: Rig) -> None:
    partial = rig.store.partial_path(digest_of(b"x"))
    fresh = rig.store.partial_path(digest_of(b"y"))
    orphan = rig.store.blob_path(digest_of(b"orphan"))
    young = rig.store.blob_path(digest_of(b"young"))
    for path, age in ((partial, 90_000), (fresh, 1000), (orphan, 200), (young, 10)):
        path.write_bytes(b"left")
        os.utime(path, (rig.now - age, rig.now - age))
    await rig.collector.collect()
    assert [path.exists() for path in (partial, fresh, orphan, young)] == [False, True, False, True]
    assert rig.left() == [0, 1, 2, 3, 4]


async def test_downloads_that_broke_off_go_before_images_when_room_is_needed(rig: Rig) -> None:
    rig.disk.used_otherwise = 450
    paths = [rig.store.partial_path(digest_of(name)) for name in (b"broken", b"under way")]
    for path, age in zip(paths, (200, 60), strict=True):
        path.write_bytes(b"x" * 200)
        os.utime(path, (rig.now - age, rig.now - age))
    collected = await rig.collector.collect()
    assert [path.exists() for path in paths] == [False, True]
    assert (collected.wanted_bytes, collected.freed_bytes) == (150, 200)
    assert rig.left() == [0, 1, 2, 3, 4]


async def test_a_module_that_runs_without_an_image_keeps_its_files(rig: Rig) -> None:
    running = rig.store.blob_path(digest_of(b"running"))
    running.write_bytes(b"running")
    os.utime(running, (1, 1))
    rig.in_use = frozenset({digest_of(b"running")})
    await rig.collector.collect()
    assert running.exists()
    assert digest_of(b"running") in rig.kept
