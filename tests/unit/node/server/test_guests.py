"""The kubelet API in front of a real supervisor with real guests: logs, exec, attach and usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from wasilet_node.server.app import KubeletServer

from tests.unit.node.runtime import guests
from tests.unit.node.runtime.guests import ECHO, SLEEPER, guest, running_supervisor
from tests.unit.node.server.rig import (
    API_SERVER,
    Authority,
    FakePods,
    ReviewKube,
    client_context,
    make_pod,
    make_settings,
)

pytestmark = pytest.mark.unit

SLEEPS_OR_ECHOES = guest("""
  (drop (call $args_sizes (i32.const 16) (i32.const 20)))
  (if (i32.gt_u (i32.load (i32.const 16)) (i32.const 1))
    (then (call $echo))
    (else (call $sleep_ms (i64.const 3600000))))
""")
"""Sleeps when it is run without arguments."""


class Node:
    """A server, its runtime, and one running container."""

    def __init__(self, runtime: guests.Rig, data: Path) -> None:
        self.runtime = runtime
        self.authority = Authority()
        self.pods = FakePods()
        kube = ReviewKube(grants={(API_SERVER, "get", name) for name in ("proxy", "stats", "metrics")})
        self.server = KubeletServer(
            settings=make_settings(data),
            kube=kube,
            pods=self.pods,
            runtime=runtime.client,
            log_root=data / "logs",
            client_ca_pem=self.authority.pem,
        )
        serving = self.authority.issue("node", addresses=["127.0.0.1"], server=True)
        self.server.set_certificate(serving.certificate, serving.key)
        self.tls = client_context(self.authority.pem, self.authority.issue(API_SERVER))

    async def place(self, source: str, *, interactive: bool = False) -> str:
        """Run a guest as the pod ``web``; ``interactive`` as ``kubectl run -i`` makes it."""
        pod = self.pods.add(make_pod())
        pod["spec"]["containers"][0] |= {"stdin": interactive, "stdinOnce": interactive}
        folder = self.runtime.paths.logs / "pods" / "default_web_uid-web" / "main"
        config = self.runtime.config(
            self.runtime.artifact(source),
            pod_uid="uid-web",
            pod_name="web",
            argv=("module",),
            log_path=str(folder / "0.log"),
            stdin=interactive,
            stdin_once=interactive,
        )
        await self.runtime.client.start(config)
        pod["status"]["containerStatuses"][0]["containerID"] = f"wasmtime://{config.id}"
        return config.id

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.server.port}{path}"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with running_supervisor(tmp_path) as runtime:
        node = Node(runtime, tmp_path)
        task = asyncio.create_task(node.server.run())
        try:
            async with asyncio.timeout(5):
                await node.server.wait_listening()
            yield node
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_log_is_followed_until_the_guest_ends(node: Node) -> None:
    container_id = await node.place(SLEEPER)
    url = node.url("/containerLogs/default/web/main?follow=true")
    async with aiohttp.ClientSession() as session, session.get(url, ssl=node.tls) as response:
        assert await asyncio.wait_for(response.content.readline(), 5) == b"asleep\n"
        await node.runtime.client.stop(container_id)
        node.pods.known["default", "web"]["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 137}}
        assert await asyncio.wait_for(response.content.read(), 2) == b""


async def test_exec_is_a_fresh_instance_with_its_own_input(node: Node) -> None:
    await node.place(SLEEPS_OR_ECHOES)
    url = node.url("/exec/default/web/main?input=1&output=1&command=module&command=echo")
    seen: dict[int, bytes] = {}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, ssl=node.tls, protocols=["v5.channel.k8s.io"]) as socket,
    ):
        await socket.send_bytes(b"\x00over and out\n")
        await socket.send_bytes(b"\xff\x00")
        async with asyncio.timeout(10):
            async for message in socket:
                seen[message.data[0]] = seen.get(message.data[0], b"") + message.data[1:]
    assert seen[1] == b"over and out\n"
    assert json.loads(seen[3])["status"] == "Success"


async def test_usage_of_a_running_guest_has_no_zero(node: Node) -> None:
    await node.place(SLEEPER)
    await asyncio.sleep(0.2)
    async with aiohttp.ClientSession() as session:
        async with session.get(node.url("/stats/summary"), ssl=node.tls) as response:
            [pod] = (await response.json())["pods"]
        async with session.get(node.url("/metrics/resource"), ssl=node.tls) as response:
            text = await response.text()
    [container] = pod["containers"]
    assert container["cpu"]["usageCoreNanoSeconds"] > 0
    assert container["memory"]["workingSetBytes"] > 4096
    assert container["memory"]["rssBytes"] > 4096
    assert 'container_cpu_usage_seconds_total{container="main",namespace="default",pod="web"}' in text


async def test_attach_gives_a_guest_its_stdin_and_what_it_answers(node: Node) -> None:
    container_id = await node.place(ECHO, interactive=True)
    seen: dict[int, bytes] = {}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            node.url("/attach/default/web/main?input=1&output=1"), ssl=node.tls, protocols=["v5.channel.k8s.io"]
        ) as socket,
    ):
        await socket.send_bytes(b"\x00over and out\n")
        await socket.send_bytes(b"\xff\x00")
        async with asyncio.timeout(10):
            async for message in socket:
                seen[message.data[0]] = seen.get(message.data[0], b"") + message.data[1:]
    assert seen[1] == b"over and out\n"
    assert json.loads(seen[3])["status"] == "Success"
    assert (await node.runtime.ended(container_id)).exit_code == 0
