"""Prometheus metrics: ``/metrics``, ``/metrics/resource``, ``/metrics/probes`` and ``/metrics/cadvisor``.

Names, labels and timestamps are kubelet's, so that metrics-server and existing dashboards read them. Each server has a
registry of its own. What changes with every pod is made again for each scrape and never kept, or the series of pods
long gone would pile up. ``/metrics/cadvisor`` holds only what is known here: CPU, memory, start times and the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from aiohttp import web
from cryptography import x509
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from wasilet_common import pod_fields

from wasilet_node import __version__, machine
from wasilet_node.runtime.protocol import ContainerState, Runtime, RuntimeUnavailableError
from wasilet_node.server.pods import PodSource
from wasilet_node.server.serving_metrics import serving
from wasilet_node.server.stats import ContainerSample, PodSample, Snapshot, UsageReader
from wasilet_node.settings import NodeSettings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"OPTIONS", "GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "CONNECT"})
_PATHS = frozenset({"healthz", "pods", "runningpods", "stats", "configz", "logs", "debug", "run", "containerLogs"}) | {
    "exec",
    "attach",
    "portForward",
    "metrics",
    "metrics/cadvisor",
    "metrics/probes",
    "metrics/resource",
}
_LONG_RUNNING = frozenset({"exec", "attach", "portForward", "debug"})
_HTTP_LABELS = ("method", "path", "server_type", "long_running")
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_CONTAINER = ("container", "pod", "namespace")
_POD = ("pod", "namespace")
_CADVISOR = ("container", "id", "image", "name", "namespace", "pod")
_NANO = 1e-9


class HttpMetrics:
    """What the server itself does; ``labels`` first, then the counters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "kubelet_http_requests",
            "Number of the http requests received since the server started",
            _HTTP_LABELS,
            registry=registry,
        )
        self.duration = Histogram(
            "kubelet_http_requests_duration_seconds",
            "Duration in seconds to serve http requests",
            _HTTP_LABELS,
            buckets=_BUCKETS,
            registry=registry,
        )
        self.inflight = Gauge(
            "kubelet_http_inflight_requests", "Number of the inflight http requests", _HTTP_LABELS, registry=registry
        )

    @staticmethod
    def labels(method: str, path: str) -> tuple[str, str, str, str]:
        """Labels of a request; a path or method that an unknown client made up is ``other``."""
        parts = path.strip("/").split("/")
        root = "/".join(parts[:2]) if parts[0] == "metrics" else parts[0]
        bucket = root if root in _PATHS else "other"
        return (
            method if method in _METHODS else "other",
            bucket,
            "readwrite",
            str(bucket in _LONG_RUNNING).lower(),
        )


class ProbeMetrics(Collector):
    """``prober_probe_total`` and ``prober_probe_duration_seconds``; the pod workers call ``record``."""

    def __init__(self, pods: PodSource) -> None:
        self._pods = pods
        self._totals: dict[tuple[str, ...], int] = {}
        self._durations: dict[tuple[str, ...], list[float]] = {}

    def record(
        self,
        *,
        kind: str,
        result: str,
        container: str,
        pod: str,
        namespace: str,
        pod_uid: str,
        duration_seconds: float | None = None,
    ) -> None:
        """One probe: ``kind`` is Liveness, Readiness or Startup; ``result`` successful, failed or unknown."""
        key = (kind, result, container, pod, namespace, pod_uid)
        self._totals[key] = self._totals.get(key, 0) + 1
        if duration_seconds is not None:
            sums = self._durations.setdefault((kind, container, pod, namespace), [0.0] * (len(_BUCKETS) + 2))
            for index, bound in enumerate(_BUCKETS):
                if duration_seconds <= bound:
                    sums[index] += 1
            sums[-2] += 1
            sums[-1] += duration_seconds

    def collect(self) -> Iterator[Metric]:
        """The series of pods that still exist; the others are dropped for good."""
        known = {pod_fields.uid(pod) for pod in self._pods.pods()}
        named = {(pod_fields.name(pod), pod_fields.namespace(pod)) for pod in self._pods.pods()}
        self._totals = {key: count for key, count in self._totals.items() if key[5] in known}
        self._durations = {key: sums for key, sums in self._durations.items() if key[2:] in named}
        totals = CounterMetricFamily(
            "prober_probe",
            "Cumulative number of a liveness, readiness or startup probe for a container by result.",
            labels=("probe_type", "result", "container", "pod", "namespace", "pod_uid"),
        )
        for key, count in self._totals.items():
            totals.add_metric(key, count)
        yield totals
        durations = HistogramMetricFamily(
            "prober_probe_duration_seconds",
            "Duration in seconds for a probe response.",
            labels=("probe_type", "container", "pod", "namespace"),
        )
        for key, sums in self._durations.items():
            buckets = [(str(bound), sums[index]) for index, bound in enumerate(_BUCKETS)]
            durations.add_metric(key, [*buckets, ("+Inf", sums[-2])], sum_value=sums[-1])
        yield durations


