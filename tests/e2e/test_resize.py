"""Pods resized on a real cluster, whose API server is the project's: it leaves it to the node what is resized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wasilet.kube.client import api_path

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.guests import Guests, build_toolbox

pytestmark = pytest.mark.e2e

SECONDS = 120.0
STRATEGIC = "application/strategic-merge-patch+json"
BEFORE = {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}}


@pytest.fixture(scope="module")
def own() -> Iterator[tuple[TestCluster, str]]:
    with whole_cluster("resize") as cluster:
        guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
        yield cluster, guests.add_bytes("toolbox", build_toolbox())


def wait(cluster: TestCluster, name: str, holds: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        pod = cluster.kube.get(api_path("pods", name, namespace="default"))
        if holds(pod):
            return pod
        assert time.monotonic() < deadline, f"{what} did not come: {pod['status']}"
        time.sleep(0.1)


def main(pod: dict[str, Any]) -> dict[str, Any]:
    return next(iter(pod["status"].get("containerStatuses") or ()), {})


def start(cluster: TestCluster, image: str, name: str, **more: Any) -> None:
    container = {"name": "main", "image": image, "args": ["forever"], "resources": BEFORE, **more}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [container]}}
    cluster.kube.create(api_path("pods", namespace="default"), body)
    wait(cluster, name, lambda pod: main(pod).get("ready"), "the first start")


def resize(cluster: TestCluster, name: str, **resources: dict[str, str]) -> None:
    body = {"spec": {"containers": [{"name": "main", "resources": resources}]}}
    cluster.kube.patch(f"{api_path('pods', name, namespace='default')}/resize", body, content_type=STRATEGIC)


def events(cluster: TestCluster, name: str) -> list[str]:
    listed = cluster.kube.get(api_path("events", namespace="default"))["items"]
    return [event["reason"] for event in listed if event["involvedObject"]["name"] == name]


def conditions(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {each["type"]: each for each in pod["status"].get("conditions") or ()}
    return {type_: each for type_, each in found.items() if type_.startswith("PodResize")}


def test_requests_move_without_a_restart(own: tuple[TestCluster, str]) -> None:
    cluster, image = own
    start(cluster, image, "moves")
    resize(cluster, "moves", requests={"memory": "48Mi"})
    pod = wait(cluster, "moves", lambda pod: main(pod)["resources"]["requests"]["memory"] == "48Mi", "the resize")
    assert main(pod)["restartCount"] == 0
    pod = wait(cluster, "moves", lambda pod: not conditions(pod), "the end of the resize")
    assert main(pod)["allocatedResources"]["memory"] == "48Mi"
    assert pod["status"]["allocatedResources"]["memory"] == "48Mi"
    deadline = time.monotonic() + SECONDS
    while not {"ResizeStarted", "ResizeCompleted"} <= set(events(cluster, "moves")):
        assert time.monotonic() < deadline, events(cluster, "moves")
        time.sleep(0.1)


def test_a_container_whose_policy_says_so_restarts(own: tuple[TestCluster, str]) -> None:
    cluster, image = own
    policy = [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]
    start(cluster, image, "restarts", resizePolicy=policy)
    resize(cluster, "restarts", limits={"memory": "80Mi"})
    pod = wait(cluster, "restarts", lambda pod: main(pod)["restartCount"] == 1 and main(pod)["ready"], "the restart")
    assert main(pod)["resources"]["limits"]["memory"] == "80Mi"


def test_what_no_node_has_room_for_waits_and_can_be_taken_back(own: tuple[TestCluster, str]) -> None:
    cluster, image = own
    start(cluster, image, "waits")
    resize(cluster, "waits", requests={"memory": "900Gi"}, limits={"memory": "900Gi"})
    pod = wait(cluster, "waits", lambda pod: conditions(pod).get("PodResizePending"), "the answer")
    assert conditions(pod)["PodResizePending"]["reason"] == "Deferred"
    assert main(pod)["restartCount"] == 0
    resize(cluster, "waits", requests=BEFORE["requests"], limits=BEFORE["limits"])
    wait(cluster, "waits", lambda pod: not conditions(pod), "the end of the pending resize")
