"""Images as the pod workers see them: kubelet's image manager, with its pull policies, messages, events and back-off.

Texts and order of events are those of Kubernetes 1.37's pkg/kubelet/images/image_manager.go and, for the closing
``Error: ...``, of kuberuntime_container.go. Who may use an image that is present is stated in
``wasilet_node.images.access``; ``imagePullPolicy: Always`` asks the registry every time but moves no bytes twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from wasilet_common.backoff import ImagePullBackoff
from wasilet_common.oci import credentials as pull_credentials
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.reference import InvalidReferenceError, Reference, parse
from wasilet_common.oci.registry import RegistryClient
from wasilet_common.singleflight import SingleFlight
from wasilet_common.time_format import go_duration

from wasilet_node.images.compile import Begins, CompileError
from wasilet_node.images.files import FilePuller
from wasilet_node.images.gc import Collected, GarbageCollector, Usage
from wasilet_node.images.model import EventSink, Image, ImageError, PullPolicy
from wasilet_node.images.offer import offered
from wasilet_node.images.pull import Pulled, Puller, PullError, interfaces_of
from wasilet_node.images.store import ImageRecord, Store, StoreError
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

logger = logging.getLogger(__name__)

_GC_INTERVAL_SECONDS: Final = 300.0
"""kubelet's ImageGCPeriod."""

_TOLD_BYTES: Final = 4 * 2**20
"""Larger images take seconds to compile, and who waits should know for what; smaller ones are not worth an event."""

_STATUS_IMAGES: Final = 50
"""kubelet's nodeStatusMaxImages."""


class ModuleCompiler(Protocol):
    """What is needed of ``wasilet_node.images.compile.Compiler``. Who made it closes it."""

    async def compile(
        self,
        module_path: Path,
        module_digest: str,
        kind: GuestKind,
        *,
        server: bool = False,
        owner: str = "",
        begins: Begins | None = None,
    ) -> Path: ...

    async def prune(self, keep_digests: Collection[str]) -> None: ...


