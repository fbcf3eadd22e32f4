from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from wasilet_node.certificates_store import NodeNames, Pair, self_signed
from wasilet_node.contract import KEPT, Contract
from wasilet_node.kube.base import (
    ApiStatusError,
    ApiUnavailableError,
    ConflictError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    TooManyRequestsError,
)
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.kube.turns import AT_ONCE, Turns

from tests.unit.node.kube.rig import answer, api_server, client_of, status_response

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, ApiStatusError),
        (401, ApiStatusError),
        (403, ForbiddenError),
        (404, NotFoundError),
        (409, ConflictError),
        (410, GoneError),
        (429, TooManyRequestsError),
        (500, ApiStatusError),
        (503, ApiStatusError),
    ],
)
async def test_a_refusal_keeps_what_the_server_said(code: int, kind: type[ApiStatusError]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return status_response(code, "SomeReason", "some message", name="x", kind="pods", retryAfterSeconds=100)

    async with client_of(handler) as kube:
        with pytest.raises(kind) as caught:
            await kube.get("/api/v1/pods/x", timeout_seconds=2)

    error = caught.value
    assert type(error) is kind
    assert (error.code, error.reason, error.message, error.details["name"]) == (
        code, "SomeReason", "some message", "x",
    )  # fmt: skip
    if isinstance(error, TooManyRequestsError):
        assert error.retry_after_seconds == 100


async def test_an_answer_that_is_no_status_is_still_an_error_with_its_text() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>bad gateway</html>")

    async with client_of(handler) as kube:
        with pytest.raises(ApiStatusError, match="bad gateway") as caught:
            await kube.get("/x")
    assert caught.value.code == 502


async def test_success_that_is_not_json_is_no_answer() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text="<html>hotel wifi</html>")

    async with client_of(handler) as kube:
        with pytest.raises(ApiUnavailableError, match="not JSON"):
            await kube.get("/x")


@pytest.mark.parametrize("said", [{}, {"metadata": {}}, {"kind": "Pod", "metadata": None}, {"kind": 1}, [], "ok", None])
async def test_success_that_is_no_object_is_no_answer(said: object) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(said)

    async with client_of(handler) as kube:
        for call in (kube.get, kube.list):
            with pytest.raises(ApiUnavailableError, match="not an object of Kubernetes"):
                await call("/api/v1/pods")


async def test_the_servers_version_is_the_one_answer_without_a_kind() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "37", "gitVersion": "v1.37.2"})

    async with client_of(handler) as kube:
        assert await Contract(kube).version() == KEPT[(1, 37)]
        with pytest.raises(ApiUnavailableError, match="not an object of Kubernetes"):
            await kube.get("/api/v1/nodes/n")


