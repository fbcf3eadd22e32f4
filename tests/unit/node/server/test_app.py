"""The kubelet API over real TLS on loopback: who gets in, and how it behaves as certificates and callers change."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.server.app import KubeletServer
from wasilet_node.server.tls import ServerError

from tests.unit.node.server.rig import (
    API_SERVER,
    LIMIT,
    NOT_YET,
    Authority,
    FakePods,
    FakeRuntime,
    ReviewKube,
    Rig,
    log_folder,
    make_pod,
    make_settings,
    running,
)

pytestmark = pytest.mark.unit

NAME_LINE = b"2025-01-01T00:00:00.%09dZ stdout F %s\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        yield rig


@pytest.mark.parametrize("path", ["/healthz", "/pods", "/metrics", "/nowhere", "/containerLogs/a/b/c", "/logs/"])
async def test_a_stranger_gets_401_on_every_path(rig: Rig, path: str) -> None:
    assert await rig.get(path, anonymous=True) == (401, "Unauthorized")
    assert await rig.get(path, token="guessed") == (401, "Unauthorized")


async def test_an_api_server_with_a_certificate_passes(rig: Rig) -> None:
    assert await rig.get("/healthz") == (200, "ok")
    review = rig.kube.asked[-1]["spec"]
    assert review["user"] == API_SERVER
    assert set(review["groups"]) == {"kubeadm:cluster-admins", "system:authenticated"}
    assert review["resourceAttributes"]["name"] == "wasm-1"


async def test_a_known_token_passes_and_is_reviewed_once(rig: Rig) -> None:
    rig.kube.tokens["secret"] = {"username": "scraper", "groups": ["system:authenticated"]}
    rig.kube.grants.add(("scraper", "get", "healthz"))
    for _ in range(3):
        assert await rig.get("/healthz", token="secret") == (200, "ok")
    assert [review["kind"] for review in rig.kube.asked] == ["TokenReview", "SubjectAccessReview"]


async def test_a_forbidden_user_is_told_what_was_missing(rig: Rig) -> None:
    nobody = rig.authority.issue("nobody")
    status, text = await rig.get("/pods", pair=nobody)
    assert status == 403
    assert text == "Forbidden (user=nobody, verb=get, resource=nodes, subresource(s)=[pods proxy])\n"


async def test_a_fine_grained_right_does_not_open_other_paths(rig: Rig) -> None:
    reader = rig.authority.issue("reader")
    rig.kube.grants.add(("reader", "get", "pods"))
    assert (await rig.get("/pods", pair=reader))[0] == 200
    assert (await rig.get("/pods/../configz", pair=reader))[0] == 403
    assert (await rig.get("/containerLogs/default/web/main", pair=reader))[0] == 403


async def test_an_api_server_that_is_away_is_500_for_certificates_and_401_for_tokens(rig: Rig) -> None:
    rig.kube.error = ApiUnavailableError("connection refused")
    status, text = await rig.get("/pods")
    assert status == 500
    assert text.startswith(f"Authorization error (user={API_SERVER}, verb=get, resource=nodes, subresource=pods)")
    assert await rig.get("/pods", token="secret") == (401, "Unauthorized")


async def test_a_client_certificate_of_another_authority_ends_in_a_tls_alert(rig: Rig) -> None:
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await rig.get("/healthz", pair=Authority("other").issue(API_SERVER))


async def test_an_expired_client_certificate_does_not_pass(rig: Rig) -> None:
    expired = rig.authority.issue(API_SERVER, lifetime=timedelta(hours=-1))
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await rig.get("/healthz", pair=expired)


async def test_a_new_certificate_serves_new_connections_and_leaves_open_ones(rig: Rig) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(rig.url("/healthz"), ssl=rig.tls(rig.client)) as response:
            assert response.status == 200
        renewed = rig.authority.issue("system:node:wasm-1", addresses=["127.0.0.1"], server=True)
        rig.server.set_certificate(renewed.certificate, renewed.key)
        async with session.get(rig.url("/healthz"), ssl=rig.tls(rig.client)) as response:
            assert response.status == 200
    presented = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", rig.server.port or 0))
    assert presented.strip() == renewed.certificate.decode().strip()


async def test_a_pair_that_does_not_match_is_refused_and_the_old_one_stays(rig: Rig) -> None:
    other = rig.authority.issue("x", server=True)
    with pytest.raises(ServerError, match="serving certificate"):
        rig.server.set_certificate(rig.serving.certificate, other.key)
    assert (await rig.get("/healthz"))[0] == 200


async def test_a_new_client_ca_ends_trust_in_the_old_one_on_open_connections_too(rig: Rig) -> None:
    successor = Authority("next")
    async with aiohttp.ClientSession() as session:
        async with session.get(rig.url("/healthz"), ssl=rig.tls(rig.client)) as response:
            assert response.status == 200
        rig.server.set_client_ca(successor.pem)
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            async with session.get(rig.url("/healthz"), ssl=rig.tls(rig.client)) as response:
                await response.text()
    assert (await rig.get("/healthz", pair=successor.issue(API_SERVER)))[0] == 200


async def test_without_a_client_ca_a_certificate_is_not_even_requested(rig: Rig) -> None:
    rig.server.set_client_ca(None)
    assert await rig.get("/healthz") == (401, "Unauthorized")


async def test_old_tls_versions_are_refused(rig: Rig) -> None:
    context = rig.tls(rig.client)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES256-SHA256:AES128-SHA:@SECLEVEL=0")
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(rig.url("/healthz"), ssl=context)


@pytest.mark.parametrize("method", ["HEAD", "DELETE", "PATCH", "PUT"])
async def test_a_wrong_method_is_405(rig: Rig, method: str) -> None:
    for verb in ("", "delete", "patch", "update"):
        rig.kube.grants.add((API_SERVER, verb, "proxy"))
    assert (await rig.get("/pods", method=method))[0] == 405


async def test_an_unknown_path_is_404_for_those_who_may_ask(rig: Rig) -> None:
    assert await rig.get("/nowhere") == (404, "404 page not found\n")


@pytest.mark.parametrize("path", ["/pods", "/pods/", "/runningpods", "/runningpods/"])
async def test_lists_of_pods_are_served_with_and_without_a_slash(rig: Rig, path: str) -> None:
    """The API server's proxy leaves the last one out, as virtual-kubelet's suite found."""
    status, body = await rig.get(path)
    assert status == 200
    assert json.loads(body)["kind"] == "PodList"


async def test_an_error_does_not_show_internals(rig: Rig) -> None:
    rig.runtime.error = RuntimeError("secret detail")
    assert await rig.get("/runningpods/") == (500, "Internal Server Error")


async def test_a_port_that_is_taken_is_named_before_a_certificate_exists(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        server = KubeletServer(
            settings=make_settings(tmp_path, port=holder.getsockname()[1]),
            kube=ReviewKube(),
            pods=FakePods(),
            runtime=FakeRuntime(),
            log_root=tmp_path,
        )
        with pytest.raises(ServerError, match=r"port \d+: Address already in use.*--port"):
            await asyncio.wait_for(server.run(), 5)


async def test_it_listens_only_once_there_is_a_certificate(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    task = asyncio.create_task(rig.server.run())
    try:
        await asyncio.sleep(0.05)
        assert rig.server.port is None
        rig.server.set_certificate(rig.serving.certificate, rig.serving.key)
        async with asyncio.timeout(5):
            await rig.server.wait_listening()
        assert (await rig.get("/healthz"))[0] == 200
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_unauthenticated_clients_that_hold_connections_make_room_for_others(rig: Rig) -> None:
    writers = [
        (await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(None)))[1] for _ in range(LIMIT)
    ]
    try:
        assert (await rig.get("/healthz"))[0] == 200
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def test_unauthenticated_clients_that_never_begin_tls_make_room_for_others(rig: Rig) -> None:
    writers = [(await asyncio.open_connection("127.0.0.1", rig.server.port))[1] for _ in range(LIMIT)]
    try:
        async with asyncio.timeout(5):
            assert (await rig.get("/healthz"))[0] == 200
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def test_a_log_is_served_whole(rig: Rig) -> None:
    pod = rig.pods.add(make_pod(state={"terminated": {"exitCode": 0, "containerID": "wasmtime://a0"}}))
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one") + NAME_LINE % (2, b"two"))
    assert await rig.get("/containerLogs/default/web/main") == (200, "one\ntwo\n")
    assert await rig.get("/containerLogs/default/web/main?tailLines=1") == (200, "two\n")
    assert await rig.get("/containerLogs/default/web/main?tailLines=x") == (
        400,
        '{"message": "Unable to decode query."}',
    )
    assert await rig.get("/containerLogs/default/none/main") == (404, 'pod "none" does not exist')


async def test_before_the_pods_are_known_nobody_is_told_that_one_does_not_exist(rig: Rig) -> None:
    rig.pods.synced.clear()
    assert await rig.get("/containerLogs/default/none/main") == (503, NOT_YET)
    assert await rig.get("/pods") == (503, NOT_YET)
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one"))
    assert await rig.get("/containerLogs/default/web/main") == (200, "one\n"), "what is known is served"


@pytest.mark.parametrize("follow", ["", "?follow=true"])
async def test_a_last_line_that_was_cut_off_is_shown_of_a_container_that_ended(rig: Rig, follow: str) -> None:
    pod = rig.pods.add(make_pod(state={"terminated": {"exitCode": 0, "containerID": "wasmtime://a0"}}))
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one") + (NAME_LINE % (2, b"torn"))[:-1])
    assert await rig.get(f"/containerLogs/default/web/main{follow}") == (200, "one\ntorn\n")


async def raw(rig: Rig, request: bytes) -> bytes:
    """All that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(rig.client))
    try:
        writer.write(request)
        async with asyncio.timeout(3):
            return await reader.read()
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_log_is_served_over_http_1_0_too(rig: Rig) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one"))
    head, _, body = (await raw(rig, b"GET /containerLogs/default/web/main HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
    assert (head.split()[1], body) == (b"200", b"one\n")


async def test_an_answer_that_fails_half_way_is_cut_off_and_not_followed_by_another(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one"))

    def broken(*_: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("wasilet_common.cri_log.render.Renderer.feed", broken)
    answer = await raw(rig, b"GET /containerLogs/default/web/main HTTP/1.1\r\nHost: node\r\n\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"0\r\n\r\n"), "a cut answer must not look whole"


@pytest.mark.parametrize("since", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00%2B23:59"])
async def test_a_time_that_its_offset_carries_out_of_the_calendar_is_a_time(rig: Rig, since: str) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(NAME_LINE % (1, b"one"))
    lines = "" if since.startswith("9") else "one\n"
    assert await rig.get(f"/containerLogs/default/web/main?sinceTime={since}") == (200, lines)


async def test_a_client_that_leaves_in_the_middle_of_a_log_is_no_error(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes((NAME_LINE % (1, b"x" * 16_000)) * 1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(rig.client))
    writer.write(b"GET /containerLogs/default/web/main HTTP/1.1\r\nHost: node\r\n\r\n")
    await reader.read(1000)
    writer.transport.abort()
    async with asyncio.timeout(3):
        while rig.server._connections():  # noqa: ASYNC110 - there is nothing to wait on but the absence
            await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_peer_that_vanished_is_noticed_within_minutes(rig: Rig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(rig.client))
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n")
        await asyncio.wait_for(reader.readline(), 3)
        (connection,) = rig.server._connections()
        assert connection.transport is not None
        accepted = connection.transport.get_extra_info("socket")
        idle, interval, count = (
            accepted.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert idle + interval * count < 300
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_follower_sees_lines_soon_and_ends_with_the_container(rig: Rig) -> None:
    pod = rig.pods.add(make_pod())
    path = log_folder(rig.log_root, pod) / "0.log"
    path.write_bytes(NAME_LINE % (1, b"one"))
    async with (
        aiohttp.ClientSession() as session,
        session.get(rig.url("/containerLogs/default/web/main?follow=true"), ssl=rig.tls(rig.client)) as response,
    ):
        assert await asyncio.wait_for(response.content.readline(), 2) == b"one\n"
        with path.open("ab") as file:
            file.write(NAME_LINE % (2, b"two"))
        assert await asyncio.wait_for(response.content.readline(), 0.5) == b"two\n"
        with path.open("ab") as file:
            file.write(NAME_LINE % (3, b"three"))
        pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}
        assert await asyncio.wait_for(response.content.read(), 1) == b"three\n"


async def test_a_follower_that_leaves_is_noticed(rig: Rig) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(rig.log_root, pod) / "0.log").write_bytes(b"")
    async with aiohttp.ClientSession() as session:
        url = rig.url("/containerLogs/default/web/main?follow=true")
        response = await session.get(url, ssl=rig.tls(rig.client))
        assert rig.server._watcher._waiters
        response.close()
    async with asyncio.timeout(2):
        while rig.server._watcher._waiters:  # noqa: ASYNC110 - there is nothing to wait on but the absence
            await asyncio.sleep(0.01)


async def test_a_rotation_loses_no_line_of_a_follower(rig: Rig) -> None:
    pod = rig.pods.add(make_pod())
    path = log_folder(rig.log_root, pod) / "0.log"
    path.write_bytes(NAME_LINE % (1, b"1"))
    async with (
        aiohttp.ClientSession() as session,
        session.get(rig.url("/containerLogs/default/web/main?follow=true"), ssl=rig.tls(rig.client)) as response,
    ):
        assert await asyncio.wait_for(response.content.readline(), 2) == b"1\n"
        for turn in range(2, 8):
            with path.open("ab") as file:
                file.write(NAME_LINE % (turn, b"%d" % turn))
            path.rename(path.with_name(f"0.log.20250101-000000.{turn:09d}"))
            path.write_bytes(NAME_LINE % (turn, b"%d after" % turn))
            if turn == 4:
                await asyncio.sleep(0.05)
        pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}
        text = await asyncio.wait_for(response.content.read(), 2)
    assert text.decode().splitlines() == [line for turn in range(2, 8) for line in (f"{turn}", f"{turn} after")]


async def test_headers_beyond_all_measure_are_refused_and_the_server_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(None))
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer " + b"x" * 100_000 + b"\r\n\r\n")
        async with asyncio.timeout(3):
            answer = await reader.read()
        assert answer.split()[1] == b"400"
        assert b"Server: kubelet\r\n" in answer
        assert answer.endswith(b"\r\n\r\n400 Bad Request\n"), "the parser's text quotes what came in"
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    assert not rig.kube.asked
    assert "xxx" not in caplog.text
    assert (await rig.get("/healthz"))[0] == 200


async def test_who_speaks_no_tls_is_hung_up_on(rig: Rig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port)
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(3):
            assert b"HTTP" not in await reader.read()
    except ConnectionError:
        pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    assert (await rig.get("/healthz"))[0] == 200
