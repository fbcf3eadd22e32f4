"""Probes and lifecycle hooks: thresholds, real sockets, and what is never reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from wasilet_node.network.attachment import MachineNetwork
from wasilet_node.pods import grpc_health, handlers, hooks
from wasilet_node.pods.probes import PodProbes, ProbeReport
from wasilet_node.pods.results import ProbeKind, ProbeResults, Result
from wasilet_node.runtime.protocol import ContainerStatus, ExecResult, UnknownContainerError

from tests.unit.node.pods.fakes import FakeEvents, FakeRuntime, eventually, make_instance, make_pod

pytestmark = pytest.mark.unit

CONTAINER = {"name": "c", "image": "x", "ports": [{"name": "web", "containerPort": 8080}]}


@asynccontextmanager
async def http_server(handler: Any) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def fine(_request: web.Request) -> web.Response:
    return web.Response()


async def get(action: dict[str, Any], timeout: float = 2.0) -> handlers.Outcome:
    return await handlers.http_get({"host": "127.0.0.1", **action}, CONTAINER, timeout_seconds=timeout)


@pytest.mark.parametrize(
    ("status", "ok", "output"),
    [(200, True, "fine"), (399, True, ""), (404, False, "HTTP probe failed with statuscode: 404"), (500, False, "")],
)
async def test_http_statuses(status: int, ok: bool, output: str) -> None:  # noqa: FBT001
    headers = {"Location": "http://elsewhere.invalid/"} if 300 <= status < 400 else {}

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="fine", headers=headers)

    async with http_server(answer) as port:
        outcome = await get({"port": port, "path": "/x"})
    assert outcome.ok is ok
    assert output in outcome.output
    if not ok:
        assert "fine" not in outcome.output, "a failure does not show the body"


async def test_headers_are_sent_and_defaults_can_be_overridden() -> None:
    seen: dict[str, str] = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(request.headers)
        return web.Response()

    async with http_server(answer) as port:
        await get(
            {
                "port": str(port),
                "httpHeaders": [{"name": "Host", "value": "app.test"}, {"name": "User-Agent", "value": "mine"}],
            }
        )
    assert (seen["Host"], seen["User-Agent"], seen["Accept"]) == ("app.test", "mine", "*/*")
    assert "Accept-Encoding" not in seen


async def test_a_redirect_within_the_host_is_followed_and_another_host_is_never_asked() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/local":
            return web.Response(status=302, headers={"Location": "/end"})
        if request.path == "/away":
            return web.Response(status=302, headers={"Location": "http://169.254.169.254/secret"})
        return web.Response(status=302, headers={"Location": "/loop"}) if request.path == "/loop" else web.Response()

    async with http_server(answer) as port:
        assert await get({"port": port, "path": "/local"}) == handlers.Outcome(ok=True)
        away = await get({"port": port, "path": "/away"})
        assert (away.ok, away.warning) == (True, True)
        assert "stopped after 10 redirects" in (await get({"port": port, "path": "/loop"})).output


async def test_a_slow_server_fails_in_time() -> None:
    async def answer(_request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async with http_server(answer) as port:
        outcome = await get({"port": port}, timeout=0.2)
        assert not outcome.ok
        assert "deadline exceeded" in outcome.output


async def test_a_closed_port_is_a_failure_not_an_error() -> None:
    async with http_server(fine) as port:
        pass
    assert not (await get({"port": port})).ok
    assert not (await handlers.tcp_connect({"host": "127.0.0.1", "port": port}, CONTAINER, timeout_seconds=1)).ok


async def test_tcp_opens_a_connection() -> None:
    async with http_server(fine) as port:
        outcome = await handlers.tcp_connect({"host": "127.0.0.1", "port": port}, CONTAINER, timeout_seconds=1)
    assert outcome.ok


async def test_without_a_host_nothing_of_the_machine_is_reached() -> None:
    asked = False

    async def answer(_request: web.Request) -> web.Response:
        nonlocal asked
        asked = True
        return web.Response()

    async with http_server(answer) as port:
        for outcome in (
            await handlers.http_get({"port": port}, CONTAINER, timeout_seconds=1),
            await handlers.tcp_connect({"port": port}, CONTAINER, timeout_seconds=1),
        ):
            assert not outcome.ok
            assert "the pod has no network of its own" in outcome.output
    assert not asked


async def test_a_port_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(handlers.HandlerError, match="no port named 'nope'"):
        await get({"port": "nope"})


async def test_a_trap_of_an_exec_probe_is_a_failure_and_no_instance_is_an_error() -> None:
    runtime = FakeRuntime()
    runtime.exec_result = lambda _argv: ExecResult(exit_code=134, output=b"", error="wasm trap: unreachable")
    outcome = await handlers.run_command(runtime, "x", ["a"], timeout_seconds=1)
    assert outcome == handlers.Outcome(ok=False, output="wasm trap: unreachable")
    runtime.exec_result = lambda _argv: ExecResult(exit_code=126, output=b"", error="no fork")
    with pytest.raises(handlers.HandlerError, match="no fork"):
        await handlers.run_command(runtime, "x", ["a"], timeout_seconds=1)

    def gone(_argv: object) -> ExecResult:
        raise UnknownContainerError("x is not running")

    runtime.exec_result = gone
    with pytest.raises(handlers.HandlerError, match="not running"):
        await handlers.run_command(runtime, "x", ["a"], timeout_seconds=1)


async def test_an_exec_probe_that_takes_too_long_is_a_failure() -> None:
    runtime = FakeRuntime()
    runtime.exec_result = lambda _argv: ExecResult(exit_code=137, output=b"", timed_out=True, error="timed out")
    outcome = await handlers.run_command(runtime, "x", ["a", "b"], timeout_seconds=1)
    assert (outcome.ok, outcome.output) == (False, 'command timed out: ["a" "b"] timed out after 1s')


# ---- the machinery


class Rig:
    """The probes of one pod with one running container, whose exec gives the next of ``answers``."""

    def __init__(self, container: dict[str, Any], answers: list[int]) -> None:
        self.pod = make_pod(containers=[{"name": "c", "image": "x", **container}])
        self.runtime = FakeRuntime()
        self.answers = answers
        self.runtime.exec_result = lambda _argv: ExecResult(
            exit_code=self.answers.pop(0) if len(self.answers) > 1 else self.answers[0], output=b"out"
        )
        self.events = FakeEvents()
        self.results = ProbeResults()
        self.changes = 0
        self.reports: list[ProbeReport] = []
        self.probes = PodProbes(
            self.pod,
            runtime=self.runtime,
            events=self.events,
            results=self.results,
            changed=self.changed,
            observe=self.reports.append,
            shortest_period_seconds=QUICK,
        )

    def changed(self) -> None:
        self.changes += 1

    def begin(self, instance: ContainerStatus | None = None) -> None:
        self.probes.sync(self.pod, {"c": instance or make_instance(started_at_ns=time.time_ns())})

    def result(self, kind: ProbeKind) -> Result | None:
        return self.results.get("c-0", kind)


def probe(**fields: Any) -> dict[str, Any]:
    return {"exec": {"command": ["check", "$(WHO)"]}, "periodSeconds": 1, **fields}


QUICK = 0.02
"""A period in seconds: a whole one is too long for a test."""


async def test_literals_of_the_environment_are_expanded_in_a_probe() -> None:
    rig = Rig({"readinessProbe": probe(), "env": [{"name": "WHO", "value": "me"}]}, [0])
    rig.begin()
    await eventually(lambda: rig.runtime.execs)
    assert rig.runtime.execs[0][1] == ("check", "me")
    rig.probes.close()


async def test_readiness_turns_only_at_its_thresholds() -> None:
    rig = Rig(
        {"readinessProbe": probe(periodSeconds=QUICK, successThreshold=2, failureThreshold=3)}, [0, 0, 1, 1, 0, 1, 1, 1]
    )
    rig.begin()
    assert rig.result(ProbeKind.READINESS) is Result.FAILURE
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.SUCCESS)
    assert len(rig.answers) == 6
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.FAILURE)
    assert rig.changes == 2
    assert rig.events.said[0] == "Unhealthy: Readiness probe failed: out"
    assert [report.successful for report in rig.reports[:5]] == [True, True, False, False, True]
    assert {(report.kind, report.container) for report in rig.reports} == {(ProbeKind.READINESS, "c")}
    rig.probes.close()


async def test_liveness_stops_probing_once_it_has_failed() -> None:
    rig = Rig({"livenessProbe": probe(periodSeconds=QUICK, failureThreshold=2)}, [1])
    rig.begin()
    assert rig.result(ProbeKind.LIVENESS) is Result.SUCCESS
    await eventually(lambda: rig.result(ProbeKind.LIVENESS) is Result.FAILURE)
    count = len(rig.runtime.execs)
    await asyncio.sleep(0.08)
    assert len(rig.runtime.execs) == count == 2
    rig.probes.close()


async def test_the_others_wait_for_startup() -> None:
    rig = Rig(
        {"startupProbe": probe(periodSeconds=QUICK, failureThreshold=30), "readinessProbe": probe(periodSeconds=QUICK)},
        [1, 1, 0],
    )
    rig.begin()
    await eventually(lambda: len(rig.runtime.execs) >= 2)
    assert rig.result(ProbeKind.READINESS) is Result.FAILURE
    assert not any("Readiness" in line for line in rig.events.said)
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.SUCCESS)
    assert rig.result(ProbeKind.STARTUP) is Result.SUCCESS
    rig.probes.close()


async def test_an_ending_pod_is_not_restarted_by_liveness() -> None:
    rig = Rig({"livenessProbe": probe(periodSeconds=QUICK, failureThreshold=1)}, [1])
    rig.begin()
    await eventually(lambda: rig.result(ProbeKind.LIVENESS) is Result.FAILURE)
    rig.probes.end_with_pod()
    assert rig.result(ProbeKind.LIVENESS) is Result.SUCCESS
    rig.probes.close()


async def test_readiness_is_asked_until_an_ending_pod_is_gone() -> None:
    rig = Rig({"readinessProbe": probe(periodSeconds=QUICK, failureThreshold=1)}, [0, 0, 1])
    rig.begin()
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.SUCCESS)
    rig.probes.end_with_pod()
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.FAILURE)
    rig.probes.close()


async def test_an_instance_that_is_gone_leaves_nothing() -> None:
    rig = Rig({"readinessProbe": probe(periodSeconds=QUICK)}, [0])
    rig.begin()
    await eventually(lambda: rig.result(ProbeKind.READINESS) is Result.SUCCESS)
    rig.probes.sync(rig.pod, {})
    assert rig.results.by_instance == {}
    assert rig.probes._probes == {}
    count = len(rig.runtime.execs)
    await asyncio.sleep(0.06)
    assert len(rig.runtime.execs) == count


async def test_a_probe_taken_over_begins_with_what_the_status_says() -> None:
    rig = Rig({"readinessProbe": probe()}, [0])
    rig.pod["status"]["containerStatuses"] = [{"name": "c", "containerID": "wasmtime://c-0", "ready": True}]
    rig.begin(make_instance())
    assert rig.result(ProbeKind.READINESS) is Result.SUCCESS
    rig.probes.close()


async def test_an_initial_delay_counts_from_the_start_of_the_container() -> None:
    rig = Rig({"readinessProbe": probe(periodSeconds=QUICK, initialDelaySeconds=60)}, [0])
    rig.begin()
    await asyncio.sleep(0.06)
    assert rig.runtime.execs == []
    rig.probes.close()


async def test_a_grpc_probe_fails_and_says_why() -> None:
    rig = Rig({"readinessProbe": {"grpc": {"port": 1}, "periodSeconds": QUICK}}, [0])
    rig.begin()
    await eventually(lambda: rig.events.said)
    assert rig.events.said[0].startswith("Unhealthy: Readiness probe failed: the pod has no network of its own")
    rig.probes.close()


class PodAtLoopback(MachineNetwork):
    """A pod whose address is this machine's loopback."""

    def addresses(self, pod: Any) -> tuple[str, ...] | None:
        return ("127.0.0.1",)

    def shares_machine(self, pod: Any) -> bool:
        return False


