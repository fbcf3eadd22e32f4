"""What a manifest holds, and which wasm module a pod is to run from it.

Four layouts are in use (docs/node.md has the table): the CNCF wasm working group's artifact, wasm-to-oci's older one,
runwasi's OCI image, and a module wrapped into an ordinary container image. An index leads to its wasm entry. Whatever
is neither is refused with its media type or platform in the message, above all a Linux image: ``wrong architecture``.

All input is hostile: only LayoutError comes out of here.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from wasilet_common.components import Interfaces
from wasilet_common.oci import mediatypes
from wasilet_common.oci.reference import is_digest

_WASM_ARCHITECTURES: Final = frozenset({"wasm", "wasm32"})
_WASI_SYSTEMS: Final = frozenset({"wasi", "wasip1", "wasip2", "wasi_preview1"})
_MAX_ENTRIES: Final = 1000
_MAX_STRINGS: Final = 4096
_MAX_STRING_BYTES: Final = 128 * 1024
"""Linux' own limit for one argument."""

_MAX_STRINGS_BYTES: Final = 256 * 1024
"""Of a whole list: the index of the store keeps them, in memory and in a file that each pull writes again."""


class LayoutError(Exception):
    """The image is not one that this node can run; the message is meant for status and event."""


class Layout(StrEnum):
    """Where the module is."""

    CNCF = "CNCF wasm artifact"
    WASM_TO_OCI = "wasm-to-oci artifact"
    RUNWASI = "OCI image with a wasm layer"
    WRAPPED = "container image with a wasm entrypoint"
    SPIN = "Spin application"


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """An OCI content descriptor."""

    media_type: str
    digest: str
    size: int
    title: str = ""
    """``org.opencontainers.image.title``."""

    platform: str = ""
    """``os/architecture``; empty where none is given."""

    artifact_type: str = ""

    @property
    def is_wasm_platform(self) -> bool:
        """Whether the platform is one of the spellings of wasm."""
        return _is_wasm(self.platform)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a pod takes from an image's config."""

    platform: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to fetch: the module is ``layers[0]`` itself, or the file ``member`` in one of ``layers``, last first."""

    layout: Layout
    layers: tuple[Descriptor, ...]
    config: ImageConfig = field(default_factory=ImageConfig)
    member: str = ""
    module_name: str = ""
    """Empty where the image has no name for it."""

    interfaces: Interfaces | None = None
    """A component's names, where the config lists them."""


