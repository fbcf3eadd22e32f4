"""A node started as Krustlet was: its environment, its flags, its taints; and pods that were written for it.

What Krustlet's tests asserted of pods is in ``cases/krustlet.yaml``; this is what they asserted of nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wasilet.cluster.known_nodes import remember_node
from wasilet.controlplane.local_registry import login_file
from wasilet.kube.client import Kube, KubeObject, api_path

from tests.clusters import TestCluster
from tests.e2e.guests import Guests, build_toolbox
from tests.e2e.stage import Stage, is_ready, phase

pytestmark = pytest.mark.e2e

NODE = "krustlet-wasi"
READY_SECONDS = 90.0
TAINTS = ("kubernetes.io/arch=wasm32-wasi:NoSchedule", "kubernetes.io/arch=wasm32-wasi:NoExecute")
TOLERATIONS = [
    {"key": "kubernetes.io/arch", "operator": "Equal", "value": "wasm32-wasi", "effect": "NoExecute"},
    {"key": "kubernetes.io/arch", "operator": "Equal", "value": "wasm32-wasi", "effect": "NoSchedule"},
]


@dataclass(frozen=True, kw_only=True)
class Krustlet:
    """The node, and what pods need to be seen on it."""

    kube: Kube
    stage: Stage
    image: str
    node: KubeObject
    kubeconfig: Path


@pytest.fixture(scope="module")
def krustlet(cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Krustlet]:
    """An agent with Krustlet's variables and flags, joined by the cluster's bootstrap file."""
    folder = tmp_path_factory.mktemp("krustlet")
    data, kubeconfig, log = folder / "data", folder / "config" / "kubeconfig", folder / "log"
    kube = cluster.kube
    address = next(
        entry["address"]
        for entry in kube.get("/api/v1/nodes")["items"][0]["status"]["addresses"]
        if entry["type"] == "InternalIP"
    )
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        "KRUSTLET_NODE_NAME": NODE,
        "KRUSTLET_NODE_IP": address,
        "KRUSTLET_HOSTNAME": NODE,
        "KRUSTLET_PORT": "0",
        "KRUSTLET_ADDRESS": address,
        "KRUSTLET_DATA_DIR": str(data),
        "KRUSTLET_BOOTSTRAP_FILE": str(cluster.cluster.state.bootstrap_file),
        "KRUSTLET_INSECURE_REGISTRIES": str(cluster.status()["registry"]),
        "WASILET_NODE_REGISTRY_CONFIG": str(login_file(cluster.cluster.state)),
        "KUBECONFIG": str(kubeconfig),
        "MAX_PODS": "17",
        "NODE_LABELS": "krustlet.example/own=yes,topology.kubernetes.io/zone=here",
    }
    command = [sys.executable, "-P", "-m", "wasilet_node", *(word for taint in TAINTS for word in ("--taint", taint))]
    stage = Stage(cluster.cluster.admin_credentials())
    # As `token create --node` does: it has the address of another node of this machine, which no unknown client gets.
    remember_node(cluster.cluster, NODE, local=True)
    with log.open("wb") as output:
        agent = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while (node := kube.find(f"/api/v1/nodes/{NODE}")) is None or not is_ready(node):
            assert agent.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        image = Guests(cluster.status()["registry"], cluster.settings.environ).add_bytes("toolbox", build_toolbox())
        yield Krustlet(kube=kube, stage=stage, image=image, node=node, kubeconfig=kubeconfig)
    finally:
        agent.terminate()
        agent.wait(30)
        subprocess.run(
            [sys.executable, "-P", "-m", "wasilet_node", "shutdown", "--data-dir", str(data)], timeout=60, check=True
        )
        kube.delete(f"/api/v1/nodes/{NODE}")
        stage.close()


def run(krustlet: Krustlet, namespace: str, name: str, **spec: Any) -> KubeObject:
    body = {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "nodeSelector": {"kubernetes.io/arch": "wasm32-wasi", "krustlet.example/own": "yes"},
            "containers": [{"name": name, "image": krustlet.image, "args": ["say Hello, world!"]}],
            **spec,
        },
    }
    return krustlet.stage.create(krustlet.kube, namespace, body)


def test_the_node_is_one_of_krustlets(krustlet: Krustlet) -> None:
    metadata, status = krustlet.node["metadata"], krustlet.node["status"]
    assert status["nodeInfo"]["architecture"] == "wasm-wasi"
    for key in ("kubernetes.io/arch", "kubernetes.io/os", "beta.kubernetes.io/arch", "beta.kubernetes.io/os"):
        assert metadata["labels"][key] == "wasm32-wasi", key
    assert metadata["labels"]["kubernetes.io/hostname"] == NODE
    assert metadata["labels"]["topology.kubernetes.io/zone"] == "here"
    assert status["capacity"]["pods"] == status["allocatable"]["pods"] == "17"
    given = {f"{t['key']}={t.get('value', '')}:{t['effect']}" for t in krustlet.node["spec"]["taints"]}
    assert given >= set(TAINTS)
    assert status["daemonEndpoints"]["kubeletEndpoint"]["Port"] > 0


def test_a_kubeconfig_is_written_where_krustlet_wrote_it(krustlet: Krustlet) -> None:
    assert krustlet.kubeconfig.stat().st_mode & 0o777 == 0o600
    nodes = Kube.from_kubeconfig(krustlet.kubeconfig)
    try:
        assert nodes.get(f"/api/v1/nodes/{NODE}")["metadata"]["name"] == NODE
    finally:
        nodes.close()


def test_a_pod_that_tolerates_the_taints_runs_there(krustlet: Krustlet) -> None:
    with krustlet.stage.namespace("krustlet") as namespace:
        created = run(krustlet, namespace, "hello-wasi", tolerations=TOLERATIONS)
        assert created["status"]["phase"] == "Pending"
        krustlet.stage.wait(
            lambda: [] if phase(krustlet.stage.pod(namespace, "hello-wasi")) == "Succeeded" else ["it to succeed"],
            within=60,
        )
        pod = krustlet.stage.pod(namespace, "hello-wasi") or {}
        assert pod["spec"]["nodeName"] == NODE
        path = f"{api_path('pods', 'hello-wasi', namespace=namespace)}/log"
        assert krustlet.kube.body(path) == b"Hello, world!\n"


def test_a_pod_that_does_not_tolerate_them_is_kept_away(krustlet: Krustlet) -> None:
    with krustlet.stage.namespace("krustlet") as namespace:
        run(krustlet, namespace, "stranger")

        def unscheduled() -> list[str]:
            pod = krustlet.stage.pod(namespace, "stranger") or {}
            conditions = (pod.get("status") or {}).get("conditions") or []
            told = [c for c in conditions if c["type"] == "PodScheduled" and c.get("reason") == "Unschedulable"]
            return [] if told and "untolerated taint" in told[0]["message"] else [f"Unschedulable: {conditions}"]

        krustlet.stage.wait(unscheduled, within=60)
