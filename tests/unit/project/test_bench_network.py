"""What the benchmark of the pod network makes of its program's output, of namespaces and of rules."""

from __future__ import annotations

import pytest
from wasilet.errors import HarnessError
from wasilet_dev.bench_network import Beside, count_endpoints, in_turns
from wasilet_dev.network_load import own_addresses, read_load

pytestmark = pytest.mark.unit

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.128.0.0/22 2 0 2
        |-- 10.128.0.1
           /32 link UNICAST
        |-- 10.128.0.7
           /32 host LOCAL
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
"""
RULES = """\
table ip kube-proxy {
	chain service-2QRHZV4L-bench/many-7/tcp/ {
		meta l4proto tcp dnat to numgen random mod 2 map { 0 : 10.128.0.9 . 7777, 1 : 10.128.0.90 . 7777 }
	}

	chain service-IGG25VYB-bench/many-17/tcp/ {
		numgen random mod 2 vmap {
			0 : goto endpoint-5OJB2KTY-bench/many-17/tcp/__10.128.0.9/7777,
			1 : goto endpoint-5OJB2KTA-bench/many-17/tcp/__10.128.0.8/7777 }
	}

	chain endpoint-5OJB2KTY-bench/many-17/tcp/__10.128.0.9/7777 {
		meta l4proto tcp dnat to 10.128.0.9:7777
	}

	chain service-ABCD2345-bench/to-pod/tcp/ {
		meta l4proto tcp dnat to 10.128.0.9:7777
	}
}
"""


def test_what_the_program_prints_is_read() -> None:
    found = read_load('{"first_byte_us": [250, 100, 3000], "requests": 9000, "seconds": 2.25}\n')
    assert found.first_byte_ms == (0.25, 0.1, 3.0)
    assert found.per_second == 4000.0


@pytest.mark.parametrize(
    "text",
    ["", "connect: Refused", '{"requests": 1, "seconds": 1}', '{"first_byte_us": [], "requests": 1, "seconds": 0}'],
)
def test_a_client_that_failed_is_named_with_what_it_printed(text: str) -> None:
    with pytest.raises(HarnessError, match=f"echo-load printed what is not understood: {text[:5]}"):
        read_load(text)


def test_a_pods_namespace_is_known_by_its_own_address_and_not_by_its_gateways() -> None:
    assert own_addresses(FIB_TRIE) == {"10.128.0.7", "127.0.0.1"}


def test_endpoints_of_the_services_that_are_measured_are_counted_and_no_others() -> None:
    assert count_endpoints(RULES, ["10.128.0.9", "10.128.0.8"]) == 3
    assert count_endpoints(RULES, ["10.128.0.90"]) == 1
    assert count_endpoints(RULES, ["10.128.0.7"]) == 0


def test_sides_take_turns_in_being_first() -> None:
    order: list[str] = []

    def measure(side: str, number: int) -> str:
        order.append(side)
        return f"{side}{number}"

    assert in_turns(["a", "b"], 3, measure) == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_medians_are_compared() -> None:
    found = Beside(name="x", unit="ms", values=[1.0, 9.0, 3.0], others=[2.0, 2.0], what="native", target="0.3")
    assert found.to_json() == {
        "name": "x",
        "value": 3.0,
        "unit": "ms",
        "beside": {"what": "native", "value": 2.0},
        "ratio": 1.5,
        "runs": 3,
        "target": "0.3",
    }
    assert "3.00 ms" in found.line()
    assert "native 2.00, ratio 1.50" in found.line()
    assert Beside(name="x", unit="ms", values=[1.0], others=[0.0], what="native").ratio == 0.0
