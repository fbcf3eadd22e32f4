"""The registry client: authentication, redirects, time-outs, resumed and refused transfers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from wasilet_common.oci.challenge import Challenge, parse_challenges
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.reference import parse
from wasilet_common.oci.registry import (
    RegistryAuthError,
    RegistryClient,
    RegistryNotFoundError,
    RegistryProtocolError,
    RegistryUnreachableError,
    TransferInterruptedError,
    environment_proxy,
)
from wasilet_common.oci.repository import MAX_MANIFEST_BYTES, Repository
from wasilet_node.settings import ImageSettings
from yarl import URL

from tests.unit.node.images.fakes import FakeRegistry, credential, digest_of, serving

pytestmark = pytest.mark.unit

SETTINGS = ImageSettings(connect_timeout_seconds=1, read_timeout_seconds=1)
BLOB = bytes(range(256)) * 1000


@asynccontextmanager
async def opened(
    registry: FakeRegistry, used: Credential | None = None, settings: ImageSettings = SETTINGS
) -> AsyncIterator[Repository]:
    client = RegistryClient(settings=settings)
    try:
        yield Repository(client=client, reference=parse(f"{registry.host}/a/hello:v1"), credential=used)
    finally:
        await client.close()


async def read(repository: Repository, digest: str, size: int, offset: int = 0) -> tuple[int, bytes]:
    async with repository.blob(digest, size=size, offset=offset) as transfer:
        return transfer.start, b"".join([chunk async for chunk in transfer.chunks])


async def test_a_tag_resolves_to_its_digest_and_the_manifest_comes_with_its_type() -> None:
    registry = FakeRegistry()
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        assert await repository.resolve("v1") == digest_of(body)
        manifest = await repository.manifest("v1")
    assert (manifest.digest, manifest.body) == (digest_of(body), body)
    assert manifest.media_type == "application/vnd.oci.image.manifest.v1+json"


async def test_a_registry_without_head_is_asked_for_the_manifest() -> None:
    registry = FakeRegistry(no_head=True)
    registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        assert await repository.resolve("v1") is None


async def test_a_manifest_by_digest_that_hashes_to_another_is_refused() -> None:
    registry = FakeRegistry()
    registry.add_cncf("a/hello:v1")
    wanted = digest_of(b"something else")
    registry.manifests[f"a/hello:{wanted}"] = registry.manifests["a/hello:v1"]
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="what came hashes to"):
            await repository.manifest(wanted)


async def test_a_digest_that_resolves_to_another_is_refused() -> None:
    registry = FakeRegistry(head_digest=digest_of(b"other"))
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="another digest"):
            await repository.resolve(digest_of(body))


async def test_a_manifest_over_the_limit_is_not_read() -> None:
    registry = FakeRegistry()
    registry.add_manifest("a/hello:v1", b" " * (MAX_MANIFEST_BYTES + 1), "application/json")
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="more than"):
            await repository.manifest("v1")


async def test_what_is_not_there_is_said_to_be_not_found() -> None:
    registry = FakeRegistry()
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryNotFoundError, match=r"a/hello:v1: not found$"):
            await repository.resolve("v1")


async def test_basic_credentials_are_sent_when_they_are_asked_for() -> None:
    registry = FakeRegistry(users={"cat": "purr:purr"})
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry, credential("x", "cat", "purr:purr")) as repository:
        assert await repository.resolve("v1") == digest_of(body)
    assert "Authorization" not in registry.requests[0][2]


async def test_without_credentials_the_pod_is_told_to_name_a_pull_secret() -> None:
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryAuthError, match=r"no basic auth credentials; name a pull secret for 127\.0\.0\.1"):
            await repository.resolve("v1")


async def test_wrong_credentials_are_refused_after_one_more_try_and_not_shown() -> None:
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(registry), opened(registry, credential("my.registry", "cat", "HISSSS")) as repository:
        with pytest.raises(RegistryAuthError, match=r"the pull secret for my\.registry is not accepted") as caught:
            await repository.resolve("v1")
    assert len(registry.requests) == 2
    assert "HISSSS" not in str(caught.value)


@pytest.mark.parametrize("used", [None, credential("x", "cat", "purr"), credential("x", "", "", "identity")])
async def test_a_bearer_token_is_fetched_and_used_for_all_that_follows(used: Credential | None) -> None:
    registry = FakeRegistry(users={"cat": "purr"} if used and used.username else {}, identity_tokens=("identity",))
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry, used) as repository:
        registry.realm = f"{registry.origin}/token"
        assert await repository.resolve("v1") == digest_of(body)
        await repository.manifest("v1")
    assert [path for _, path, _ in registry.requests].count("/token") == 1


async def test_a_token_that_expired_is_renewed() -> None:
    registry = FakeRegistry()
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        registry.realm = f"{registry.origin}/token"
        await repository.resolve("v1")
        registry.token = "a-newer-one"
        assert await repository.resolve("v1") == digest_of(body)


async def test_a_refused_token_is_an_authentication_error() -> None:
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(registry), opened(registry, credential("x", "cat", "wrong")) as repository:
        registry.realm = f"{registry.origin}/token"
        with pytest.raises(RegistryAuthError, match="failed to fetch a token: 401"):
            await repository.resolve("v1")


@pytest.mark.parametrize(
    "realm",
    ["http://203.0.113.1/token", "ftp://127.0.0.1/x", "", "http://", "http://a b/", "/token", "https://[a]@/"],
)
async def test_credentials_do_not_go_to_a_token_server_in_plain_http_elsewhere(realm: str) -> None:
    registry = FakeRegistry(realm=realm or " ")
    async with serving(registry), opened(registry, credential("x", "cat", "purr")) as repository:
        with pytest.raises(RegistryProtocolError, match="token server"):
            await repository.resolve("v1")


async def test_a_redirect_is_followed_without_the_registrys_credentials() -> None:
    storage = FakeRegistry()
    storage.add_blob(BLOB)
    registry = FakeRegistry(users={"cat": "purr"})
    async with serving(storage, registry), opened(registry, credential("x", "cat", "purr")) as repository:
        registry.redirect = lambda digest: f"{storage.origin}/v2/any/blobs/{digest}?signature=a%2Bb"
        assert await read(repository, digest_of(BLOB), len(BLOB)) == (0, BLOB)
    assert "Authorization" in registry.requests[-1][2]
    assert "Authorization" not in storage.requests[-1][2]
    assert "Cookie" not in storage.requests[-1][2]


@pytest.mark.parametrize(
    "target", ["http://203.0.113.1/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://u:p@127.0.0.1/"]
)
async def test_a_redirect_to_where_it_may_not_go_is_refused(target: str) -> None:
    registry = FakeRegistry(redirect=lambda _: target)
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="redirects to"):
            await read(repository, digest_of(BLOB), len(BLOB))


@pytest.mark.parametrize("target", ["https://[a]@/", "https://hé/x", "https://xn--ß/", "https://", "javascript:x"])
async def test_a_redirect_that_is_no_url_is_refused(target: str) -> None:
    answer = f"HTTP/1.1 307 Elsewhere\r\nContent-Length: 0\r\nLocation: {target}\r\n\r\n".encode()
    async with raw_server(answer) as registry, opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="redirects to nowhere"):
            await read(repository, digest_of(BLOB), len(BLOB))


async def test_redirects_in_circles_end() -> None:
    registry = FakeRegistry(redirect=lambda digest: f"/v2/a/hello/blobs/{digest}")
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="in circles"):
            await read(repository, digest_of(BLOB), len(BLOB))


def test_a_registry_elsewhere_cannot_lead_requests_to_this_machine() -> None:
    client = RegistryClient(settings=ImageSettings(insecure_registries=("plain.example:5000",)))
    plain, secure = URL("http://plain.example:5000"), URL("https://ghcr.io")
    assert not client.may_go(URL("http://127.0.0.1:10248/"), source=plain)
    assert not client.may_go(URL("https://localhost/"), source=secure)
    assert not client.may_go(URL("http://plain.example:5000/"), source=secure)
    for spelt in (
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "127.1",
        "0x7f000001",
        "2130706433",
        "localhost.",
        "a.localhost",
    ):
        assert not client.may_go(URL(f"https://{spelt}:6443/"), source=secure), spelt
    assert client.may_go(URL("http://plain.example:5000/x"), source=plain)
    assert client.may_go(URL("https://storage.example/x"), source=secure)
    assert client.may_go(URL("http://127.0.0.1:9/"), source=URL("http://localhost:5000"))


def test_plain_http_is_for_loopback_and_listed_registries() -> None:
    plain, secure = ("localhost:5000", "[::1]:1", "10.0.0.1:5000"), ("10.0.0.1", "10.0.0.1:5001", "ghcr.io")
    client = RegistryClient(settings=ImageSettings(insecure_registries=("10.0.0.1:5000",)))
    assert {host for host in (*plain, *secure) if client.origin(host).scheme == "http"} == set(plain)


async def test_a_blob_resumes_where_it_ended() -> None:
    registry = FakeRegistry()
    registry.add_blob(BLOB)
    async with serving(registry), opened(registry) as repository:
        assert await read(repository, digest_of(BLOB), len(BLOB), offset=1000) == (1000, BLOB[1000:])
    assert registry.requests[-1][2]["Range"] == "bytes=1000-"


async def test_a_registry_that_ignores_the_range_sends_all() -> None:
    registry = FakeRegistry(ignore_range=True)
    registry.add_blob(BLOB)
    async with serving(registry), opened(registry) as repository:
        assert await read(repository, digest_of(BLOB), len(BLOB), offset=1000) == (0, BLOB)


async def test_a_transfer_that_breaks_off_says_how_far_it_came() -> None:
    registry = FakeRegistry(break_after=[1000])
    registry.add_blob(BLOB)
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(TransferInterruptedError, match="of 256000 bytes"):
            await read(repository, digest_of(BLOB), len(BLOB))


@pytest.mark.parametrize("wrong", [BLOB + b"x", BLOB[:-1], b""])
async def test_a_blob_of_another_size_than_announced_is_refused_unread(wrong: bytes) -> None:
    registry = FakeRegistry(served={digest_of(BLOB): wrong})
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryProtocolError, match="the registry announces"):
            await read(repository, digest_of(BLOB), len(BLOB))


async def test_a_server_in_trouble_is_an_error_with_its_own_words() -> None:
    registry = FakeRegistry(status=503)
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryUnreachableError, match=r"unexpected status from GET request .*: 503: BAD: as told"):
            await repository.manifest("v1")


@asynccontextmanager
async def raw_server(answer: bytes, *, hold: bool = False, drip_seconds: float = 0) -> AsyncIterator[FakeRegistry]:
    """Answers each connection with these bytes, then closes it, or holds it, or goes on with spaces."""
    handlers: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await reader.read(100)
            writer.write(answer)
            await writer.drain()
            if hold:
                await reader.read()
            while drip_seconds:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(drip_seconds)
        except ConnectionError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield FakeRegistry(origin=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()
        await server.wait_closed()
        if handlers:
            await asyncio.wait(handlers, timeout=5)


async def test_a_dead_registry_is_a_prompt_error_that_says_what_to_do() -> None:
    async with raw_server(b"") as registry:
        pass
    async with opened(registry) as repository:
        with pytest.raises(
            RegistryUnreachableError,
            match=r'failed to do request: Head "http://127\.0\.0\.1:\d+/v2/a/hello/manifests/v1": '
            r"dial tcp 127\.0\.0\.1:\d+: connect: connection refused; is the registry running",
        ):
            await repository.resolve("v1")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: 1\r\n"])
async def test_a_registry_that_is_stuck_is_given_up_on(answer: bytes) -> None:
    settings = ImageSettings(connect_timeout_seconds=0.2, read_timeout_seconds=0.2)
    async with raw_server(answer, hold=True) as registry, opened(registry, None, settings) as repository:
        with pytest.raises(RegistryUnreachableError, match="timeout awaiting response headers"):
            await repository.resolve("v1")


async def test_a_manifest_that_drips_is_given_up_on() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    settings = ImageSettings(connect_timeout_seconds=0.1, read_timeout_seconds=0.5)
    async with raw_server(answer, drip_seconds=0.02) as registry, opened(registry, None, settings) as repository:
        with pytest.raises(RegistryUnreachableError, match="did not send the manifest within"):
            await repository.manifest("v1")


async def test_a_token_that_drips_is_given_up_on_while_a_blob_is_fetched() -> None:
    settings = ImageSettings(connect_timeout_seconds=0.1, read_timeout_seconds=0.5)
    async with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", drip_seconds=0.02) as token_server:
        registry = FakeRegistry(realm=f"{token_server.origin}/token")
        async with serving(registry), opened(registry, None, settings) as repository:
            with pytest.raises(RegistryUnreachableError, match="did not send a token within"):
                await asyncio.wait_for(read(repository, digest_of(BLOB), len(BLOB)), 20)


@pytest.mark.parametrize("burst", [0, 10_000_000])
async def test_a_blob_that_drips_is_given_up_on_long_before_its_size_would_allow(burst: int) -> None:
    size = 500 * 1024 * 1024
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * burst
    settings = ImageSettings(connect_timeout_seconds=0.1, read_timeout_seconds=0.5)
    async with raw_server(answer, drip_seconds=0.02) as registry, opened(registry, None, settings) as repository:
        with pytest.raises(TransferInterruptedError, match=r"broke off after \d+ of 524288000 bytes: TimeoutError"):
            await asyncio.wait_for(read(repository, digest_of(BLOB), size), 20)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_registry_that_asks_for_patience_is_waited_for_once(status: int) -> None:
    registry = FakeRegistry(busy=[(status, "1")])
    body = registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        assert await repository.resolve("v1") == digest_of(body)
        registry.busy = [(status, "1"), (status, "1")]
        with pytest.raises(RegistryUnreachableError, match=f": {status}"):
            await repository.manifest("v1")
    assert len(registry.requests) == 4


@pytest.mark.parametrize("retry_after", ["", "0", "3600", "-1", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_registry_that_asks_for_much_patience_is_left_to_the_back_off(retry_after: str) -> None:
    registry = FakeRegistry(busy=[(429, retry_after)])
    registry.add_cncf("a/hello:v1")
    async with serving(registry), opened(registry) as repository:
        with pytest.raises(RegistryUnreachableError, match="429; the registry limits how often"):
            await repository.manifest("v1")
    assert len(registry.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"\0" * 1000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 999],
)
async def test_what_is_not_http_is_an_error_too(answer: bytes) -> None:
    async with raw_server(answer) as registry, opened(registry) as repository:
        with pytest.raises(RegistryUnreachableError, match="failed to do request"):
            await repository.resolve("v1")


async def test_a_plain_http_registry_that_is_not_listed_is_named_with_the_flag_that_lists_it() -> None:
    registry = FakeRegistry()
    client = RegistryClient(settings=SETTINGS)
    async with serving(registry):
        client.speaks_https(registry.host)
        repository = Repository(client=client, reference=parse(f"{registry.host}/a/hello:v1"), credential=None)
        with pytest.raises(
            RegistryUnreachableError,
            match=r"server gave HTTP response to HTTPS client; .*--insecure-registries 127\.0\.0\.1:",
        ):
            await repository.resolve("v1")
    await client.close()


async def test_a_loopback_registry_that_wants_https_gets_it() -> None:
    answer = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    async with raw_server(answer) as registry, opened(registry) as repository:
        with pytest.raises(RegistryUnreachableError, match='Head "https://'):
            await repository.resolve("v1")


async def test_a_bad_request_alone_does_not_change_the_scheme() -> None:
    registry = FakeRegistry(status=400)
    async with serving(registry), opened(registry) as repository:
        for _ in range(2):
            with pytest.raises(RegistryUnreachableError, match=r"to http://.*: 400"):
                await repository.resolve("v1")


async def test_a_name_that_does_not_resolve_is_said_to_be_no_such_host() -> None:
    async with opened(FakeRegistry(origin="http://registry.invalid")) as repository:
        with pytest.raises(RegistryUnreachableError, match=r"lookup registry\.invalid: no such host"):
            await repository.resolve("v1")


def test_proxies_of_the_environment_are_used_except_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    assert environment_proxy(URL("https://ghcr.io/v2/")) == "http://proxy.example:3128"
    assert environment_proxy(URL("https://internal.example/v2/")) is None
    assert environment_proxy(URL("https://127.0.0.1:5000/v2/")) is None
    assert environment_proxy(URL("https://[::1]:5000/v2/")) is None


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        ([], []),
        (["Basic"], [("basic", {})]),
        (['Basic realm="a b"'], [("basic", {"realm": "a b"})]),
        (
            ['Bearer realm="https://a/token",service="s",scope="repository:a/b:pull,push"'],
            [("bearer", {"realm": "https://a/token", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (
            [r'Basic realm="quo\"ted", charset=UTF-8, Bearer REALM = x'],
            [("basic", {"realm": 'quo"ted', "charset": "UTF-8"}), ("bearer", {"realm": "x"})],
        ),
        (["Basic", "Bearer realm=y"], [("basic", {}), ("bearer", {"realm": "y"})]),
        (['realm="orphan"'], []),
        (['Bearer realm="unclosed'], [("bearer", {}), ("realm", {})]),
        (["\0\0"], []),
    ],
)
def test_challenges_are_taken_apart(headers: list[str], challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(headers) == [Challenge(scheme=s, parameters=p) for s, p in challenges]


def test_a_credential_never_shows_its_secrets() -> None:
    used = credential("ghcr.io", "cat", "purr", "identity")
    assert "purr" not in repr(used)
    assert "identity" not in f"{used} {[used]}"


async def test_an_empty_blob_is_a_blob() -> None:
    registry = FakeRegistry()
    registry.add_blob(b"")
    async with serving(registry), opened(registry) as repository:
        assert await read(repository, digest_of(b""), 0) == (0, b"")
