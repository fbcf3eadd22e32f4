"""The node pulls from a real registry (CNCF distribution) what the harness pushed to it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from wasilet.oci.artifact import Layout, make_artifact
from wasilet.oci.push import push, reference_named
from wasilet_common.oci import mediatypes
from wasilet_common.oci.credentials import Credential, from_secrets
from wasilet_node.images.compile import Compiler
from wasilet_node.images.manager import ImageManager
from wasilet_node.images.model import Image, ImageError, PullPolicy
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

from tests.component.registry_rig import PASSWORD, USER, free_port, running_registry
from tests.unit.node.images.fakes import Events, tar_of

pytestmark = pytest.mark.component

# (module (memory (export "memory") 1) (func (export "_start")))
MODULE = bytes.fromhex(
    "0061736d01000000010401600000030201000503010001071302066d656d6f72790200065f737461727400000a040102000b"
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
async def images(tmp_path: Path) -> AsyncIterator[ImageManager]:
    settings = ImageSettings(connect_timeout_seconds=2)
    compiler = Compiler(tmp_path / "compiled", settings)
    manager = ImageManager(directory=tmp_path / "images", settings=settings, compiler=compiler)
    await manager.start()
    yield manager
    await manager.close()
    await compiler.close()


def module_file(folder: Path, data: bytes = MODULE) -> Path:
    path = folder / "hello.wasm"
    path.write_bytes(data)
    return path


async def ensure(
    images: ImageManager, name: str, *, credentials: tuple[Credential, ...] = (), events: Events | None = None
) -> Image:
    return await images.ensure(
        name, policy=PullPolicy.ALWAYS, credentials=credentials, event=events or Events(), pod_uid="uid"
    )


@pytest.mark.parametrize("layout", list(Layout))
async def test_every_layout_that_the_harness_writes_is_pulled_and_compiled(
    registry: str, images: ImageManager, tmp_path: Path, layout: Layout
) -> None:
    name = f"{registry}/layouts/{layout}:v1"
    pushed = await asyncio.to_thread(push, make_artifact(module_file(tmp_path), layout=layout), reference_named(name))
    image = await ensure(images, name)
    assert image.module_path.read_bytes() == MODULE
    assert image.image_id == f"{registry}/layouts/{layout}@{pushed.digest}"
    assert (image.kind, image.module_name) == (GuestKind.MODULE, "hello.wasm")
    assert (await ensure(images, f"{registry}/layouts/{layout}@{pushed.digest}")).module_digest == image.module_digest
    compiled = await images.compiled(image)
    assert compiled.stat().st_size > 0


async def test_a_guarded_registry_opens_to_the_pods_pull_secret(
    tmp_path: Path, images: ImageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (tmp_path / "guarded").mkdir()
    with running_registry(tmp_path / "guarded", login=True) as registry:
        document = json.dumps({"auths": {registry: {"auth": auth}}})
        (tmp_path / "config.json").write_text(document)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        name = f"{registry}/private/hello:v1"
        await asyncio.to_thread(push, make_artifact(module_file(tmp_path)), reference_named(name))
        secret = {
            "type": "kubernetes.io/dockerconfigjson",
            "data": {".dockerconfigjson": base64.b64encode(document.encode()).decode()},
        }
        with pytest.raises(ImageError, match=r"pull access denied.*name a pull secret"):
            await images.ensure(name, policy=PullPolicy.ALWAYS, credentials=(), event=Events(), pod_uid="without")
        wrong = tuple(dataclasses.replace(known, password="hiss") for known in from_secrets([secret]))
        with pytest.raises(ImageError, match="is not accepted"):
            await images.ensure(name, policy=PullPolicy.ALWAYS, credentials=wrong, event=Events(), pod_uid="wrong")
        assert (await ensure(images, name, credentials=from_secrets([secret]))).module_path.read_bytes() == MODULE


async def upload(session: aiohttp.ClientSession, origin: str, repository: str, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    async with session.post(f"{origin}/v2/{repository}/blobs/uploads/") as response:
        location = response.headers["Location"]
    async with session.put(f"{location}&digest={digest}", data=data) as response:
        assert response.status == 201
    return digest


async def test_an_index_with_a_wrapped_image_among_linux_ones_is_resolved(registry: str, images: ImageManager) -> None:
    origin, repository = f"http://{registry}", "multi/hello"
    config = json.dumps({"os": "wasi", "architecture": "wasm", "config": {"Entrypoint": ["/hello.wasm"]}}).encode()
    linux = json.dumps({"os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["/hello"]}}).encode()
    layer = tar_of([("hello.wasm", MODULE)])
    entries = []
    async with aiohttp.ClientSession() as session:
        for platform, body in (("linux/amd64", linux), ("wasi/wasm", config)):
            manifest = json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": mediatypes.OCI_MANIFEST,
                    "config": {
                        "mediaType": mediatypes.OCI_CONFIG,
                        "digest": await upload(session, origin, repository, body),
                        "size": len(body),
                    },
                    "layers": [
                        {
                            "mediaType": mediatypes.OCI_LAYER_TAR_GZIP,
                            "digest": await upload(session, origin, repository, layer),
                            "size": len(layer),
                        }
                    ],
                }
            ).encode()
            digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
            headers = {"Content-Type": mediatypes.OCI_MANIFEST}
            async with session.put(
                f"{origin}/v2/{repository}/manifests/{digest}", data=manifest, headers=headers
            ) as response:
                assert response.status == 201
            system, architecture = platform.split("/")
            entries.append(
                {
                    "mediaType": mediatypes.OCI_MANIFEST,
                    "digest": digest,
                    "size": len(manifest),
                    "platform": {"os": system, "architecture": architecture},
                }
            )
        index = json.dumps({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": entries}).encode()
        headers = {"Content-Type": mediatypes.OCI_INDEX}
        async with session.put(f"{origin}/v2/{repository}/manifests/v1", data=index, headers=headers) as response:
            assert response.status == 201
    image = await ensure(images, f"{registry}/{repository}:v1")
    assert image.module_path.read_bytes() == MODULE
    assert image.entrypoint == ("/hello.wasm",)
    with pytest.raises(ImageError, match='wrong architecture: the image is for "linux/amd64"'):
        await images.ensure(
            f"{registry}/{repository}@{entries[0]['digest']}",
            policy=PullPolicy.ALWAYS,
            credentials=(),
            event=Events(),
            pod_uid="linux",
        )


async def test_a_download_that_broke_off_resumes_from_a_real_registry(
    registry: str, images: ImageManager, tmp_path: Path
) -> None:
    data = MODULE + b"\x00\x05\x01x" + gzip.compress(b"x")[:3]
    name = f"{registry}/resumed/hello:v1"
    await asyncio.to_thread(push, make_artifact(module_file(tmp_path, data)), reference_named(name))
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "images" / "partial" / f"sha256-{digest}").write_bytes(data[:20])
    assert (await ensure(images, name)).module_path.read_bytes() == data


async def test_a_registry_that_is_gone_is_a_prompt_error(images: ImageManager) -> None:
    name = f"127.0.0.1:{free_port()}/hello:v1"
    async with asyncio.timeout(3):
        with pytest.raises(ImageError, match="connection refused; is the registry running at"):
            await ensure(images, name)


KILLED = """
import asyncio, os, sys
from pathlib import Path
from wasilet_node.images import store
from wasilet_node.images.manager import ImageManager
from wasilet_node.images.model import PullPolicy
from wasilet_node.settings import ImageSettings