class MetricsViews:
    """The handlers of the metrics routes."""

    def __init__(self, *, settings: NodeSettings, pods: PodSource, runtime: Runtime, usage: UsageReader) -> None:
        self.registry = CollectorRegistry()
        """Further metrics of the agent may be registered here; they appear under ``/metrics``."""

        self.http = HttpMetrics(self.registry)
        self.probes = ProbeMetrics(pods)
        self._runtime = runtime
        self._pods = pods
        self._usage = usage
        self._data = settings.paths.data
        ProcessCollector(registry=self.registry)
        Gauge("kubelet_node_name", "The node's name. The count is always 1.", ["node"], registry=self.registry).labels(
            settings.node_name
        ).set(1)
        Gauge(
            "kubernetes_build_info",
            "A metric with a constant '1' value labeled by the version this kubelet was built as.",
            ["git_version", "platform"],
            registry=self.registry,
        ).labels(__version__, f"linux/{platform.machine()}").set(1)
        self._certificate_ttl = Gauge(
            "kubelet_certificate_manager_server_ttl_seconds",
            "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate.",
            registry=self.registry,
        )
        self._certificate_ttl.set(float("inf"))
        self._starts = CollectorRegistry()
        ProcessCollector(registry=self._starts)

    def set_certificate(self, certificate_pem: bytes) -> None:
        """Report the life of this serving certificate from now on."""
        expires = x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
        self._certificate_ttl.set_function(lambda: _seconds_until(expires))

    async def kubelet(self, _: web.Request) -> web.Response:
        """``GET /metrics``."""
        return _text([*self.registry.collect(), *await self._running()])

    async def resource(self, _: web.Request) -> web.Response:
        """``GET /metrics/resource``: what metrics-server reads."""
        try:
            snapshot = await self._usage.snapshot()
        except RuntimeUnavailableError:
            return _text(_scrape_errors(1))
        return _text([*_node_resources(snapshot), *_pod_resources(snapshot), *_scrape_errors(0)])

    async def prober(self, _: web.Request) -> web.Response:
        """``GET /metrics/probes``."""
        started = [each for each in self._starts.collect() if each.name == "process_start_time_seconds"]
        return _text([*self.probes.collect(), *started])

    async def cadvisor(self, _: web.Request) -> web.Response:
        """``GET /metrics/cadvisor``."""
        snapshot = await self._usage.snapshot()
        return _text([*_cadvisor(snapshot), *self._machine()])

    async def _running(self) -> list[Metric]:
        pods = GaugeMetricFamily("kubelet_running_pods", "Number of pods that have a running pod sandbox")
        containers = GaugeMetricFamily(
            "kubelet_running_containers", "Number of containers currently running", labels=("container_state",)
        )
        desired = GaugeMetricFamily(
            "kubelet_desired_pods", "The number of pods the kubelet is being instructed to run."
        )
        desired.add_metric((), len(self._pods.pods()))
        try:
            statuses = await self._runtime.list()
        except RuntimeUnavailableError:
            return [desired]
        running = {each.pod_uid for each in statuses if each.state is ContainerState.RUNNING}
        pods.add_metric((), len(running))
        for state in ContainerState:
            containers.add_metric((state.value,), sum(1 for each in statuses if each.state is state))
        try:
            served = list(serving(await self._usage.snapshot()))
        except RuntimeUnavailableError:
            served = []
        return [desired, pods, containers, *served]

    def _machine(self) -> Iterator[Metric]:
        facts = machine.facts(self._data)
        cores = GaugeMetricFamily("machine_cpu_cores", "Number of logical CPU cores.", labels=("machine_id", "boot_id"))
        cores.add_metric((facts.machine_id, facts.boot_id), facts.cpu_millicores / 1000)
        yield cores
        memory = GaugeMetricFamily(
            "machine_memory_bytes", "Amount of memory installed on the machine.", labels=("machine_id", "boot_id")
        )
        memory.add_metric((facts.machine_id, facts.boot_id), facts.memory_bytes)
        yield memory


def _seconds_until(moment: datetime) -> float:
    return (moment - datetime.now(UTC)).total_seconds()


