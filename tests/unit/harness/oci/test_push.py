"""``push`` and ``pull`` against registries as they are in the field, each a small server on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from wasilet.oci.artifact import Layout, make_artifact
from wasilet.oci.logins import docker_config, logins_for
from wasilet.oci.push import RegistryError, pull, push, reference_named
from wasilet_common.oci import mediatypes
from wasilet_common.oci.reference import parse

from tests.unit.node.images.fakes import MODULE, FakeRegistry, descriptor, digest_of, serving, tar_of

pytestmark = pytest.mark.unit


def module_at(folder: Path) -> Path:
    path = folder / "hello.wasm"
    path.write_bytes(MODULE)
    return path


def logged_in(folder: Path, *entries: tuple[str, dict[str, str]], **more: Any) -> dict[str, str]:
    """An environment with a docker configuration."""
    (folder / "config.json").write_text(json.dumps({"auths": dict(entries), **more}))
    return {"DOCKER_CONFIG": str(folder), "HOME": str(folder), "WASILET_STATE_HOME": str(folder / "none")}


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


async def test_what_is_pushed_can_be_pulled_and_is_sent_once(tmp_path: Path) -> None:
    registry, environ = FakeRegistry(), logged_in(tmp_path)
    async with serving(registry):
        reference = reference_named(f"{registry.host}/a/hello:v1")
        artifact = make_artifact(module_at(tmp_path))
        first = await asyncio.to_thread(push, artifact, reference, environ=environ)
        second = await asyncio.to_thread(push, artifact, reference, environ=environ)
        pulled = await asyncio.to_thread(pull, reference, output=tmp_path / "out.wasm", environ=environ)
    assert (first.uploaded_bytes > 0, second.uploaded_bytes) == (True, 0)
    assert pulled.digest == first.digest == artifact.digest
    assert (tmp_path / "out.wasm").read_bytes() == MODULE


@pytest.mark.parametrize("scope", ["", ',scope="repository:a/hello:pull"'])
async def test_a_token_for_a_push_may_push_also_where_the_challenge_names_the_realm_alone(
    tmp_path: Path, scope: str
) -> None:
    registry, environ = FakeRegistry(), logged_in(tmp_path)
    async with serving(registry):
        registry.realm = f"{registry.origin}/token"
        registry.challenges = (f'Bearer realm="{registry.realm}"{scope}',)
        reference = reference_named(f"{registry.host}/a/hello:v1")
        await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=environ)
        pushing = list(registry.scopes)
        registry.scopes.clear()
        await asyncio.to_thread(pull, reference, environ=environ)
    assert pushing[0] == ("repository:a/hello:pull" if scope else "repository:a/hello:pull,push")
    assert registry.scopes == ["repository:a/hello:pull"]


@pytest.mark.parametrize(
    "challenges",
    [
        ('Basic realm="fake", Bearer realm="{origin}/token",service="s"',),
        ('Basic realm="fake"', 'Bearer realm="{origin}/token",service="s"'),
        ("Negotiate", 'bearer   realm = "{origin}/token"'),
        ('Bearer service="a, Basic b",realm="{origin}/token"',),
    ],
    ids=["in one header", "in several", "after one that is not known", "with a comma in a string"],
)
async def test_of_several_challenges_the_one_that_can_be_answered_is(tmp_path: Path, challenges: tuple[str]) -> None:
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(registry):
        registry.realm = f"{registry.origin}/token"
        registry.challenges = tuple(text.format(origin=registry.origin) for text in challenges)
        environ = logged_in(tmp_path, (registry.host, auth("cat", "purr")))
        reference = reference_named(f"{registry.host}/a/hello:v1")
        await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=environ)
    assert "a/hello:v1" in registry.manifests


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("{host}", auth("cat", "purr:purr")),
        ("https://{host}", auth("cat", "purr:purr")),
        ("http://{host}", auth("cat", "purr:purr")),
        ("http://{host}/v1/", auth("cat", "purr:purr")),
        ("https://{host}/v2/", auth("cat", "purr:purr")),
        ("https://{host}/v1", auth("cat", "purr:purr")),
        ("{host}/a", auth("cat", "purr:purr")),
        ("{host}/elsewhere", auth("cat", "purr:purr")),
        ("{host}", {"username": "cat", "password": "purr:purr"}),
        ("https://{host}/v1/", {"username": "cat", "password": "purr:purr", "email": "x"}),
        ("{host}", {"auth": "", "username": "cat", "password": "purr:purr"}),
    ],
)
async def test_a_login_is_found_as_docker_login_wrote_it(tmp_path: Path, key: str, entry: dict[str, str]) -> None:
    registry = FakeRegistry(users={"cat": "purr:purr"})
    async with serving(registry):
        environ = logged_in(tmp_path, (key.format(host=registry.host), entry), ("other.example", auth("x", "y")))
        reference = reference_named(f"{registry.host}/a/hello:v1")
        await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=environ)
    assert "a/hello:v1" in registry.manifests


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "https://docker.io"])
def test_docker_hubs_names_are_one(tmp_path: Path, key: str) -> None:
    (found,) = logins_for(parse("you/hello"), logged_in(tmp_path, (key, auth("cat", "purr"))))
    assert (found.username, found.password) == ("cat", "purr")


HELPER = """#!/bin/sh
read -r server
echo "$server" >> {seen}
test "$server" = "{server}" || {{ echo "credentials not found in native keychain"; exit 1; }}
echo '{answer}'
"""


def with_helper(folder: Path, server: str, answer: dict[str, str], **config: Any) -> dict[str, str]:
    program = folder / "docker-credential-tests"
    program.write_text(HELPER.format(seen=folder / "seen", server=server, answer=json.dumps(answer)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**logged_in(folder, **config), "PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("image", "server", "config"),
    [
        ("registry.example/a", "registry.example", {"credsStore": "tests"}),
        ("registry.example/a", "registry.example", {"credHelpers": {"registry.example": "tests"}}),
        ("registry.example/a", "https://registry.example", {"credsStore": "tests"}),
        ("you/hello", "https://index.docker.io/v1/", {"credsStore": "tests"}),
    ],
)
def test_a_credential_helper_is_asked(tmp_path: Path, image: str, server: str, config: dict[str, Any]) -> None:
    environ = with_helper(tmp_path, server, {"Username": "cat", "Secret": "purr:purr"}, **config)
    (found,) = logins_for(parse(image), environ)
    assert (found.username, found.password) == ("cat", "purr:purr")


def test_a_helpers_identity_token_is_one(tmp_path: Path) -> None:
    answer = {"Username": "<token>", "Secret": "refresh"}
    environ = with_helper(tmp_path, "registry.example", answer, credsStore="tests")
    (found,) = logins_for(parse("registry.example/a"), environ)
    assert (found.username, found.identity_token) == ("", "refresh")


def test_a_helper_of_another_registry_is_not_asked_and_one_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = with_helper(tmp_path, "x", {}, credHelpers={"other.example": "tests"})
    assert logins_for(parse("registry.example/a"), environ) == ()
    assert not (tmp_path / "seen").exists()
    monkeypatch.setattr("wasilet.oci.logins.HELPER_TIMEOUT_SECONDS", 0.2)
    (tmp_path / "docker-credential-tests").write_text("#!/bin/sh\nexec sleep 60\n")
    assert logins_for(parse("other.example/a"), environ) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        '{"auths": []}',
        '{"auths": {"a": 1}}',
        '{"credsStore": "../../bin/sh"}',
        '{"auths": {"registry.example": {"auth": "%"}}}',
    ],
)
def test_a_configuration_that_makes_no_sense_holds_no_login(tmp_path: Path, text: str) -> None:
    environ = logged_in(tmp_path)
    docker_config(environ).write_text(text)
    assert logins_for(parse("registry.example/a"), environ) == ()


async def test_a_message_never_speaks_of_a_login_that_is_not_there(tmp_path: Path) -> None:
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(registry):
        registry.realm = f"{registry.origin}/token"
        reference = reference_named(f"{registry.host}/a/hello:v1")
        artifact = make_artifact(module_at(tmp_path))
        with pytest.raises(RegistryError, match="wants a login for a/hello, and there is none") as without:
            await asyncio.to_thread(push, artifact, reference, environ=logged_in(tmp_path, ("other.example", {})))
        environ = logged_in(tmp_path, (registry.host, auth("cat", "HISS")))
        with pytest.raises(RegistryError, match=f"does not accept the login for {registry.host}") as wrong:
            await asyncio.to_thread(push, artifact, reference, environ=environ)
    assert without.value.hint == wrong.value.hint == f"type: docker login {registry.host}"
    assert "HISS" not in str(wrong.value)


def manifest_of(registry: FakeRegistry, **more: Any) -> dict[str, Any]:
    config = registry.add_blob(b'{"architecture":"wasm","os":"wasip1"}')
    return {
        "schemaVersion": 2,
        "config": descriptor(config, mediatypes.CNCF_WASM_CONFIG),
        "layers": [descriptor(registry.add_blob(MODULE), mediatypes.CNCF_WASM_LAYER)],
        **more,
    }


@pytest.mark.parametrize(
    ("own", "served"),
    [
        ("", "application/json"),
        ("", mediatypes.OCI_MANIFEST),
        ("", f"{mediatypes.OCI_MANIFEST}; charset=utf-8"),
        ("", "application/json; charset=utf-8"),
        ("", "text/plain"),
        (mediatypes.OCI_MANIFEST, "application/json"),
        (mediatypes.OCI_MANIFEST, "application/octet-stream"),
        (mediatypes.DOCKER_MANIFEST, f"{mediatypes.DOCKER_MANIFEST};charset=UTF-8"),
    ],
)
async def test_a_manifest_is_one_whatever_it_is_served_as(tmp_path: Path, own: str, served: str) -> None:
    registry = FakeRegistry()
    document = manifest_of(registry, **({"mediaType": own} if own else {}))
    registry.add_manifest("a/hello:v1", document, served)
    async with serving(registry):
        reference = reference_named(f"{registry.host}/a/hello:v1")
        await asyncio.to_thread(pull, reference, output=tmp_path / "out.wasm", environ=logged_in(tmp_path))
    assert (tmp_path / "out.wasm").read_bytes() == MODULE


async def test_of_an_index_the_wasm_entry_is_taken_as_the_node_takes_it(tmp_path: Path) -> None:
    registry = FakeRegistry()
    linux = registry.add_image(
        "a/hello:linux",
        config={"os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["/hello"]}},
        config_type=mediatypes.OCI_CONFIG,
        layers=[(tar_of([("hello", b"\x7fELF")]), mediatypes.OCI_LAYER_TAR_GZIP)],
    )
    wasm = registry.add_image(
        "a/hello:wasm",
        config={"os": "wasip1", "architecture": "wasm", "config": {"Entrypoint": ["/app/main.wasm"]}},
        config_type=mediatypes.OCI_CONFIG,
        layers=[(tar_of([("app/main.wasm", MODULE)]), mediatypes.OCI_LAYER_TAR_GZIP)],
    )
    platforms = ({"os": "linux", "architecture": "amd64"}, {"os": "unknown", "architecture": "unknown"})
    entries = [descriptor(linux, mediatypes.OCI_MANIFEST, platform=platform) for platform in platforms]
    entries.append(descriptor(wasm, mediatypes.OCI_MANIFEST, platform={"os": "wasip1", "architecture": "wasm"}))
    registry.add_manifest("a/hello:v1", {"schemaVersion": 2, "manifests": entries}, "application/json")
    registry.add_manifest("a/hello:v2", {"schemaVersion": 2, "manifests": entries[:1]}, mediatypes.OCI_INDEX)
    async with serving(registry):
        environ = logged_in(tmp_path)
        reference = reference_named(f"{registry.host}/a/hello:v1")
        pulled = await asyncio.to_thread(pull, reference, output=tmp_path / "out.wasm", environ=environ)
        with pytest.raises(RegistryError, match="wrong architecture: the index has no entry for platform wasi/wasm"):
            await asyncio.to_thread(pull, reference_named(f"{registry.host}/a/hello:v2"), environ=environ)
    assert pulled.digest == digest_of(wasm)
    assert (tmp_path / "out.wasm").read_bytes() == MODULE


@pytest.mark.parametrize("place", ["{path}", "{origin}{path}"])
async def test_an_upload_goes_where_the_registry_says(tmp_path: Path, place: str) -> None:
    registry = FakeRegistry()
    async with serving(registry):
        registry.upload_at = lambda path: place.format(path=path, origin=registry.origin)
        reference = reference_named(f"{registry.host}/a/hello:v1")
        await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=logged_in(tmp_path))
    assert digest_of(MODULE) in registry.blobs


@pytest.mark.parametrize(
    "place", ["", "ftp://x/y", "http://203.0.113.1/{path}", "http://u:p@127.0.0.1/x", "http://169.254.169.254/x"]
)
async def test_an_upload_does_not_go_astray(tmp_path: Path, place: str) -> None:
    registry = FakeRegistry(upload_at=lambda path: place.format(path=path))
    async with serving(registry):
        reference = reference_named(f"{registry.host}/a/hello:v1")
        with pytest.raises(RegistryError, match="with an address that may not be used"):
            await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=logged_in(tmp_path))


async def test_a_registry_that_holds_something_else_than_was_sent_is_an_error(tmp_path: Path) -> None:
    registry = FakeRegistry(keep=lambda data: data[:-1])
    async with serving(registry):
        reference = reference_named(f"{registry.host}/a/hello:v1")
        with pytest.raises(RegistryError, match="does not hold it as it was sent"):
            await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=logged_in(tmp_path))


async def test_logins_and_uploads_do_not_follow_to_another_origin(tmp_path: Path) -> None:
    registry, other = FakeRegistry(users={"cat": "purr"}), FakeRegistry()
    async with serving(registry, other):
        registry.upload_at = lambda path: f"{other.origin}{path}"
        environ = logged_in(tmp_path, (registry.host, auth("cat", "purr")))
        reference = reference_named(f"{registry.host}/a/hello:v1")
        # What lands elsewhere is not in the registry, which is noticed; and the login stayed where it belongs.
        with pytest.raises(RegistryError, match="does not hold it as it was sent"):
            await asyncio.to_thread(push, make_artifact(module_at(tmp_path)), reference, environ=environ)
    assert other.requests
    assert all("Authorization" not in headers for _, _, headers in other.requests)


@pytest.mark.parametrize("layout", list(Layout))
async def test_the_module_of_every_layout_comes_back(tmp_path: Path, layout: Layout) -> None:
    registry = FakeRegistry()
    async with serving(registry):
        reference = reference_named(f"{registry.host}/a/hello:v1")
        artifact = make_artifact(module_at(tmp_path), layout=layout)
        await asyncio.to_thread(push, artifact, reference, environ=logged_in(tmp_path))
        await asyncio.to_thread(pull, reference, output=tmp_path / "out.wasm", environ=logged_in(tmp_path))
    assert (tmp_path / "out.wasm").read_bytes() == MODULE
