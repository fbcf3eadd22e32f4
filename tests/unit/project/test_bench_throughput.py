"""What the benchmark of serving makes of wrk's output, and of two servers' runs."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from wasilet.errors import HarnessError
from wasilet_dev.bench_throughput import Comparison, Sample, median, read_wrk, serving

pytestmark = pytest.mark.unit

WRK = """\
Running 2s test @ http://127.0.0.1:35163/healthz
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.24ms    2.60ms  34.39ms   86.50%
    Req/Sec     5.12k   640.30     6.10k    70.00%
  Latency Distribution
     50%    2.61ms
     75%    3.84ms
     90%    5.90ms
     99%    {slow}
  10200 requests in 2.00s, 1.04MB read
{more}Requests/sec:   5100.25
Transfer/sec:    533.10KB
"""
SAMPLE = Sample(per_second=1000.0, p99_ms=2.0, cpu_us=50.0, failed=0)


@pytest.mark.parametrize(("slow", "p99_ms"), [("412.00us", 0.412), ("12.60ms", 12.6), ("1.05s", 1050.0)])
def test_what_wrk_prints_is_read(slow: str, p99_ms: float) -> None:
    found = read_wrk(WRK.format(slow=slow, more=""), cpu_seconds=1.02)
    assert (found.per_second, found.failed) == (5100.25, 0)
    assert found.p99_ms == pytest.approx(p99_ms)
    assert found.cpu_us == pytest.approx(100.0)


def test_failures_are_counted_whatever_their_kind() -> None:
    more = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 100\n"
    assert read_wrk(WRK.format(slow="1.00ms", more=more), cpu_seconds=1.0).failed == 110


def test_a_server_that_answers_nothing_is_no_division_by_zero() -> None:
    text = WRK.replace("10200 requests", "0 requests").format(slow="0.00us", more="")
    silent = read_wrk(text, cpu_seconds=0.0)
    assert silent.failed == 1
    compared = Comparison(name="x", host=SAMPLE, rival=silent, rounds=1)
    assert set(compared.ratios.values()) == {0.0}
    assert compared.line().endswith("FAILED 0/1")


def test_another_tools_output_is_refused() -> None:
    with pytest.raises(HarnessError, match="wrk printed what is not understood: Summary"):
        read_wrk("Summary:\n  Requests/sec: 12\n", cpu_seconds=1.0)


def test_ratios_above_one_mean_that_the_component_host_is_better() -> None:
    compared = Comparison(
        name="x", host=SAMPLE, rival=Sample(per_second=500.0, p99_ms=4.0, cpu_us=100.0, failed=0), rounds=3
    )
    assert compared.ratios == {"requests_per_second": 2.0, "p99": 2.0, "cpu": 2.0}
    assert compared.to_json()["ratios"] == compared.ratios


def test_medians_hide_no_failure() -> None:
    runs = [SAMPLE, replace(SAMPLE, per_second=10.0, failed=3), replace(SAMPLE, per_second=3000.0)]
    assert median(runs) == replace(SAMPLE, failed=3)


def test_a_server_that_ends_before_it_serves_is_reported_with_its_last_words() -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no such component')"]
    with pytest.raises(HarnessError, match="ended before it served: no such component"), serving(argv, {}):
        pass
