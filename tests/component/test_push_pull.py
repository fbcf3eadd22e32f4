"""Artifacts to a real registry and back: what is pushed is what is pulled, and a registry in trouble says so soon."""

from __future__ import annotations

import base64
import hashlib
import http.client
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from wasilet.errors import HarnessError, UsageError
from wasilet.oci.artifact import Layout, make_artifact
from wasilet.oci.push import RegistryError, holds, pull, push, reference_named

from tests.component.registry_rig import PASSWORD, USER, free_port, running_registry

pytestmark = pytest.mark.component

MODULE = b"\0asm\x01\x00\x00\x00" + b"\x00\x04\x03abc"
OTHER = b"\0asm\x01\x00\x00\x00" + b"\x00\x04\x03xyz"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("guarded"), login=True) as address:
        yield address


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "hello.wasm"
    path.write_bytes(MODULE)
    return path


def fetch(registry: str, path: str, accept: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(registry, timeout=5)
    try:
        connection.request("GET", path, headers={"Accept": accept})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("layout", "config_type", "layer_type"),
    [
        (Layout.CNCF, "application/vnd.wasm.config.v0+json", "application/wasm"),
        (
            Layout.KRUSTLET,
            "application/vnd.wasm.config.v1+json",
            "application/vnd.wasm.content.layer.v1+wasm",
        ),
        (
            Layout.RUNWASI,
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
        ),
        (Layout.IMAGE, "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"),
    ],
)
def test_the_registry_holds_the_layout_that_was_asked_for(
    registry: str, module: Path, layout: Layout, config_type: str, layer_type: str
) -> None:
    reference = reference_named(f"{registry}/layouts/{layout}:v1")
    pushed = push(make_artifact(module, layout=layout), reference)
    status, body = fetch(
        registry, f"/v2/layouts/{layout}/manifests/{pushed.digest}", "application/vnd.oci.image.manifest.v1+json"
    )
    assert status == 200
    assert f"sha256:{hashlib.sha256(body).hexdigest()}" == pushed.digest
    manifest = json.loads(body)
    assert manifest["config"]["mediaType"] == config_type
    assert [layer["mediaType"] for layer in manifest["layers"]] == [layer_type]


def test_what_was_pushed_comes_back_byte_for_byte(registry: str, module: Path, tmp_path: Path) -> None:
    reference = reference_named(f"{registry}/hello:v1")
    pushed = push(make_artifact(module), reference)
    output = tmp_path / "out.wasm"
    pulled = pull(reference, output=output)
    assert output.read_bytes() == MODULE
    assert pulled.digest == pushed.digest
    assert pulled.config["os"] == "wasip1"
    assert pulled.layers[0][3] == "hello.wasm"
    assert pull(reference_named(pushed.pinned)).digest == pushed.digest


def test_pushing_the_same_module_again_uploads_nothing_and_names_the_same_digest(registry: str, module: Path) -> None:
    reference = reference_named(f"{registry}/again:v1")
    first = push(make_artifact(module), reference)
    second = push(make_artifact(module), reference)
    assert first.uploaded_bytes > 0
    assert second.uploaded_bytes == 0
    assert second.digest == first.digest


def test_a_tag_that_moved_on_no_longer_holds_the_first_artifact(registry: str, module: Path) -> None:
    reference = reference_named(f"{registry}/moving:latest")
    first = make_artifact(module)
    assert not holds(first, reference)
    push(first, reference)
    assert holds(first, reference)
    module.write_bytes(OTHER)
    push(make_artifact(module), reference)
    assert not holds(first, reference)


