"""A component that asks for what is not offered is refused by name, before it is pulled where its config says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import wasmtime
from wasilet_common.components import Interfaces
from wasilet_common.oci import mediatypes
from wasilet_node.images.manager import ImageManager
from wasilet_node.images.model import ImageError, PullPolicy
from wasilet_node.images.offer import offered, world_labels
from wasilet_node.images.preflight import COMMAND_OFFER, refusal
from wasilet_node.runtime.component_host.library import HostUnavailableError
from wasilet_node.settings import ImageSettings

from tests.unit.node.images.fakes import Events, FakeCompiler, FakeRegistry, digest_of, serving
from tests.unit.node.runtime.component_guests import component_guest

pytestmark = pytest.mark.unit

COMMAND = bytes(wasmtime.wat2wasm(component_guest("(i32.const 0)")))
KEYVALUE = bytes(
    wasmtime.wat2wasm(component_guest("(i32.const 0)", imports='(import "wasi:keyvalue/store@0.2.0-draft" (instance))'))
)


@pytest.mark.parametrize(
    "name",
    [
        "wasi:cli/environment@0.2.0",
        "wasi:cli/environment@0.2.99",
        "wasi:io/streams@0.2.3",
        "wasi:sockets/tcp@0.2.1",
        "wasi:random/random@0.2.0+build",
        "pollable",
        "",
    ],
)
def test_what_is_offered_passes(name: str) -> None:
    assert refusal(Interfaces(imports=(name,))) == ""


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("wasi:http/outgoing-handler@0.2.3", "wasi-experimental-http"),
        ("wasi:keyvalue/store@0.2.0-draft", "store data in a volume"),
        ("wasi:blobstore/container@0.2.0", "store data in a volume"),
        ("wasi:config/store@0.2.0-rc.1", "read environment variables"),
        ("wasi:nn/graph@0.2.0-rc-2024-10-28", "no inference"),
        ("fermyon:spin/key-value@2.0.0", "SpinKube"),
        ("wasmcloud:bus/lattice@1.0.0", "wasmCloud"),
        ("wasi:cli/environment@0.3.0", "build it for WASI 0.2"),
        ("wasi:io/streams@0.2.0-rc-2023-11-10", "tools of this year"),
        ("you:library/api@1.0.0", "wac plug"),
        ("wasi:cli", "build it for WASI 0.2"),
    ],
)
def test_what_is_not_offered_is_named_with_what_to_do(name: str, advice: str) -> None:
    why = refusal(Interfaces(imports=("wasi:cli/stdout@0.2.0", name)))
    assert why.startswith(f"the component imports {name}, which this node does not offer: ")
    assert advice in why


def test_an_offer_may_be_larger_and_names_are_tamed_and_few() -> None:
    http = Interfaces(imports=("wasi:http/types@0.2.0",))
    assert refusal(http, COMMAND_OFFER | {"wasi:http@0.2"}) == ""
    why = refusal(Interfaces(imports=tuple(f"a:b/c\n{'x' * 500}{n}" for n in range(50))))
    assert "\n" not in why
    assert " and 45 more" in why
    assert len(why) < 1000


def add_component(registry: FakeRegistry, name: str, component: bytes, fields: object) -> None:
    config: dict[str, Any] = {"architecture": "wasm", "os": "wasip2", "layerDigests": [digest_of(component)]}
    if fields is not None:
        config["component"] = fields
    registry.add_image(
        name,
        config=config,
        config_type=mediatypes.CNCF_WASM_CONFIG,
        layers=[(component, mediatypes.CNCF_WASM_LAYER)],
    )


async def outcome(registry: FakeRegistry, folder: Path, name: str) -> tuple[str, list[str]]:
    """The message, or ``pulled``; and what was compiled."""
    compiler = FakeCompiler()
    manager = ImageManager(directory=folder / "images", settings=ImageSettings(), compiler=compiler)
    try:
        async with serving(registry):
            image = await manager.ensure(
                f"{registry.host}/{name}", policy=PullPolicy.ALWAYS, credentials=(), event=Events()
            )
            await manager.compiled(image)
            return f"pulled {image.module_name}", compiler.compiled
    except ImageError as error:
        return error.message, compiler.compiled
    finally:
        await manager.close()
        await asyncio.sleep(0)


NEEDS = {"imports": ["wasi:cli/stdout@0.2.0", "wasi:keyvalue/store@0.2.0-draft"], "exports": ["wasi:cli/run@0.2.0"]}


async def test_a_config_that_lists_them_is_believed_before_the_layer_is_asked_for(tmp_path: Path) -> None:
    registry = FakeRegistry()
    add_component(registry, "a/kv:v1", KEYVALUE, NEEDS)
    message, compiled = await outcome(registry, tmp_path, "a/kv:v1")
    assert "the component imports wasi:keyvalue/store@0.2.0-draft, which this node does not offer" in message
    assert compiled == []
    assert not [path for path in registry.paths() if path.endswith(digest_of(KEYVALUE))]


@pytest.mark.parametrize("fields", [None, {}, {"imports": None}, [], "x"])
async def test_without_them_the_component_is_read_before_it_is_compiled(tmp_path: Path, fields: object) -> None:
    registry = FakeRegistry()
    add_component(registry, "a/kv:v1", KEYVALUE, fields)
    message, compiled = await outcome(registry, tmp_path, "a/kv:v1")
    assert "the component imports wasi:keyvalue/store@0.2.0-draft, which this node does not offer" in message
    assert compiled == []


async def test_an_image_as_wkg_pushes_it_runs(tmp_path: Path) -> None:
    registry = FakeRegistry()
    fields = {"exports": ["wasi:cli/run@0.2.3"], "imports": ["wasi:cli/exit@0.2.3"], "target": None}
    add_component(registry, "a/hello:v1", COMMAND, fields)
    message, compiled = await outcome(registry, tmp_path, "a/hello:v1")
    assert message == "pulled hello"
    assert compiled == [digest_of(COMMAND).removeprefix("sha512:")]


def spin_app(source: bytes, /, **changed: Any) -> dict[str, Any]:
    part = {
        "id": "hello",
        "metadata": {"allowed_outbound_hosts": []},
        "source": {"content_type": "application/wasm", "digest": digest_of(source)},
        "env": {"GREETING": "hi"},
    }
    app: dict[str, Any] = {
        "spin_lock_version": 1,
        "metadata": {"name": "hello"},
        "triggers": [{"id": "t", "trigger_type": "http", "trigger_config": {"component": "hello", "route": "/..."}}],
        "components": [{**part, **changed.pop("component", {})}],
    }
    return {**app, **changed}


def add_spin(registry: FakeRegistry, app: dict[str, Any]) -> None:
    registry.add_image(
        "a/spin:v1",
        config=json.dumps(app).encode(),
        config_type=mediatypes.SPIN_CONFIG,
        layers=[(b"other", mediatypes.CNCF_WASM_LAYER), (COMMAND, mediatypes.CNCF_WASM_LAYER)],
    )


async def test_a_spin_application_of_one_http_component_is_pulled(tmp_path: Path) -> None:
    registry = FakeRegistry()
    add_spin(registry, spin_app(COMMAND))
    assert (await outcome(registry, tmp_path, "a/spin:v1"))[0] == "pulled hello"


@pytest.mark.parametrize(
    ("app", "needs"),
    [
        (spin_app(COMMAND, component={"metadata": {"key_value_stores": ["default"]}}), "needs a key-value store"),
        (spin_app(COMMAND, component={"metadata": {"sqlite_databases": ["default"]}}), "needs an SQLite database"),
        (spin_app(COMMAND, component={"metadata": {"ai_models": ["llama2"]}}), "needs an AI model"),
        (spin_app(COMMAND, component={"files": [{"path": "/"}]}), "needs files that Spin mounts"),
        (spin_app(COMMAND, component={"config": {"a": "{{ b }}"}}), "needs variables of the application"),
        (spin_app(COMMAND, component={"dependencies": {"x": {}}}), "needs components that Spin composes"),
        (spin_app(COMMAND, triggers=[{"id": "t", "trigger_type": "redis"}]), "is started by redis"),
        (spin_app(COMMAND, triggers=[]), "is started by nothing"),
        (spin_app(COMMAND, components=[]), "has 0 components"),
        (spin_app(COMMAND, components=[{}, {}]), "has 2 components"),
        (spin_app(COMMAND, component={"source": {"digest": digest_of(b"x")}}), "not among the image's layers"),
        (spin_app(COMMAND, component={"source": None}), "source is not a JSON object"),
        (spin_app(COMMAND, component={"env": {"A": 1}}), "env is not a list of strings"),
        (spin_app(COMMAND, components="x"), "components are not a list"),
    ],
)
async def test_other_spin_applications_are_refused_by_what_they_need(
    tmp_path: Path, app: dict[str, Any], needs: str
) -> None:
    registry = FakeRegistry()
    add_spin(registry, app)
    message, compiled = await outcome(registry, tmp_path, "a/spin:v1")
    assert needs in message
    assert compiled == []
    assert not [path for path in registry.paths() if path.endswith(digest_of(COMMAND))]


def _no_host() -> None:
    raise HostUnavailableError("no component host; COMMAND builds it")


@pytest.mark.parametrize(
    ("interfaces", "with_host", "without"),
    [
        (Interfaces(imports=("wasi:cli/exit@0.2.3",), exports=("wasi:cli/run@0.2.3",)), "", ""),
        (Interfaces(imports=("wasi:http/types@0.2.3",), exports=("wasi:http/incoming-handler@0.2.3",)), "", "COMMAND"),
        (Interfaces(exports=("wasi:http/handler@0.3.0",)), "", "COMMAND"),
        (Interfaces(imports=("wasi:config/store@0.2.0-rc.1",), exports=("wasi:cli/run@0.2.3",)), "", "COMMAND"),
        (Interfaces(imports=("wasi:cli/stdout@0.3.0",), exports=("wasi:cli/run@0.3.0",)), "", "COMMAND"),
        (Interfaces(imports=("wasi:http/types@0.2.3", "wasi:nn/graph@0.2.0-rc-2024-10-28")), "inference", "inference"),
    ],
)
def test_what_needs_the_component_host_is_told_how_to_have_it(
    interfaces: Interfaces, with_host: str, without: str
) -> None:
    for find, why in ((lambda: None, with_host), (_no_host, without)):
        refused = offered(interfaces, find=find)
        assert (why in refused) if why else refused == ""


def test_the_labels_name_what_runs_here_now() -> None:
    labels = {find: world_labels(find=find) for find in (_no_host, lambda: None)}
    without, with_host = labels.values()
    assert set(with_host.values()) == {"true"}
    assert {name for name, value in without.items() if value == "true"} == {
        "wasilet.dev/wasi-cli-0.1",
        "wasilet.dev/wasi-cli-0.2",
    }


@pytest.mark.parametrize(
    ("exports", "server"),
    [
        (("wasi:http/incoming-handler@0.2.3",), True),
        (("wasi:http/handler@0.3.1",), True),
        (("wasi:http/incoming-handler@0.2.3", "wasi:cli/run@0.2.3"), False),
        (("wasi:cli/run@0.2.3",), False),
        ((), False),
    ],
)
def test_a_component_with_a_handler_is_a_server_unless_it_is_a_command(
    exports: tuple[str, ...],
    server: bool,  # noqa: FBT001
) -> None:
    assert Interfaces(exports=exports).is_server is server
