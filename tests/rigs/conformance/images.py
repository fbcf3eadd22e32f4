"""The images that the tests ask for, in a local registry: one program under the names of Linux images.

It is a component, which can listen and connect, where tests reach for the network, and else a module.

Each keeps its original's entrypoint, because the module looks at ``argv[0]`` as busybox does, and because tests of
``command`` and ``args`` look at it too. An image that is not listed is not there, and its tests fail with a pull error.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from wasilet import process
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.oci.artifact import Artifact, Blob
from wasilet.oci.push import push, reference_named
from wasilet_common.oci import mediatypes

from tests.rigs.conformance.suite import HERE, Suite

REPOSITORY = "e2e"
_LIST_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class _Image:
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    serves: bool = False
    """A component."""

    files: tuple[tuple[str, str], ...] = ()
    """Path and content: it is then an ordinary image, whose files and program are in one archive."""


_KITTEN_FILES = (
    ("data.json", '{"image": "kitten.jpg"}\n'),
    ("etc/os-release", '# What stands in for the image, and has this file of it.\nNAME="Alpine Linux"\n'),
)
"""What the tests of image volumes look for in it."""

_IMAGES: Mapping[str, _Image] = {
    "agnhost": _Image(("/agnhost",), ("pause",), serves=True),
    "busybox": _Image(cmd=("sh",), serves=True),
    "glibc-dns-testing": _Image(cmd=("sh",), serves=True),
    "httpd": _Image(cmd=("httpd",), serves=True),
    "kitten": _Image(cmd=("/kitten.wasm",), serves=True, files=_KITTEN_FILES),
    "nautilus": _Image(cmd=("nautilus",), serves=True),
    "nginx": _Image(cmd=("nginx",), serves=True),
    "nonroot": _Image(cmd=("id",)),
    "pause": _Image(("/pause",)),
    "perl": _Image(cmd=("perl",)),
    "resource-consumer": _Image(("/resource-consumer",)),
}


def repositories(registry: str) -> str:
    """The file of ``KUBE_TEST_REPO_LIST``: every registry of the tests is ``registry``, but the one that must not
    exist, and those of images with a login, which stay what they are."""
    names = ("promoterE2eRegistry", "buildImageRegistry", "gcEtcdRegistry", "gcRegistry", "sigStorageRegistry")
    more = ("dockerLibraryRegistry", "cloudProviderGcpRegistry")
    return yaml.safe_dump(dict.fromkeys((*names, *more), f"{registry}/{REPOSITORY}"))


def push_images(
    suite: Suite, registry: str, repository_list: Path, *, say: Callable[[str], None], environ: Mapping[str, str]
) -> list[str]:
    """Build the stand-ins and push them as every image that the tests name and that they can be. Raises
    HarnessError."""
    module, component = (
        build(find_app(str(HERE / name)), say=say, environ=os.environ).module.read_bytes()
        for name in ("standin", "serving")
    )
    listed = process.run(
        [suite.tests, "--list-images"],
        timeout_seconds=_LIST_TIMEOUT_SECONDS,
        env={**os.environ, "KUBE_TEST_REPO_LIST": str(repository_list)},
    ).stdout.split()
    pushed = []
    for reference in listed:
        image = _IMAGES.get(reference.rpartition("/")[2].partition(":")[0])
        if image is not None and reference.startswith(f"{registry}/{REPOSITORY}/"):
            push(_artifact(component if image.serves else module, image), reference_named(reference), environ=environ)
            pushed.append(reference)
    return pushed


def _artifact(module: bytes, image: _Image) -> Artifact:
    """An image config, which names entrypoint and command, around a wasm layer (runwasi's layout) or an archive."""
    layer = _archive(module, image) if image.files else _wasm_layer(module)
    document = {
        "architecture": "wasm",
        "os": "wasi",
        "config": {"Entrypoint": list(image.entrypoint), "Cmd": list(image.cmd)},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    }
    config = Blob(media_type=mediatypes.OCI_CONFIG, data=json.dumps(document, sort_keys=True).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }
    data = json.dumps(manifest, sort_keys=True).encode()
    return Artifact(manifest=Blob(media_type=mediatypes.OCI_MANIFEST, data=data), config=config, layer=layer)


def _wasm_layer(module: bytes) -> Blob:
    annotations = ((mediatypes.TITLE_ANNOTATION, "standin.wasm"),)
    return Blob(media_type=mediatypes.RUNWASI_LAYER, data=module, annotations=annotations)


def _archive(module: bytes, image: _Image) -> Blob:
    contents = {image.cmd[0].removeprefix("/"): module}
    contents |= {path: text.encode() for path, text in image.files}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in contents.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return Blob(media_type=mediatypes.OCI_LAYER_TAR, data=buffer.getvalue())
