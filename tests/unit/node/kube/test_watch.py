from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest
from aiohttp import web
from wasilet_node.kube.base import WatchEvent
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.kube.watch import Pace

from tests.unit.node.kube.rig import QUICK, WatchScript, api_server, client_of, item, listed, status_response

pytestmark = pytest.mark.unit


async def take(events: AsyncIterator[WatchEvent], count: int) -> list[tuple[str, str]]:
    taken: list[tuple[str, str]] = []
    async with asyncio.timeout(5), aclosing(cast("Any", events)) as stream:
        async for event in stream:
            taken.append((event.type, event.object.get("metadata", {}).get("name", "")))
            if len(taken) == count:
                break
    return taken


async def test_the_list_comes_first_then_changes() -> None:
    script = WatchScript(
        [listed(item("a", 1), item("b", 2), version=5)],
        [[
            {"type": "ADDED", "object": item("c", 6)},
            {"type": "MODIFIED", "object": item("a", 7)},
            {"type": "DELETED", "object": item("b", 8)},
        ]],
    )  # fmt: skip
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods", field_selector="spec.nodeName=n"), 6)
    assert events == [
        ("SYNC", "a"), ("SYNC", "b"), ("SYNCED", ""), ("ADDED", "c"), ("MODIFIED", "a"), ("DELETED", "b"),
    ]  # fmt: skip
    watch = script.queries[1]
    assert watch["fieldSelector"] == "spec.nodeName=n"
    assert watch["resourceVersion"] == "5"
    assert watch["allowWatchBookmarks"] == "true"
    assert 240 <= int(watch["timeoutSeconds"]) <= 300


async def test_listed_objects_say_what_they_are() -> None:
    script = WatchScript([listed(item("a", 1), version=5)], [])
    async with client_of(script) as kube, aclosing(cast("Any", kube.watch("/api/v1/pods"))) as events:
        first = await anext(events)
    assert (first.object["kind"], first.object["apiVersion"]) == ("Pod", "v1")


async def test_a_watch_that_ends_goes_on_from_the_last_version_a_bookmark_included() -> None:
    script = WatchScript(
        [listed(version=5)],
        [
            [{"type": "ADDED", "object": item("a", 6)}],
            [{"type": "BOOKMARK", "object": item("", 20)}],
            [{"type": "ADDED", "object": item("b", 21)}],
        ],
    )
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods"), 3)
    assert events == [("SYNCED", ""), ("ADDED", "a"), ("ADDED", "b")]
    assert [query.get("resourceVersion") for query in script.queries] == [None, "5", "6", "20"]


@pytest.mark.parametrize(
    "gone",
    [
        status_response(410, "Expired"),
        [{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}],
    ],
    ids=["as an answer", "as an event"],
)
async def test_a_version_that_the_server_forgot_means_a_new_list(gone: Any) -> None:
    script = WatchScript([listed(item("a", 1), version=5), listed(item("b", 30), version=30)], [gone])
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods"), 4)
    assert events == [("SYNC", "a"), ("SYNCED", ""), ("SYNC", "b"), ("SYNCED", "")]


async def test_a_replaced_etcd_with_lower_versions_means_a_new_list() -> None:
    too_large = status_response(504, "Timeout", "Too large resource version: 5, current: 2")
    script = WatchScript([listed(version=5), listed(item("b", 1), version=2)], [too_large])
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods"), 3)
    assert events == [("SYNCED", ""), ("SYNC", "b"), ("SYNCED", "")]


