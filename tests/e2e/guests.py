"""Images for end-to-end tests, by name: pushed once a session into the registry of the cluster.

``toolbox`` (``tests/e2e/toolbox``) does what its arguments say and is what most cases run, here in each of the layouts.
The others are what an image must not be, or must be in a way that no tool of ours writes: an index, a Linux image, a
module without an entry point.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wasmtime
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.build.component_host import ensure_component_host, found_component_host
from wasilet.build.npm import find_node
from wasilet.build.toolchain import find_rust
from wasilet.demo.demo_services import private_registry
from wasilet.errors import HarnessError
from wasilet.oci.artifact import Artifact, Blob, Layout, make_artifact
from wasilet.oci.logins import basic_header, logins_for
from wasilet.oci.push import push, reference_named
from wasilet.providers.base import Cluster
from wasilet_common.oci import mediatypes
from wasilet_common.oci.credentials import Credential

from tests.e2e import componentize
from tests.unit.node.runtime.component_guests import component_guest

FOLDER = Path(__file__).parent
OLDEST_RUST_OF_BINDINGS = (1, 78, 0)


@dataclass
class Guests:
    """What was pushed: name to reference, and to digest."""

    registry: str
    environ: Mapping[str, str]
    """That of the cluster's settings, by which its registry's login is found."""

    references: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    dockerconfig: str = ""
    """The login of the private registry, which holds the guest ``private``."""

    def add(self, name: str, artifact: Artifact) -> str:
        """Push an artifact under ``guests/<name>:v1``."""
        reference = f"{self.registry}/guests/{name}:v1"
        pushed = push(artifact, reference_named(reference), environ=self.environ)
        self.references[name], self.digests[name] = reference, pushed.digest
        return reference

    def add_wat(self, name: str, text: str) -> str:
        """Compile WebAssembly text and push it."""
        return self.add_bytes(name, bytes(wasmtime.wat2wasm(text)))

    def add_bytes(self, name: str, module: bytes, layout: Layout = Layout.CNCF) -> str:
        """Push a module."""
        return self.add(name, module_artifact(name, module, layout))

    def add_index(self, name: str, platforms: Mapping[str, str]) -> str:
        """An index: platform (``os/architecture``) to the name of a guest."""
        manifests = []
        for platform, guest in platforms.items():
            system, _, architecture = platform.partition("/")
            manifest = self._manifest(guest)
            manifests.append(
                {
                    "mediaType": mediatypes.OCI_MANIFEST,
                    "digest": f"sha256:{hashlib.sha256(manifest).hexdigest()}",
                    "size": len(manifest),
                    "platform": {"os": system, "architecture": architecture},
                }
            )
            self._put("indexes", manifest, mediatypes.OCI_MANIFEST, f"m{len(manifests)}", mount_from=guest)
        index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": manifests}
        data = json.dumps(index).encode()
        self._put("indexes", data, mediatypes.OCI_INDEX, name)
        self.references[name] = f"{self.registry}/guests/indexes:{name}"
        self.digests[name] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return self.references[name]

    def _manifest(self, guest: str) -> bytes:
        return self._request("GET", f"/v2/guests/{guest}/manifests/v1", {"Accept": mediatypes.ACCEPT})

    def _put(self, repository: str, data: bytes, media_type: str, tag: str, *, mount_from: str = "") -> None:
        if mount_from:
            for blob in _blobs(json.loads(data)):
                query = f"mount={blob}&from=guests/{mount_from}"
                self._request("POST", f"/v2/guests/{repository}/blobs/uploads/?{query}", {"Content-Length": "0"})
        self._request("PUT", f"/v2/guests/{repository}/manifests/{tag}", {"Content-Type": media_type}, data)

    def _login(self) -> Credential:
        return logins_for(reference_named(f"{self.registry}/guests/x:v1"), self.environ)[0]

    def _request(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.registry, timeout=10)
        try:
            connection.request(method, path, body, {**headers, "Authorization": basic_header(self._login())})
            response = connection.getresponse()
            answer = response.read()
            assert response.status < 300, f"{method} {path}: {response.status} {answer!r}"
            return answer
        finally:
            connection.close()


def _blobs(manifest: Mapping[str, Any]) -> list[str]:
    return [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]


def push_guests(cluster: Cluster, registry: str) -> Guests:
    """All of them, one into a second registry with a login."""
    guests = Guests(registry, cluster.settings.environ)
    toolbox = build_toolbox()
    guests.add_bytes("toolbox", toolbox)
    if not componentize.why_not():
        component = componentize.as_component(toolbox)
        guests.add_bytes("toolbox-component", component)
        guests.add_bytes("toolbox-component-runwasi", component, Layout.RUNWASI)
        guests.add_bytes("hello-component", componentize.as_component(build_guest("hello-world")))
    for layout in (Layout.KRUSTLET, Layout.RUNWASI, Layout.IMAGE):
        guests.add_bytes(f"toolbox-{layout}", toolbox, layout)
    for name, make in _OTHERS.items():
        guests.add(name, make(toolbox))
    guests.add_index("index", {"linux/amd64": "linux", "wasi/wasm": "toolbox-runwasi"})
    guests.add_index("linux-index", {"linux/amd64": "linux", "linux/arm64": "linux"})
    for name, text in _TEXTS.items():
        guests.add_wat(name, text)
    address, environ, secret = private_registry(cluster, "guests", say=lambda _: None)
    guests.dockerconfig = base64.b64decode(secret["data"][".dockerconfigjson"]).decode()
    guests.references["private"] = f"{address}/guests/private:v1"
    push(module_artifact("private", toolbox), reference_named(guests.references["private"]), environ=environ)
    return guests


def build_toolbox() -> bytes:
    """The module of ``tests/e2e/toolbox``."""
    return build_guest(str(FOLDER / "toolbox"))


def needs_a_component_host() -> None:
    """Skip where the component host is not here and cannot be built: no Rust, or one that is too old."""
    if found_component_host(os.environ) is None:
        try:
            ensure_component_host(lambda _: None, os.environ)
        except HarnessError as error:
            pytest.skip(error.message)


def needs_node() -> None:
    """Skip where no Node.js can run the compilers that come by npm."""
    try:
        find_node("this test", os.environ)
    except HarnessError as error:
        pytest.skip(error.message)


def needs_rust_for_bindings() -> None:
    """Skip where the Rust that builds for WASI cannot compile the bindings of WASI 0.2: Debian 12's."""
    rust = find_rust()
    if rust is not None and rust.rustc_version < OLDEST_RUST_OF_BINDINGS:
        pytest.skip(f"the bindings of WASI 0.2 need a newer Rust than {rust}")


