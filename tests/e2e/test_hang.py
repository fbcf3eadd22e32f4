"""The supervisor hangs, alive, below the agent: the node says so, loses nothing, and starts nothing twice."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from wasilet.kube.client import api_path
from wasilet_node.runtime import supervisor_registry

from tests.e2e.conftest import Roomy
from tests.e2e.stage import is_ready, phase

pytestmark = pytest.mark.e2e

NOTICED_SECONDS = 30.0
BACK_SECONDS = 60.0


def pod(name: str, image: str, *args: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": image, "args": list(args)}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1, **spec}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {**spec, "tolerations": [{"operator": "Exists"}]},
    }


@contextlib.contextmanager
def hanging_supervisor(roomy: Roomy) -> Iterator[None]:
    pointer = supervisor_registry.current(roomy.cluster.cluster.state.node(roomy.node))
    assert pointer is not None
    os.kill(pointer.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pointer.pid, signal.SIGCONT)


def wait_node(roomy: Roomy, status: str, message: str, *, within: float) -> None:
    def missing() -> list[str]:
        conditions = roomy.kube.get(api_path("nodes", roomy.node))["status"]["conditions"]
        ready = next(condition for condition in conditions if condition["type"] == "Ready")
        found = ready["status"] == status and message in ready["message"]
        return [] if found else [f"Ready is {ready['status']}: {ready['message']}"]

    roomy.stage.wait(missing, within=within, poll=0.5)


def test_the_node_is_not_ready_while_the_supervisor_hangs_and_nothing_runs_twice(roomy: Roomy) -> None:
    with roomy.stage.namespace("hang") as namespace:
        roomy.stage.create(roomy.kube, namespace, pod("ticker", roomy.image, "tick 0.2"))

        def pods_are(**wanted: str) -> list[str]:
            found = {name: roomy.stage.pod(namespace, name) for name in wanted}
            return [f"{name} is {phase(found[name])}" for name in wanted if phase(found[name]) != wanted[name]]

        roomy.stage.wait(lambda: pods_are(ticker="Running"), within=BACK_SECONDS)
        before = roomy.kube.get(api_path("pods", "ticker", namespace=namespace))["status"]["containerStatuses"][0]
        with hanging_supervisor(roomy):
            # To a pod that is bound already nothing holds: what its start asks for waits in the socket.
            once = pod("once", roomy.image, "say it ran", "exit 3", restartPolicy="Never", nodeName=roomy.node)
            roomy.stage.create(roomy.kube, namespace, once)
            begun = time.monotonic()
            wait_node(
                roomy, "False", "container runtime is down: no answer from the supervisor", within=NOTICED_SECONDS
            )
            assert time.monotonic() - begun < NOTICED_SECONDS
        wait_node(roomy, "True", "", within=BACK_SECONDS)
        roomy.stage.wait(lambda: pods_are(ticker="Running", once="Failed"), within=BACK_SECONDS)
        after = roomy.kube.get(api_path("pods", "ticker", namespace=namespace))
        assert is_ready(after)
        assert after["status"]["containerStatuses"][0]["containerID"] == before["containerID"]
        assert after["status"]["containerStatuses"][0]["restartCount"] == 0
        ended = roomy.kube.get(api_path("pods", "once", namespace=namespace))["status"]["containerStatuses"][0]
        assert (ended["restartCount"], ended["state"]["terminated"]["exitCode"]) == (0, 3)
        logs = roomy.cluster.cluster.state.node(roomy.node) / "logs/pods"
        (log,) = logs.glob(f"{namespace}_once_*/main/*.log")
        assert log.read_text().count("it ran") == 1