@pytest.mark.parametrize("said", [{"kind": "Status", "items": []}, {"kind": "Pod"}, {}, {"items": ["x"]}])
async def test_a_list_that_is_none_is_not_taken_for_an_empty_one(said: dict[str, object]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return answer(**{"kind": "PodList", **said})

    async with client_of(handler) as kube:
        with pytest.raises(ApiUnavailableError, match="not a list"):
            await kube.list("/api/v1/pods")


async def test_metadata_that_is_left_out_is_empty() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response({"kind": "TokenReview", "status": {}})

    async with client_of(handler) as kube:
        assert (await kube.create("/x", {}))["metadata"] == {}


async def test_bodies_and_content_types_reach_the_server() -> None:
    seen: list[tuple[str, str, str, object]] = []

    async def handler(request: web.Request) -> web.Response:
        body = await request.text()
        seen.append((request.method, request.path, request.content_type, json.loads(body) if body else None))
        return answer(ok=True)

    async with client_of(handler) as kube:
        await kube.create("/a", {"x": 1})
        await kube.replace("/b", {"x": 2})
        await kube.patch("/c", {"x": 3})
        await kube.patch("/d", {"x": 4}, content_type="application/merge-patch+json")
        await kube.delete("/e", grace_period_seconds=0, uid="u")

    assert seen == [
        ("POST", "/a", "application/json", {"x": 1}),
        ("PUT", "/b", "application/json", {"x": 2}),
        ("PATCH", "/c", "application/strategic-merge-patch+json", {"x": 3}),
        ("PATCH", "/d", "application/merge-patch+json", {"x": 4}),
        (
            "DELETE",
            "/e",
            "application/json",
            {
                "apiVersion": "v1",
                "kind": "DeleteOptions",
                "gracePeriodSeconds": 0,
                "preconditions": {"uid": "u"},
            },
        ),
    ]


@pytest.mark.parametrize(("path", "counts"), [("/api/v1/pods/x/status", True), ("/api/v1/events/x", False)])
async def test_only_a_status_on_its_way_is_what_events_wait_for(path: str, *, counts: bool) -> None:
    seen: list[bool] = []

    async def handler(_: web.Request) -> web.Response:
        seen.append(kube.writes_statuses)
        return status_response(409, "Conflict", "changed")

    async with client_of(handler) as kube:
        with pytest.raises(ConflictError):
            await kube.patch(path, {})
        assert (seen, kube.writes_statuses) == ([counts], False)


async def test_a_token_is_sent_as_bearer_and_the_agent_names_itself() -> None:
    async def handler(request: web.Request) -> web.Response:
        return answer(headers=dict(request.headers))

    async with client_of(handler, credentials=Credentials(token="abc.def")) as kube:
        headers = (await kube.get("/x"))["headers"]
    assert headers["Authorization"] == "Bearer abc.def"
    assert headers["User-Agent"] == "test"


async def test_a_silent_server_is_given_up_after_the_time_that_was_given() -> None:
    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    async with client_of(handler) as kube:
        began = asyncio.get_running_loop().time()
        with pytest.raises(ApiUnavailableError, match="no answer in time"):
            await kube.get("/x", timeout_seconds=0.2)
        assert asyncio.get_running_loop().time() - began < 1.5


async def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        kube = KubeClient(Cluster(server=f"http://127.0.0.1:{port}"), Credentials(token="t"), user_agent="test")
        with pytest.raises(ApiUnavailableError, match=rf"GET http://127\.0\.0\.1:{port}/x.*"):
            await kube.get("/x")
        await kube.close()


async def test_lists_are_read_in_pages_and_joined() -> None:
    queries: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        queries.append(dict(request.query))
        if "continue" not in request.query:
            return answer(kind="PodList", metadata={"continue": "tok en&"}, items=[{"n": 1}])
        return answer(kind="PodList", metadata={"resourceVersion": "7"}, items=[{"n": 2}])

    async with client_of(handler) as kube:
        whole = await kube.list("/api/v1/pods", field_selector="spec.nodeName=a b", label_selector="x in (a,b)")

    assert [each["n"] for each in whole["items"]] == [1, 2]
    assert whole["metadata"] == {"resourceVersion": "7"}
    assert queries[0] == {"limit": "500", "fieldSelector": "spec.nodeName=a b", "labelSelector": "x in (a,b)"}
    assert queries[1]["continue"] == "tok en&"


async def test_a_list_without_items_is_empty() -> None:
    async def handler(_: web.Request) -> web.Response:
        return answer(kind="PodList", items=None)

    async with client_of(handler) as kube:
        assert (await kube.list("/x"))["items"] == []


async def test_an_expired_page_token_begins_the_list_again() -> None:
    answers = ["page", "gone", "whole"]

    async def handler(_: web.Request) -> web.Response:
        page = answers.pop(0)
        if page == "page":
            return answer(kind="PodList", metadata={"continue": "t"}, items=[{"n": "old"}])
        if page == "gone":
            return status_response(410, "Expired")
        return answer(kind="PodList", items=[{"n": "new"}])

    async with client_of(handler) as kube:
        assert (await kube.list("/x"))["items"] == [{"n": "new"}]


async def test_too_many_requests_is_waited_for_within_the_callers_time() -> None:
    answers = [429, 200]

    async def handler(_: web.Request) -> web.Response:
        code = answers.pop(0)
        return answer() if code == 200 else web.json_response({}, status=code, headers={"Retry-After": "0.05"})

    async with client_of(handler) as kube:
        await kube.get("/x")
    assert answers == []


async def test_a_retry_after_beyond_the_callers_time_is_raised_at_once() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response({}, status=503, headers={"Retry-After": "30"})

    async with client_of(handler) as kube:
        async with asyncio.timeout(2):
            with pytest.raises(ApiStatusError):
                await kube.get("/x", timeout_seconds=5)


@pytest.mark.parametrize("method", ["get", "patch"])
async def test_a_kept_alive_connection_that_went_stale_costs_nothing(method: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return answer()

    async with api_server(handler) as (url, runner):
        kube = KubeClient(Cluster(server=url), Credentials(token="t"), user_agent="test")
        await kube.get("/x")
        port = runner.addresses[0][1]
        await runner.cleanup()
        async with api_server(handler, port=port):
            await (kube.get("/x") if method == "get" else kube.patch("/x", {}))
            await kube.close()


@pytest.fixture
async def identity_server(tmp_path: Path) -> AsyncIterator[tuple[str, Pair, Pair, list[str]]]:
    """A TLS server that says which client certificate it saw, and lets ``/slow`` hang until ``/go``."""
    server = self_signed("server", NodeNames(ips=frozenset({"127.0.0.1"})))
    first, second = self_signed("first", NodeNames()), self_signed("second", NodeNames())
    (tmp_path / "server.pem").write_text(server.certificate + server.key)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(cadata=first.certificate + second.certificate)
    go = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        certificate = request.get_extra_info("peercert")
        name = dict(pair for entry in certificate["subject"] for pair in entry)["commonName"]
        if request.path == "/go":
            go.set()
        if request.path == "/slow":
            await go.wait()
        return answer(name=name)

    async with api_server(handler, tls=tls) as (url, _):
        yield url, first, second, [server.certificate]


async def test_another_certificate_takes_over_and_a_request_in_flight_ends_as_it_began(
    identity_server: tuple[str, Pair, Pair, list[str]],
) -> None:
    url, first, second, (ca,) = identity_server
    kube = KubeClient(
        Cluster(server=url, ca_data=ca), Credentials(certificate=first.certificate, key=first.key), user_agent="test"
    )
    slow = asyncio.create_task(kube.get("/slow"))
    await kube.get("/warm-up")

    kube.set_credentials(Credentials(certificate=second.certificate, key=second.key))

    assert (await kube.get("/go"))["name"] == "second (self-signed)"
    assert (await slow)["name"] == "first (self-signed)"
    await kube.close()


async def test_a_server_with_an_unknown_certificate_is_not_spoken_to(
    identity_server: tuple[str, Pair, Pair, list[str]],
) -> None:
    url, first, second, _ = identity_server
    kube = KubeClient(
        Cluster(server=url, ca_data=second.certificate),
        Credentials(certificate=first.certificate, key=first.key),
        user_agent="test",
    )
    with pytest.raises(ApiUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await kube.get("/x")
    await kube.close()


async def test_a_damaged_certificate_is_refused_and_the_old_one_stays(
    identity_server: tuple[str, Pair, Pair, list[str]],
) -> None:
    url, first, _, (ca,) = identity_server
    kube = KubeClient(
        Cluster(server=url, ca_data=ca), Credentials(certificate=first.certificate, key=first.key), user_agent="test"
    )
    with pytest.raises(ValueError, match="cannot be loaded"):
        kube.set_credentials(Credentials(certificate=first.certificate, key="nonsense"))
    assert (await kube.get("/x"))["name"] == "first (self-signed)"
    await kube.close()


async def test_loopback_never_goes_through_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(_: web.Request) -> web.Response:
        return answer()

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with client_of(handler) as kube:
        await kube.get("/x")


async def test_idle_connections_probe_their_peer() -> None:
    options: list[int] = []

    async def handler(_: web.Request) -> web.Response:
        return answer()

    async with client_of(handler) as kube:
        await kube.get("/x")
        session = kube._generation.calls._rest.pool_manager
        assert isinstance(session, aiohttp.ClientSession)
        for connections in session.connector._conns.values():  # type: ignore[union-attr]
            for protocol, _ in connections:
                assert protocol.transport is not None
                options.append(protocol.transport.get_extra_info("socket").getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))  # fmt: skip
    assert options == [15]


async def test_a_request_that_is_cancelled_at_any_moment_leaves_no_connection(
    identity_server: tuple[str, Pair, Pair, list[str]],
) -> None:
    url, first, _, (ca,) = identity_server
    port = urlsplit(url).port
    assert port is not None
    identity = Credentials(certificate=first.certificate, key=first.key)
    for turns in [*range(50), *range(50)]:
        kube = KubeClient(Cluster(server=url, ca_data=ca), identity, user_agent="test")
        asking = asyncio.create_task(kube.get("/x"))
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        await kube.close()
        assert established_to(port) == 0, f"cancelled after {turns} turns of the loop"


def established_to(port: int) -> int:
    """How many connections of this machine to a port are established (``/proc/net/tcp``: 01), on the asking end."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(remote.endswith(f":{port:04X}") and state == "01" for _, _, remote, state, *_ in rows)


async def test_a_burst_of_requests_shares_few_connections() -> None:
    """Each more costs a TLS handshake, and is idle a moment later."""
    seen: set[object] = set()

    async def handler(request: web.Request) -> web.Response:
        seen.add(request.transport)
        await asyncio.sleep(0.001)
        return answer()

    async with client_of(handler, turns=Turns(patience_seconds=60)) as kube:
        await asyncio.gather(*(kube.get(f"/api/v1/pods/{number}") for number in range(60)))
    assert len(seen) <= AT_ONCE


async def test_a_slow_server_is_asked_side_by_side() -> None:
    """What it does not answer must keep nothing else from it: the lease above all."""
    release = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path != "/lease":
            await release.wait()
        return answer()

    async with client_of(handler) as kube:
        stuck = [asyncio.create_task(kube.get(f"/api/v1/pods/{number}")) for number in range(3 * AT_ONCE)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await kube.get("/lease")
        release.set()
        await asyncio.gather(*stuck)