@dataclass(frozen=True, kw_only=True)
class ImageManifest:
    """An image manifest: a config and layers."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def size_bytes(self) -> int:
        """What the registry stores of it."""
        return self.config.size + sum({layer.digest: layer.size for layer in self.layers}.values())


@dataclass(frozen=True, kw_only=True)
class Index:
    """An index, also called a manifest list or multi-platform image."""

    manifests: tuple[Descriptor, ...]

    def choose(self, otherwise: str = "") -> Descriptor:
        """The wasm entry, or where there is none that of the platform ``otherwise``. Raises LayoutError naming what
        there is instead."""
        for entry in self.manifests:
            if entry.is_wasm_platform:
                return entry
        for entry in self.manifests:
            unnamed = entry.platform in {"", "unknown/unknown"}
            artifacts = {mediatypes.CNCF_WASM_CONFIG, mediatypes.WASM_TO_OCI_CONFIG, *mediatypes.WASM_LAYERS}
            if unnamed and entry.artifact_type in artifacts:
                return entry
        if len(self.manifests) == 1 and not self.manifests[0].platform:
            return self.manifests[0]
        for entry in self.manifests:
            if otherwise and entry.platform == otherwise:
                return entry
        platforms = sorted({entry.platform for entry in self.manifests} - {"", "unknown/unknown"})
        raise LayoutError(
            "wrong architecture: the index has no entry for platform wasi/wasm, only "
            f"{_some(platforms) if platforms else 'entries without a platform'}"
        )


def parse_manifest(body: bytes, media_type: str) -> ImageManifest | Index:
    """Decode a manifest or index. ``media_type`` is the registry's; where it states none, the body's counts.

    Raises LayoutError. A body that could be read as either is refused (CVE-2021-41190).
    """
    document = _object(_decode(body, "manifest"), "the manifest")
    own = document.get("mediaType", "")
    if not isinstance(own, str):
        raise LayoutError("the manifest's mediaType is not a string")
    known = mediatypes.INDEXES | mediatypes.MANIFESTS
    if own in known and media_type in known and own != media_type:
        raise LayoutError(f"the manifest calls itself {own}, but the registry calls it {media_type}")
    kind = media_type if media_type in known else own
    if "manifests" in document and ("layers" in document or "config" in document):
        raise LayoutError("the manifest is ambiguous: it has both manifests and layers")
    if kind not in known:
        if kind == "" and document.get("schemaVersion") == 2 and "manifests" in document:
            kind = mediatypes.OCI_INDEX
        elif kind == "" and document.get("schemaVersion") == 2 and "config" in document:
            kind = mediatypes.OCI_MANIFEST
        else:
            raise LayoutError(f"the manifest's media type {_show(own or media_type)} is not supported")
    if kind in mediatypes.INDEXES:
        return Index(manifests=_descriptors(document.get("manifests"), "manifests"))
    return ImageManifest(
        config=_descriptor(document.get("config"), "config"),
        layers=_descriptors(document.get("layers"), "layers"),
    )


def plan(manifest: ImageManifest, config_body: bytes) -> Plan:
    """Decide what the module is. ``config_body`` is the verified config blob. Raises LayoutError."""
    kind = manifest.config.media_type
    if kind == mediatypes.CNCF_WASM_CONFIG:
        return _plan_cncf(manifest, config_body)
    if kind == mediatypes.SPIN_CONFIG:
        return _plan_spin(manifest, config_body)
    if kind == mediatypes.WASM_TO_OCI_CONFIG:
        return _plan_artifact(manifest, Layout.WASM_TO_OCI, {mediatypes.WASM_TO_OCI_LAYER, mediatypes.CNCF_WASM_LAYER})
    if kind in mediatypes.IMAGE_CONFIGS:
        return _plan_image(manifest, config_body)
    raise LayoutError(f"the image's config media type {_show(kind)} is not that of a wasm or container image")


def check_config_type(manifest: ImageManifest) -> None:
    """Refuse an unknown config before it is fetched. Raises LayoutError."""
    known = {
        mediatypes.CNCF_WASM_CONFIG,
        mediatypes.WASM_TO_OCI_CONFIG,
        mediatypes.SPIN_CONFIG,
        *mediatypes.IMAGE_CONFIGS,
    }
    if manifest.config.media_type not in known:
        raise LayoutError(
            f"the image's config media type {_show(manifest.config.media_type)} is not that of a wasm or container"
            " image"
        )


def _plan_cncf(manifest: ImageManifest, config_body: bytes) -> Plan:
    config = _object(_decode(config_body, "config"), "the config")
    platform = _platform(config.get("os"), config.get("architecture"))
    if platform and not _is_wasm(platform):
        raise LayoutError(f"wrong architecture: the wasm artifact's config says {_show(platform)}, not wasip1/wasm")
    planned = _plan_artifact(manifest, Layout.CNCF, {mediatypes.CNCF_WASM_LAYER})
    return replace(planned, interfaces=_interfaces(config.get("component")))


def _interfaces(component: object) -> Interfaces | None:
    """``component.imports`` and ``exports`` of the CNCF config. One without imports (null, as some tools write where
    they did not look) says nothing."""
    if not isinstance(component, dict) or not isinstance(component.get("imports"), list):
        return None
    return Interfaces(
        imports=_strings(component["imports"], "component.imports"),
        exports=_strings(component.get("exports"), "component.exports"),
    )


def _plan_spin(manifest: ImageManifest, config_body: bytes) -> Plan:
    """Spin's locked application: one component behind HTTP, with nothing that only Spin's runtime has."""
    app = _object(_decode(config_body, "config"), "the config")
    kinds = sorted({str(item.get("trigger_type")) for item in _objects(app.get("triggers"), "triggers")})
    components = _objects(app.get("components"), "components")
    if len(components) != 1:
        raise LayoutError(f"the Spin application has {len(components)} components; this node runs one per container")
    if kinds != ["http"]:
        raise LayoutError(f"the Spin application is started by {_some(kinds) or 'nothing'}; this node serves HTTP only")
    component = components[0]
    metadata = component.get("metadata") or {}
    needs = [what for key, what in _SPIN_NEEDS.items() if isinstance(metadata, dict) and metadata.get(key)]
    needs += [what for key, what in _SPIN_PARTS.items() if component.get(key)]
    if needs:
        raise LayoutError(
            f"the Spin application needs {', '.join(needs)}, which this node does not offer: build it without, or run "
            "it by SpinKube"
        )
    source = _object(component.get("source"), "the component's source")
    layer = next((layer for layer in manifest.layers if layer.digest == source.get("digest")), None)
    if layer is None:
        raise LayoutError("the Spin application's component is not among the image's layers")
    variables = component.get("env") or {}
    env = _object(variables, "the component's env")
    if len(env) > _MAX_STRINGS or not all(isinstance(value, str) for value in env.values()):
        raise LayoutError("the Spin application's env is not a list of strings")
    identity = component.get("id")
    return Plan(
        layout=Layout.SPIN,
        layers=(layer,),
        config=ImageConfig(env=tuple((str(name), value) for name, value in env.items())),
        module_name=_base_name(identity) if isinstance(identity, str) else "",
    )


_SPIN_NEEDS: Final = {
    "key_value_stores": "a key-value store",
    "sqlite_databases": "an SQLite database",
    "databases": "an SQLite database",
    "ai_models": "an AI model",
}
_SPIN_PARTS: Final = {
    "files": "files that Spin mounts",
    "config": "variables of the application",
    "dependencies": "components that Spin composes",
}


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
        raise LayoutError(f"the Spin application's {what} are not a list")
    return [_object(item, f"one of the Spin application's {what}") for item in value]


def _plan_artifact(manifest: ImageManifest, layout: Layout, allowed: set[str]) -> Plan:
    if not manifest.layers:
        raise LayoutError(f"the {layout} has no layer")
    layer = manifest.layers[0]
    if layer.media_type not in allowed:
        raise LayoutError(f"the {layout}'s first layer has media type {_show(layer.media_type)}, not {_some(allowed)}")
    return Plan(layout=layout, layers=(layer,), module_name=_base_name(layer.title))


def _plan_image(manifest: ImageManifest, config_body: bytes) -> Plan:
    document = _object(_decode(config_body, "config"), "the config")
    config = _image_config(document)
    wasm_layers = [layer for layer in manifest.layers if layer.media_type in mediatypes.WASM_LAYERS]
    argv = config.entrypoint or config.cmd
    if wasm_layers:
        layer = _named_layer(wasm_layers, argv)
        return Plan(
            layout=Layout.RUNWASI, layers=(layer,), config=config, module_name=_base_name(layer.title or _first(argv))
        )
    path = _module_path(config)
    if not path:
        platform = config.platform or "an unknown platform"
        raise LayoutError(
            f"wrong architecture: the image is for {_show(platform)} (config {manifest.config.media_type}) and its"
            f" entrypoint {_show(_first(argv))} is not a .wasm file; this node runs WebAssembly only"
        )
    known = mediatypes.TAR_LAYERS | mediatypes.TAR_GZIP_LAYERS | mediatypes.TAR_ZSTD_LAYERS
    for layer in manifest.layers:
        if layer.media_type not in known:
            raise LayoutError(f"the image's layer has media type {_show(layer.media_type)}, which is not supported")
    if not manifest.layers:
        raise LayoutError(f"the image has no layer that could hold its entrypoint {_show(path)}")
    return Plan(
        layout=Layout.WRAPPED,
        layers=manifest.layers,
        config=config,
        member=path,
        module_name=posixpath.basename(path),
    )


def _named_layer(layers: Sequence[Descriptor], argv: Sequence[str]) -> Descriptor:
    """runwasi images may carry several modules; the entrypoint picks one by its title, else the first one runs."""
    entry = _base_name(_first(argv))
    return next((layer for layer in layers if entry and _base_name(layer.title) == entry), layers[0])


def _module_path(config: ImageConfig) -> str:
    """The entrypoint as a path within the layers, or empty when it is no ``*.wasm``."""
    entry = _first(config.entrypoint or config.cmd)
    if not entry.lower().endswith(".wasm"):
        return ""
    absolute = posixpath.normpath(posixpath.join("/", config.working_dir, entry))
    return absolute.lstrip("/")


def _image_config(document: dict[str, Any]) -> ImageConfig:
    inner = document.get("config")
    inner = {} if inner is None else _object(inner, "the config's config")
    env = []
    for entry in _strings(inner.get("Env"), "Env"):
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise LayoutError("the image's config has an Env entry that is not NAME=value")
        env.append((name, value))
    working_dir = inner.get("WorkingDir") or ""
    if not isinstance(working_dir, str) or "\0" in working_dir or len(working_dir) > 4096:
        raise LayoutError("the image's config has a WorkingDir that is not a path")
    return ImageConfig(
        platform=_platform(document.get("os"), document.get("architecture")),
        entrypoint=_strings(inner.get("Entrypoint"), "Entrypoint"),
        cmd=_strings(inner.get("Cmd"), "Cmd"),
        env=tuple(env),
        working_dir=working_dir,
    )


def _strings(value: object, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_STRINGS:
        raise LayoutError(f"the image's config has an {name} that is not a list of strings")
    for item in value:
        if not isinstance(item, str) or "\0" in item or len(item) > _MAX_STRING_BYTES or not _encodable(item):
            raise LayoutError(f"the image's config has an {name} that is not a list of strings")
    if sum(map(len, value)) > _MAX_STRINGS_BYTES:
        raise LayoutError(f"the image's config has an {name} of more than {_MAX_STRINGS_BYTES} characters")
    return tuple(value)


def _descriptors(value: object, name: str) -> tuple[Descriptor, ...]:
    if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
        raise LayoutError(f"the manifest's {name} is not a list of at most {_MAX_ENTRIES} descriptors")
    return tuple(_descriptor(item, name) for item in value)


def _descriptor(value: object, name: str) -> Descriptor:
    item = _object(value, f"a descriptor of the manifest's {name}")
    media_type, digest, size = item.get("mediaType"), item.get("digest"), item.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str) or not is_digest(digest):
        raise LayoutError(f"a descriptor of the manifest's {name} has no media type, or no sha256 or sha512 digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise LayoutError(f"a descriptor of the manifest's {name} has no size")
    annotations = item.get("annotations")
    title = annotations.get(mediatypes.TITLE_ANNOTATION) if isinstance(annotations, dict) else None
    platform = item.get("platform")
    artifact_type = item.get("artifactType")
    return Descriptor(
        media_type=media_type,
        digest=digest,
        size=size,
        title=title if isinstance(title, str) else "",
        platform=_platform(platform.get("os"), platform.get("architecture")) if isinstance(platform, dict) else "",
        artifact_type=artifact_type if isinstance(artifact_type, str) else "",
    )


def _platform(system: object, architecture: object) -> str:
    if not isinstance(system, str) or not isinstance(architecture, str) or not (system or architecture):
        return ""
    return f"{system}/{architecture}"[:80]


def _is_wasm(platform: str) -> bool:
    """``wasi/wasm``, as runwasi and Docker write it, wasip1 and wasip2, and both the other way round."""
    first, _, second = platform.partition("/")
    pairs = ((first, second), (second, first))
    return any(system in _WASI_SYSTEMS and architecture in _WASM_ARCHITECTURES for system, architecture in pairs)


def _base_name(title: str) -> str:
    """A title is only a name: of a path its last part, and nothing that would not do as argv[0]."""
    name = posixpath.basename(title.rstrip("/"))
    return name if name.isprintable() and len(name) <= 255 and _encodable(name) else ""


def _first(argv: Sequence[str]) -> str:
    return argv[0] if argv else ""


def _decode(body: bytes, what: str) -> object:
    try:
        document: object = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"the image's {what} is not JSON") from error
    return document


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LayoutError(f"{what} is not a JSON object")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(text: str) -> str:
    return json.dumps(text[:200])


def _some(names: Sequence[str] | set[str], limit: int = 8) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(json.dumps(name)[1:-1] for name in shown[:limit]) + more
