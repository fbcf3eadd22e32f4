"""Several wasm nodes of one cluster: own names, ports and folders; pods spread over them, and leave a drained one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wasilet.controlplane.acquire import acquire
from wasilet.kube.client import KubeObject, api_path
from wasilet.kube.resources import node_is_ready
from wasilet.oci.publish import push_app
from wasilet.settings import cache_root
from wasilet.steps import SilentReporter

from tests.clusters import TestCluster, whole_cluster

pytestmark = pytest.mark.e2e

WAIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def three() -> Iterator[TestCluster]:
    with whole_cluster("three", nodes=3) as made:
        yield made


def eventually(probe: Callable[[], Any], what: Callable[[], str]) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS:g} s: {what()}"
        time.sleep(0.2)
    return found


def kubectl(cluster: TestCluster, *words: str) -> str:
    path = acquire(["kubectl"], cache=cache_root(), environ=os.environ, progress=lambda _: None)["kubectl"].path
    command = [str(path), "--kubeconfig", str(cluster.admin_kubeconfig), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def running(cluster: TestCluster) -> dict[str, str]:
    """Pod to node, of those that are Ready and not going."""
    pods = cluster.kube.get(api_path("pods", namespace="default"), labelSelector="app=spread")["items"]
    return {p["metadata"]["name"]: p["spec"]["nodeName"] for p in pods if is_ready(p)}


def is_ready(pod: KubeObject) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def test_each_has_its_own_name_port_and_folder(three: TestCluster) -> None:
    nodes = three.status()["nodes"]
    assert [node["name"] for node in nodes] == ["three-1", "three-2", "three-3"]
    assert all(node["ready"] for node in nodes)
    for key in ("port", "pid", "data_dir"):
        assert len({node[key] for node in nodes}) == 3, key
    objects = three.kube.get(api_path("nodes"))["items"]
    ports = {n["metadata"]["name"]: n["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] for n in objects}
    assert ports == {node["name"]: node["port"] for node in nodes}
    assert all(node_is_ready(node) for node in objects)


def test_a_deployment_with_anti_affinity_spreads_and_drain_moves_its_pods(three: TestCluster) -> None:
    assert push_app("hello-world", three.settings, reporter=SilentReporter())[0].succeeded
    term = {
        "weight": 100,
        "podAffinityTerm": {
            "labelSelector": {"matchLabels": {"app": "spread"}},
            "topologyKey": "kubernetes.io/hostname",
        },
    }
    spec = {
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}},
        "containers": [{"name": "main", "image": f"{three.status()['registry']}/hello-world:latest"}],
    }
    deployment = {
        "metadata": {"name": "spread"},
        "spec": {
            "replicas": 3,
            "selector": {"matchLabels": {"app": "spread"}},
            "template": {"metadata": {"labels": {"app": "spread"}}, "spec": spec},
        },
    }
    path = api_path("deployments", group="apps", namespace="default")
    three.kube.create(path, deployment)
    eventually(lambda: len(running(three)) == 3, lambda: str(running(three)))
    before = running(three)
    assert sorted(before.values()) == ["three-1", "three-2", "three-3"]

    kubectl(three, "drain", "three-2", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")

    eventually(lambda: len(running(three)) == 3, lambda: str(running(three)))
    after = running(three)
    assert "three-2" not in after.values()
    stayed = {name for name, node in before.items() if node != "three-2"}
    assert stayed <= set(after), "a pod of a node that was not drained was moved"
    leftover = Path(three.status()["nodes"][1]["data_dir"]) / "pods"
    eventually(lambda: not list(leftover.iterdir()), lambda: str(list(leftover.iterdir())))
    kubectl(three, "uncordon", "three-2")
    three.kube.delete(f"{path}/spread")