def build_guest(app: str) -> bytes:
    """The module of a sample or a folder."""
    return build(find_app(app), say=lambda _: None, environ=os.environ).module.read_bytes()


def module_artifact(name: str, module: bytes, layout: Layout = Layout.CNCF) -> Artifact:
    """A module laid out as ``invoke push`` does it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.wasm"
        file.write_bytes(module)
        return make_artifact(file, layout=layout, environ={"SOURCE_DATE_EPOCH": "0"})


def image(files: Mapping[str, bytes], config: Mapping[str, Any], *, platform: str = "wasi/wasm") -> Artifact:
    """A container image of one tar layer. ``config``: Entrypoint, Cmd, Env, WorkingDir."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    layer = Blob(media_type=mediatypes.OCI_LAYER_TAR, data=archive.getvalue())
    system, _, architecture = platform.partition("/")
    document = {
        "os": system,
        "architecture": architecture,
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    }
    return artifact(layer, Blob(media_type=mediatypes.OCI_CONFIG, data=json.dumps(document).encode()))


def artifact(layer: Blob, config: Blob) -> Artifact:
    """An OCI manifest of one layer."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
    }
    data = json.dumps(manifest).encode()
    return Artifact(manifest=Blob(media_type=mediatypes.OCI_MANIFEST, data=data), config=config, layer=layer)


def wasm_artifact(module: bytes) -> Artifact:
    """The CNCF layout around any bytes, a module or not."""
    layer = Blob(media_type=mediatypes.CNCF_WASM_LAYER, data=module)
    config = {"architecture": "wasm", "os": "wasip1", "layerDigests": [layer.digest]}
    return artifact(layer, Blob(media_type=mediatypes.CNCF_WASM_CONFIG, data=json.dumps(config).encode()))


_OTHERS: Mapping[str, Callable[[bytes], Artifact]] = {
    "linux": lambda _: image({"bin/sh": b"\x7fELF"}, {"Entrypoint": ["/bin/sh"]}, platform="linux/amd64"),
    "configured": lambda toolbox: image(
        {"app/main.wasm": toolbox},
        {
            "Entrypoint": ["/app/main.wasm", "say entrypoint"],
            "Cmd": ["say cmd"],
            "Env": ["FROM_IMAGE=image", "BOTH=image"],
            "WorkingDir": "/work",
        },
    ),
    "chart": lambda _: artifact(
        Blob(media_type="application/vnd.cncf.helm.chart.content.v1.tar+gzip", data=b"chart"),
        Blob(media_type="application/vnd.cncf.helm.config.v1+json", data=b"{}"),
    ),
    "text": lambda _: wasm_artifact(b"this is no module"),
    "cut-short": lambda toolbox: wasm_artifact(toolbox[: len(toolbox) // 2]),
}

_TEXTS: Mapping[str, str] = {
    "no-start": '(module (memory (export "memory") 1) (func (export "main")))',
    "start-is-a-global": '(module (global (export "_start") i32 (i32.const 1)))',
    "start-takes-a-value": '(module (func (export "_start") (param i32)))',
    "start-gives-a-value": '(module (func (export "_start") (result i32) (i32.const 0)))',
    "wasi-unstable": '(module (import "wasi_unstable" "proc_exit" (func (param i32))) (func (export "_start")))',
    "foreign-import": '(module (import "env" "fetch" (func)) (memory (export "memory") 1) (func (export "_start")))',
    "trap-at-start": '(module (memory (export "memory") 1) (func $boom unreachable) (start $boom) '
    '(func (export "_start")))',
    "component": component_guest("(i32.const 0)"),
    "component-fails": component_guest("(i32.const 1)"),
    "component-exit-7": component_guest("(call $exit_code (i32.const 7)) (i32.const 0)"),
    "component-traps": component_guest("unreachable"),
    "component-keyvalue": component_guest(
        "(i32.const 0)", imports='(import "wasi:keyvalue/store@0.2.0-draft" (instance (export "handle" (func))))'
    ),
}
