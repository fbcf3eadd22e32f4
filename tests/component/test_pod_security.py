"""What pods may do where a namespace has no PodSecurity label, asked of a real API server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.apps.render import pod_spec, render
from wasilet.apps.samples import find_app, sample_names
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import control_plane_steps
from wasilet.errors import ApiError
from wasilet.kube.client import Kube, api_path
from wasilet.steps import Play, Status

from tests.clusters import TestCluster, control_plane, run_play

pytestmark = pytest.mark.component

ROWS: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "attacks" / "pod_security.yaml").read_text()
)
ENFORCE = "pod-security.kubernetes.io/enforce"
PLAIN: dict[str, Any] = {"containers": [{"name": "m", "image": "i"}]}
HOST_PATH = {**PLAIN, "volumes": [{"name": "v", "hostPath": {"path": "/etc"}}]}
HOST_NETWORK = {**PLAIN, "hostNetwork": True}
HOST_PORT = {"containers": [{"name": "m", "image": "i", "ports": [{"containerPort": 80, "hostPort": 80}]}]}


@pytest.fixture(scope="module")
def plane() -> Iterator[TestCluster]:
    with control_plane("levels") as made:
        yield made


def refusal(plane: TestCluster, namespace: str, spec: dict[str, Any], **metadata: Any) -> str:
    """Why admission would not let the pod in; empty: it would. Nothing is created."""
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "asked", **metadata}, "spec": spec}
    # A connection of its own: the API server may have been started again.
    kube = Kube.from_kubeconfig(plane.admin_kubeconfig)
    try:
        kube.create(api_path("pods", namespace=namespace) + "?dryRun=All", body)
    except ApiError as error:
        return f"{error.code} {error}"
    finally:
        kube.close()
    return ""


@pytest.mark.parametrize("spec", [HOST_PATH, HOST_NETWORK, HOST_PORT])
def test_a_pod_that_reaches_for_the_machine_is_refused_unless_its_namespace_says_so(
    plane: TestCluster, spec: dict[str, Any]
) -> None:
    assert 'violates PodSecurity "baseline:latest"' in refusal(plane, "default", spec)
    assert refusal(plane, "default", PLAIN) == ""
    namespace = plane.kube.create(
        api_path("namespaces"), {"metadata": {"generateName": "open-", "labels": {ENFORCE: "privileged"}}}
    )["metadata"]["name"]
    account, deadline = api_path("serviceaccounts", "default", namespace=namespace), time.monotonic() + 30
    while plane.kube.find(account) is None:
        assert time.monotonic() < deadline, "the namespace got no ServiceAccount"
        time.sleep(0.05)
    assert refusal(plane, namespace, spec) == ""


@pytest.mark.parametrize("tried", ROWS)
def test_every_way_to_ask_for_the_machine_is_refused(plane: TestCluster, tried: str) -> None:
    row = dict(ROWS[tried])
    metadata = {"annotations": row.pop("annotations")} if "annotations" in row else {}
    asked = row.pop("container", {})
    spec = {**PLAIN, **row}
    plain = PLAIN["containers"][0]
    specs = [{**spec, "containers": [{**plain, **asked}]}]
    if asked and not asked.keys() & {"livenessProbe", "lifecycle"}:
        specs.append({**spec, "initContainers": [{**plain, **asked, "name": "before"}]})
    for each in specs:
        assert 'violates PodSecurity "baseline:latest"' in refusal(plane, "default", each, **metadata)


@pytest.mark.parametrize("sample", sample_names())
def test_every_sample_gets_by_with_the_default(plane: TestCluster, sample: str) -> None:
    image = "localhost:5000/sample:1"
    app = find_app(sample)
    specs = [spec for obj in render(app, {"image": image}, lenient=True) if (spec := pod_spec(obj)) is not None]
    assert specs
    for spec in specs:
        spec["containers"] = [{**container, "image": image} for container in spec["containers"]]
        assert refusal(plane, "default", spec) == ""


def test_the_level_can_be_changed_and_stays_as_long_as_nobody_changes_it_again(plane: TestCluster) -> None:
    def levelled(level: str) -> list[str]:
        with open_cluster(replace(plane.settings, pod_security=level)) as cluster:
            recap = run_play(Play("again", control_plane_steps(cluster)))
        return [o.name for o in recap.outcomes if o.status is Status.CHANGED]

    assert levelled("") == []
    assert levelled("restricted") == ["folder and ports", "API server"]
    assert 'violates PodSecurity "restricted:latest"' in refusal(plane, "default", PLAIN)
    assert levelled("") == []
    assert levelled("privileged") == ["folder and ports", "API server"]
    assert refusal(plane, "default", HOST_PATH) == ""