def test_a_login_from_dockers_configuration_opens_a_guarded_registry(
    guarded: str, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "docker"
    config.mkdir()
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (config / "config.json").write_text(json.dumps({"auths": {guarded: {"auth": secret}}}))
    environ = {"DOCKER_CONFIG": str(config)}
    reference = reference_named(f"{guarded}/private/hello:v1")
    pushed = push(make_artifact(module), reference, environ=environ)
    assert pull(reference, environ=environ).digest == pushed.digest
    with pytest.raises(RegistryError, match="wants a login for private/hello, and there is none") as refused:
        pull(reference, environ={"HOME": str(tmp_path)})
    assert refused.value.hint == f"type: docker login {guarded}"
    assert PASSWORD not in str(refused.value)


def test_a_wrong_password_is_refused_by_name(
    guarded: str, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"auths": {guarded: {"auth": base64.b64encode(b"cat:hiss").decode()}}})
    )
    with pytest.raises(RegistryError, match="does not accept the login for "):
        push(
            make_artifact(module),
            reference_named(f"{guarded}/private/x:v1"),
            environ={"DOCKER_CONFIG": str(tmp_path)},
        )


def test_a_registry_that_is_not_there_is_an_error_that_says_so(module: Path) -> None:
    reference = reference_named(f"127.0.0.1:{free_port()}/hello:v1")
    with pytest.raises(RegistryError, match=r"no registry answers at 127\.0\.0\.1:") as error:
        push(make_artifact(module), reference)
    assert "invoke up" in error.value.hint


def test_a_registry_that_accepts_and_says_nothing_is_given_up(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasilet.oci.push.READ_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RegistryError, match="does not answer in time"):
            push(make_artifact(module), reference_named(f"127.0.0.1:{port}/hello:v1"))


def test_plain_http_is_never_a_fallback(module: Path) -> None:
    with pytest.raises(RegistryError):
        push(make_artifact(module), reference_named("registry.invalid:5000/hello:v1"))


def test_a_digest_cannot_be_pushed_to(module: Path) -> None:
    digest = "sha256:" + "0" * 64
    with pytest.raises(UsageError, match="names a digest"):
        push(make_artifact(module), reference_named(f"127.0.0.1:1/hello@{digest}"))


def test_an_unknown_repository_is_named(registry: str) -> None:
    with pytest.raises(RegistryError, match="has no nowhere/at-all:v9"):
        pull(reference_named(f"{registry}/nowhere/at-all:v9"))


def test_a_file_that_is_no_module_is_not_pushed(tmp_path: Path) -> None:
    wrong = tmp_path / "hello.wasm"
    wrong.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(HarnessError, match="is no WebAssembly module"):
        make_artifact(wrong)


class LyingRegistry(http.server.BaseHTTPRequestHandler):
    """Serves a correct manifest and a blob that is ``blob``, whatever was asked for."""

    blob: ClassVar[bytes] = MODULE

    def do_GET(self) -> None:
        config = b"{}"
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.wasm.config.v1+json",
                "digest": f"sha256:{hashlib.sha256(config).hexdigest()}",
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/wasm",
                    "digest": f"sha256:{hashlib.sha256(MODULE).hexdigest()}",
                    "size": len(MODULE),
                }
            ],
        }
        body = json.dumps(manifest).encode() if "/manifests/" in self.path else self.blob
        if self.path.endswith(hashlib.sha256(config).hexdigest()):
            body = config
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""


@pytest.fixture
def liar() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LyingRegistry)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("blob", "message"),
    [(OTHER, "damaged"), (MODULE[:-1], "the registry announces"), (MODULE + b"x" * 10, "the registry announces")],
    ids=["other bytes", "too short", "too long"],
)
def test_a_blob_that_is_not_what_the_manifest_says_is_refused_and_nothing_is_written(
    liar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blob: bytes, message: str
) -> None:
    monkeypatch.setattr(LyingRegistry, "blob", blob)
    output = tmp_path / "out.wasm"
    with pytest.raises(RegistryError, match=message):
        pull(reference_named(f"{liar}/x:v1"), output=output)
    assert not output.exists()


def test_a_manifest_that_is_not_the_digest_asked_for_is_refused(liar: str) -> None:
    digest = "sha256:" + "1" * 64
    with pytest.raises(RegistryError, match="was asked for, but what came hashes to"):
        pull(reference_named(f"{liar}/x@{digest}"))