class NotKnownYet(MachineNetwork):
    def shares_machine(self, pod: Any) -> bool:
        return False


async def test_a_pod_with_an_address_is_asked_there_by_the_names_of_its_ports() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="well")

    async with http_server(answer) as port:
        container = {"name": "main", "ports": [{"name": "web", "containerPort": port}]}
        reach = handlers.Reach.of(PodAtLoopback(), make_pod())
        got = await handlers.http_get({"port": "web"}, container, timeout_seconds=2, reach=reach)
        assert got == handlers.Outcome(ok=True, output="well")
        assert (await handlers.tcp_connect({"port": "web"}, container, timeout_seconds=2, reach=reach)).ok
    refused = await handlers.tcp_connect({"port": "web"}, container, timeout_seconds=2, reach=reach)
    assert refused.output == f"dial tcp 127.0.0.1:{port}: connect: connection refused"


async def test_a_network_that_the_new_agent_has_not_found_again_yet_says_nothing_of_the_container() -> None:
    reach = handlers.Reach.of(NotKnownYet(), make_pod())
    for probe in (handlers.http_get, handlers.tcp_connect):
        with pytest.raises(handlers.HandlerError, match="not known yet"):
            await probe({"port": 1}, CONTAINER, timeout_seconds=1, reach=reach)
    with pytest.raises(handlers.HandlerError, match="not known yet"):
        await grpc_health.check({"port": 1}, timeout_seconds=1, reach=reach)


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


