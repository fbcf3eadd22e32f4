"""A user's own test suite, which has pytest-kind and now Wasilet too: run by tests/e2e/test_pytest_kind.py, in a pytest
of its own. The cluster is pytest-kind's; Wasilet's fixture joins a wasm node to it.
"""

from __future__ import annotations

from typing import Any


def test_the_cluster_is_pytest_kinds_and_the_wasm_node_joined_it(kind_cluster: Any, cluster: Any) -> None:
    assert cluster.provider == "kind"
    assert cluster.name == kind_cluster.name
    names = kind_cluster.kubectl("get", "nodes", "-o", "name").split()
    assert sorted(names) == [f"node/{kind_cluster.name}-1", f"node/{kind_cluster.name}-control-plane"]


def test_a_wasm_pod_runs_in_it(kind_cluster: Any, wasm_app: Any, run_pod: Any, assert_logs: Any) -> None:
    pod = run_pod(wasm_app("hello-world"))
    assert_logs(pod, contains="Hello, from WASI")
    assert pod.name in kind_cluster.kubectl("get", "pods", "-A")