def _node_resources(snapshot: Snapshot) -> Iterator[Metric]:
    node = snapshot.node
    moment = node.taken_at_ns * _NANO
    cpu = CounterMetricFamily("node_cpu_usage_seconds", "Cumulative cpu time consumed by the node in core-seconds")
    cpu.add_metric((), node.cpu_nanoseconds * _NANO, timestamp=moment)
    yield cpu
    memory = GaugeMetricFamily("node_memory_working_set_bytes", "Current working set of the node in bytes")
    memory.add_metric((), node.working_set_bytes, timestamp=moment)
    yield memory
    swap = GaugeMetricFamily("node_swap_usage_bytes", "Current swap usage of the node in bytes.")
    swap.add_metric((), node.swap_used_bytes, timestamp=moment)
    yield swap


def _pod_resources(snapshot: Snapshot) -> Iterator[Metric]:
    started = GaugeMetricFamily(
        "container_start_time_seconds", "Start time of the container since unix epoch in seconds", labels=_CONTAINER
    )
    cpu = CounterMetricFamily(
        "container_cpu_usage_seconds",
        "Cumulative cpu time consumed by the container in core-seconds",
        labels=_CONTAINER,
    )
    memory = GaugeMetricFamily(
        "container_memory_working_set_bytes", "Current working set of the container in bytes", labels=_CONTAINER
    )
    pod_cpu = CounterMetricFamily(
        "pod_cpu_usage_seconds", "Cumulative cpu time consumed by the pod in core-seconds", labels=_POD
    )
    pod_memory = GaugeMetricFamily(
        "pod_memory_working_set_bytes", "Current working set of the pod in bytes", labels=_POD
    )
    for pod, each in _samples(snapshot):
        labels = (each.status.container_name, pod.name, pod.namespace)
        moment = each.taken_at_ns * _NANO
        started.add_metric(labels, each.status.started_at_ns * _NANO)
        cpu.add_metric(labels, each.cpu_nanoseconds * _NANO, timestamp=moment)
        memory.add_metric(labels, each.working_set_bytes, timestamp=moment)
    for pod in snapshot.pods:
        moment = max(each.taken_at_ns for each in pod.containers) * _NANO
        names = (pod.name, pod.namespace)
        pod_cpu.add_metric(names, sum(each.cpu_nanoseconds for each in pod.containers) * _NANO, timestamp=moment)
        pod_memory.add_metric(names, sum(each.working_set_bytes for each in pod.containers), timestamp=moment)
    yield from (started, cpu, memory, pod_cpu, pod_memory)


def _cadvisor(snapshot: Snapshot) -> Iterator[Metric]:
    cpu = CounterMetricFamily(
        "container_cpu_usage_seconds", "Cumulative cpu time consumed in seconds.", labels=(*_CADVISOR, "cpu")
    )
    gauges = {
        "container_memory_working_set_bytes": "Current working set in bytes.",
        "container_memory_rss": "Size of RSS in bytes.",
        "container_start_time_seconds": "Start time of the container since unix epoch in seconds.",
        "container_last_seen": "Last time a container was seen by the exporter",
    }
    families = {name: GaugeMetricFamily(name, text, labels=_CADVISOR) for name, text in gauges.items()}
    for pod, each in _samples(snapshot):
        status = each.status
        labels = (status.container_name, f"/{pod.uid}/{status.id}", status.image, status.id, pod.namespace, pod.name)
        moment = each.taken_at_ns * _NANO
        cpu.add_metric((*labels, "total"), each.cpu_nanoseconds * _NANO, timestamp=moment)
        values = (each.working_set_bytes, each.rss_bytes, status.started_at_ns * _NANO, moment)
        for family, value in zip(families.values(), values, strict=True):
            family.add_metric(labels, value, timestamp=moment)
    yield cpu
    yield from families.values()


def _samples(snapshot: Snapshot) -> Iterator[tuple[PodSample, ContainerSample]]:
    for pod in snapshot.pods:
        for container in pod.containers:
            yield pod, container


def _scrape_errors(count: int) -> Iterator[Metric]:
    for name in ("scrape_error", "resource_scrape_error"):
        family = GaugeMetricFamily(name, "1 if there was an error while getting container metrics, 0 otherwise")
        family.add_metric((), count)
        yield family


class _Families:
    """What ``generate_latest`` asks of a registry. kubelet has no ``_created`` series, so they are left out."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _text(families: Iterable[Metric]) -> web.Response:
    body = generate_latest(_Families(families))
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
