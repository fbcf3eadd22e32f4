"""The content-addressed store of blobs, and the index of what the node's images are.

::

    <images>/
        lock                    flock: one agent a store
        blobs/sha256/<hex>      complete and verified; never changed after the rename that put it here
        partial/sha256-<hex>    a download that broke off; the next one goes on from its end
        tmp/                    emptied at every start
        index.json              references -> digest, digest -> record; replaced atomically

Only modules stay: manifests and configs are small, used once, and what matters of them is in the index; a container
image's layers go as soon as the module is out of them.

What if the process dies right here? A blob is synced before it is renamed to its digest, and the index is written after
the blob that it names, so a crash leaves at most blobs without a record: the next pull finds them, or garbage
collection removes them. Because disks and people damage files, a blob is hashed again at its first use in each process.
While a pull needs a blob it pins it, so that garbage collection cannot take it away between two steps.

Methods that are documented to block are meant for a thread; in-memory state changes only on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from wasilet_common.oci.reference import Reference, is_digest
from wasilet_common.singleflight import SingleFlight

from wasilet_node.images.access import AccessRecords
from wasilet_node.images.uninterrupted import uninterrupted
from wasilet_node.runtime.protocol import GuestKind

logger = logging.getLogger(__name__)

_VERSION: Final = 1
_CHUNK: Final = 1024 * 1024
_NAMES_AN_IMAGE: Final = 5
"""kubelet's maxNamesPerImageInNodeStatus."""


