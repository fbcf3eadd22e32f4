"""Pulls one image: resolve, choose, fetch, verify, keep.

Every byte is checked against its digest and size before anything looks at it, and sizes are checked before anything is
read. A download that breaks off goes on where it ended, in this pull or in one after a restart. Of a container image
only the layers from the top down to the one that holds the module are fetched. Messages have containerd's shape
(``failed to pull and unpack image "...": ...``), since that is what people search for, and end in what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from wasilet_common.components import ComponentError, Interfaces, read_interfaces
from wasilet_common.oci import layouts, tarball
from wasilet_common.oci.choice import choose
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.layouts import Descriptor, ImageManifest, LayoutError, Plan
from wasilet_common.oci.mediatypes import WASM_TO_OCI_CONFIG
from wasilet_common.oci.reference import Reference
from wasilet_common.oci.registry import (
    RegistryAuthError,
    RegistryClient,
    RegistryError,
    RegistryNotFoundError,
    RegistryProtocolError,
    TransferInterruptedError,
)
from wasilet_common.oci.repository import MAX_MANIFEST_BYTES, Manifest, Repository

from wasilet_node.images.kinds import detect_kind
from wasilet_node.images.preflight import refusal
from wasilet_node.images.store import ImageRecord, Store, open_private
from wasilet_node.images.uninterrupted import uninterrupted
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

logger = logging.getLogger(__name__)

_TRANSFER_ATTEMPTS: Final = 3
_WRITE_BYTES: Final = 1024 * 1024


class PullError(Exception):
    """The image could not be pulled; the message is meant for status and event."""


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """The image, and how long its pull took without the wait for a slot."""

    record: ImageRecord
    seconds: float
    credential: Credential | None = None
    """The login that the registry took; None: it wanted none."""


@dataclass
class _Locked:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Puller:
    """Pulls images into a store, so many at once as the settings allow; of one blob, never more than one.

    Asking a registry what a reference stands for needs no slot: a pod under ``Always`` whose image is here must not
    wait behind the downloads of others.
    """

    def __init__(
        self,
        *,
        store: Store,
        registry: RegistryClient,
        settings: ImageSettings,
        monotonic: Callable[[], float] = time.monotonic,
        preflight: Callable[[Interfaces], str] = refusal,
    ) -> None:
        self._store = store
        self._registry = registry
        self._settings = settings
        self._monotonic = monotonic
        self._preflight = preflight
        self._slots = asyncio.Semaphore(max(settings.max_parallel_pulls, 1))
        self._blob_locks: dict[str, _Locked] = {}

    async def pull(
        self, reference: Reference, credentials: Sequence[Credential], logins: Sequence[Credential] = ()
    ) -> Pulled:
        """Resolve the reference at its registry, and have the image in the store. Raises PullError.

        ``credentials`` are those that fit the reference, best first; each is tried. None: anonymously. ``logins``: all
        there are, of which one may name the registry's token server.
        """
        try:
            return await self._pull(reference, credentials, logins)
        except (RegistryError, LayoutError, tarball.LayerError) as error:
            raise PullError(f'failed to pull and unpack image "{reference}": {error}') from error
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise PullError(
                f'failed to pull and unpack image "{reference}": the image store cannot be written: {reason}'
            ) from error

    async def _pull(
        self, reference: Reference, credentials: Sequence[Credential], logins: Sequence[Credential]
    ) -> Pulled:
        began = self._monotonic()
        repository, digest, manifest = await self._resolve(reference, credentials, logins)
        known = self._store.record(digest)
        if known is not None:
            async with self._store.pinned(known.module_digest):
                if await self._store.has(known.module_digest, known.module_size_bytes):
                    await self._store.add(reference, known)
                    return Pulled(record=known, seconds=self._monotonic() - began, credential=repository.credential)
        queued = self._monotonic()
        async with self._slots:
            waited = self._monotonic() - queued
            top = manifest or await repository.manifest(digest)
            record = await self._make(repository, top, reference, digest)
        return Pulled(record=record, seconds=self._monotonic() - began - waited, credential=repository.credential)

    async def _make(self, repository: Repository, top: Manifest, reference: Reference, digest: str) -> ImageRecord:
        """Fetch what the manifest or index names, and record it. Raises RegistryError, LayoutError, LayerError."""
        chosen = await choose(repository, top)
        plan = await self._plan(repository, chosen.image)
        if plan.interfaces is not None:
            self._check_interfaces(plan.interfaces)
        size = chosen.size_bytes + chosen.image.size_bytes
        return await self._fetch(repository, plan, reference, digest, size)

    async def _resolve(
        self, reference: Reference, credentials: Sequence[Credential], logins: Sequence[Credential]
    ) -> tuple[Repository, str, Manifest | None]:
        failures: list[RegistryError] = []
        attempts: Sequence[Credential | None] = credentials or (None,)
        for credential in attempts:
            repository = Repository(client=self._registry, reference=reference, credential=credential, logins=logins)
            try:
                digest = await repository.resolve(reference.target)
                if digest is not None:
                    return repository, digest, None
                manifest = await repository.manifest(reference.target)
                return repository, manifest.digest, manifest
            except (RegistryAuthError, RegistryNotFoundError) as error:
                # Registries hide what a user may not see as 404, so another credential may still find it.
                failures.append(error)
            except RegistryError as error:
                raise type(error)(f'failed to resolve reference "{reference}": {error}') from error
        messages = list(dict.fromkeys(str(failure) for failure in failures))
        reason = messages[0] if len(messages) == 1 else f"[{', '.join(messages)}]"
        raise type(failures[-1])(f'failed to resolve reference "{reference}": {reason}') from failures[-1]

    async def _plan(self, repository: Repository, image: ImageManifest) -> Plan:
        layouts.check_config_type(image)
        config = image.config
        if config.media_type == WASM_TO_OCI_CONFIG:
            return layouts.plan(image, b"")
        if config.size > MAX_MANIFEST_BYTES:
            raise LayoutError(f"the image's config has {config.size} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
        body = bytearray()
        async with repository.blob(config.digest, size=config.size) as transfer:
            async for chunk in transfer.chunks:
                body += chunk
        _check(config, hashlib.new(_algorithm(config.digest), body).hexdigest())
        return layouts.plan(image, bytes(body))

    async def _fetch(
        self, repository: Repository, plan: Plan, reference: Reference, digest: str, size: int
    ) -> ImageRecord:
        if plan.member:
            module_digest = await self._unwrap(repository, plan)
        else:
            module_digest = plan.layers[0].digest
        async with self._temporarily(module_digest):
            if not plan.member:
                await self._blob(repository, plan.layers[0])
            module = self._store.blob_path(module_digest)
            length, preamble = await asyncio.to_thread(_look_at, module)
            kind = detect_kind(preamble)
            if kind is GuestKind.COMPONENT and plan.interfaces is None:
                interfaces = await asyncio.to_thread(interfaces_of, module)
                if interfaces is not None:
                    self._check_interfaces(interfaces)
            record = ImageRecord(
                digest=digest,
                module_digest=module_digest,
                module_size_bytes=length,
                kind=kind,
                size_bytes=size,
                entrypoint=plan.config.entrypoint,
                cmd=plan.config.cmd,
                env=plan.config.env,
                working_dir=plan.config.working_dir,
                module_name=plan.module_name or reference.repository.rpartition("/")[2],
            )
            await self._store.add(reference, record)
        return record

    def _check_interfaces(self, interfaces: Interfaces) -> None:
        """Raises LayoutError."""
        why = self._preflight(interfaces)
        if why:
            raise LayoutError(why)

    async def _unwrap(self, repository: Repository, plan: Plan) -> str:
        """The module of a container image, from the topmost layer that has it."""
        limit = self._settings.max_image_bytes
        total = 0
        budget = tarball.Budget(total_bytes=limit)
        for layer in reversed(plan.layers):
            total += layer.size
            if total > limit:
                raise LayoutError(f"the image's layers have {total} bytes or more, over the {limit} allowed")
            async with self._temporarily(layer.digest):
                await self._blob(repository, layer)
                found, digest = await uninterrupted(self._extract, layer, plan.member, budget)
            if found is not None:
                if not found.deleted:
                    return digest
                break
        raise LayoutError(f"the image has no file /{plan.member}, which is its entrypoint")

    @asynccontextmanager
    async def _temporarily(self, digest: str) -> AsyncIterator[None]:
        """A blob is needed here, and goes at the end unless an image has it by then."""
        try:
            async with self._store.pinned(digest):
                yield
        finally:
            await self._store.delete_blobs({digest} - self._store.module_digests())

    def _extract(self, layer: Descriptor, member: str, budget: tarball.Budget) -> tuple[tarball.Found | None, str]:
        with self._store.temporary() as (path, file):
            found = tarball.extract(
                self._store.blob_path(layer.digest), media_type=layer.media_type, name=member, out=file, budget=budget
            )
            if found is None or found.deleted:
                return found, ""
            file.seek(0)
            hasher = hashlib.sha256()
            _digest_into(file, hasher, found.size)
            digest = f"sha256:{hasher.hexdigest()}"
            self._store.adopt(path, file, digest)
        return found, digest

    async def _blob(self, repository: Repository, blob: Descriptor) -> None:
        """Have a blob in the store. Raises RegistryError, LayoutError, OSError."""
        if blob.size > self._settings.max_image_bytes:
            raise LayoutError(
                f"the image has a layer of {blob.size} bytes, more than the {self._settings.max_image_bytes} allowed"
            )
        async with self._one_at_a_time(blob.digest):
            if await self._store.has(blob.digest, blob.size):
                return
            for attempt in range(1, _TRANSFER_ATTEMPTS + 1):
                before = self._partial_size(blob)
                try:
                    await self._download(repository, blob)
                except TransferInterruptedError as error:
                    if attempt == _TRANSFER_ATTEMPTS or self._partial_size(blob) <= before:
                        raise
                    logger.info("going on with blob %s: %s", blob.digest, error)
                else:
                    return

    async def _download(self, repository: Repository, blob: Descriptor) -> None:
        path = self._store.partial_path(blob.digest)
        with os.fdopen(open_private(path, exclusive=False), "r+b", buffering=0) as file:
            hasher = hashlib.new(_algorithm(blob.digest))
            offset = await uninterrupted(_digest_into, file, hasher, blob.size)
            resumed = offset > 0
            if offset < blob.size or not blob.size:
                async with repository.blob(blob.digest, size=blob.size, offset=offset) as transfer:
                    if transfer.start != offset:
                        resumed = False
                        hasher = hashlib.new(_algorithm(blob.digest))
                        await uninterrupted(_rewind, file)
                    await self._write(transfer.chunks, file, hasher)
            try:
                _check(blob, hasher.hexdigest())
            except RegistryProtocolError:
                path.unlink()
                if not resumed:
                    raise
            else:
                await uninterrupted(self._store.adopt, path, file, blob.digest)
                return
        # The part on disk was not of this blob: begin again, once.
        await self._download(repository, blob)

    async def _write(self, chunks: AsyncIterator[bytes], file: BinaryIO, hasher: hashlib._Hash) -> None:
        """Write to disk in large pieces, and what came before an error too, for the next attempt to go on from."""
        pending = bytearray()

        def flush() -> None:
            data = bytes(pending)
            pending.clear()
            hasher.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

        try:
            async for chunk in chunks:
                pending += chunk
                if len(pending) >= _WRITE_BYTES:
                    await uninterrupted(flush)
        finally:
            await uninterrupted(flush)

    def _partial_size(self, blob: Descriptor) -> int:
        try:
            return self._store.partial_path(blob.digest).stat().st_size
        except OSError:
            return 0

    @asynccontextmanager
    async def _one_at_a_time(self, digest: str) -> AsyncIterator[None]:
        locked = self._blob_locks.setdefault(digest, _Locked())
        locked.users += 1
        try:
            async with locked.lock:
                yield
        finally:
            locked.users -= 1
            if not locked.users:
                del self._blob_locks[digest]


def _algorithm(digest: str) -> str:
    return digest.partition(":")[0]


def _check(blob: Descriptor, hexdigest: str) -> None:
    actual = f"{_algorithm(blob.digest)}:{hexdigest}"
    if actual != blob.digest:
        raise RegistryProtocolError(f"blob {blob.digest} was asked for, but what came hashes to {actual}")


def _digest_into(file: BinaryIO, hasher: hashlib._Hash, size: int) -> int:
    """Hash what a former download left, and stand at its end. More than the blob has cannot be a part of it."""
    if os.fstat(file.fileno()).st_size > size:
        _rewind(file)
        return 0
    offset = 0
    while chunk := file.read(_WRITE_BYTES):
        hasher.update(chunk)
        offset += len(chunk)
    return offset


def _rewind(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def interfaces_of(component: Path) -> Interfaces | None:
    """None: its names cannot be read; the compile step reports what is wrong with it."""
    try:
        with component.open("rb") as file:
            return read_interfaces(file)
    except ComponentError:
        return None


def _look_at(module: Path) -> tuple[int, bytes]:
    with module.open("rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(8)
