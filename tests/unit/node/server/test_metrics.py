"""What metrics-server, Prometheus and ``kubectl top`` read."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families
from wasilet_node.runtime.protocol import ContainerState, ContainerUsage, HttpCounters, RuntimeUnavailableError
from wasilet_node.server.metrics import HttpMetrics, MetricsViews
from wasilet_node.server.stats import SummaryView, UsageReader

from tests.unit.node.server.rig import FakePods, FakeRuntime, log_folder, make_pod, make_settings
from tests.unit.node.server.rig import make_status as status

pytestmark = pytest.mark.unit


def usage(
    container_id: str = "a0", *, cpu: int = 2_000_000_000, memory: int = 4096, at: int | None = None
) -> ContainerUsage:
    return ContainerUsage(
        id=container_id, cpu_nanoseconds=cpu, memory_bytes=memory, timestamp_ns=at if at is not None else time.time_ns()
    )


class Rig:
    def __init__(self, folder: Path) -> None:
        settings = make_settings(folder)
        self.pods = FakePods()
        self.runtime = FakeRuntime()
        self.now = 100.0
        self.usage = UsageReader(pods=self.pods, runtime=self.runtime, data=folder, clock=lambda: self.now)
        self.metrics = MetricsViews(settings=settings, pods=self.pods, runtime=self.runtime, usage=self.usage)
        self.stats = SummaryView(settings=settings, usage=self.usage, log_root=folder)

    async def summary(self, query: str = "") -> dict[str, Any]:
        response = await self.stats.summary(make_mocked_request("GET", f"/stats/summary{query}"))
        decoded: dict[str, Any] = json.loads(response.text or "")
        return decoded


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def series(response: web.Response) -> dict[str, list[tuple[dict[str, str], float, float | None]]]:
    assert isinstance(response.body, bytes)
    found: dict[str, list[tuple[dict[str, str], float, float | None]]] = {}
    for family in text_string_to_metric_families(response.body.decode()):
        for sample in family.samples:
            moment = None if sample.timestamp is None else float(sample.timestamp)
            found.setdefault(sample.name, []).append((sample.labels, sample.value, moment))
    return found


REQUEST = make_mocked_request("GET", "/")


async def test_resource_metrics_hold_all_that_metrics_server_needs(rig: Rig) -> None:
    rig.runtime.statuses, rig.runtime.usages = [status()], [usage()]
    found = series(await rig.metrics.resource(REQUEST))
    labels = {"container": "main", "pod": "web", "namespace": "default"}
    [(cpu_labels, cpu, moment)] = found["container_cpu_usage_seconds_total"]
    assert (cpu_labels, cpu) == (labels, 2.0)
    assert moment == pytest.approx(time.time(), abs=5)
    assert found["container_memory_working_set_bytes"][0][:2] == (labels, 4096)
    assert found["container_start_time_seconds"][0][1] == pytest.approx(time.time() - 10, abs=5)
    assert found["pod_cpu_usage_seconds_total"][0][:2] == ({"pod": "web", "namespace": "default"}, 2.0)
    assert found["node_cpu_usage_seconds_total"][0][1] > 0
    assert found["node_memory_working_set_bytes"][0][1] > 0
    assert found["scrape_error"][0][1] == found["resource_scrape_error"][0][1] == 0


async def test_no_value_of_a_running_container_is_ever_zero(rig: Rig) -> None:
    rig.runtime.statuses, rig.runtime.usages = [status()], [usage(cpu=0, memory=0)]
    found = series(await rig.metrics.resource(REQUEST))
    for name, samples in found.items():
        if name.startswith(("container_", "pod_")):
            assert all(value > 0 for _, value, _ in samples), name


async def test_a_runtime_that_is_away_is_a_scrape_error(rig: Rig) -> None:
    rig.runtime.error = RuntimeUnavailableError()
    found = series(await rig.metrics.resource(REQUEST))
    assert found["resource_scrape_error"][0][1] == 1
    assert "container_cpu_usage_seconds_total" not in found
    assert "kubelet_running_pods" not in series(await rig.metrics.kubelet(REQUEST))


async def test_kubelet_metrics_count_pods_and_containers(rig: Rig) -> None:
    rig.runtime.statuses = [status("a"), status("b"), status("c", pod="x", state=ContainerState.EXITED)]
    found = series(await rig.metrics.kubelet(REQUEST))
    assert found["kubelet_running_pods"][0][1] == 1
    states = {labels["container_state"]: value for labels, value, _ in found["kubelet_running_containers"]}
    assert states == {"created": 0, "running": 2, "exited": 1}
    assert found["kubelet_node_name"][0][0] == {"node": "wasm-1"}
    assert "process_cpu_seconds_total" in found


async def test_each_server_has_metrics_of_its_own(rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path)
    rig.metrics.http.requests.labels(*HttpMetrics.labels("GET", "/pods")).inc()
    assert "kubelet_http_requests_total" in series(await rig.metrics.kubelet(REQUEST))
    assert "kubelet_http_requests_total" not in series(await other.metrics.kubelet(REQUEST))


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/metrics/resource", ("GET", "metrics/resource", "readwrite", "false")),
        ("GET", "/containerLogs/a/b/c", ("GET", "containerLogs", "readwrite", "false")),
        ("POST", "/exec/a/b/c", ("POST", "exec", "readwrite", "true")),
        ("BREW", "/coffee", ("other", "other", "readwrite", "false")),
        ("GET", "/metrics/made-up", ("GET", "other", "readwrite", "false")),
    ],
)
def test_labels_of_requests_are_few(method: str, path: str, expected: tuple[str, ...]) -> None:
    assert HttpMetrics.labels(method, path) == expected


async def test_probe_results_are_counted_until_their_pod_is_gone(rig: Rig) -> None:
    rig.pods.add(make_pod())
    for result in ("successful", "failed", "failed"):
        rig.metrics.probes.record(
            kind="Readiness",
            result=result,
            container="main",
            pod="web",
            namespace="default",
            pod_uid="uid-web",
            duration_seconds=0.02,
        )
    found = series(await rig.metrics.prober(REQUEST))
    assert {labels["result"]: value for labels, value, _ in found["prober_probe_total"]} == {
        "successful": 1,
        "failed": 2,
    }
    buckets = {labels["le"]: value for labels, value, _ in found["prober_probe_duration_seconds_bucket"]}
    assert (buckets["0.01"], buckets["0.025"], buckets["+Inf"]) == (0, 3, 3)
    rig.pods.known.clear()
    assert "prober_probe_total" not in series(await rig.metrics.prober(REQUEST))


async def test_cadvisor_metrics_name_image_and_instance(rig: Rig) -> None:
    rig.runtime.statuses, rig.runtime.usages = [status()], [usage()]
    found = series(await rig.metrics.cadvisor(REQUEST))
    labels = found["container_memory_working_set_bytes"][0][0]
    assert labels["image"] == "example/hello:v1"
    assert labels["name"] == "a0"
    assert found["machine_memory_bytes"][0][1] > 0


async def test_the_summary_adds_containers_up_to_pods(rig: Rig, tmp_path: Path) -> None:
    pod = rig.pods.add(make_pod())
    (log_folder(tmp_path, pod) / "0.log").write_bytes(b"x" * 123)
    rig.runtime.statuses = [status("a0"), status("a1")]
    rig.runtime.usages = [usage("a0"), usage("a1")]
    summary = await rig.summary()
    [entry] = summary["pods"]
    assert entry["podRef"] == {"name": "web", "namespace": "default", "uid": "uid-web"}
    assert entry["cpu"]["usageCoreNanoSeconds"] == 4_000_000_000
    assert entry["memory"]["workingSetBytes"] == 8192
    assert entry["containers"][0]["logs"]["usedBytes"] == 123
    assert entry["containers"][0]["memory"]["rssBytes"] > 0
    assert "network" not in entry
    node = summary["node"]
    assert node["nodeName"] == "wasm-1"
    assert node["fs"]["capacityBytes"] >= node["fs"]["availableBytes"] > 0
    assert {each["name"] for each in node["systemContainers"]} == {"kubelet", "pods"}


async def test_the_brief_summary_reads_no_disks(rig: Rig) -> None:
    rig.runtime.statuses, rig.runtime.usages = [status()], [usage()]
    summary = await rig.summary("?only_cpu_and_memory=true")
    assert "fs" not in summary["node"]
    assert "logs" not in summary["pods"][0]["containers"][0]


async def test_usage_per_second_is_the_difference_of_two_readings(rig: Rig) -> None:
    base = time.time_ns()
    rig.runtime.statuses = [status()]
    rig.runtime.usages = [usage(cpu=1_000_000_000, at=base)]
    first = (await rig.usage.snapshot()).pods[0].containers[0].cpu_nanocores
    assert first == pytest.approx(100_000_000, rel=0.05)
    rig.now += 10
    rig.runtime.usages = [usage(cpu=6_000_000_000, at=base + 10_000_000_000)]
    assert (await rig.usage.snapshot()).pods[0].containers[0].cpu_nanocores == 500_000_000


async def test_one_reading_serves_all_who_ask_at_once(rig: Rig) -> None:
    rig.runtime.statuses, rig.runtime.usages = [status()], [usage()]
    first = await rig.usage.snapshot()
    assert await rig.usage.snapshot() is first
    rig.now += 2
    assert await rig.usage.snapshot() is not first


async def test_what_servers_counted_is_there_by_status_and_duration(rig: Rig) -> None:
    counted = HttpCounters(
        in_flight=2,
        connections=3,
        instances=7,
        seconds=1.5,
        buckets=(4, 0, 1, *([0] * 10), 1),
        statuses={200: 5, 504: 1},
    )
    rig.runtime.usages = [dataclasses.replace(usage(), http=counted)]
    rig.runtime.statuses = [status()]
    found = series(await rig.metrics.kubelet(REQUEST))
    by_code = {labels["code"]: value for labels, value, _ in found["wasilet_http_requests_total"]}
    assert by_code == {"200": 5, "504": 1}
    buckets = {labels["le"]: value for labels, value, _ in found["wasilet_http_request_duration_seconds_bucket"]}
    assert (buckets["0.0005"], buckets["0.0025"], buckets["30.0"], buckets["+Inf"]) == (4, 5, 5, 6)
    assert found["wasilet_http_request_duration_seconds_sum"][0][1] == 1.5
    assert found["wasilet_http_requests_in_flight"][0][1] == 2
    assert found["wasilet_http_instances_total"][0][1] == 7