class StoreError(Exception):
    """The store cannot be used: another agent holds it, or the disk fails."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What the store knows of one image. Times are seconds since the epoch."""

    digest: str
    """What the reference resolves to: the digest of the manifest, or of the index above it."""

    module_digest: str
    module_size_bytes: int
    kind: GuestKind
    size_bytes: int
    """What the registry stores of it: manifest, config and layers."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    module_name: str = ""
    pulled_at: float = 0.0


def hash_file(path: Path, algorithm: str) -> str:
    """The digest of a file; empty when it cannot be read. Blocking."""
    digest = hashlib.new(algorithm)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return f"{algorithm}:{digest.hexdigest()}"


class Store:
    """One store, one process. ``open`` it before use, ``close`` it after."""

    def __init__(
        self,
        *,
        directory: Path,
        clock: Callable[[], float] = time.time,
        lock_wait_seconds: float = 10.0,
        hash_file: Callable[[Path, str], str] = hash_file,
    ) -> None:
        """``lock_wait_seconds``: how long an agent that is ending may still hold the folder. ``hash_file``: gives the
        digest of a file, by path and algorithm."""
        self.directory = directory
        self._lock_wait_seconds = lock_wait_seconds
        self._hash_file = hash_file
        self._clock = clock
        self.access = AccessRecords()
        self._references: dict[str, str] = {}
        self._records: dict[str, ImageRecord] = {}
        self._last_used: dict[str, float] = {}
        self._verified: set[str] = set()
        self._verifying: SingleFlight[str, bool] = SingleFlight()
        self._lock_file: int | None = None
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._deleting = asyncio.Lock()
        self._pins: Counter[str] = Counter()

    async def open(self) -> None:
        """Take the lock, clear away what a crash left, read the index. Raises StoreError. Idempotent."""
        async with self._opening:
            if self._lock_file is not None:
                return
            lock: int | None = None
            try:
                await asyncio.to_thread(self._prepare_folders)
                lock = await self._lock()
                await asyncio.to_thread(self._clear_temporary)
                self._load(await asyncio.to_thread(self._read_index))
                self._lock_file, lock = lock, None
            except OSError as error:
                raise StoreError(f"the image store {self.directory} cannot be used: {error.strerror}") from error
            finally:
                if lock is not None:
                    os.close(lock)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # What images there are

    def lookup(self, reference: Reference) -> ImageRecord | None:
        """The image that a reference means here, whose blobs may still turn out to be damaged or gone."""
        digest = reference.digest or self._references.get(str(reference))
        if digest is None or (reference.digest and str(reference) not in self._references):
            return None
        return self._records.get(digest)

    def record(self, digest: str) -> ImageRecord | None:
        """The image of a digest, under any name."""
        return self._records.get(digest)

    def records(self) -> Sequence[ImageRecord]:
        """All images."""
        return tuple(self._records.values())

    def last_used(self, digest: str) -> float:
        """When the image was last asked for, in this process or before; 0 for an unknown one."""
        return self._last_used.get(digest, 0.0)

    def touch(self, digest: str) -> None:
        """The image is used now."""
        if digest in self._records:
            self._last_used[digest] = self._clock()

    def status(self, limit: int) -> list[dict[str, object]]:
        """``node.status.images``: names with digests first, then tags; largest image first."""
        names: dict[str, list[str]] = {}
        for name, digest in self._references.items():
            names.setdefault(digest, []).append(name)
        for known in names.values():
            known.sort(key=lambda name: ("@" not in name, name))
        largest = sorted(self._records.values(), key=lambda record: (-record.size_bytes, record.digest))
        return [
            {"names": names.get(record.digest, [])[:_NAMES_AN_IMAGE], "sizeBytes": record.size_bytes}
            for record in largest[:limit]
        ]

    async def add(self, reference: Reference, record: ImageRecord) -> None:
        """Name an image whose module is here. Raises OSError."""
        names = {reference.at(record.digest): record.digest, str(reference): record.digest}
        self._last_used[record.digest] = self._clock()
        if record.digest in self._records and names.items() <= self._references.items():
            return
        self._records.setdefault(record.digest, dataclasses.replace(record, pulled_at=self._clock()))
        self._references.update(names)
        await self.save()

    async def remove(self, digest: str) -> int:
        """Forget an image and delete its module unless another image has the same. Returns the bytes freed.

        The index goes first: a crash in between leaves a blob without a record, never a record without its blob.
        Raises OSError.
        """
        gone = self._records.pop(digest, None)
        if gone is None:
            return 0
        self._last_used.pop(digest, None)
        self.access.forget(digest)
        self._references = {name: target for name, target in self._references.items() if target != digest}
        await self.save()
        return await self.delete_blobs({gone.module_digest} - self.module_digests())

    def module_digests(self) -> frozenset[str]:
        """The modules of all images."""
        return frozenset(record.module_digest for record in self._records.values())

    async def delete_blobs(self, digests: Collection[str]) -> int:
        """Delete blobs, save those that are pinned. Returns the bytes freed. Raises OSError."""
        async with self._deleting:
            doomed = [digest for digest in digests if not self._pins[digest]]
            self._verified.difference_update(doomed)
            return await uninterrupted(lambda: sum(_unlink(self.blob_path(digest)) for digest in doomed))

    @contextlib.asynccontextmanager
    async def pinned(self, digest: str) -> AsyncIterator[None]:
        """Keep a blob from being deleted, whether it is here yet or not."""
        async with self._deleting:
            self._pins[digest] += 1
        try:
            yield
        finally:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]

    async def orphans(self, *, older_than: float) -> set[str]:
        """Blobs that no image needs, and that were written before a time (seconds since the epoch)."""
        return set(await asyncio.to_thread(self._old_blobs, older_than)) - self.module_digests()

    # Blobs

    def blob_path(self, digest: str) -> Path:
        """Where a blob is, or will be."""
        algorithm, _, encoded = digest.partition(":")
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self.directory / "blobs" / algorithm / encoded

    def partial_path(self, digest: str) -> Path:
        """Where a blob is while it comes in."""
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        return self.directory / "partial" / digest.replace(":", "-")

    async def has(self, digest: str, size: int | None = None) -> bool:
        """Whether a blob is here and whole; one that is damaged is deleted. Hashes it once per process, for however
        many pods ask at once after a restart."""
        path = self.blob_path(digest)
        try:
            found = path.stat().st_size
        except OSError:
            return False
        if digest in self._verified and size in {None, found}:
            return True
        return await self._verifying.do(digest, lambda: self._verify(digest)) and size in {None, found}

    async def _verify(self, digest: str) -> bool:
        if await asyncio.to_thread(self._hash_file, self.blob_path(digest), digest.partition(":")[0]) == digest:
            self._verified.add(digest)
            return True
        logger.warning("blob %s in the image store is damaged; it will be pulled again", digest)
        await self.delete_blobs([digest])
        return False

    def adopt(self, path: Path, file: BinaryIO, digest: str) -> None:
        """Make a written, verified file of this store a blob. Blocking. Raises OSError."""
        file.flush()
        os.fsync(file.fileno())
        target = self.blob_path(digest)
        path.replace(target)
        _sync_folder(target.parent)
        self._verified.add(digest)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file ``(path, file)``, which is deleted at the end unless it was adopted. Blocking."""
        path = self.directory / "tmp" / secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink, missing_ok=True)
            yield path, stack.enter_context(os.fdopen(open_private(path), "w+b"))

    # The index and the folders

    async def save(self) -> None:
        """Write the index, with the times of last use. Raises OSError."""
        async with self._writing:
            document = {
                "version": _VERSION,
                "references": self._references,
                "access": self.access.dump(),
                "images": [_to_json(record, self._last_used.get(record.digest, 0.0)) for record in self.records()],
            }
            data = json.dumps(document, indent=1).encode()
            await uninterrupted(self._write_index, data)

    def _write_index(self, data: bytes) -> None:
        with self.temporary() as (path, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            path.replace(self.directory / "index.json")
            _sync_folder(self.directory)

    def _read_index(self) -> dict[str, Any]:
        path = self.directory / "index.json"
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or document.get("version") != _VERSION:
            logger.warning("the index of the image store is unreadable; images will be resolved again")
            path.replace(path.with_suffix(".damaged"))
            return {}
        return document

    def _load(self, document: dict[str, Any]) -> None:
        self._records, self._last_used, self._references = {}, {}, {}
        images = document.get("images")
        for entry in images if isinstance(images, list) else []:
            try:
                record, last_used = _from_json(entry)
            except (KeyError, TypeError, ValueError):
                logger.warning("an entry of the image store's index is unreadable; that image will be pulled again")
                continue
            self._records[record.digest] = record
            self._last_used[record.digest] = last_used
        try:
            self.access.load(document.get("access"), self._records)
        except (KeyError, TypeError, ValueError, AttributeError):
            logger.warning("the records of who may use which image are unreadable; registries will be asked again")
        references = document.get("references")
        for name, digest in references.items() if isinstance(references, dict) else ():
            if digest in self._records:
                self._references[name] = digest

    def _prepare_folders(self) -> None:
        for folder in (self.directory, *(self.directory / name for name in ("blobs", "partial", "tmp"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        for algorithm in ("sha256", "sha512"):
            (self.directory / "blobs" / algorithm).mkdir(mode=0o700, exist_ok=True)

    async def _lock(self) -> int:
        descriptor = open_private(self.directory / "lock", exclusive=False)
        deadline = time.monotonic() + self._lock_wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise StoreError(f"another node agent uses the image store {self.directory}") from None
                await asyncio.sleep(0.1)
            except BaseException:
                os.close(descriptor)
                raise
            else:
                return descriptor

    def _clear_temporary(self) -> None:
        for path in (self.directory / "tmp").iterdir():
            path.unlink()

    def _old_blobs(self, older_than: float) -> list[str]:
        return [
            f"{folder.name}:{path.name}"
            for folder in (self.directory / "blobs").iterdir()
            for path in folder.iterdir()
            if is_digest(f"{folder.name}:{path.name}") and path.stat().st_mtime < older_than
        ]

    def clear_partials(self, *, older_than: float) -> int:
        """Delete downloads that no one went on with since a time. Returns the bytes freed. Blocking."""
        paths = list((self.directory / "partial").iterdir())
        return sum(_unlink(path) for path in paths if path.stat().st_mtime < older_than)


def _to_json(record: ImageRecord, last_used: float) -> dict[str, Any]:
    return {**dataclasses.asdict(record), "last_used": last_used}


def _from_json(entry: dict[str, Any]) -> tuple[ImageRecord, float]:
    fields = dict(entry)
    last_used = float(fields.pop("last_used"))
    for name in ("entrypoint", "cmd"):
        fields[name] = tuple(str(item) for item in fields[name])
    fields["env"] = tuple((str(name), str(value)) for name, value in fields["env"])
    fields["kind"] = GuestKind(fields["kind"])
    record = ImageRecord(**fields)
    for digest in (record.digest, record.module_digest):
        if not is_digest(digest):
            raise ValueError("not a digest")
    return record, last_used


def open_private(path: Path, *, exclusive: bool = True) -> int:
    """A descriptor of a file that only this user may read and write; never through a link. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0)
    return os.open(path, flags, 0o600)


def _unlink(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
