"""A wasm module as an OCI artifact: the four layouts that the node reads, made from a file.

The first is what is written by default: the CNCF wasm working group's artifact. Its config names the operating system
(``wasip1`` or ``wasip2``) and, for a component, the interfaces it imports and exports. The other three are for
registries, runtimes and tests that expect them.

What is made depends on the module alone: the same bytes pushed twice are one manifest with one digest. Hence the
creation time is the module's own (or ``SOURCE_DATE_EPOCH``'s), never now, and tar headers are empty of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from wasilet_common.components import ComponentError, interfaces_of
from wasilet_common.oci import mediatypes
from wasilet_common.time_format import NANOSECONDS, rfc3339

from wasilet.build.application import wasi_version
from wasilet.errors import HarnessError, UsageError

_MAX_MODULE_BYTES = 512 * 1024 * 1024
"""The node refuses larger ones."""


class Layout(StrEnum):
    """How an artifact is laid out; the value is what ``--layout`` takes."""

    CNCF = "cncf"
    """CNCF wasm OCI artifact."""

    KRUSTLET = "krustlet"
    """As wasm-to-oci wrote it and Krustlet read it."""

    RUNWASI = "runwasi"
    """An OCI image of platform ``wasi/wasm`` with a wasm layer."""

    IMAGE = "image"
    """The module as a file in an ordinary container image of platform ``wasi/wasm``."""


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Bytes with their media type and digest."""

    media_type: str
    data: bytes
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """``sha256:...``, computed here and never taken from a server."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"

    def descriptor(self) -> dict[str, Any]:
        """The OCI content descriptor."""
        descriptor: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}
        if self.annotations:
            descriptor["annotations"] = dict(self.annotations)
        return descriptor


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Everything that a push uploads, in this order: blobs, then the manifest."""

    manifest: Blob
    config: Blob
    layer: Blob

    @property
    def digest(self) -> str:
        """The manifest's: what a pod may pin."""
        return self.manifest.digest

    @property
    def size_bytes(self) -> int:
        """Of all three."""
        return len(self.manifest.data) + len(self.config.data) + len(self.layer.data)


def layout_named(text: str) -> Layout:
    """``--layout``'s value. Raises UsageError."""
    try:
        return Layout(text)
    except ValueError:
        raise UsageError(f"unknown layout {text!r}", hint=f"known are {', '.join(Layout)}") from None


def make_artifact(module: Path, *, layout: Layout = Layout.CNCF, environ: Mapping[str, str] = os.environ) -> Artifact:
    """Lay ``module`` out. Raises HarnessError when it is no wasm binary or larger than a node takes."""
    try:
        version = wasi_version(module)
        status = module.stat()
        if status.st_size > _MAX_MODULE_BYTES:
            raise HarnessError(f"{module} is larger than {_MAX_MODULE_BYTES // 2**20} MiB, which no node pulls")
        data = module.read_bytes()
    except OSError as error:
        raise UsageError(f"{module} cannot be read: {error.strerror}") from error
    created = _created(status.st_mtime, environ)
    make = {
        Layout.CNCF: _cncf,
        Layout.KRUSTLET: _krustlet,
        Layout.RUNWASI: _runwasi,
        Layout.IMAGE: _image,
    }[layout]
    config, layer, annotations = make(data, module.name, version, created)
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }
    if annotations:
        manifest["annotations"] = annotations
    return Artifact(manifest=Blob(media_type=mediatypes.OCI_MANIFEST, data=_json(manifest)), config=config, layer=layer)


_Parts = tuple[Blob, Blob, dict[str, str]]


def _cncf(data: bytes, name: str, version: str, created: str) -> _Parts:
    layer = _layer(mediatypes.CNCF_WASM_LAYER, data, name)
    config: dict[str, Any] = {
        "created": created,
        "architecture": "wasm",
        "os": version,
        "layerDigests": [layer.digest],
    }
    if version == "wasip2":
        try:
            found = interfaces_of(data)
        except ComponentError as error:
            raise HarnessError(f"the component is damaged: {error}") from error
        config["component"] = {"exports": list(found.exports), "imports": list(found.imports)}
        if found.target:
            config["component"]["target"] = found.target
    return Blob(media_type=mediatypes.CNCF_WASM_CONFIG, data=_json(config)), layer, {}


def _krustlet(data: bytes, name: str, version: str, created: str) -> _Parts:  # noqa: ARG001  (one signature for all)
    return (
        Blob(media_type=mediatypes.WASM_TO_OCI_CONFIG, data=b"{}"),
        _layer(mediatypes.WASM_TO_OCI_LAYER, data, name),
        {},
    )


def _runwasi(data: bytes, name: str, version: str, created: str) -> _Parts:  # noqa: ARG001  (one signature for all)
    layer = _layer(mediatypes.RUNWASI_LAYER, data, name)
    return _image_config(layer.digest, created, {}), layer, {}


def _image(data: bytes, name: str, version: str, created: str) -> _Parts:  # noqa: ARG001  (one signature for all)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), 0o755
        tar.addfile(entry, io.BytesIO(data))
    layer = Blob(media_type=mediatypes.OCI_LAYER_TAR, data=archive.getvalue())
    return _image_config(layer.digest, created, {"Entrypoint": [f"/{name}"]}), layer, {}


def _image_config(diff_id: str, created: str, config: dict[str, Any]) -> Blob:
    """An OCI image config; a layer that is not compressed has its digest as diff id."""
    image = {
        "created": created,
        "architecture": "wasm",
        "os": "wasi",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    return Blob(media_type=mediatypes.OCI_CONFIG, data=_json(image))


def _layer(media_type: str, data: bytes, name: str) -> Blob:
    return Blob(media_type=media_type, data=data, annotations=((mediatypes.TITLE_ANNOTATION, name),))


def _created(modified: float, environ: Mapping[str, str]) -> str:
    epoch = environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(epoch) if epoch.isdecimal() else int(modified)
    return rfc3339(int(seconds) * NANOSECONDS)


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), sort_keys=True).encode()
