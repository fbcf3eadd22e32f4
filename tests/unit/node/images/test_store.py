"""The store: what survives a crash, damage and a second agent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_common.oci.reference import parse
from wasilet_node.images.store import ImageRecord, Store, StoreError
from wasilet_node.runtime.protocol import GuestKind

from tests.unit.node.images.fakes import COMPONENT, MODULE, digest_of

pytestmark = pytest.mark.unit

MANIFEST = digest_of(b"manifest")
OTHER = digest_of(b"other manifest")
REFERENCE = parse("ghcr.io/a/hello:v1")


def record(digest: str = MANIFEST, module: bytes = MODULE, size: int = 100) -> ImageRecord:
    return ImageRecord(
        digest=digest,
        module_digest=digest_of(module),
        module_size_bytes=len(module),
        kind=GuestKind.MODULE,
        size_bytes=size,
        entrypoint=("/a.wasm",),
        cmd=("b",),
        env=(("A", "1"),),
        working_dir="/w",
        module_name="a.wasm",
    )


def put(store: Store, data: bytes) -> str:
    digest = digest_of(data)
    with store.temporary() as (path, file):
        file.write(data)
        store.adopt(path, file, digest)
    return digest


async def reopened(store: Store, **more: Any) -> Store:
    store.close()
    again = Store(directory=store.directory, **more)
    await again.open()
    return again


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(directory=tmp_path / "images")
    await store.open()
    yield store
    store.close()


async def test_an_image_is_known_again_after_a_restart(store: Store) -> None:
    put(store, MODULE)
    await store.add(REFERENCE, record())
    again = await reopened(store)
    try:
        known = again.lookup(REFERENCE)
        assert known is not None
        assert known.pulled_at > 0
        assert (known.entrypoint, known.env, known.kind) == (("/a.wasm",), (("A", "1"),), GuestKind.MODULE)
        assert await again.has(known.module_digest, known.module_size_bytes)
        assert again.last_used(MANIFEST) == store.last_used(MANIFEST)
    finally:
        again.close()


async def test_an_image_is_found_by_tag_and_by_digest_but_only_in_its_own_repository(store: Store) -> None:
    await store.add(REFERENCE, record())
    assert store.lookup(REFERENCE) is not None
    assert store.lookup(parse(f"ghcr.io/a/hello@{MANIFEST}")) is not None
    assert store.lookup(parse(f"ghcr.io/a/hello:other@{MANIFEST}")) is not None
    assert store.lookup(parse("ghcr.io/a/hello:v2")) is None
    assert store.lookup(parse(f"ghcr.io/b/hello@{MANIFEST}")) is None


async def test_a_tag_that_moves_leaves_the_old_image_its_digest(store: Store) -> None:
    await store.add(REFERENCE, record())
    await store.add(REFERENCE, record(OTHER, COMPONENT, size=200))
    moved = store.lookup(REFERENCE)
    assert moved is not None
    assert moved.digest == OTHER
    assert store.status(50) == [
        {"names": [f"ghcr.io/a/hello@{OTHER}", "ghcr.io/a/hello:v1"], "sizeBytes": 200},
        {"names": [f"ghcr.io/a/hello@{MANIFEST}"], "sizeBytes": 100},
    ]


async def test_the_nodes_status_names_the_largest_images_and_few_names_of_each(store: Store) -> None:
    for number in range(8):
        await store.add(parse(f"ghcr.io/a/hello:v{number}"), record())
    await store.add(REFERENCE, record(OTHER, size=7))
    [only] = store.status(1)
    names = only["names"]
    assert isinstance(names, list)
    assert len(names) == 5
    assert names[0] == f"ghcr.io/a/hello@{MANIFEST}"


async def test_a_blob_is_hashed_once_for_all_who_ask_after_a_restart(store: Store) -> None:
    digest = put(store, MODULE)
    hashed: list[Path] = []

    def counted(path: Path, algorithm: str) -> str:
        hashed.append(path)
        time.sleep(0.05)
        return f"{algorithm}:{hashlib.new(algorithm, path.read_bytes()).hexdigest()}"

    again = await reopened(store, hash_file=counted)
    try:
        assert all(await asyncio.gather(*(again.has(digest, len(MODULE)) for _ in range(20))))
    finally:
        again.close()
    assert len(hashed) == 1


async def test_a_damaged_blob_is_deleted_instead_of_used(store: Store) -> None:
    digest = put(store, MODULE)
    again = await reopened(store)
    try:
        again.blob_path(digest).write_bytes(MODULE[:-1] + b"X")
        assert not await again.has(digest, len(MODULE))
        assert not again.blob_path(digest).exists()
    finally:
        again.close()


async def test_a_blob_that_vanished_or_shrank_is_noticed_though_it_was_verified(store: Store) -> None:
    digest = put(store, MODULE)
    assert await store.has(digest, len(MODULE))
    os.truncate(store.blob_path(digest), 3)
    assert not await store.has(digest, len(MODULE))
    digest = put(store, MODULE)
    store.blob_path(digest).unlink()
    assert not await store.has(digest)


async def test_what_a_crash_left_is_cleared_but_partial_downloads_stay(store: Store) -> None:
    (store.directory / "tmp" / "left").write_bytes(b"x")
    store.partial_path(digest_of(MODULE)).write_bytes(b"half")
    again = await reopened(store)
    again.close()
    assert not list((store.directory / "tmp").iterdir())
    assert store.partial_path(digest_of(MODULE)).read_bytes() == b"half"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 99}', b"\xff" * 10])
async def test_an_unreadable_index_is_put_aside(store: Store, content: bytes) -> None:
    await store.add(REFERENCE, record())
    (store.directory / "index.json").write_bytes(content)
    again = await reopened(store)
    try:
        assert again.records() == ()
        assert (store.directory / "index.damaged").read_bytes() == content
    finally:
        again.close()


@pytest.mark.parametrize(
    "change",
    [{"digest": "x"}, {"kind": "elf"}, {"env": 7}, {"unknown": 1}, {"last_used": "x"}, {"module_digest": "../x"}],
)
async def test_one_unreadable_entry_costs_only_that_image(store: Store, change: dict[str, object]) -> None:
    await store.add(REFERENCE, record())
    await store.add(parse("ghcr.io/b:v1"), record(OTHER))
    path = store.directory / "index.json"
    document = json.loads(path.read_bytes())
    document["images"][0] |= change
    document["images"].append(None)
    path.write_text(json.dumps(document))
    again = await reopened(store)
    try:
        assert [known.digest for known in again.records()] == [OTHER]
        assert again.lookup(REFERENCE) is None
    finally:
        again.close()


async def test_everything_is_private(store: Store) -> None:
    await store.add(REFERENCE, record())
    put(store, MODULE)
    for path in (store.directory, *store.directory.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_second_agent_is_refused(store: Store) -> None:
    second = Store(directory=store.directory, lock_wait_seconds=0.1)
    with pytest.raises(StoreError, match="another node agent"):
        await second.open()


async def test_an_agent_that_ends_lets_the_next_one_in(store: Store) -> None:
    next_one = Store(directory=store.directory)
    opening = asyncio.create_task(next_one.open())
    await asyncio.sleep(0.05)
    assert not opening.done()
    store.close()
    await asyncio.wait_for(opening, 5)
    next_one.close()


async def test_a_store_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"the image store .* cannot be used: Not a directory"):
        await Store(directory=tmp_path / "file" / "images").open()


async def test_removing_an_image_keeps_a_module_that_another_one_has(store: Store) -> None:
    put(store, MODULE)
    await store.add(REFERENCE, record())
    await store.add(parse("ghcr.io/b:v1"), record(OTHER))
    assert await store.remove(MANIFEST) == 0
    assert await store.has(digest_of(MODULE))
    assert await store.remove(OTHER) == len(MODULE)
    assert not await store.has(digest_of(MODULE))
    assert await store.remove(OTHER) == 0


async def test_a_pinned_blob_is_not_deleted(store: Store) -> None:
    digest = put(store, MODULE)
    async with store.pinned(digest), store.pinned(digest):
        assert await store.delete_blobs({digest}) == 0
    assert await store.delete_blobs({digest}) == len(MODULE)


async def test_orphans_are_old_blobs_of_no_image(store: Store) -> None:
    old, young, used = put(store, b"old"), put(store, b"young"), put(store, MODULE)
    await store.add(REFERENCE, record())
    for digest in (old, used):
        os.utime(store.blob_path(digest), (1, 1))
    assert await store.orphans(older_than=1000) == {old}
    assert young not in await store.orphans(older_than=1000)


def test_only_digests_become_paths(tmp_path: Path) -> None:
    store = Store(directory=tmp_path)
    for evil in ("sha256:../../etc/passwd", "../x", "sha256:" + "0" * 63 + "/", ""):
        with pytest.raises(ValueError, match="not a digest"):
            store.blob_path(evil)
        with pytest.raises(ValueError, match="not a digest"):
            store.partial_path(evil)
