"""What people deploy: Deployments, ReplicaSets, Jobs, CronJobs, StatefulSets, DaemonSets, and namespaces full of pods.

The controllers are Kubernetes' own; what is tested is that the node gives them everything they wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from wasilet import process
from wasilet.controlplane.acquire import locate
from wasilet.kube.client import KubeObject, api_path

from tests.e2e.conftest import Roomy
from tests.e2e.matching import mismatches
from tests.e2e.stage import is_ready, phase

pytestmark = pytest.mark.e2e

SECONDS = 120.0


@pytest.fixture
def namespace(roomy: Roomy, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40]
    with roomy.stage.namespace(name) as made:
        yield made


def pod_spec(roomy: Roomy, *script: str, **fields: Any) -> dict[str, Any]:
    container = {"name": "main", "image": roomy.image, "args": list(script)}
    return {"terminationGracePeriodSeconds": 1, "containers": [container], **fields}


def workload(kind: str, name: str, spec: dict[str, Any], template: dict[str, Any], **extra: Any) -> KubeObject:
    """An object of apps/v1 that makes pods labelled ``app: <name>``."""
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template},
            **spec,
        },
        **extra,
    }


def apps(kind_plural: str, name: str, namespace: str, sub: str = "") -> str:
    return api_path(kind_plural, name, group="apps", namespace=namespace, sub=sub)


def wait_for(roomy: Roomy, path: str, expected: dict[str, Any], *, within: float = SECONDS) -> None:
    """Until an object holds what is expected."""
    roomy.stage.wait(lambda: mismatches(expected, roomy.kube.find(path) or {}, path), within=within, poll=0.3)


def ready_pods(roomy: Roomy, namespace: str) -> list[KubeObject]:
    return [pod for pod in roomy.stage.pods(namespace) if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]


def wait_ready(roomy: Roomy, namespace: str, count: int, *, within: float = SECONDS) -> None:
    """Until that many pods are ready and no other is there."""

    def missing() -> list[str]:
        ready, there = len(ready_pods(roomy, namespace)), len(roomy.stage.pods(namespace))
        return [] if ready == there == count else [f"{ready} of {there} pods are ready, {count} are wanted"]

    roomy.stage.wait(missing, within=within)


def kubectl(roomy: Roomy, *words: str, timeout: float = SECONDS) -> str:
    settings = roomy.cluster.settings
    found = locate("kubectl", cache=settings.cache, environ=settings.environ)
    assert found is not None
    argv = [str(found.path), "--kubeconfig", str(roomy.cluster.admin_kubeconfig), *words]
    return process.run(argv, timeout_seconds=timeout).stdout


def test_a_deployment_rolls_to_a_new_version_without_a_gap(roomy: Roomy, namespace: str) -> None:
    """``kubectl rollout status`` ends, and never are fewer pods ready than asked for."""
    spec = {"replicas": 3, "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}}
    deployment = workload("Deployment", "web", spec, pod_spec(roomy, "say one", "forever"))
    roomy.kube.create(apps("deployments", "", namespace), deployment)
    assert "successfully rolled out" in kubectl(roomy, "rollout", "status", "deploy/web", "-n", namespace)
    wait_for(
        roomy, apps("deployments", "web", namespace), {"status": {"conditions": {"Available": {"status": "True"}}}}
    )
    before = {pod["metadata"]["uid"] for pod in roomy.stage.pods(namespace)}
    kubectl(roomy, "patch", "deploy/web", "-n", namespace, "--type=json", "-p", PATCH_TWO)
    fewest = 3

    def rolled() -> list[str]:
        nonlocal fewest
        fewest = min(fewest, len(ready_pods(roomy, namespace)))
        now = {pod["metadata"]["uid"] for pod in roomy.stage.pods(namespace)}
        return [f"{len(now & before)} old pods are left"] if now & before or len(now) != 3 else []

    roomy.stage.wait(rolled, within=SECONDS)
    assert fewest >= 3
    assert "successfully rolled out" in kubectl(roomy, "rollout", "status", "deploy/web", "-n", namespace)
    kubectl(roomy, "rollout", "undo", "deploy/web", "-n", namespace)
    kubectl(roomy, "rollout", "status", "deploy/web", "-n", namespace)
    waited = kubectl(roomy, "wait", "--for=condition=Available", "deploy/web", "-n", namespace, "--timeout=60s")
    assert "condition met" in waited


PATCH_TWO = '[{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": ["say two", "forever"]}]'


def test_a_replica_set_scales_from_none_to_fifty_and_back(roomy: Roomy, namespace: str) -> None:
    replicas = workload("ReplicaSet", "many", {"replicas": 0}, pod_spec(roomy, "forever"))
    roomy.kube.create(apps("replicasets", "", namespace), replicas)
    path = apps("replicasets", "many", namespace)
    roomy.kube.patch(path, {"spec": {"replicas": 50}})
    wait_ready(roomy, namespace, 50)
    wait_for(roomy, path, {"status": {"readyReplicas": 50, "availableReplicas": 50}})
    roomy.kube.patch(path, {"spec": {"replicas": 0}})
    wait_ready(roomy, namespace, 0)


def test_a_job_runs_in_parallel_to_its_completions(roomy: Roomy, namespace: str) -> None:
    template = {"spec": pod_spec(roomy, "say working", "sleep 0.5", restartPolicy="Never")}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "work"},
        "spec": {"completions": 9, "parallelism": 3, "template": template},
    }
    roomy.kube.create(api_path("jobs", group="batch", namespace=namespace), job)
    most = 0

    def done() -> list[str]:
        nonlocal most
        most = max(most, sum(phase(pod) == "Running" for pod in roomy.stage.pods(namespace)))
        succeeded = sum(phase(pod) == "Succeeded" for pod in roomy.stage.pods(namespace))
        return [] if succeeded == 9 else [f"{succeeded} of 9 pods have succeeded"]

    roomy.stage.wait(done, within=SECONDS)
    assert most <= 3
    wait_for(
        roomy,
        api_path("jobs", "work", group="batch", namespace=namespace),
        {"status": {"succeeded": 9, "conditions": {"Complete": {"status": "True"}}}},
    )
    assert "condition met" in kubectl(roomy, "wait", "--for=condition=complete", "job/work", "-n", namespace)


def test_a_job_that_fails_ends_at_its_back_off_limit(roomy: Roomy, namespace: str) -> None:
    template = {"spec": pod_spec(roomy, "exit 3", restartPolicy="Never")}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "doomed"},
        "spec": {"backoffLimit": 1, "template": template},
    }
    roomy.kube.create(api_path("jobs", group="batch", namespace=namespace), job)
    wait_for(
        roomy,
        api_path("jobs", "doomed", group="batch", namespace=namespace),
        {"status": {"failed": 2, "conditions": {"Failed": {"status": "True", "reason": "BackoffLimitExceeded"}}}},
    )
    assert len(roomy.stage.pods(namespace)) == 2


def test_a_job_counts_the_exit_codes_of_its_failure_policy(roomy: Roomy, namespace: str) -> None:
    """The module's own exit code reaches the Job controller."""
    template = {"spec": pod_spec(roomy, "exit 42", restartPolicy="Never")}
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "strict"},
        "spec": {"backoffLimit": 6, "template": template, "podFailurePolicy": {"rules": [rule]}},
    }
    roomy.kube.create(api_path("jobs", group="batch", namespace=namespace), job)
    wait_for(
        roomy,
        api_path("jobs", "strict", group="batch", namespace=namespace),
        {"status": {"failed": 1, "conditions": {"Failed": {"status": "True", "reason": "PodFailurePolicy"}}}},
    )


