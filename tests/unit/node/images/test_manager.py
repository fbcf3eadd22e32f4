"""Images as pods meet them: policies, events, back-off, sharing, and what a hostile registry can do (nothing)."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wasilet_common.oci import mediatypes as media
from wasilet_common.oci.credentials import Credential, SecretSource
from wasilet_common.oci.file_tree import unpack
from wasilet_common.oci.registry import RegistryClient
from wasilet_common.time_format import go_duration
from wasilet_node.images.compile import CompileError
from wasilet_node.images.manager import ImageManager
from wasilet_node.images.model import Image, ImageError, Images, PullPolicy
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

from tests.unit.node.images.fakes import (
    COMPONENT,
    MODULE,
    Events,
    FakeCompiler,
    FakeRegistry,
    credential,
    descriptor,
    digest_of,
    serving,
    tar_of,
)

pytestmark = pytest.mark.unit

ALWAYS, IF_NOT_PRESENT, NEVER = PullPolicy.ALWAYS, PullPolicy.IF_NOT_PRESENT, PullPolicy.NEVER
BIG = MODULE + bytes(range(256)) * 20_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A manager and a registry."""

    def __init__(self, directory: Path, settings: ImageSettings) -> None:
        self.registry = FakeRegistry()
        self.compiler = FakeCompiler()
        self.clock = Clock()
        self.directory = directory
        self.settings = settings
        self.manager = self.new_manager()

    def new_manager(self, **more: Any) -> ImageManager:
        return ImageManager(
            directory=self.directory,
            settings=self.settings,
            compiler=self.compiler,
            registry=RegistryClient(settings=self.settings),
            monotonic=self.clock,
            **more,
        )

    async def restart(self) -> None:
        await self.manager.close()
        self.manager = self.new_manager()

    def name(self, image: str = "a/hello:v1") -> str:
        return f"{self.registry.host}/{image}"

    async def ensure(
        self,
        image: str = "a/hello:v1",
        policy: PullPolicy = IF_NOT_PRESENT,
        events: Events | None = None,
        credentials: Sequence[Credential] = (),
        pod_uid: str = "pod",
    ) -> Image:
        return await self.manager.ensure(
            self.name(image), policy=policy, credentials=credentials, event=events or Events(), pod_uid=pod_uid
        )

    async def refused(self, reason: str, image: str = "a/hello:v1", **more: Any) -> str:
        with pytest.raises(ImageError) as caught:
            await self.ensure(image, **more)
        assert caught.value.reason == reason
        assert str(caught.value) == caught.value.message
        return caught.value.message


@asynccontextmanager
async def rigged(directory: Path, settings: ImageSettings | None = None) -> AsyncIterator[Rig]:
    rig = Rig(directory, settings or ImageSettings(connect_timeout_seconds=2, read_timeout_seconds=2))
    async with serving(rig.registry):
        try:
            yield rig
        finally:
            await rig.manager.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rigged(tmp_path / "images") as rig:
        yield rig


async def test_it_is_what_the_pod_workers_expect(rig: Rig) -> None:
    images: Images = rig.manager
    assert await images.list() == []


async def test_an_image_is_pulled_once_and_then_present(rig: Rig) -> None:
    body = rig.registry.add_cncf("a/hello:v1")
    events = Events()
    image = await rig.ensure(events=events)
    assert image.module_path.read_bytes() == MODULE
    assert image.image_id == f"{rig.registry.host}/a/hello@{digest_of(body)}"
    assert (image.kind, image.module_name, image.module_digest) == (GuestKind.MODULE, "hello.wasm", digest_of(MODULE))
    asked = len(rig.registry.requests)
    assert await rig.ensure(events=events) == image
    assert await rig.ensure(policy=NEVER, events=events) == image
    assert len(rig.registry.requests) == asked
    name, size = rig.name(), image.size_bytes
    present = (
        "Normal",
        "Pulled",
        f'Container image "{name}" already present on machine and can be accessed by the pod',
    )
    assert events.seen == [
        ("Normal", "Pulling", f'Pulling image "{name}"'),
        (
            "Normal",
            "Pulled",
            f'Successfully pulled image "{name}" in 0s (0s including waiting). Image size: {size} bytes.',
        ),
        present,
        present,
    ]