async def test_other_errors_are_tried_again_without_a_new_list() -> None:
    script = WatchScript(
        [listed(version=5)],
        [
            status_response(500, "InternalError"),
            [{"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "InternalError"}}],
            [{"type": "ADDED", "object": item("a", 6)}],
        ],
    )
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods"), 2)
    assert events == [("SYNCED", ""), ("ADDED", "a")]
    assert sum("watch" not in query for query in script.queries) == 1


async def test_a_forbidden_list_is_tried_until_it_is_allowed() -> None:
    script = WatchScript(
        [status_response(403, "Forbidden"), status_response(401, "Unauthorized"), listed(version=5)], []
    )
    async with client_of(script) as kube:
        assert await take(kube.watch("/api/v1/pods"), 1) == [("SYNCED", "")]


async def test_events_may_be_cut_anywhere_and_be_large() -> None:
    text = json.dumps({"type": "ADDED", "object": item("a", 6, data="x" * 3_000_000)}).encode() + b"\n"

    async def in_pieces(response: web.StreamResponse) -> None:
        for start in range(0, len(text), 700_001):
            await response.write(text[start : start + 700_001])
        both = [{"type": "ADDED", "object": item(name, 7)} for name in ("b", "c")]
        await response.write("\n".join(json.dumps(event) for event in both).encode() + b"\n")

    script = WatchScript([listed(version=5)], [[in_pieces]])
    async with client_of(script) as kube:
        events = await take(kube.watch("/api/v1/pods"), 4)
    assert events == [("SYNCED", ""), ("ADDED", "a"), ("ADDED", "b"), ("ADDED", "c")]


async def test_events_of_what_is_no_object_are_not_passed_on() -> None:
    watches: list[Any] = [[{"type": "DELETED", "object": each}] for each in (None, {}, ["x"], {"kind": 1})]
    script = WatchScript([listed(version=5)], [*watches, [{"type": "ADDED", "object": item("a", 6)}]])
    async with client_of(script) as kube:
        assert await take(kube.watch("/api/v1/pods"), 2) == [("SYNCED", ""), ("ADDED", "a")]


async def test_a_connection_that_went_dead_is_noticed() -> None:
    async def silence(_: web.StreamResponse) -> None:
        await asyncio.sleep(3600)

    script = WatchScript([listed(version=5)], [[silence], [{"type": "ADDED", "object": item("a", 6)}]])
    async with client_of(script, watch_pace=replace(QUICK, read_timeout_seconds=0.1)) as kube:
        assert await take(kube.watch("/api/v1/pods"), 2) == [("SYNCED", ""), ("ADDED", "a")]


async def test_an_api_server_that_goes_away_and_comes_back_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    first = WatchScript([listed(item("a", 1), version=5)], [])
    second = WatchScript([listed(version=5)], [[{"type": "DELETED", "object": item("a", 9)}]])
    seen: list[tuple[str, str]] = []

    async with api_server(first) as (url, runner):
        port = runner.addresses[0][1]
        kube = KubeClient(Cluster(server=url), Credentials(token="t"), user_agent="test", watch_pace=QUICK)
        done = asyncio.Event()

        async def consume() -> None:
            async for event in kube.watch("/api/v1/pods"):
                seen.append((event.type, event.object.get("metadata", {}).get("name", "")))
                if event.type == "DELETED":
                    done.set()

        task = asyncio.create_task(consume())
        async with asyncio.timeout(5):
            await first.until_asked(2)
            await runner.cleanup()
            await asyncio.sleep(0.1)
            async with api_server(second, port=port):
                await done.wait()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await kube.close()
    assert seen == [("SYNC", "a"), ("SYNCED", ""), ("DELETED", "a")]
    assert "will be tried again" in caplog.text


async def test_a_watch_that_is_given_up_leaves_no_request_behind() -> None:
    script = WatchScript([listed(version=5)], [])
    async with client_of(script) as kube:
        task = asyncio.create_task(take(kube.watch("/api/v1/pods"), 2))
        await script.until_asked(2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert kube._generation.in_flight == 0


async def test_watches_come_back_as_soon_as_any_call_is_answered() -> None:
    script = WatchScript([listed(version=5)], [])
    async with api_server(script) as (url, runner):
        port = runner.addresses[0][1]
        await runner.cleanup()
        endless = Pace(first_delay_seconds=3600.0, longest_delay_seconds=3600.0)
        kube = KubeClient(Cluster(server=url), Credentials(token="t"), user_agent="test", watch_pace=endless)
        task = asyncio.create_task(take(kube.watch("/api/v1/pods"), 1))
        await asyncio.sleep(0.1)
        assert not task.done()
        async with api_server(script, port=port):
            await kube.get("/anything")
            async with asyncio.timeout(5):
                assert await task == [("SYNCED", "")]
            await kube.close()