def test_a_cron_job_runs_each_minute(roomy: Roomy, namespace: str) -> None:
    template = {"spec": pod_spec(roomy, "say tick", restartPolicy="OnFailure")}
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "clock"},
        "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": template}}},
    }
    roomy.kube.create(api_path("cronjobs", group="batch", namespace=namespace), cron)
    path = api_path("cronjobs", "clock", group="batch", namespace=namespace)
    wait_for(roomy, path, {"status": {"lastSuccessfulTime": "present"}}, within=60 + SECONDS)
    assert any(phase(pod) == "Succeeded" for pod in roomy.stage.pods(namespace))


def test_a_stateful_set_starts_in_order_and_keeps_names(roomy: Roomy, namespace: str) -> None:
    stateful = workload(
        "StatefulSet", "db", {"replicas": 3, "serviceName": "db"}, pod_spec(roomy, "env HOSTNAME", "forever")
    )
    roomy.kube.create(apps("statefulsets", "", namespace), stateful)
    wait_ready(roomy, namespace, 3)
    starts = {pod["metadata"]["name"]: pod["metadata"]["creationTimestamp"] for pod in roomy.stage.pods(namespace)}
    assert list(starts) == ["db-0", "db-1", "db-2"]
    assert sorted(starts.values()) == [starts["db-0"], starts["db-1"], starts["db-2"]]
    uid = next(pod["metadata"]["uid"] for pod in roomy.stage.pods(namespace) if pod["metadata"]["name"] == "db-1")
    roomy.kube.delete(api_path("pods", "db-1", namespace=namespace))

    def back() -> list[str]:
        pod = roomy.stage.pod(namespace, "db-1")
        return [] if pod and pod["metadata"]["uid"] != uid and is_ready(pod) else ["db-1 is not back"]

    roomy.stage.wait(back, within=SECONDS)

    def named() -> list[str]:
        # A container without a probe is ready before its first line is written.
        log = roomy.kube.body(api_path("pods", "db-1", namespace=namespace, sub="log"))
        return [] if log == b"HOSTNAME=db-1\n" else [f"the log is {log!r}"]

    roomy.stage.wait(named, within=SECONDS)


