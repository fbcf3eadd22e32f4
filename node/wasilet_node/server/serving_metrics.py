"""Metrics of containers that serve HTTP, beside kubelet's own on ``/metrics``: what their sandboxes have counted."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from wasilet_node.runtime.component_host.counters import BUCKET_SECONDS
from wasilet_node.server.stats import Snapshot

_LABELS = ("container", "pod", "namespace")


def serving(snapshot: Snapshot) -> Iterator[Metric]:
    """Families without a sample where nothing serves."""
    requests = CounterMetricFamily(
        "wasilet_http_requests",
        "Requests that were answered, by status; 499: the client had gone.",
        labels=[*_LABELS, "code"],
    )
    durations = HistogramMetricFamily(
        "wasilet_http_request_duration_seconds", "From a request's head to the end of its answer.", labels=_LABELS
    )
    in_flight = GaugeMetricFamily("wasilet_http_requests_in_flight", "Requests being answered.", labels=_LABELS)
    connections = GaugeMetricFamily("wasilet_http_connections", "Open connections.", labels=_LABELS)
    instances = CounterMetricFamily("wasilet_http_instances", "Instances of the component made.", labels=_LABELS)
    for pod in snapshot.pods:
        for container in pod.containers:
            counted = container.http
            if counted is None:
                continue
            labels = (container.status.container_name, pod.name, pod.namespace)
            for code, count in counted.statuses.items():
                requests.add_metric((*labels, str(code)), count)
            total = 0
            buckets = []
            for end, count in zip((*map(str, BUCKET_SECONDS), "+Inf"), counted.buckets, strict=False):
                total += count
                buckets.append((end, total))
            durations.add_metric(labels, buckets, counted.seconds)
            in_flight.add_metric(labels, counted.in_flight)
            connections.add_metric(labels, counted.connections)
            instances.add_metric(labels, counted.instances)
    yield from (requests, durations, in_flight, connections, instances)