async def test_an_image_is_still_present_after_a_restart(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    image = await rig.ensure()
    await rig.restart()
    assert await rig.ensure(policy=NEVER) == image


async def test_always_asks_for_the_digest_and_moves_no_bytes_twice(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    first = await rig.ensure(policy=ALWAYS)
    del rig.registry.requests[:]
    assert await rig.ensure(policy=ALWAYS) == first
    assert [method for method, _, _ in rig.registry.requests] == ["HEAD"]
    rig.registry.add_cncf("a/hello:v1", COMPONENT)
    second = await rig.ensure(policy=ALWAYS)
    assert (second.kind, second.module_path.read_bytes()) == (GuestKind.COMPONENT, COMPONENT)


async def test_a_present_image_does_not_help_always_when_the_registry_is_down(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    await rig.ensure()
    rig.registry.status = 503
    assert "503" in await rig.refused("ErrImagePull", policy=ALWAYS)


async def test_never_refuses_what_is_not_there(rig: Rig) -> None:
    events = Events()
    message = await rig.refused("ErrImageNeverPull", policy=NEVER, events=events)
    assert message == f'Container image "{rig.name()}" is not present with pull policy of Never'
    assert events.seen == [
        ("Warning", "ErrImageNeverPull", message),
        ("Warning", "Failed", "Error: ErrImageNeverPull"),
    ]
    assert not rig.registry.requests


async def test_a_name_that_does_not_parse_is_an_invalid_image_name(rig: Rig) -> None:
    events = Events()
    message = await rig.refused("InvalidImageName", "a/HELLO", events=events)
    assert message.startswith(f'Failed to apply default image tag "{rig.name("a/HELLO")}": couldn\'t parse image name')
    assert events.seen == [("Warning", "InspectFailed", message), ("Warning", "Failed", "Error: InvalidImageName")]


async def test_a_failed_pull_backs_off_by_pod_with_kubelets_words(rig: Rig) -> None:
    events = Events()
    name = rig.name()
    failure = f'failed to pull and unpack image "{name}": failed to resolve reference "{name}": {name}: not found'
    assert await rig.refused("ErrImagePull", events=events) == failure
    rig.clock.now += 9.9
    backed_off = await rig.refused("ImagePullBackOff", events=events)
    assert backed_off == f'Back-off pulling image "{name}": ErrImagePull: {failure}'
    assert events.seen == [
        ("Normal", "Pulling", f'Pulling image "{name}"'),
        ("Warning", "Failed", f'Failed to pull image "{name}": {failure}'),
        ("Warning", "Failed", "Error: ErrImagePull"),
        ("Normal", "BackOff", f'Back-off pulling image "{name}"'),
        ("Warning", "Failed", "Error: ImagePullBackOff"),
    ]
    await rig.refused("ErrImagePull", pod_uid="another pod")
    rig.clock.now += 0.2
    await rig.refused("ErrImagePull")
    rig.clock.now += 19
    await rig.refused("ImagePullBackOff")
    rig.registry.add_cncf("a/hello:v1")
    rig.clock.now += 2
    await rig.ensure()


async def test_an_event_sink_may_be_a_coroutine(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    seen: list[str] = []

    async def sink(_type: str, reason: str, _message: str) -> None:
        await asyncio.sleep(0)
        seen.append(reason)

    await rig.manager.ensure(rig.name(), policy=ALWAYS, credentials=[], event=sink)
    assert seen == ["Pulling", "Pulled"]


async def test_every_layout_and_an_index_above_it_is_pulled(rig: Rig) -> None:
    registry = rig.registry
    registry.add_image(
        "a/old:v1", config=b"{}", config_type=media.WASM_TO_OCI_CONFIG, layers=[(MODULE, media.WASM_TO_OCI_LAYER)]
    )
    config = {"os": "wasi", "architecture": "wasm", "config": {"Entrypoint": ["app/main.wasm", "-v"], "Env": ["A=1"]}}
    registry.add_image(
        "a/runwasi:v1", config=config, config_type=media.OCI_CONFIG, layers=[(COMPONENT, media.RUNWASI_LAYER)]
    )
    body = registry.add_image(
        "a/wrapped:v1",
        config=config,
        config_type=media.DOCKER_CONFIG,
        layers=[
            (tar_of([("app/main.wasm", COMPONENT)]), media.OCI_LAYER_TAR_GZIP),
            (tar_of([("app/main.wasm", MODULE)], compress=False), media.OCI_LAYER_TAR),
            (tar_of([("etc/x", b"x")]), media.DOCKER_LAYER_TAR_GZIP),
        ],
    )
    entries = [
        descriptor(b"linux", media.OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64"}),
        descriptor(body, media.OCI_MANIFEST, platform={"os": "wasi", "architecture": "wasm"}),
    ]
    top = registry.add_manifest("a/wrapped:multi", {"schemaVersion": 2, "manifests": entries}, media.OCI_INDEX)
    old, runwasi, wrapped, multi = [
        await rig.ensure(name) for name in ("a/old:v1", "a/runwasi:v1", "a/wrapped:v1", "a/wrapped:multi")
    ]
    assert (old.module_path.read_bytes(), old.module_name) == (MODULE, "old")
    assert (runwasi.kind, runwasi.entrypoint, runwasi.env) == (
        GuestKind.COMPONENT,
        ("app/main.wasm", "-v"),
        (("A", "1"),),
    )
    assert (wrapped.module_path.read_bytes(), wrapped.module_name) == (MODULE, "main.wasm")
    assert multi.image_id.endswith(f"a/wrapped@{digest_of(top)}")
    assert multi.module_digest == wrapped.module_digest
    kept = {path.name for path in (rig.directory / "blobs").rglob("*") if path.is_file()}
    assert kept == {digest_of(MODULE)[7:], digest_of(COMPONENT)[7:]}


async def test_the_layers_below_the_module_are_not_fetched(rig: Rig) -> None:
    base, top = tar_of([("bin/sh", os.urandom(5000))]), tar_of([("main.wasm", MODULE)])
    rig.registry.add_image(
        "a/hello:v1",
        config={"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/main.wasm"]}},
        config_type=media.OCI_CONFIG,
        layers=[(base, media.OCI_LAYER_TAR_GZIP), (top, media.OCI_LAYER_TAR_GZIP)],
    )
    await rig.ensure()
    assert not any(digest_of(base) in path for path in rig.registry.paths())


@pytest.mark.parametrize("deleted", [True, False])
async def test_an_entrypoint_that_no_layer_holds_is_named(rig: Rig, *, deleted: bool) -> None:
    below = tar_of([("main.wasm", MODULE)] if deleted else [("x", b"")])
    above = tar_of([(".wh.main.wasm", b"")] if deleted else [("y", b"")])
    rig.registry.add_image(
        "a/hello:v1",
        config={"config": {"Entrypoint": ["/main.wasm"]}},
        config_type=media.OCI_CONFIG,
        layers=[(below, media.OCI_LAYER_TAR_GZIP), (above, media.OCI_LAYER_TAR_GZIP)],
    )
    assert "no file /main.wasm, which is its entrypoint" in await rig.refused("ErrImagePull")


async def test_a_linux_image_is_refused_without_fetching_a_layer(rig: Rig) -> None:
    rig.registry.add_image(
        "a/proxy:v1",
        config={"os": "linux", "architecture": "arm64", "config": {"Entrypoint": ["/proxy"]}},
        config_type=media.DOCKER_CONFIG,
        layers=[(b"x" * 1000, media.DOCKER_LAYER_TAR_GZIP)],
    )
    message = await rig.refused("ErrImagePull", "a/proxy:v1")
    assert f'failed to pull and unpack image "{rig.name("a/proxy:v1")}": wrong architecture: ' in message
    assert "linux/arm64" in message
    assert not any(digest_of(b"x" * 1000) in path for path in rig.registry.paths())


async def test_what_is_no_webassembly_is_refused(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1", b"#!/bin/sh\n")
    assert "not WebAssembly" in await rig.refused("ErrImagePull")
    assert await rig.manager.list() == []


async def test_bytes_that_are_not_those_of_the_digest_are_never_used(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    rig.registry.served[digest_of(MODULE)] = MODULE[:-1] + b"X"
    assert "what came hashes to" in await rig.refused("ErrImagePull")
    assert not list((rig.directory / "partial").iterdir())
    del rig.registry.served[digest_of(MODULE)]
    rig.clock.now += 11
    assert (await rig.ensure()).module_path.read_bytes() == MODULE


@pytest.mark.parametrize("served", [b"{}", b'{"architecture": "wasm", "os": "wasip1", "layerDigests": ["evil"]}'])
async def test_a_config_that_is_not_that_of_the_digest_is_never_read(rig: Rig, served: bytes) -> None:
    rig.registry.add_cncf("a/hello:v1")
    config = next(data for data in rig.registry.blobs.values() if data != MODULE)
    rig.registry.served[digest_of(config)] = served.ljust(len(config))
    message = await rig.refused("ErrImagePull")
    assert "hashes to" in message or "announces" in message


async def test_an_image_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with rigged(tmp_path / "images", ImageSettings(max_image_bytes=1000)) as rig:
        rig.registry.add_cncf("a/hello:v1", BIG)
        assert f"a layer of {len(BIG)} bytes, more than the 1000 allowed" in await rig.refused("ErrImagePull")
        assert not any(digest_of(BIG) in path for path in rig.registry.paths())


async def test_a_bomb_of_a_layer_is_refused(tmp_path: Path) -> None:
    async with rigged(tmp_path / "images", ImageSettings(max_image_bytes=100_000)) as rig:
        rig.registry.add_image(
            "a/hello:v1",
            config={"config": {"Entrypoint": ["/main.wasm"]}},
            config_type=media.OCI_CONFIG,
            layers=[(gzip.compress(b"\0" * 512 * 10_000), media.OCI_LAYER_TAR_GZIP)],
        )
        await rig.refused("ErrImagePull")
        rig.registry.add_image(
            "a/hello:v2",
            config={"config": {"Entrypoint": ["/main.wasm"]}},
            config_type=media.OCI_CONFIG,
            layers=[(tar_of([("main.wasm", b"\0asm\x01\0\0\0" + b"\0" * 5_000_000)]), media.OCI_LAYER_TAR_GZIP)],
        )
        assert "more than the 100000 allowed" in await rig.refused("ErrImagePull", "a/hello:v2")
        assert not [path for path in (rig.directory / "blobs").rglob("*") if path.is_file()]


async def test_many_layers_that_are_small_bombs_are_refused_as_one_large_one(tmp_path: Path) -> None:
    async with rigged(tmp_path / "images", ImageSettings(max_image_bytes=1_000_000)) as rig:
        bombs = [(tar_of([(f"zeros-{number}", b"\0" * 400_000)]), media.OCI_LAYER_TAR_GZIP) for number in range(4)]
        rig.registry.add_image(
            "a/hello:v1",
            config={"config": {"Entrypoint": ["/main.wasm"]}},
            config_type=media.OCI_CONFIG,
            layers=bombs,
        )
        assert "decompress to more than the 1000000 bytes allowed" in await rig.refused("ErrImagePull")
        assert digest_of(bombs[0][0]) not in "".join(rig.registry.paths()), "the last layer was not even fetched"


async def test_a_pull_that_breaks_off_goes_on_where_it_ended(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1", BIG)
    # The first answer is the config's.
    rig.registry.break_after = [10_000, 2_000_000, 2_000_000]
    assert (await rig.ensure()).module_path.read_bytes() == BIG
    spans = [headers.get("Range") for _, path, headers in rig.registry.requests if digest_of(BIG) in path]
    assert len(spans) == 3
    assert spans[0] is None
    assert all(span and int(span[6:-1]) > 0 for span in spans[1:])


async def test_a_pull_goes_on_after_a_restart_and_begins_again_from_a_spoilt_part(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1", BIG)
    for part in (BIG[:100_000], b"X" * 100_000, BIG + b"X", BIG):
        await rig.restart()
        (rig.directory / "partial").mkdir(parents=True, exist_ok=True)
        (rig.directory / "partial" / digest_of(BIG).replace(":", "-")).write_bytes(part)
        image = await rig.ensure(policy=ALWAYS)
        assert image.module_path.read_bytes() == BIG
        image.module_path.unlink()
    spans = [headers.get("Range") for _, path, headers in rig.registry.requests if digest_of(BIG) in path]
    assert spans == ["bytes=100000-", "bytes=100000-", None, None]


async def test_a_damaged_module_is_pulled_again(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    image = await rig.ensure()
    await rig.restart()
    image.module_path.write_bytes(b"damaged")
    events = Events()
    assert (await rig.ensure(events=events)).module_path.read_bytes() == MODULE
    assert events.reasons == ["Pulling", "Pulled"]


async def test_many_pods_share_one_pull(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1", BIG)
    images = await asyncio.gather(*(rig.ensure(policy=ALWAYS, pod_uid=str(number)) for number in range(20)))
    assert len(set(images)) == 1
    assert len([path for path in rig.registry.paths() if digest_of(BIG) in path]) == 1
    assert len(rig.registry.requests) == 4


async def test_two_names_of_one_module_fetch_it_once(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1", BIG)
    rig.registry.add_cncf("b/other:v1", BIG, title="other.wasm")
    first, second = await asyncio.gather(rig.ensure(), rig.ensure("b/other:v1"))
    assert first.module_path == second.module_path
    assert (first.module_name, second.module_name) == ("hello.wasm", "other.wasm")
    assert len([path for path in rig.registry.paths() if digest_of(BIG) in path]) == 1


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - it waits for what other parties do
            await asyncio.sleep(0.005)


async def test_a_pod_that_is_deleted_does_not_stop_the_pull_of_others_but_the_last_one_does(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    rig.registry.gate = asyncio.Event()
    pods = [asyncio.create_task(rig.ensure(pod_uid=str(number))) for number in range(3)]
    await until(lambda: any("blobs" in path for path in rig.registry.paths()))
    pods[0].cancel()
    await asyncio.gather(pods[0], return_exceptions=True)
    rig.registry.gate.set()
    assert await pods[1] == await pods[2]

    rig.registry.add_cncf("a/hello:v2", COMPONENT)
    rig.registry.gate = asyncio.Event()
    asked = len(rig.registry.requests)
    pod = asyncio.create_task(rig.ensure("a/hello:v2"))
    await until(lambda: any("blobs" in path for _, path, _ in rig.registry.requests[asked:]))
    pod.cancel()
    await asyncio.gather(pod, return_exceptions=True)
    await until(lambda: not len(rig.manager._pulls))
    rig.registry.gate.set()
    await asyncio.sleep(0.05)
    assert not (rig.directory / "blobs" / "sha256" / digest_of(COMPONENT)[7:]).exists()
    assert (await rig.ensure("a/hello:v2")).kind is GuestKind.COMPONENT


async def test_pulls_wait_for_a_free_slot_but_present_images_do_not(tmp_path: Path) -> None:
    async with rigged(tmp_path / "images", ImageSettings(max_parallel_pulls=2)) as rig:
        rig.registry.add_cncf("a/present:v1", COMPONENT)
        await rig.ensure("a/present:v1")
        del rig.registry.requests[:]
        rig.registry.gate = asyncio.Event()
        for number in range(5):
            rig.registry.add_cncf(f"a/hello:v{number}", MODULE + bytes([number]))
        pods = [asyncio.create_task(rig.ensure(f"a/hello:v{number}")) for number in range(5)]
        await until(lambda: len(rig.registry.paths("HEAD")) == 5)
        await until(lambda: len(rig.registry.paths("GET")) == 4)
        await asyncio.wait_for(rig.ensure("a/present:v1", policy=ALWAYS), 5)
        assert len([path for path in rig.registry.paths() if "/blobs/" in path]) == 2
        rig.registry.gate.set()
        assert len(set(await asyncio.gather(*pods))) == 5


async def test_a_private_image_needs_the_secret_of_each_pod_under_always(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    rig.registry.users = {"cat": "purr"}
    mine = [credential("ghcr.io", "cat", "purr"), in_secret(rig.registry.host, "purr", "s")]
    allowed = rig.ensure(policy=ALWAYS, credentials=mine, pod_uid="mine")
    denied = rig.ensure(policy=ALWAYS, pod_uid="other")
    first, second = await asyncio.gather(allowed, denied, return_exceptions=True)
    assert isinstance(first, Image)
    assert isinstance(second, ImageError)
    assert "pull access denied" in second.message
    assert "imagePullSecrets" in second.message
    assert await rig.ensure(pod_uid="third", credentials=mine) == first


def in_secret(host: str, password: str, name: str, namespace: str = "ns") -> Credential:
    source = SecretSource(namespace=namespace, name=name, uid=f"uid-{namespace}-{name}")
    return replace(credential(host, "cat", password), source=source)


ACCESS = [
    ("none at all", None, None, False),
    ("the same secret", ("purr", "s", "ns"), None, True),
    ("the same login in a secret of another namespace", ("purr", "t", "elsewhere"), None, True),
    ("the same secret, whose login was changed since", ("hiss", "s", "ns"), None, True),
    ("another login in another secret", ("hiss", "t", "ns"), None, False),
    ("a login of another registry", ("purr", "s", "ns"), "ghcr.io", False),
]


@pytest.mark.parametrize("policy", [IF_NOT_PRESENT, NEVER])
@pytest.mark.parametrize(("secret", "host", "allowed"), [row[1:] for row in ACCESS], ids=[row[0] for row in ACCESS])
async def test_a_present_image_is_for_those_who_bring_what_it_was_pulled_with(
    rig: Rig, secret: tuple[str, str, str] | None, host: str | None, *, allowed: bool, policy: PullPolicy
) -> None:
    rig.registry.users = {"cat": "purr"}
    rig.registry.add_cncf("a/hello:v1")
    here = rig.registry.host
    await rig.ensure(credentials=[in_secret(here, "purr", "s")])
    await rig.restart()
    asked = len(rig.registry.requests)
    bring = [] if secret is None else [in_secret(host or here, *secret)]
    if allowed:
        events = Events()
        await rig.ensure(policy=policy, credentials=bring, pod_uid="other", events=events)
        assert "can be accessed by the pod" in events.seen[0][2]
        assert len(rig.registry.requests) == asked
    elif policy is NEVER:
        message = await rig.refused("ErrImageNeverPull", policy=policy, credentials=bring, pod_uid="other")
        assert message == f'Container image "{rig.name()}" is not present with pull policy of Never'
    else:
        await rig.refused("ErrImagePull", policy=policy, credentials=bring, pod_uid="other")
        assert len(rig.registry.requests) > asked
    assert "purr" not in (rig.directory / "index.json").read_text()


async def test_a_login_that_the_registry_takes_opens_a_present_image_without_moving_it_again(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    host = rig.registry.host
    await rig.ensure(credentials=[in_secret(host, "purr", "s")])
    blobs = [path for path in rig.registry.paths() if "/blobs/" in path]
    await rig.ensure(credentials=[in_secret(host, "meow", "t")], pod_uid="second")
    assert [path for path in rig.registry.paths() if "/blobs/" in path] == blobs
    asked = len(rig.registry.requests)
    await rig.ensure(credentials=[in_secret(host, "meow", "t")], pod_uid="third")
    assert len(rig.registry.requests) == asked
    await rig.ensure(pod_uid="public")  # this registry wants no login: from now on the image is everybody's
    asked = len(rig.registry.requests)
    await rig.ensure(pod_uid="another", policy=NEVER)
    assert len(rig.registry.requests) == asked


async def change_index(rig: Rig, change: Callable[[dict[str, Any]], object]) -> None:
    """As another agent, or a failing disk, left it."""
    await rig.manager.close()
    index = rig.directory / "index.json"
    document = json.loads(index.read_text())
    change(document)
    index.write_text(json.dumps(document))
    rig.manager = rig.new_manager()


async def test_images_of_an_agent_that_kept_no_records_are_preloaded(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    await rig.ensure(credentials=[in_secret(rig.registry.host, "purr", "s")])
    await change_index(rig, lambda document: document.pop("access"))
    await rig.ensure(policy=NEVER, pod_uid="other")


@pytest.mark.parametrize("damage", [{}, [], {"key": "zz", "images": {}}, {"key": "00", "images": {"D": {"r": {}}}}])
async def test_damaged_records_give_an_image_to_nobody_unasked(rig: Rig, damage: Any) -> None:
    body = rig.registry.add_cncf("a/hello:v1")
    await rig.ensure()
    damaged = json.loads(json.dumps(damage).replace("D", digest_of(body)))
    await change_index(rig, lambda document: document.update(access=damaged))
    await rig.refused("ErrImageNeverPull", policy=NEVER, pod_uid="other")
    await rig.ensure(pod_uid="other")


async def test_each_fitting_credential_is_tried(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    rig.registry.users = {"cat": "purr"}
    host = rig.registry.host
    await rig.ensure(credentials=[credential(host, "dog", "SECRETBARK"), credential(host, "cat", "purr")])
    events = Events()
    wrong = [credential(host, "dog", "SECRETBARK"), credential(f"{host}/a", "cow", "SECRETMOO")]
    message = await rig.refused("ErrImagePull", policy=ALWAYS, credentials=wrong, events=events)
    assert message.count("is not accepted") == 2
    assert "SECRET" not in message + str(events.seen)


async def test_a_compiled_file_is_made_once_for_all_who_wait(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    image = await rig.ensure()
    assert set(await asyncio.gather(*(rig.manager.compiled(image) for _ in range(5)))) == {image.module_path}
    assert rig.compiler.compiled == [digest_of(MODULE)]


@pytest.mark.parametrize(("module", "told"), [(BIG, 1), (MODULE, 0)])
async def test_a_large_image_is_reported_when_its_compilation_begins(rig: Rig, module: bytes, told: int) -> None:
    rig.registry.add_cncf("a/hello:v1", module)
    image = await rig.ensure()
    events = Events()
    await asyncio.gather(*(rig.manager.compiled(image, event=events) for _ in range(3)))
    compiling = [seen for seen in events.seen if seen[1] == "Compiling"]
    assert len(compiling) == told
    if told:
        assert re.fullmatch(r'Compiling image ".*/a/hello:v1" \(5 MiB\), once on this node', compiling[0][2])


async def test_a_module_that_does_not_compile_is_a_create_container_error(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    image = await rig.ensure()
    rig.compiler.error = CompileError("unknown import")
    with pytest.raises(ImageError, match="unknown import") as caught:
        await rig.manager.compiled(image)
    assert caught.value.reason == "CreateContainerError"


async def test_a_store_that_another_agent_holds_is_an_inspect_error(rig: Rig) -> None:
    await rig.manager.start()
    second = rig.new_manager(lock_wait_seconds=0.05)
    events = Events()
    with pytest.raises(ImageError, match="another node agent") as caught:
        await second.ensure(rig.name(), policy=IF_NOT_PRESENT, credentials=[], event=events)
    assert caught.value.reason == "ImageInspectError"
    assert events.reasons == ["InspectFailed", "Failed"]
    await second.close()


async def test_a_disk_that_cannot_be_written_is_a_pull_error(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    await rig.manager.start()
    (rig.directory / "partial").rmdir()
    message = await rig.refused("ErrImagePull")
    assert "the image store cannot be written: no such file or directory" in message


async def test_garbage_collection_keeps_what_pods_use_and_prunes_the_compiled(tmp_path: Path) -> None:
    settings = ImageSettings(gc_high_threshold_percent=0, gc_low_threshold_percent=0, gc_minimum_age_seconds=0)
    async with rigged(tmp_path / "images", settings) as rig:
        rig.registry.add_cncf("a/hello:v1")
        rig.registry.add_cncf("a/hello:v2", COMPONENT)
        used = await rig.ensure("a/hello:v1")
        await rig.ensure("a/hello:v2")
        rig.manager.set_in_use(frozenset({used.module_digest}))
        await rig.manager.collect_garbage()
        assert rig.compiler.kept == frozenset({used.module_digest})
        assert [entry["names"] for entry in await rig.manager.list()] == [[used.image_id, rig.name()]]
        await rig.refused("ErrImageNeverPull", "a/hello:v2", policy=NEVER)


async def test_the_images_of_the_nodes_status_have_names_and_sizes(rig: Rig) -> None:
    rig.registry.add_cncf("a/hello:v1")
    image = await rig.ensure()
    assert await rig.manager.list() == [{"names": [image.image_id, rig.name()], "sizeBytes": image.size_bytes}]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "0s"),
        (0.8505, "850ms"),
        (1.2, "1.2s"),
        (59.9999, "59.999s"),
        (62.5, "1m2.5s"),
        (3600, "1h0m0s"),
    ],
)
def test_durations_read_as_gos(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def hostile(randomly: random.Random, registry: FakeRegistry) -> None:
    """An image of random wrongness under ``a/hello:v1``."""
    archive = tar_of([("a.wasm", MODULE)])
    blob = randomly.choice([MODULE, COMPONENT, archive, archive, b"", b"{}", b"\0asm", os.urandom(50)])
    platforms = [{"os": "wasi", "architecture": "wasm"}, {"os": "linux", "architecture": "amd64"}, None, 7]
    config: Any = {"architecture": "wasm", "os": "wasi", "config": {"Entrypoint": ["/a.wasm"], "Env": ["A=1"]}}
    config = randomly.choice([*[config] * 6, {}, [], None, {"config": 1}, {"config": {"Env": "x"}}])
    body = json.dumps(config).encode()
    types = [media.OCI_LAYER_TAR_GZIP if blob == archive else media.CNCF_WASM_LAYER] * 80
    types += [value for name, value in vars(media).items() if name.isupper() and isinstance(value, str)]
    layers = [
        descriptor(registry.add_blob(blob), randomly.choice(types)) for _ in range(randomly.choice([0, 1, 1, 1, 2]))
    ]
    for entry in layers:
        if randomly.random() < 0.2:
            entry[randomly.choice(list(entry))] = randomly.choice([0, -1, 1 << 60, "", "sha256:" + "0" * 64, None, []])
    configs = [*[media.OCI_CONFIG] * 4, media.CNCF_WASM_CONFIG, media.WASM_TO_OCI_CONFIG, media.DOCKER_CONFIG, "x/y"]
    manifest: Any = {
        "schemaVersion": 2,
        "config": descriptor(registry.add_blob(body), randomly.choice(configs)),
        "layers": layers,
    }
    kind = randomly.choice([*[media.OCI_MANIFEST] * 4, media.DOCKER_MANIFEST, "text/html", media.OCI_INDEX])
    if randomly.random() < 0.3:
        inner = registry.add_manifest("a/hello:inner", manifest, media.OCI_MANIFEST)
        manifest = {"manifests": [descriptor(inner, media.OCI_MANIFEST, platform=randomly.choice(platforms))]}
        kind = media.OCI_INDEX
    data = json.dumps(manifest).encode()
    if randomly.random() < 0.2:
        spoilt = bytearray(data)
        spoilt[randomly.randrange(len(spoilt))] = randomly.randrange(256)
        data = bytes(spoilt)
    registry.add_manifest("a/hello:v1", data, kind)
    registry.served = {digest_of(blob): os.urandom(len(blob))} if randomly.random() < 0.1 else {}
    registry.break_after = [randomly.randrange(60)] if randomly.random() < 0.1 else []
    registry.head_digest = randomly.choice([*[None] * 8, "nonsense", digest_of(b"")])


async def test_hundreds_of_hostile_images_end_in_nothing_but_image_errors(tmp_path: Path) -> None:
    randomly = random.Random(5)
    outcomes = {"pulled": 0, "refused": 0}
    async with rigged(tmp_path / "images", ImageSettings(max_image_bytes=10_000)) as rig:
        for number in range(600):
            rig.registry.manifests.clear()
            hostile(randomly, rig.registry)
            with contextlib.suppress(ImageError):
                outcomes["refused"] += 1
                image = await rig.ensure(policy=ALWAYS, pod_uid=str(number))
                outcomes["refused"] -= 1
                outcomes["pulled"] += 1
                assert digest_of(image.module_path.read_bytes()) == image.module_digest
        assert not list((rig.directory / "tmp").iterdir())
    assert min(outcomes.values()) > 20, outcomes


async def files_of(rig: Rig, folder: Path, image: str, events: Events | None = None) -> dict[str, bytes]:
    found = await rig.manager.ensure_files(
        rig.name(image), policy=IF_NOT_PRESENT, credentials=[], event=events or Events(), pod_uid="pod"
    )
    folder.mkdir()
    unpack(found.module_path, folder, limit_bytes=1 << 20)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_the_files_of_images_and_artifacts_are_had_as_one_archive(rig: Rig, tmp_path: Path) -> None:
    low = tar_of([("a/x", b"low"), ("y", b"1")])
    high = tar_of([("a/x", b"high"), (".wh.y", b"")], compress=False)
    rig.registry.add_image(
        "a/data:v1",
        config={"os": "linux", "architecture": "amd64"},
        config_type=media.OCI_CONFIG,
        layers=[(low, media.OCI_LAYER_TAR_GZIP), (high, media.OCI_LAYER_TAR)],
    )
    events = Events()
    assert await files_of(rig, tmp_path / "1", "a/data:v1", events) == {"a/x": b"high"}
    assert [event[1] for event in events.seen] == ["Pulling", "Pulled"]
    rig.registry.add_image(
        "a/model:v1",
        config=b"{}",
        config_type="application/vnd.oci.empty.v1+json",
        layers=[(b"weights", "application/octet-stream"), (b"more", "text/plain")],
        titles=["models/w.bin"],
    )
    more = digest_of(b"more").partition(":")[2]
    assert await files_of(rig, tmp_path / "2", "a/model:v1") == {"models/w.bin": b"weights", more: b"more"}
    # What can be run is had as files, too, and stays what it is.
    rig.registry.add_cncf("a/hello:v1")
    assert await files_of(rig, tmp_path / "3", "a/hello:v1") == {"hello.wasm": MODULE}
    assert (await rig.ensure()).module_path.read_bytes() == MODULE
    assert len(list((rig.directory / "volumes" / "blobs" / "sha256").iterdir())) == 3, "layers do not stay"
    assert len(await rig.manager.list()) == 4
    await rig.restart()
    events = Events()
    assert await files_of(rig, tmp_path / "4", "a/data:v1", events) == {"a/x": b"high"}
    assert "already present on machine" in events.seen[0][2]


REFUSED_FILES = [
    (media.OCI_CONFIG, [(b"x", "application/vnd.unknown")], [], "application/vnd.unknown"),
    (media.OCI_CONFIG, [(b"no archive" * 60, media.OCI_LAYER_TAR)], [], "not a tar archive"),
    (media.OCI_CONFIG, [], [], "no layers"),
    ("application/x", [(b"x", "text/plain")], ["../../etc/cron.d/x"], "no path below a folder"),
    ("application/x", [(b"x", "text/plain"), (b"y", "text/plain")], ["a", "./a"], "more than one file"),
]


@pytest.mark.parametrize(("config_type", "layers", "titles", "why"), REFUSED_FILES)
async def test_files_that_cannot_be_are_refused_and_leave_nothing(
    rig: Rig, config_type: str, layers: Any, titles: Any, why: str
) -> None:
    rig.registry.add_image("a/odd:v1", config=b"{}", config_type=config_type, layers=layers, titles=titles)
    with pytest.raises(ImageError, match=why) as caught:
        await rig.manager.ensure_files(rig.name("a/odd:v1"), policy=ALWAYS, credentials=[], event=Events())
    assert caught.value.reason == "ErrImagePull"
    left = [path for path in (rig.directory / "volumes").rglob("*") if path.is_file() and path.name != "lock"]
    assert left == []
