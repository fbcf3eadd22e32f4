"""Identifying callers and deciding what they may do."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from wasilet_common.singleflight import SingleFlight, TooManyCallsError
from wasilet_node.kube.base import ApiUnavailableError, KubeObject
from wasilet_node.server.auth import (
    AuthenticationError,
    Authenticator,
    AuthorizationError,
    Authorizer,
    User,
    bearer_token,
    certificate_user,
    subresources,
    verb,
)
from wasilet_node.server.caches import ExpiringCache

from tests.unit.node.server.rig import Authority, ReviewKube

pytestmark = pytest.mark.unit


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/pods", ("pods", "proxy")),
        ("/pods/", ("pods", "proxy")),
        ("/podsecurity", ("proxy",)),
        ("/runningpods", ("pods", "proxy")),
        ("/runningpods/", ("pods", "proxy")),
        ("/healthz", ("healthz", "proxy")),
        ("/healthz/syncloop", ("healthz", "proxy")),
        ("/configz", ("configz", "proxy")),
        ("/stats/summary", ("stats",)),
        ("/metrics", ("metrics",)),
        ("/metrics/resource", ("metrics",)),
        ("/metricsx", ("proxy",)),
        ("/logs/", ("log",)),
        ("/containerLogs/a/b/c", ("proxy",)),
        ("/exec/a/b/c", ("proxy",)),
        ("/", ("proxy",)),
    ],
)
def test_paths_map_to_the_subresources_that_kubelet_asks_for(path: str, expected: tuple[str, ...]) -> None:
    assert subresources(path) == expected


def test_methods_map_to_verbs() -> None:
    assert [verb(method) for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")] == [
        "get",
        "create",
        "update",
        "patch",
        "delete",
        "",
    ]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("Bearer abc def", "abc"),
        ("Bearer ", None),
        ("Bearer", None),
        ("Basic abc", None),
        ("", None),
    ],
)
def test_the_authorization_header_is_read_as_the_api_server_reads_it(header: str, expected: str | None) -> None:
    assert bearer_token(header) == expected


def test_a_browser_may_send_its_token_as_a_websocket_protocol() -> None:
    encoded = base64.urlsafe_b64encode(b"tok>en?").decode().rstrip("=")
    assert bearer_token("", f"v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.{encoded}") == "tok>en?"
    assert bearer_token("", "base64url.bearer.authorization.k8s.io.!!") is None
    assert bearer_token("", "base64url.bearer.authorization.k8s.io.\u00e9\udcff") is None


def test_a_certificate_names_user_and_groups_while_it_is_valid() -> None:
    pair = Authority().issue("system:node:a", organizations=["system:nodes", "more"])
    now = datetime.now(UTC)
    user = certificate_user(der(pair.certificate), now=now)
    assert user is not None
    assert user.name == "system:node:a"
    assert user.groups == ("system:nodes", "more", "system:authenticated")
    assert certificate_user(der(pair.certificate), now=now + timedelta(days=2)) is None
    assert certificate_user(b"no certificate", now=now) is None


async def test_many_requests_with_one_token_are_one_review() -> None:
    release = asyncio.Event()

    class SlowKube(ReviewKube):
        async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
            await release.wait()
            return await super().create(path, body, timeout_seconds=timeout_seconds)

    kube = SlowKube(tokens={"t": {"username": "u"}})
    authenticator = Authenticator(kube)
    calls = [asyncio.create_task(authenticator.authenticate(tls=None, authorization="Bearer t")) for _ in range(20)]
    await asyncio.sleep(0)
    calls[0].cancel()
    release.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, User) and result.name == "u" for result in results[1:])
    assert len(kube.asked) == 1


async def test_a_rejected_token_is_remembered_and_an_error_is_not() -> None:
    kube = ReviewKube()
    authenticator = Authenticator(kube)
    for _ in range(2):
        assert await authenticator.authenticate(tls=None, authorization="Bearer bad") is None
    assert len(kube.asked) == 1
    kube.error = ApiUnavailableError("away")
    with pytest.raises(AuthenticationError):
        await authenticator.authenticate(tls=None, authorization="Bearer good")
    kube.error, kube.tokens["good"] = None, {"username": "u"}
    assert await authenticator.authenticate(tls=None, authorization="Bearer good") is not None


async def test_the_cache_does_not_hold_tokens() -> None:
    authenticator = Authenticator(ReviewKube(tokens={"very-secret": {"username": "u"}}))
    await authenticator.authenticate(tls=None, authorization="Bearer very-secret")
    assert all(b"very-secret" not in key for key in authenticator._known._entries)


@pytest.mark.parametrize("token", ["x" * 20_000, "ä"])
async def test_absurd_tokens_are_not_sent_on(token: str) -> None:
    kube = ReviewKube()
    assert await Authenticator(kube).authenticate(tls=None, authorization=f"Bearer {token}") is None
    assert not kube.asked


async def test_the_coarse_right_is_asked_for_only_when_the_fine_one_is_missing() -> None:
    kube = ReviewKube(grants={("u", "get", "pods"), ("v", "get", "proxy")})
    authorizer = Authorizer(kube, node_name="n")
    assert (await authorizer.authorize(User(name="u"), method="GET", path="/pods")).allowed
    assert len(kube.asked) == 1
    assert (await authorizer.authorize(User(name="v"), method="GET", path="/pods")).allowed
    assert len(kube.asked) == 3


async def test_decisions_are_remembered_for_each_user_and_verb() -> None:
    kube = ReviewKube(grants={("u", "get", "proxy")})
    authorizer = Authorizer(kube, node_name="n")
    for _ in range(3):
        assert (await authorizer.authorize(User(name="u"), method="GET", path="/x")).allowed
        assert not (await authorizer.authorize(User(name="u"), method="POST", path="/x")).allowed
        assert not (await authorizer.authorize(User(name="u", groups=("g",)), method="POST", path="/x")).allowed
    assert len(kube.asked) == 3


async def test_a_lookup_that_fails_is_an_error_and_not_a_refusal() -> None:
    authorizer = Authorizer(ReviewKube(error=ApiUnavailableError("away")), node_name="n")
    with pytest.raises(AuthorizationError, match=r"user=u, verb=get, resource=nodes, subresource=metrics"):
        await authorizer.authorize(User(name="u"), method="GET", path="/metrics")


def test_entries_expire_and_the_least_used_goes_first() -> None:
    now = [0.0]
    cache: ExpiringCache[str, int] = ExpiringCache(max_entries=2, clock=lambda: now[0])
    cache.put("a", 1, ttl_seconds=10)
    cache.put("b", 2, ttl_seconds=20)
    assert cache.get("a") == 1
    cache.put("c", 3, ttl_seconds=20)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    now[0] = 10.0
    assert cache.get("a") is None
    assert len(cache) == 1


async def test_unauthenticated_clients_cannot_queue_without_limit() -> None:
    flights: SingleFlight[int, int] = SingleFlight(max_running=1, max_waiting=1)
    release = asyncio.Event()

    async def call() -> int:
        await release.wait()
        return 1

    waiting = [asyncio.create_task(flights.do(key, call)) for key in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyCallsError):
        await flights.do(3, call)
    release.set()
    assert await asyncio.gather(*waiting) == [1, 1]
    await flights.close()