class ImageManager:
    """Implements ``wasilet_node.images.model.Images``. Everything waits for ``start``, which the first call makes up
    for."""

    def __init__(
        self,
        *,
        directory: Path,
        settings: ImageSettings,
        compiler: ModuleCompiler,
        registry: RegistryClient | None = None,
        disk_usage: Callable[[Path], Usage] = shutil.disk_usage,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        lock_wait_seconds: float = 10.0,
        of_files: bool = False,
    ) -> None:
        """``directory`` is NodePaths.images. ``clock`` gives seconds since the epoch. ``lock_wait_seconds``: see Store.
        ``of_files``: its images are not run, but the files of image volumes. No I/O happens here."""
        self._settings = settings
        self._compiler = compiler
        self._monotonic = monotonic
        self._registry = registry or RegistryClient(settings=settings)
        self._store = Store(directory=directory, clock=clock, lock_wait_seconds=lock_wait_seconds)
        self._puller = (FilePuller if of_files else Puller)(
            store=self._store, registry=self._registry, settings=settings, monotonic=monotonic, preflight=offered
        )
        self._files: ImageManager | None = None
        if not of_files:
            self._files = ImageManager(
                directory=directory / "volumes",
                settings=settings,
                compiler=compiler,
                registry=self._registry,
                disk_usage=disk_usage,
                clock=clock,
                monotonic=monotonic,
                lock_wait_seconds=lock_wait_seconds,
                of_files=True,
            )
        self._backoff = ImagePullBackoff(clock=monotonic)
        self._in_use: frozenset[str] = frozenset()
        self._servers: dict[str, bool] = {}
        self._pulls: SingleFlight[Hashable, Pulled] = SingleFlight()
        self._compiles: SingleFlight[str, Path] = SingleFlight()
        self._collector = GarbageCollector(
            store=self._store,
            settings=settings,
            in_use=lambda: self._in_use,
            prune=self._prune,
            disk_usage=disk_usage,
            clock=clock,
        )

    async def start(self) -> None:
        """Open the store. Raises StoreError when another agent has it. Idempotent."""
        await self._store.open()

    async def close(self) -> None:
        """Cancel what is under way, close connections, give the store back."""
        if self._files is not None:
            await self._files.close()
        await self._pulls.close()
        await self._compiles.close()
        await self._registry.close()
        self._store.close()

    async def run(self) -> None:
        """Collect garbage every five minutes, for ever. Cancel it to end it."""
        while True:
            await asyncio.sleep(_GC_INTERVAL_SECONDS)
            try:
                await self.collect_garbage()
            except (OSError, StoreError):
                logger.exception("image garbage collection failed")

    async def collect_garbage(self) -> Collected:
        """One round, by disk use. Raises StoreError, OSError."""
        await self.start()
        self._backoff.forget_expired()
        collected = await self._collector.collect()
        await self._store.save()
        if self._files is not None:
            await self._files.collect_garbage()
        return collected

    async def delete_unused(self) -> int:
        """For eviction: delete every image that no running pod uses. Returns the bytes freed. Raises as above."""
        await self.start()
        freed = await self._collector.delete_unused()
        return freed if self._files is None else freed + await self._files.delete_unused()

    async def ensure(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        """See ``Images``. ``credentials`` may be all that the pod brings; those that fit the image are tried."""
        try:
            return await self._ensure(reference, policy, credentials, event, pod_uid)
        except ImageError as error:
            await _emit(event, "Warning", "Failed", f"Error: {error.reason}")
            raise

    async def ensure_files(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        """See ``Images``."""
        files = self._files or self
        return await files.ensure(reference, policy=policy, credentials=credentials, event=event, pod_uid=pod_uid)

    async def _ensure(
        self, name: str, policy: PullPolicy, credentials: Sequence[Credential], event: EventSink, pod_uid: str
    ) -> Image:
        quoted = _quote(name)
        try:
            reference = parse(name)
        except InvalidReferenceError as error:
            message = f"Failed to apply default image tag {quoted}: {error}"
            await _emit(event, "Warning", "InspectFailed", message)
            raise ImageError("InvalidImageName", message) from error

        if policy is not PullPolicy.ALWAYS:
            record = await self._present(reference, quoted, event)
            fitting = pull_credentials.matching(reference, credentials)
            if record is not None and self._store.access.may_use(record.digest, reference, fitting):
                message = f"Container image {quoted} already present on machine and can be accessed by the pod"
                await _emit(event, "Normal", "Pulled", message)
                return await self._image(name, reference, record)
            # Whether the image is here is not shown to those who may not use it.
            if policy is PullPolicy.NEVER:
                message = f"Container image {quoted} is not present with pull policy of Never"
                await _emit(event, "Warning", "ErrImageNeverPull", message)
                raise ImageError("ErrImageNeverPull", message)

        key = (pod_uid, name)
        former = self._backoff.waiting(key)
        if former is not None:
            message = f"Back-off pulling image {quoted}"
            await _emit(event, "Normal", "BackOff", message)
            raise ImageError("ImagePullBackOff", f"{message}: ErrImagePull: {former}")

        await _emit(event, "Normal", "Pulling", f"Pulling image {quoted}")
        began = self._monotonic()
        try:
            pulled = await self._pull(reference, credentials)
            await self._grant(reference, pulled, credentials)
        except (PullError, StoreError) as error:
            await _emit(event, "Warning", "Failed", f"Failed to pull image {quoted}: {error}")
            self._backoff.failed(key, str(error))
            raise ImageError("ErrImagePull", str(error)) from error
        waited = self._monotonic() - began
        await _emit(
            event,
            "Normal",
            "Pulled",
            f"Successfully pulled image {quoted} in {go_duration(pulled.seconds)} ({go_duration(waited)} including"
            f" waiting). Image size: {pulled.record.size_bytes} bytes.",
        )
        self._backoff.forget_expired()
        return await self._image(name, reference, pulled.record)

    async def compiled(self, image: Image, *, owner: str = "", event: EventSink | None = None) -> Path:
        """See ``Images``."""
        self._store.touch(image.manifest_digest)

        async def begins() -> None:
            if event is not None and image.size_bytes >= _TOLD_BYTES:
                size = f"{image.size_bytes / 2**20:.0f} MiB"
                message = f"Compiling image {_quote(image.reference)} ({size}), once on this node"
                await _emit(event, "Normal", "Compiling", message)

        try:
            return await self._compiles.do(
                image.module_digest,
                lambda: self._compiler.compile(
                    image.module_path,
                    _cache_key(image.module_digest),
                    image.kind,
                    server=image.server,
                    owner=owner,
                    begins=begins,
                ),
            )
        except CompileError as error:
            raise ImageError("CreateContainerError", str(error)) from error
        finally:
            self._store.touch(image.manifest_digest)

    async def list(self) -> Sequence[dict[str, object]]:
        """See ``Images``."""
        await self.start()
        found = self._store.status(_STATUS_IMAGES)
        if self._files is not None:
            found = sorted([*found, *await self._files.list()], key=_size, reverse=True)[:_STATUS_IMAGES]
        return found

    def set_in_use(self, module_digests: frozenset[str]) -> None:
        """See ``Images``."""
        for record in self._store.records():
            if record.module_digest in module_digests or record.module_digest in self._in_use:
                self._store.touch(record.digest)
        self._in_use = module_digests

    async def _prune(self, module_digests: Collection[str]) -> None:
        if self._files is None:
            return  # nothing of what it keeps is ever compiled
        await self._compiler.prune({_cache_key(digest) for digest in module_digests})

    async def _present(self, reference: Reference, quoted: str, event: EventSink) -> ImageRecord | None:
        try:
            await self.start()
            record = self._store.lookup(reference)
            if record is None:
                return None
            self._store.touch(record.digest)
            return record if await self._store.has(record.module_digest, record.module_size_bytes) else None
        except (StoreError, OSError) as error:
            message = f"Failed to inspect image {quoted}: {error}"
            await _emit(event, "Warning", "InspectFailed", message)
            raise ImageError("ImageInspectError", message) from error

    async def _grant(self, reference: Reference, pulled: Pulled, credentials: Sequence[Credential]) -> None:
        """A pull may have been shared by pods that bring one login in different Secrets."""
        used = pulled.credential
        own = next((each for each in credentials if each == used), None)
        if self._store.access.granted(pulled.record.digest, reference, own):
            await self._store.save()

    async def _pull(self, reference: Reference, credentials: Sequence[Credential]) -> Pulled:
        """Pods share a pull only when they bring the same credentials, or one would use what another may see."""
        file = self._settings.registry_config
        own = await asyncio.to_thread(pull_credentials.from_docker_config, file) if file is not None else ()
        fitting = (*pull_credentials.matching(reference, credentials), *pull_credentials.matching(reference, own))
        logins = (*credentials, *own)

        async def work() -> Pulled:
            await self.start()
            return await self._puller.pull(reference, fitting, logins)

        return await self._pulls.do((str(reference), _fingerprint(fitting), _fingerprint(logins)), work)

    async def _image(self, name: str, reference: Reference, record: ImageRecord) -> Image:
        path = self._store.blob_path(record.module_digest)
        return Image(
            reference=name,
            image_id=reference.at(record.digest),
            manifest_digest=record.digest,
            module_digest=record.module_digest,
            module_path=path,
            kind=record.kind,
            server=record.kind is GuestKind.COMPONENT and await self._is_server(record.module_digest, path),
            size_bytes=record.size_bytes,
            entrypoint=record.entrypoint,
            cmd=record.cmd,
            env=record.env,
            working_dir=record.working_dir,
            module_name=record.module_name,
        )

    async def _is_server(self, digest: str, path: Path) -> bool:
        """Read from the component once per agent: which world it has is in no manifest of older images."""
        if digest not in self._servers:
            interfaces = await asyncio.to_thread(interfaces_of, path)
            # What cannot be read is named by the compile step.
            self._servers[digest] = interfaces is not None and interfaces.is_server
        return self._servers[digest]


def _size(listed: Mapping[str, object]) -> int:
    size = listed["sizeBytes"]
    return size if isinstance(size, int) else 0


def _cache_key(module_digest: str) -> str:
    """The compile cache knows sha256 by its prefix; a sha512 is its bare digits there."""
    return module_digest.removeprefix("sha512:")


def _quote(text: str) -> str:
    return json.dumps(text)


def _fingerprint(credentials: Sequence[Credential]) -> bytes:
    digest = hashlib.sha256()
    for credential in credentials:
        parts = (credential.registry, credential.username, credential.password, credential.identity_token)
        digest.update(json.dumps(parts).encode())
    return digest.digest()


async def _emit(event: EventSink, type_: str, reason: str, message: str) -> None:
    outcome = event(type_, reason, message)
    if inspect.isawaitable(outcome):
        await outcome
