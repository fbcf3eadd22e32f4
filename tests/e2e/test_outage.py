"""The API server freezes for longer than any time-out, and a Node is deleted under its running pods."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
from wasilet.kube.client import api_path

from tests.e2e.conftest import Roomy
from tests.e2e.stage import is_ready, phase
from tests.e2e.test_cases import unexpected_lines

pytestmark = pytest.mark.e2e

AWAY_SECONDS = 60.0
BACK_SECONDS = 120.0


@pytest.fixture
def ticking(roomy: Roomy) -> Iterator[tuple[str, str]]:
    """A namespace with a ready pod ``ticker``; and its container's id."""
    with roomy.stage.namespace("outage") as namespace:
        container = {"name": "main", "image": roomy.image, "args": ["tick 0.2"]}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 1, "tolerations": [{"operator": "Exists"}]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ticker"}, "spec": spec}
        roomy.stage.create(roomy.kube, namespace, pod)
        wait_ready(roomy, namespace, "ticker")
        yield namespace, container_id(roomy, namespace)


def wait_ready(roomy: Roomy, namespace: str, name: str) -> None:
    def missing() -> list[str]:
        pod = roomy.stage.pod(namespace, name)
        return [] if pod is not None and is_ready(pod) else [f"{name} is not ready: {(pod or {}).get('status')}"]

    roomy.stage.wait(missing, within=BACK_SECONDS)


def container_id(roomy: Roomy, namespace: str) -> str:
    status = roomy.kube.get(api_path("pods", "ticker", namespace=namespace))["status"]["containerStatuses"][0]
    assert status["restartCount"] == 0
    return str(status["containerID"])


def ticks(roomy: Roomy, namespace: str) -> int:
    """How often the ticker has ticked, by its last line; 0 before its first."""
    folder = roomy.cluster.cluster.state.node(roomy.node) / "logs/pods"
    (log,) = folder.glob(f"{namespace}_ticker_*/main/0.log")
    lines = log.read_text().splitlines()
    return int(lines[-1].split()[-1]) if lines else 0


@contextlib.contextmanager
def frozen(roomy: Roomy, component: str) -> Iterator[None]:
    """A component that takes connections and answers nothing."""
    record = roomy.cluster.cluster.state.alive(component)
    assert record is not None
    os.kill(record.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(record.process.pid, signal.SIGCONT)


def test_pods_go_on_while_the_api_server_is_frozen(roomy: Roomy, ticking: tuple[str, str]) -> None:
    namespace, before = ticking
    seen = len(unexpected_lines(roomy.cluster))
    first = ticks(roomy, namespace)
    with frozen(roomy, "kube-apiserver"):
        time.sleep(AWAY_SECONDS)
        assert ticks(roomy, namespace) - first > AWAY_SECONDS
    container = {"name": "main", "image": roomy.image, "args": ["exit 0"]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "after"},
        "spec": {"restartPolicy": "Never", "containers": [container], "tolerations": [{"operator": "Exists"}]},
    }
    roomy.stage.create(roomy.kube, namespace, pod)

    def done() -> list[str]:
        now = phase(roomy.stage.pod(namespace, "after"))
        return [] if now == "Succeeded" else [f"the pod made after it is {now or 'not seen'}"]

    roomy.stage.wait(done, within=BACK_SECONDS)
    wait_ready(roomy, namespace, "ticker")
    assert container_id(roomy, namespace) == before
    surprised = unexpected_lines(roomy.cluster)[seen:]
    assert not surprised, surprised[0]


def test_a_deleted_node_registers_again_and_its_pod_runs_on(roomy: Roomy, ticking: tuple[str, str]) -> None:
    namespace, before = ticking
    path = api_path("nodes", roomy.node)
    uid = roomy.kube.get(path)["metadata"]["uid"]
    roomy.kube.delete(path)

    def back() -> list[str]:
        node = roomy.kube.find(path)
        if node is None or node["metadata"]["uid"] == uid:
            return ["the Node is not there again"]
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions") or ())
        return [] if ready else ["the new Node is not Ready"]

    roomy.stage.wait(back, within=BACK_SECONDS, poll=0.5)
    first = ticks(roomy, namespace)
    time.sleep(2)
    assert ticks(roomy, namespace) > first
    assert container_id(roomy, namespace) == before
