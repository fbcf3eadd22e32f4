"""The media types of wasm images, in one place and free of imports, because the harness writes what the node reads.

Sources: the OCI image and distribution specifications; the CNCF wasm working group's artifact layout; wasm-to-oci;
runwasi; Docker's manifest version 2, schema 2.
"""

from __future__ import annotations

from typing import Final

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_TAR_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_TAR_ZSTD: Final = "application/vnd.oci.image.layer.v1.tar+zstd"

DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_TAR: Final = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_TAR_GZIP: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"

CNCF_WASM_CONFIG: Final = "application/vnd.wasm.config.v0+json"
CNCF_WASM_LAYER: Final = "application/wasm"
WASM_TO_OCI_CONFIG: Final = "application/vnd.wasm.config.v1+json"
WASM_TO_OCI_LAYER: Final = "application/vnd.wasm.content.layer.v1+wasm"
RUNWASI_LAYER: Final = "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm"

SPIN_CONFIG: Final = "application/vnd.fermyon.spin.application.v1+config"

TITLE_ANNOTATION: Final = "org.opencontainers.image.title"

INDEXES: Final = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
IMAGE_CONFIGS: Final = frozenset({OCI_CONFIG, DOCKER_CONFIG})
WASM_LAYERS: Final = frozenset({CNCF_WASM_LAYER, WASM_TO_OCI_LAYER, RUNWASI_LAYER})
TAR_LAYERS: Final = frozenset({OCI_LAYER_TAR, DOCKER_LAYER_TAR})
TAR_GZIP_LAYERS: Final = frozenset({OCI_LAYER_TAR_GZIP, DOCKER_LAYER_TAR_GZIP})
TAR_ZSTD_LAYERS: Final = frozenset({OCI_LAYER_TAR_ZSTD})

ACCEPT: Final = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}, {DOCKER_INDEX}"
"""What the node asks a registry for."""
