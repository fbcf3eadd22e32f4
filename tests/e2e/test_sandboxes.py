"""A pod whose sandbox is gone, by ``down`` and ``up`` or by its supervisor's death: its init container runs again."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.kube.client import api_path

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.guests import Guests, build_toolbox

pytestmark = pytest.mark.e2e

SECONDS = 120.0
POD = api_path("pods", "cache", namespace="default")


@pytest.fixture(scope="module")
def own() -> Iterator[tuple[TestCluster, str]]:
    with whole_cluster("sandbox") as cluster:
        yield (
            cluster,
            Guests(str(cluster.status()["registry"]), cluster.settings.environ).add_bytes("toolbox", build_toolbox()),
        )


def container(name: str, image: str, *args: str) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "args": list(args),
        "volumeMounts": [{"name": "memory", "mountPath": "/m"}],
    }


def statuses(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    listed = [*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ())]
    return {each["name"]: each for each in listed}


def wait(cluster: TestCluster, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        pod = cluster.kube.get(POD)
        if holds(pod):
            return pod
        assert time.monotonic() < deadline, f"{what} did not come: {statuses(pod)}"
        time.sleep(0.1)


def runs(pod: dict[str, Any], *, restarts: int) -> bool:
    """The regular container runs, which it does only with what the init container wrote into memory."""
    main = statuses(pod).get("main", {})
    return bool(main.get("ready")) and main["restartCount"] == restarts


def test_a_pod_whose_sandbox_is_gone_begins_with_its_init_containers(own: tuple[TestCluster, str]) -> None:
    cluster, image = own
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "cache"},
        "spec": {
            "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
            "initContainers": [container("fill", image, "append /m/file filled", "cat /m/file")],
            "containers": [container("main", image, "cat /m/file", "forever")],
        },
    }
    cluster.kube.create(api_path("pods", namespace="default"), body)
    first = wait(cluster, lambda pod: runs(pod, restarts=0), "the pod")

    log = io.StringIO()
    assert down(cluster.settings, reporter=PlainReporter(log)).succeeded, log.getvalue()
    assert up(cluster.settings, reporter=PlainReporter(log)).succeeded, log.getvalue()
    with open_cluster(cluster.settings) as again:
        later = TestCluster(cluster.settings, again)
        second = wait(later, lambda pod: runs(pod, restarts=1), "the pod after down and up")
        assert first["metadata"]["uid"] == second["metadata"]["uid"]
        assert statuses(second)["fill"]["restartCount"] == 1
        path = api_path("pods", "cache", namespace="default", sub="log")
        assert later.kube.body(path, container="fill") == b"filled\n", "the volume was empty"

        supervisor = int(later.status()["nodes"][0]["supervisor_pid"])
        os.kill(supervisor, signal.SIGKILL)
        third = wait(later, lambda pod: runs(pod, restarts=2), "the pod after the supervisor's death")
        assert statuses(third)["fill"]["restartCount"] == 2

        os.kill(int(later.status()["nodes"][0]["pid"]), signal.SIGKILL)
        assert up(cluster.settings, reporter=PlainReporter(log)).succeeded, log.getvalue()
        fourth = wait(later, lambda pod: runs(pod, restarts=2), "the pod after the agent's restart")
        ids = [{name: each["containerID"] for name, each in statuses(pod).items()} for pod in (third, fourth)]
        assert ids[0] == ids[1]
