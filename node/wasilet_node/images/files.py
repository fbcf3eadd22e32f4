"""Images and artifacts as files, for image volumes (KEP-4639).

They have their own store, where an image's "module" is one plain archive of all its files: policies, events,
back-off, access, verification and garbage collection are then those of every image. A pod's volume is unpacked from the
archive and goes with the pod, so that nothing of the store is in use by pods.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from typing import BinaryIO

from wasilet_common.oci import mediatypes, tarball
from wasilet_common.oci.choice import choose
from wasilet_common.oci.file_tree import Merger, checked
from wasilet_common.oci.layouts import Descriptor, ImageManifest, LayoutError
from wasilet_common.oci.reference import Reference
from wasilet_common.oci.repository import Manifest, Repository

from wasilet_node.images.pull import Puller
from wasilet_node.images.store import ImageRecord
from wasilet_node.images.uninterrupted import uninterrupted
from wasilet_node.runtime.protocol import GuestKind

_MACHINES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
_TAR = mediatypes.TAR_LAYERS | mediatypes.TAR_GZIP_LAYERS | mediatypes.TAR_ZSTD_LAYERS


@dataclass(frozen=True, kw_only=True)
class _Layer:
    blob: Descriptor
    name: str
    """Of the file that the layer is; empty: it is an archive of files."""


def plan_files(image: ImageManifest) -> tuple[_Layer, ...]:
    """What each layer is, the lowest first: those of a container image are archives, those of an artifact are files,
    named by their title or else by their digest. Raises LayoutError."""
    is_image = image.config.media_type in mediatypes.IMAGE_CONFIGS
    found = []
    for layer in image.layers:
        if is_image and layer.media_type not in mediatypes.WASM_LAYERS:
            if layer.media_type not in _TAR:
                raise LayoutError(f"the image's layer has media type {layer.media_type!r}, which is not supported")
            found.append(_Layer(blob=layer, name=""))
        else:
            title = "/".join(part for part in layer.title.split("/") if part not in {"", "."})
            found.append(_Layer(blob=layer, name=checked(title) or layer.digest.partition(":")[2]))
    if not found:
        raise LayoutError("the image has no layers, so there are no files in it")
    return tuple(found)


class FilePuller(Puller):
    """Pulls an image's files as one archive. Of an index the entry for wasm is taken, else the one for this machine:
    data have no architecture, but images often say one."""

    async def _make(self, repository: Repository, top: Manifest, reference: Reference, digest: str) -> ImageRecord:
        chosen = await choose(repository, top, platform=_MACHINES.get(platform.machine(), ""))
        layers = plan_files(chosen.image)
        total = sum(layer.blob.size for layer in layers)
        limit = self._settings.max_image_bytes
        if total > limit:
            raise LayoutError(f"the image's layers have {total} bytes, over the {limit} allowed")
        archive, length = await self._merge(repository, layers)
        async with self._temporarily(archive):
            record = ImageRecord(
                digest=digest,
                module_digest=archive,
                module_size_bytes=length,
                kind=GuestKind.MODULE,
                size_bytes=chosen.size_bytes + chosen.image.size_bytes,
            )
            await self._store.add(reference, record)
        return record

    async def _merge(self, repository: Repository, layers: tuple[_Layer, ...]) -> tuple[str, int]:
        budget = tarball.Budget(total_bytes=self._settings.max_image_bytes)
        with self._store.temporary() as (path, file):
            merger = Merger(file, budget=budget)
            for layer in reversed(layers):
                async with self._temporarily(layer.blob.digest):
                    await self._blob(repository, layer.blob)
                    blob = self._store.blob_path(layer.blob.digest)
                    if layer.name:
                        await uninterrupted(merger.file, layer.name, blob)
                    else:
                        await uninterrupted(merger.layer, blob, media_type=layer.blob.media_type)
            await uninterrupted(merger.finish)
            length = file.tell()
            digest = await uninterrupted(_digest, file)
            await uninterrupted(self._store.adopt, path, file, digest)
        return digest, length


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    hasher = hashlib.sha256()
    while chunk := file.read(1024 * 1024):
        hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"
