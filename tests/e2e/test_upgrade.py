"""A running cluster is led from an older minor to the newest by ``up``, one at a time, with all that it holds; also
when the run dies on the way. By command: the older minors are built first, minutes each."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.controlplane.acquire import AcquireError, acquire
from wasilet.controlplane.versions import versions
from wasilet.kube.client import api_path
from wasilet.settings import cache_root
from wasilet.steps import Recap

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.guests import Guests, build_toolbox

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

OLDEST, BETWEEN, NEWEST = sorted(
    versions().kubernetes.values(), key=lambda text: [int(part) for part in text.split(".")]
)
SECONDS = 60.0
FIRST = "1.34.4"
"""What the first Wasilet ran, and no Wasilet since brings."""

KEPT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("configmaps", {"metadata": {"name": "kept"}, "data": {"a": "b"}}),
    ("secrets", {"metadata": {"name": "kept"}, "stringData": {"a": "b"}}),
    ("services", {"metadata": {"name": "kept"}, "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}]}}),
    ("serviceaccounts", {"metadata": {"name": "kept"}}),
)


@pytest.fixture
def old() -> Iterator[TestCluster]:
    with whole_cluster("upgrade", kubernetes_version=OLDEST) as cluster:
        cluster.kube.create(
            api_path("configmaps", namespace="default"), {"metadata": {"name": "kept"}, "data": {"a": "b"}}
        )
        start_pod(cluster)
        yield cluster


def start_pod(cluster: TestCluster) -> None:
    """One that runs until it is deleted."""
    guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
    image = guests.add_bytes("toolbox", build_toolbox())
    spec = {"containers": [{"name": "main", "image": image, "args": ["forever"]}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "keeps-running"}, "spec": spec}
    cluster.kube.create(api_path("pods", namespace="default"), pod)
    deadline = time.monotonic() + SECONDS
    while running(cluster) == ("", -1):
        assert time.monotonic() < deadline, "the pod did not start"
        time.sleep(0.1)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestCluster]:
    """A cluster as the first Wasilet left it: of a minor that is no longer on the list, with objects of some kinds."""
    with monkeypatch.context() as then:
        then.setitem(cast("dict[str, str]", versions().kubernetes), "1.34", FIRST)
        names = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"]
        try:
            acquire(names, cache=cache_root(), environ=os.environ, progress=lambda _: None, kubernetes="1.34")
        except (AcquireError, OSError) as error:
            pytest.skip(f"Kubernetes {FIRST} cannot be had: {error}")
        with whole_cluster("first", kubernetes_version=FIRST) as cluster:
            for kind, body in KEPT:
                cluster.kube.create(api_path(kind, namespace="default"), body)
            start_pod(cluster)
            # It recorded neither what runs nor what was asked for.
            cluster.cluster.state.update(kubernetes="", kubernetes_asked="")
            then.undo()
            yield cluster


def kept(cluster: TestCluster) -> list[str]:
    """The uids of what was made before, and of the Node and the pod."""
    paths = [api_path(kind, "kept", namespace="default") for kind, _ in KEPT]
    paths += [api_path("pods", "keeps-running", namespace="default"), f"/api/v1/nodes/{cluster.settings.name}-1"]
    return [str(cluster.kube.get(path)["metadata"]["uid"]) for path in paths]


def kubelet_version(cluster: TestCluster) -> str:
    node = cluster.kube.get(f"/api/v1/nodes/{cluster.settings.name}-1")
    return str(node["status"]["nodeInfo"]["kubeletVersion"]).partition("+")[0]


def running(cluster: TestCluster) -> tuple[str, int]:
    """The id of the pod's container and how often it was restarted; while it does not run: nothing, -1."""
    pod = cluster.kube.get(api_path("pods", "keeps-running", namespace="default"))
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        if "running" in status["state"]:
            return status["containerID"], status["restartCount"]
    return "", -1


def lead_on(cluster: TestCluster, version: str) -> tuple[Recap, str]:
    log = io.StringIO()
    settings = dataclasses.replace(cluster.settings, kubernetes_version=version)
    recap = up(settings, reporter=PlainReporter(log))
    assert recap.succeeded, log.getvalue()
    return recap, log.getvalue()


def server(cluster: TestCluster) -> str:
    return str(cluster.kube.get("/version")["gitVersion"])


def test_up_leads_it_over_each_minor_and_nothing_is_lost(old: TestCluster) -> None:
    before = running(old)
    assert server(old) == f"v{OLDEST}"
    _, told = lead_on(old, NEWEST)
    assert f"Kubernetes: {OLDEST} -> {BETWEEN} -> {NEWEST}" in told
    assert server(old) == f"v{NEWEST}"
    assert running(old) == before, "a control plane's upgrade is no matter of its pods"
    assert old.kube.get(api_path("configmaps", "kept", namespace="default"))["data"] == {"a": "b"}
    recap, _ = lead_on(old, NEWEST)
    assert not [outcome for outcome in recap.outcomes if outcome.status.value == "changed"]
    _, told = lead_on(old, "")
    assert f"Kubernetes: {NEWEST}" in told, "what was asked for is remembered"


def test_a_cluster_of_the_first_wasilet_is_led_to_the_newest_and_its_node_follows(first: TestCluster) -> None:
    before, objects = running(first), kept(first)
    assert (server(first), kubelet_version(first)) == (f"v{FIRST}", f"v{FIRST}")
    _, reported = lead_on(first, "")
    assert f"Kubernetes: {FIRST} -> {OLDEST} -> {BETWEEN} -> {NEWEST}" in reported
    assert server(first) == f"v{NEWEST}"
    assert kept(first) == objects
    assert first.kube.get(api_path("secrets", "kept", namespace="default"))["data"] == {"a": "Yg=="}
    assert running(first) == before
    deadline = time.monotonic() + SECONDS
    while kubelet_version(first) != f"v{NEWEST}":
        assert time.monotonic() < deadline, f"the node still says {kubelet_version(first)}"
        time.sleep(0.5)


def test_a_run_that_died_between_two_minors_is_taken_up_again(old: TestCluster) -> None:
    before = running(old)
    command = [sys.executable, "-P", "-m", "wasilet", "up", "--name", old.settings.name, "--kubernetes-version", NEWEST]
    dying = subprocess.Popen(
        command, env=dict(old.settings.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_process(f"kube-apiserver-v{BETWEEN}", old.settings.state_root)
    finally:
        dying.kill()
        dying.wait(timeout=30)
    _, told = lead_on(old, NEWEST)
    assert f"{BETWEEN} -> {NEWEST}" in told
    assert server(old) == f"v{NEWEST}"
    assert running(old) == before
    assert old.kube.get(api_path("configmaps", "kept", namespace="default"))["data"] == {"a": "b"}


def wait_for_process(words: str, root: Path) -> None:
    """Until this cluster's API server of a version runs."""
    deadline = time.monotonic() + SECONDS
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if words in command.partition("\0")[0] and str(root) in command:
                return
        assert time.monotonic() < deadline, f"no {words} came"
        time.sleep(0.05)
