"""From what a reference names to the wasm image's manifest: the way through indexes, one for pulls of the node and of
the commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wasilet_common.oci import layouts
from wasilet_common.oci.layouts import ImageManifest, Index, LayoutError
from wasilet_common.oci.repository import MAX_MANIFEST_BYTES, Manifest, Repository

_MAX_INDEX_DEPTH: Final = 3


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The image's manifest, and the bytes of all manifests on the way to it."""

    manifest: Manifest
    image: ImageManifest
    size_bytes: int


async def choose(repository: Repository, top: Manifest, *, platform: str = "") -> Chosen:
    """Follow indexes to the wasm image manifest, or where there is none to that of a platform (``os/architecture``).
    Raises LayoutError, RegistryError."""
    manifest, size = top, len(top.body)
    document = layouts.parse_manifest(top.body, top.media_type)
    for _ in range(_MAX_INDEX_DEPTH):
        if not isinstance(document, Index):
            break
        entry = document.choose(platform)
        if entry.size > MAX_MANIFEST_BYTES:
            raise LayoutError(f"the manifest {entry.digest} has {entry.size} bytes, more than {MAX_MANIFEST_BYTES}")
        manifest = await repository.manifest(entry.digest)
        if len(manifest.body) != entry.size:
            raise LayoutError(f"the manifest {entry.digest} has not the size that its index says")
        size += entry.size
        document = layouts.parse_manifest(manifest.body, manifest.media_type or entry.media_type)
    if isinstance(document, Index):
        raise LayoutError(f"the image's indexes are nested more than {_MAX_INDEX_DEPTH} deep")
    return Chosen(manifest=manifest, image=document, size_bytes=size)
