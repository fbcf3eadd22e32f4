"""A registry leads no request to what is nearer than itself, and no login for another site: ``registries.yaml``."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet_common.addresses import Reach
from wasilet_common.oci.authentication import same_site
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.reference import parse
from wasilet_common.oci.registry import (
    RegistryAuthError,
    RegistryClient,
    RegistryProtocolError,
    RegistryUnreachableError,
)
from wasilet_common.oci.repository import Repository
from wasilet_node.settings import ImageSettings
from yarl import URL

from tests.unit.node.images.fakes import FakeRegistry, credential, digest_of, serving

pytestmark = pytest.mark.unit

TABLE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "registries.yaml").read_text())


def named(row: dict[str, Any]) -> str:
    return f"{row['from']} to {row['to']} {'+'.join(row.get('answers', []))}"


@pytest.mark.parametrize("row", TABLE["led"], ids=named)
async def test_a_registry_leads_nowhere_nearer_than_itself(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def resolve(_host: str, port: int, *_args: Any, **_more: Any) -> list[Any]:
        families = [socket.AF_INET6 if ":" in text else socket.AF_INET for text in row["answers"]]
        ends = [(text, port, 0, 0) if ":" in text else (text, port) for text in row["answers"]]
        return [(f, socket.SOCK_STREAM, 6, "", end) for f, end in zip(families, ends, strict=True)]

    async def connect(*, addr_infos: list[Any], **_: Any) -> socket.socket:
        tried.extend(entry[4][0] for entry in addr_infos)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", connect)
    client = RegistryClient(settings=ImageSettings(), proxy=lambda _: None)
    source, target = URL("https://registry.example/v2/"), URL(row["to"])
    client._known["registry.example"] = [row["from"]]
    if row["from"].startswith("127."):
        source = URL("https://localhost:5000/v2/")
        client._known["localhost"] = [row["from"]]
    try:
        if row["allowed"]:
            assert client.may_go(target, source=source)
            with pytest.raises(RegistryUnreachableError):
                async with client.send("GET", target, headers={}, source=source):
                    pass
            assert tried == row.get("answers", [target.host])
            return
        if client.may_go(target, source=source):
            with pytest.raises(RegistryProtocolError, match="nearer to this machine"):
                async with client.send("GET", target, headers={}, source=source):
                    pass
        assert tried == []
    finally:
        await client.close()


@pytest.mark.parametrize("row", TABLE["sites"], ids=lambda row: f"{row['registry']} and {row['server']}")
def test_whose_site_a_token_server_is_of(row: dict[str, Any]) -> None:
    assert same_site(row["server"], row["registry"]) == row["same"]
    assert same_site(row["registry"], row["server"]) == row["same"]


async def token_requests(
    monkeypatch: pytest.MonkeyPatch, used: Credential, *logins: Credential
) -> tuple[FakeRegistry, Exception | None]:
    """A registry whose token server is of another site; what that server was asked, and how it ended."""
    monkeypatch.setattr("wasilet_common.oci.authentication.same_site", lambda *_: False)
    registry, server = FakeRegistry(users={"cat": "purr"}), FakeRegistry(users={"cat": "purr"})
    registry.add_cncf("a/hello:v1")
    client = RegistryClient(settings=ImageSettings())
    try:
        async with serving(registry, server):
            registry.realm = f"{server.origin}/token"
            given = [Credential(registry=server.host, username=c.username, password=c.password) for c in logins]
            repository = Repository(
                client=client, reference=parse(f"{registry.host}/a/hello:v1"), credential=used, logins=given
            )
            try:
                await repository.manifest("v1")
            except RegistryAuthError as error:
                return server, error
            return server, None
    finally:
        await client.close()


async def test_a_token_server_of_another_site_gets_no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    server, error = await token_requests(monkeypatch, credential("registry.example", "cat", "purr"))
    assert [headers.get("Authorization") for _, _, headers in server.requests] == [None]
    assert "is of another site" in str(error)
    assert "was not sent there: add one for 127.0.0.1" in str(error)
    assert "purr" not in str(error)


async def test_it_gets_the_one_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = credential("registry.example", "mouse", "squeak")
    server, error = await token_requests(monkeypatch, used, credential("", "cat", "purr"))
    assert error is None
    assert server.paths() == ["/token"]


async def test_a_redirect_of_a_blob_is_judged_by_what_its_name_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: a registry that is taken for a public one leads to a name of this machine."""
    blob = b"x" * 100
    registry, inner = FakeRegistry(), FakeRegistry()
    registry.add_blob(blob)
    inner.add_blob(blob)
    client = RegistryClient(
        settings=ImageSettings(insecure_registries=("inside.example",)), reach=lambda _: Reach.PUBLIC
    )
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "inside.example" else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        async with serving(registry, inner):
            port = inner.origin.rpartition(":")[2]
            client.settings = ImageSettings(insecure_registries=(f"inside.example:{port}",))
            registry.redirect = lambda digest: f"http://inside.example:{port}/v2/a/hello/blobs/{digest}"
            repository = Repository(client=client, reference=parse(f"{registry.host}/a/hello:v1"), credential=None)
            with pytest.raises(RegistryProtocolError, match="nearer to this machine"):
                async with repository.blob(digest_of(blob), size=len(blob)):
                    pass
    finally:
        await client.close()
    assert inner.requests == []
