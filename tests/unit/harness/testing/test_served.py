"""What is read of a node's metrics, and the rates that become of two looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from wasilet.testing.served import Key, Rates, Served, read_metrics

pytestmark = pytest.mark.unit

LABELS = 'container="{container}",namespace="shop",pod="web"'


def metrics(container: str, *, ok: int, failed: int) -> str:
    labels = LABELS.format(container=container)
    total = ok + failed
    return f"""\
# TYPE wasilet_http_requests_total counter
wasilet_http_requests_total{{{labels},code="200"}} {ok}.0
wasilet_http_requests_total{{{labels},code="503"}} {failed}.0
# TYPE wasilet_http_request_duration_seconds histogram
wasilet_http_request_duration_seconds_bucket{{{labels},le="0.001"}} {total - 1}.0
wasilet_http_request_duration_seconds_bucket{{{labels},le="0.25"}} {total}.0
wasilet_http_request_duration_seconds_bucket{{{labels},le="+Inf"}} {total}.0
wasilet_http_request_duration_seconds_count{{{labels}}} {total}.0
wasilet_http_request_duration_seconds_sum{{{labels}}} {total * 0.002}
container_cpu_usage_seconds_total{{{labels}}} 7
"""


def test_the_containers_of_a_pod_are_added_up() -> None:
    text = metrics("a", ok=90, failed=10) + metrics("b", ok=100, failed=0)
    (found,) = read_metrics(text).values()
    assert (found.requests, found.failed) == (200, 10)
    assert found.mean_seconds == pytest.approx(0.002)
    assert found.buckets == ((0.001, 198), (0.25, 200), (float("inf"), 200))
    assert str(found) == "200 requests, 2.0 ms on average, 99 % within 1 ms, 10 failed"


@pytest.mark.parametrize("text", ["", "container_memory 1\n", 'wasilet_http_requests_total{pod="web" 1\n', "\0\0"])
def test_what_has_none_of_it_or_is_broken_is_nothing(text: str) -> None:
    assert read_metrics(text) == {}


def test_a_pod_that_was_never_asked_has_nothing_to_report() -> None:
    assert str(Served()) == ""
    assert Served().within(0.99) == 0.0


def test_rates_are_of_what_came_between_two_looks() -> None:
    key: Key = ("shop", "web")
    seen: dict[Key, Served] = {key: Served(requests=1000, seconds=100.0)}
    now = 10.0

    def look() -> Mapping[Key, Served]:
        return dict(seen)

    rates = Rates(look, clock=lambda: now)
    rates.look()
    assert rates.words == {key: "0/s"}
    seen[key], now = Served(requests=1500, seconds=101.0), 12.0
    rates.look()
    assert rates.words == {key: "250/s 2.0 ms"}
    # Its container was started again, and another pod has come.
    seen[key], now = Served(requests=10, seconds=0.01), 14.0
    seen["shop", "new"] = Served(requests=4, seconds=0.004)
    rates.look()
    assert rates.words == {key: "5/s 1.0 ms", ("shop", "new"): "2/s 1.0 ms"}
    del seen[key]
    rates.look()
    assert set(rates.words) == {("shop", "new")}


def test_buckets_are_counted_from_the_earlier_look_on() -> None:
    earlier = Served(requests=10, seconds=1.0, buckets=((0.1, 10), (1.0, 10)))
    later = replace(earlier, requests=20, seconds=6.0, buckets=((0.1, 10), (1.0, 20)))
    assert later.since(earlier) == Served(requests=10, seconds=5.0, buckets=((0.1, 0), (1.0, 10)))
    assert later.since(earlier).within(0.5) == 1.0
