"""What the benchmark of growth makes of the API server's counts."""

from __future__ import annotations

import dataclasses

import pytest
from wasilet.errors import UsageError
from wasilet.settings import load
from wasilet.steps import SilentReporter
from wasilet_dev.bench_growth import LARGE_NODES, Size, _per, calculated, page, parsed
from wasilet_dev.benchmarks import figures

pytestmark = pytest.mark.unit

METRICS = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",group="",resource="pods",subresource="status",verb="PATCH"} 7
apiserver_request_total{code="409",component="apiserver",group="",resource="pods",subresource="status",verb="PATCH"} 1
apiserver_request_total{code="200",group="",resource="pods",subresource="status",verb="APPLY"} 2
apiserver_request_total{code="201",group="",resource="events",subresource="",verb="POST"} 1.2e+03
apiserver_request_total{code="201",group="events.k8s.io",resource="events",subresource="",verb="POST"} 5
apiserver_request_total{code="200",group="",resource="pods",subresource="",verb="WATCH"} 99
apiserver_request_total{code="200",group="",resource="",subresource="/healthz",verb="GET"} 99
apiserver_request_duration_seconds_count{resource="pods",verb="PATCH"} 99
"""
SIZE = Size(
    nodes=3,
    pods=100,
    running_seconds=2.5,
    start={"PATCH pods/status": 1.0, "POST events": 3.0, "POST pods/binding": 1.0, "POST serviceaccounts/token": 1.0},
    rest={"PATCH leases": 18.0, "PATCH nodes/status": 0.6, "GET namespaces": 500.0},
    end={"PATCH pods/status": 1.0, "DELETE pods": 1.0, "POST events": 1.0},
    agent_mib=90.0,
    supervisor_mib=30.0,
)


def test_requests_are_counted_by_what_they_are_whatever_became_of_them() -> None:
    assert parsed(METRICS) == {"PATCH pods/status": 10, "POST events": 1200, "POST events.events.k8s.io": 5}


def test_what_the_benchmark_asks_itself_is_no_pods() -> None:
    before, after = {"POST pods": 5.0, "GET nodes": 1.0}, {"POST pods": 15.0, "POST events": 30.0, "GET nodes": 1.0}
    assert _per(after, before, 10, without={"POST pods": 1.0}) == {"POST events": 3.0}


def test_a_large_cluster_is_calculated_from_what_the_nodes_of_the_largest_size_ask() -> None:
    found = calculated([dataclasses.replace(SIZE, nodes=1), SIZE, dataclasses.replace(SIZE, pods=10)])
    assert found["at rest"] == pytest.approx(LARGE_NODES * 18.6 / 3 / 60)
    assert found["starts and ends of pods"] == pytest.approx(1000 * 30 / 3600 * 8)


def test_the_page_says_what_is_calculated_and_leaves_out_what_is_rare() -> None:
    text = page([SIZE, dataclasses.replace(SIZE, rest={"PUT leases": 1.0, "LIST nodes": 0.01})], "Measured somewhere.")
    assert "**Calculated, not measured**: 1,000 nodes" in text
    assert "| PATCH pods/status | 1.00 | 1.00 |  | the pod's status |" in text
    assert "LIST nodes" not in text


@pytest.mark.parametrize("what", ["up", "pods", "http", "network"])
def test_only_two_benchmarks_write_a_page(what: str) -> None:
    with pytest.raises(UsageError, match="writes no page"):
        next(figures(what, load({}), runs=1, pods=0, reporter=SilentReporter(), write=True))