def test_a_daemon_set_that_tolerates_the_taint_runs_on_the_node(roomy: Roomy, namespace: str) -> None:
    """And one that does not, does not."""
    taint = {"key": "kubernetes.io/arch", "value": "wasm32-wasi", "effect": "NoSchedule"}
    node = api_path("nodes", roomy.node)
    roomy.kube.patch(node, {"spec": {"taints": [taint]}})
    try:
        tolerant = pod_spec(roomy, "forever", tolerations=[{"key": "kubernetes.io/arch", "operator": "Exists"}])
        for name, template in (("tolerant", tolerant), ("strict", pod_spec(roomy, "forever"))):
            roomy.kube.create(apps("daemonsets", "", namespace), workload("DaemonSet", name, {}, template))
        expected = {"status": {"numberReady": 1, "numberAvailable": 1, "desiredNumberScheduled": 1}}
        wait_for(roomy, apps("daemonsets", "tolerant", namespace), expected)
        wait_for(roomy, apps("daemonsets", "strict", namespace), {"status": {"observedGeneration": 1}})
        assert roomy.kube.get(apps("daemonsets", "strict", namespace))["status"]["desiredNumberScheduled"] == 0
        assert [pod["metadata"]["labels"]["app"] for pod in roomy.stage.pods(namespace)] == ["tolerant"]
    finally:
        roomy.kube.patch(node, {"spec": {"taints": None}})


def test_endpoints_follow_readiness(roomy: Roomy, namespace: str) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
    }
    roomy.kube.create(api_path("services", namespace=namespace), service)
    deployment = workload("Deployment", "web", {"replicas": 2}, pod_spec(roomy, "forever"))
    roomy.kube.create(apps("deployments", "", namespace), deployment)
    wait_ready(roomy, namespace, 2)
    path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    def ready() -> list[str]:
        slices = roomy.kube.get(path)["items"]
        count = sum(bool(e["conditions"]["ready"]) for each in slices for e in each["endpoints"] or ())
        return [] if count == 2 else [f"{count} endpoints are ready"]

    roomy.stage.wait(ready, within=SECONDS, poll=0.3)


def test_a_namespace_with_two_hundred_pods_is_deleted(roomy: Roomy, namespace: str) -> None:
    replicas = workload("ReplicaSet", "crowd", {"replicas": 200}, pod_spec(roomy, "forever"))
    roomy.kube.create(apps("replicasets", "", namespace), replicas)
    wait_ready(roomy, namespace, 200, within=2 * SECONDS)
    roomy.kube.delete(api_path("namespaces", namespace))
    began = time.monotonic()
    path = api_path("namespaces", namespace)
    roomy.stage.wait(lambda: ["it is still there"] if roomy.kube.find(path) else [], within=2 * SECONDS, poll=0.5)
    state = roomy.cluster.cluster.state
    deadline = time.monotonic() + SECONDS
    while left := [f.name for f in (state.node(roomy.node) / "logs/pods").glob(f"{namespace}_*")]:
        assert time.monotonic() < deadline, f"left on the node {time.monotonic() - began:.0f} s later: {left}"
        time.sleep(0.2)