@pytest.mark.parametrize(
    ("answer", "ok", "output"),
    [
        (frame(4, 0, 0) + frame(1, 4, 1, b"\x88") + frame(0, 0, 1, b"\0\0\0\0\x02\x08\x01"), True, ""),
        (frame(0, 0, 1, b"\0\0\0\0") + frame(0, 0, 1, b"\x02\x08\x02"), False, 'responded with "NOT_SERVING"'),
        (frame(0, 0, 1, b"\0\0\0\0\0"), False, 'responded with "UNKNOWN"'),
        (frame(1, 5, 1, b"\x88"), False, "does not implement the grpc health protocol"),
        (frame(7, 0, 0, b"\0" * 8), False, "does not implement the grpc health protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "it does not speak HTTP/2"),
        (b"", False, "it closed the connection"),
        (frame(0, 0, 1, b"\0\xff\xff\xff\xff"), False, "it closed the connection"),
    ],
)
async def test_a_grpc_probe_reads_the_health_that_a_server_tells(answer: bytes, ok: object, output: str) -> None:
    asked = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked = await reader.read(4096)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        reach = handlers.Reach.of(PodAtLoopback(), make_pod())
        action = {"port": server.sockets[0].getsockname()[1], "service": "liveness"}
        outcome = await grpc_health.check(action, timeout_seconds=2, reach=reach)
    assert (outcome.ok, output in outcome.output) == (ok, True), outcome.output
    assert asked.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert b"/grpc.health.v1.Health/Check" in asked
    assert asked.endswith(b"\0\0\0\0\x0a\x0a\x08liveness")


# ---- hooks


async def test_a_sleep_hook_longer_than_the_grace_ends_with_it() -> None:
    pod = make_pod()
    with pytest.raises(hooks.HookError, match="terminated before sleep hook finished"):
        await hooks.run_hook(FakeRuntime(), pod, CONTAINER, "x", {"sleep": {"seconds": 60}}, timeout_seconds=0.05)


async def test_an_http_hook_only_has_to_be_delivered() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=500)

    async with http_server(answer) as port:
        hook = {"httpGet": {"host": "127.0.0.1", "port": port}}
        await hooks.run_hook(FakeRuntime(), make_pod(), CONTAINER, "x", hook, timeout_seconds=2)
    with pytest.raises(hooks.HookError, match="the pod has no network of its own"):
        await hooks.run_hook(FakeRuntime(), make_pod(), CONTAINER, "x", {"httpGet": {"port": 1}}, timeout_seconds=2)