class NoCompiler:
    async def compile(self, path, digest, kind, owner=''): ...
    async def prune(self, keep): ...

step = int(sys.argv[3])
calls = 0

def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == step:
            os._exit(9)
        return function(*args, **kwargs)
    return call

os.fsync, Path.replace, os.open = dying(os.fsync), dying(Path.replace), dying(os.open)

async def main():
    manager = ImageManager(directory=Path(sys.argv[1]), settings=ImageSettings(), compiler=NoCompiler())
    image = await manager.ensure(sys.argv[2], policy=PullPolicy.ALWAYS, credentials=(), event=lambda *_: None)
    assert image.module_path.read_bytes()
    await manager.close()

asyncio.run(main())
"""


async def test_an_agent_that_is_killed_at_any_step_of_a_pull_leaves_a_store_to_go_on_with(
    registry: str, tmp_path: Path
) -> None:
    name = f"{registry}/killed/hello:v1"
    await asyncio.to_thread(push, make_artifact(module_file(tmp_path)), reference_named(name))
    directory = tmp_path / "store"
    for step in range(1, 40):
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-P", "-c", KILLED, str(directory / str(step)), name, str(step)],
            check=False,
            timeout=60,
        )
        settings = ImageSettings()
        compiler = Compiler(tmp_path / "compiled", settings)
        manager = ImageManager(directory=directory / str(step), settings=settings, compiler=compiler)
        try:
            image = await ensure(manager, name)
            assert image.module_path.read_bytes() == MODULE
            assert not list((directory / str(step) / "tmp").iterdir())
        finally:
            await manager.close()
            await compiler.close()
        if run.returncode == 0:
            break
        assert run.returncode == 9
    assert 5 < step < 39
