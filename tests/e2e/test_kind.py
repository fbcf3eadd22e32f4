"""The kind provider on real kind: made, joined, used from both kinds of node, adopted, repaired, and gone.

The cluster of most tests here is as a user gets it: kind's node without a taint, the wasm node with Krustlet's two.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.controlplane import pod_network
from wasilet.controlplane.acquire import acquire
from wasilet.controlplane.local_registry import login_file
from wasilet.errors import ApiError
from wasilet.kube.client import CSRS, Kube, KubeObject, api_path
from wasilet.oci.publish import push_app
from wasilet.ports import port_is_free
from wasilet.process import is_alive, stop
from wasilet.providers.docker import Docker
from wasilet.providers.kind import CLUSTER_LABEL
from wasilet.settings import Settings, cache_root
from wasilet.steps import SilentReporter, Status
from wasilet_node.network.uplink import interface_prefix

from tests.clusters import TestCluster, temporary_settings, whole_cluster
from tests.e2e import componentize
from tests.e2e.guests import needs_rust_for_bindings
from tests.rigs.kind.session import KindRig

pytestmark = pytest.mark.e2e

WAIT_SECONDS = 90.0
TOLERATIONS = [{"key": "kubernetes.io/arch", "operator": "Equal", "value": "wasm32-wasi"}]


@pytest.fixture(scope="module")
def own(kind_rig: KindRig) -> Iterator[TestCluster]:
    with whole_cluster(
        f"own-{os.getpid()}",
        provider="kind",
        image=kind_rig.image,
        config=kind_rig.config(),
        environment=kind_rig.engine.environment,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def linux(own: TestCluster, kind_rig: KindRig) -> str:
    """The image of ``tests/rigs/linux`` in the cluster's registry."""
    return kind_rig.push_linux(str(own.status()["registry"]), login_file(own.cluster.state).parent)


@pytest.fixture
def namespace(own: TestCluster) -> Iterator[str]:
    made = own.kube.create(api_path("namespaces"), {"metadata": {"generateName": "kind-"}})
    name = str(made["metadata"]["name"])
    eventually(lambda: own.kube.find(api_path("serviceaccounts", "default", namespace=name)), "a ServiceAccount")
    yield name
    own.kube.delete(api_path("namespaces", name))


def eventually(probe: Any, what: str, *, seconds: float = WAIT_SECONDS, scene: Any = lambda: "") -> Any:
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s: {scene()}"
        time.sleep(0.1)
    return found


def wasm_node(cluster: TestCluster) -> KubeObject:
    return cluster.kube.get(api_path("nodes", cluster.cluster.node_names()[0]))


def log_of(kube: Kube, namespace: str, pod: str) -> str:
    try:
        with kube.stream(f"{api_path('pods', pod, namespace=namespace)}/log", idle_seconds=10.0) as lines:
            return "\n".join(lines)
    except ApiError:
        return ""


def kind(rig: KindRig, *arguments: str) -> str:
    """The pinned kind, as a user would type it."""
    cache = cache_root()
    path = acquire(["kind"], cache=cache, environ={}, progress=lambda _: None)["kind"].path
    done = subprocess.run(
        [path, *arguments], env=rig.engine.environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.smoke
def test_the_wasm_node_joins_beside_kinds_own_and_keeps_its_two_taints(own: TestCluster) -> None:
    nodes = {node["metadata"]["name"]: node for node in own.kube.get(api_path("nodes"))["items"]}
    assert set(nodes) == {f"{own.settings.name}-control-plane", f"{own.settings.name}-1"}
    taints = wasm_node(own)["spec"]["taints"]
    assert {(taint["key"], taint["value"], taint["effect"]) for taint in taints} == {
        ("kubernetes.io/arch", "wasm32-wasi", "NoSchedule"),
        ("kubernetes.io/arch", "wasm32-wasi", "NoExecute"),
    }
    assert own.status()["ready"]


@pytest.mark.smoke
def test_linux_and_wasm_run_side_by_side_and_wasm_reads_what_a_job_made(
    own: TestCluster, namespace: str, linux: str
) -> None:
    registry = str(own.status()["registry"])
    recap, wasm = push_app("config-reader", own.settings, reporter=SilentReporter())
    assert recap.succeeded
    assert wasm is not None
    kube = own.kube
    rbac = "rbac.authorization.k8s.io"
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]}
    account = {"kind": "ServiceAccount", "name": "default", "namespace": namespace}
    role_ref = {"apiGroup": rbac, "kind": "Role", "name": "maker"}
    kube.create(api_path("roles", group=rbac, namespace=namespace), {"metadata": {"name": "maker"}, "rules": [rule]})
    kube.create(
        api_path("rolebindings", group=rbac, namespace=namespace),
        {"metadata": {"name": "maker"}, "roleRef": role_ref, "subjects": [account]},
    )
    job_pod = {
        "restartPolicy": "Never",
        "containers": [{"name": "main", "image": linux, "args": ["make", "made", "greeting", "from a Job"]}],
    }
    kube.create(
        api_path("jobs", group="batch", namespace=namespace),
        {"metadata": {"name": "maker"}, "spec": {"backoffLimit": 3, "template": {"spec": job_pod}}},
    )
    pods = api_path("pods", namespace=namespace)
    kube.create(
        pods,
        {
            "metadata": {"name": "linux"},
            "spec": {"containers": [{"name": "main", "image": linux, "args": ["say", "hello from Linux"]}]},
        },
    )
    reference = {"configMapKeyRef": {"name": "made", "key": "greeting"}}
    container = {
        "name": "main",
        "image": f"{registry}/config-reader:latest",
        "env": [{"name": "APP_GREETING", "valueFrom": reference}],
        "volumeMounts": [{"name": "made", "mountPath": "/etc/config", "readOnly": True}],
    }
    kube.create(
        pods,
        {
            "metadata": {"name": "wasm"},
            "spec": {
                "containers": [container],
                "volumes": [{"name": "made", "configMap": {"name": "made"}}],
                "nodeSelector": {"kubernetes.io/arch": "wasm32-wasi"},
                "tolerations": TOLERATIONS,
            },
        },
    )
    eventually(
        lambda: "hello from Linux" in log_of(kube, namespace, "linux"),
        "the Linux pod's line",
        scene=lambda: [event["message"] for event in kube.get(api_path("events", namespace=namespace))["items"]],
    )
    said = eventually(
        lambda: (text := log_of(kube, namespace, "wasm")) and "file greeting" in text and text, "the wasm pod's lines"
    )
    assert "variable APP_GREETING=from a Job" in said
    assert "file greeting: from a Job" in said
    where = {item["metadata"]["name"]: item["spec"]["nodeName"] for item in kube.get(pods)["items"]}
    assert where["wasm"] == f"{own.settings.name}-1"
    assert where["linux"] == f"{own.settings.name}-control-plane"


def run_pod(cluster: TestCluster, namespace: str, name: str, image: str, *args: str, **fields: Any) -> None:
    """On the wasm node, unless the image is that of Linux. One that fails begins again: endpoints follow the pods'
    readiness in their own time."""
    container = {"name": "main", "image": image, "args": list(args), **fields}
    spec: dict[str, Any] = {"restartPolicy": "OnFailure", "containers": [container]}
    if "/linux:" not in image:
        spec |= {"nodeSelector": {"kubernetes.io/arch": "wasm32-wasi"}, "tolerations": TOLERATIONS}
    metadata = {"name": name, "labels": {"app": name}}
    cluster.kube.create(api_path("pods", namespace=namespace), {"metadata": metadata, "spec": spec})


@pytest.mark.smoke
def test_wasm_and_linux_pods_reach_each_other_by_address_service_and_name(
    own: TestCluster, namespace: str, linux: str
) -> None:
    needs_rust_for_bindings()
    if why := componentize.why_not():
        pytest.skip(why)
    recap, _ = push_app("tcp-echo", own.settings, reporter=SilentReporter())
    assert recap.succeeded
    kube, wasm = own.kube, f"{own.status()['registry']}/tcp-echo:latest"
    pods = api_path("pods", namespace=namespace)
    probe = {"readinessProbe": {"tcpSocket": {"port": 7777}, "periodSeconds": 1}}
    run_pod(own, namespace, "wasm", wasm, "serve", "7777", **probe)
    run_pod(own, namespace, "linux", linux, "serve", "7777", **probe)
    for name in ("wasm", "linux"):
        spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 7777}]}
        kube.create(api_path("services", namespace=namespace), {"metadata": {"name": name}, "spec": spec})
    servers = {
        name: eventually(
            lambda name=name: ready_pod(kube, f"{pods}/{name}"),
            name,
            scene=lambda name=name: (kube.get(f"{pods}/{name}")["status"], pod_network.described(own.cluster.state)),
        )
        for name in ("wasm", "linux")
    }
    address = {name: server["status"]["podIP"] for name, server in servers.items()}
    for name, node in (("wasm", own.cluster.node_names()[0]), ("linux", f"{own.settings.name}-control-plane")):
        cidr = kube.get(api_path("nodes", node))["spec"]["podCIDR"]
        assert ipaddress.ip_address(address[name]) in ipaddress.ip_network(cidr)

    def place(way: str, server: str) -> tuple[str, str]:
        if way == "address":
            return address[server], "7777"
        return (server if way == "service" else f"{server}.{namespace}.svc.cluster.local"), "80"

    ways = ("address", "service", "name")
    for way in ways:
        run_pod(own, namespace, f"wasm-by-{way}", wasm, "connect", *place(way, "linux"), way)
        run_pod(own, namespace, f"linux-by-{way}", linux, "connect", ":".join(place(way, "wasm")), way)
    for way in ways:
        for client in ("wasm", "linux"):
            path = f"{pods}/{client}-by-{way}"
            ended = eventually(
                lambda path=path: (pod := kube.get(path))["status"].get("phase") == "Succeeded" and pod,
                f"the end of {client} by {way}",
                scene=lambda path=path: (kube.get(path)["status"], log_of(kube, namespace, path.rpartition("/")[2])),
            )
            said = log_of(kube, namespace, f"{client}-by-{way}")
            # Only the Linux server tells by which address it is asked: the pod's own.
            seen = f" from {ended['status']['podIP']}" if client == "wasm" else ""
            assert said.strip().endswith(f"answered {way}{seen}")


def ready_pod(kube: Kube, path: str) -> KubeObject | None:
    pod = kube.get(path)
    conditions = pod["status"].get("conditions") or ()
    return pod if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions) else None


@pytest.mark.smoke
def test_kubectl_follows_a_log_through_the_container_network(own: TestCluster, namespace: str) -> None:
    registry = str(own.status()["registry"])
    assert push_app("hello-world", own.settings, reporter=SilentReporter())[0].succeeded
    spec = {
        "containers": [
            {
                "name": "main",
                "image": f"{registry}/hello-world:latest",
                "env": [{"name": "INTERVAL_SECONDS", "value": "0.2"}],
            }
        ],
        "nodeSelector": {"kubernetes.io/arch": "wasm32-wasi"},
        "tolerations": TOLERATIONS,
    }
    pods = api_path("pods", namespace=namespace)
    own.kube.create(pods, {"metadata": {"name": "hello"}, "spec": spec})
    eventually(lambda: "Hello" in log_of(own.kube, namespace, "hello"), "a first line")
    kubectl = acquire(["kubectl"], cache=cache_root(), environ=os.environ, progress=lambda _: None)["kubectl"].path
    command = [str(kubectl), "--kubeconfig", str(own.admin_kubeconfig), "-n", namespace, "logs", "-f", "hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        lines = [following.stdout.readline() for _ in range(5)]
        assert all("Hello, from WASI" in line for line in lines)
        own.kube.delete(f"{pods}/hello")
        following.communicate(timeout=20)
        assert following.returncode == 0


@pytest.mark.smoke
def test_daemon_sets_of_the_cluster_keep_off_the_wasm_node(own: TestCluster) -> None:
    """kube-proxy tolerates every taint; what keeps it off is that it selects ``kubernetes.io/os: linux``."""
    proxy = own.kube.get(api_path("daemonsets", "kube-proxy", group="apps", namespace="kube-system"))
    assert {"operator": "Exists"} in proxy["spec"]["template"]["spec"]["tolerations"]
    assert proxy["status"]["desiredNumberScheduled"] == 1
    assert proxy["status"]["numberMisscheduled"] == 0
    name = own.cluster.node_names()[0]
    there = own.kube.get(api_path("pods"), fieldSelector=f"spec.nodeName={name}")["items"]
    assert [pod for pod in there if pod["metadata"]["namespace"] == "kube-system"] == []


@pytest.mark.smoke
def test_a_second_up_changes_nothing(own: TestCluster) -> None:
    recap = up(own.settings, reporter=SilentReporter())
    assert recap.succeeded
    assert [outcome.name for outcome in recap.outcomes if outcome.status is not Status.OK] == []


@pytest.mark.smoke
def test_tools_are_told_of_the_registry(own: TestCluster) -> None:
    notice = own.kube.get(api_path("configmaps", "local-registry-hosting", namespace="kube-public"))
    said = yaml.safe_load(notice["data"]["localRegistryHosting.v1"])
    assert said["host"] == own.status()["registry"]
    assert said["hostFromContainerRuntime"].startswith(own.access.node_address)


@pytest.mark.smoke
def test_the_registrys_second_proxy_is_for_reading_only(own: TestCluster) -> None:
    import http.client

    port = own.cluster.ports()["registry_for_nodes"]
    connection = http.client.HTTPConnection(own.access.node_address, port, timeout=5)
    connection.request("GET", "/v2/")
    assert connection.getresponse().read() is not None
    connection.request("POST", "/v2/intruder/blobs/uploads/")
    assert connection.getresponse().status == 405
    connection.close()
    assert port_is_free(port, "127.0.0.1")
    assert port_is_free(own.cluster.ports()["registry"], own.access.node_address)


@pytest.mark.smoke
def test_the_approver_has_a_credential_of_its_own_that_can_do_nothing_else(own: TestCluster) -> None:
    approver = Kube.from_kubeconfig(own.cluster.state.etc / "approver.conf")
    try:
        assert approver.get(CSRS)["kind"] == "CertificateSigningRequestList"
        for path in (api_path("secrets"), api_path("services"), api_path("pods")):
            with pytest.raises(ApiError) as refused:
                approver.get(path)
            assert refused.value.code == 403
    finally:
        approver.close()
    left = [csr for csr in own.kube.get(CSRS)["items"] if csr["metadata"]["name"].startswith("wasilet-approver")]
    assert left == []


@pytest.mark.smoke
def test_up_brings_a_cluster_back_after_the_machine_was_off(own: TestCluster, kind_rig: KindRig) -> None:
    label = f"{CLUSTER_LABEL}={own.settings.name}"
    docker = Docker(kind_rig.engine.environment)
    (before,) = docker.containers(label)
    stop(own.cluster.state.stray_processes(), grace_seconds=0)
    kind_rig.engine.docker("kill", before.name)
    log = io.StringIO()
    recap = up(own.settings, reporter=PlainReporter(log))
    assert recap.succeeded, log.getvalue()
    (after,) = docker.containers(label)
    assert (after.id, after.running) == (before.id, True)
    # The Node may still be called Ready from before; that the API server reaches it says that it runs.
    node = own.cluster.node_names()[0]
    with own.kube.stream(f"{api_path('nodes', node)}/proxy/healthz", idle_seconds=10.0) as lines:
        assert list(lines) == ["ok"]


@pytest.mark.smoke
def test_down_leaves_nothing(own: TestCluster, kind_rig: KindRig) -> None:
    """The last of this cluster's tests."""
    state = own.cluster.state
    processes = [record.process for record in state.records()]
    recap = down(own.settings, reporter=PlainReporter(io.StringIO()), purge=True)
    assert recap.succeeded
    assert processes
    assert not any(is_alive(process) for process in processes)
    assert Docker(kind_rig.engine.environment).containers(f"{CLUSTER_LABEL}={own.settings.name}") == []
    assert not state.path.exists()
    assert not Path(str(own.settings.kubeconfig)).exists()
    ours = tuple(interface_prefix(state.node(name)) for name in own.cluster.node_names())
    eventually(lambda: not any(name.startswith(ours) for _, name in socket.if_nameindex()), "the end of the links")


def test_a_cluster_made_by_hand_is_adopted_and_left_as_it_was(kind_rig: KindRig, tmp_path: Path) -> None:
    name = f"hand-{os.getpid()}"
    arguments = ["create", "cluster", "--name", name, "--kubeconfig", str(tmp_path / "hand.conf")]
    arguments += ["--config", str(kind_rig.config())] + (["--image", kind_rig.image] if kind_rig.image else [])
    try:
        kind(kind_rig, *arguments)
        theirs = Kube.from_kubeconfig(tmp_path / "hand.conf")
        before = inventory(theirs)
        with temporary_settings(name, provider="kind", environment=kind_rig.engine.environment) as settings:
            log = io.StringIO()
            assert up(settings, reporter=PlainReporter(log)).succeeded, log.getvalue()
            assert inventory(theirs) != before
            assert down(settings, reporter=SilentReporter(), purge=True).succeeded
            assert inventory(theirs) == before
        certs_d = kind_rig.engine.docker("exec", f"{name}-control-plane", "ls", "/etc/containerd/certs.d").stdout
        assert certs_d.strip() == ""
        theirs.close()
    finally:
        kind(kind_rig, "delete", "cluster", "--name", name, "--kubeconfig", str(tmp_path / "hand.conf"))


def inventory(kube: Kube) -> dict[str, list[str]]:
    """Names of what the harness may add to a cluster."""
    rbac = "rbac.authorization.k8s.io"
    paths = {
        "nodes": api_path("nodes"),
        "roles": api_path("clusterroles", group=rbac),
        "bindings": api_path("clusterrolebindings", group=rbac),
        "secrets": api_path("secrets"),
        "notices": api_path("configmaps", namespace="kube-public"),
    }
    names = {kind: {item["metadata"]["name"] for item in kube.get(path)["items"]} for kind, path in paths.items()}
    # The controller-manager puts it into every namespace, in its own time.
    return {kind: sorted(found - {"kube-root-ca.crt"}) for kind, found in names.items()}


@pytest.mark.slow
def test_what_an_interrupted_run_left_half_made_is_made_again(kind_rig: KindRig, tmp_path: Path) -> None:
    given: dict[str, Any] = {"provider": "kind", "image": kind_rig.image, "config": kind_rig.config()}
    name = f"half-{os.getpid()}"
    docker = Docker(kind_rig.engine.environment)
    with temporary_settings(name, environment=kind_rig.engine.environment, **given) as settings:
        kill_while(settings, lambda: docker.containers(f"{CLUSTER_LABEL}={name}"), tmp_path, after_seconds=2.0)
        half = docker.containers(f"{CLUSTER_LABEL}={name}")
        assert len(half) == 1
        log = io.StringIO()
        recap = up(settings, reporter=PlainReporter(log))
        assert recap.succeeded, log.getvalue()
        whole = docker.containers(f"{CLUSTER_LABEL}={name}")
        assert [container.id for container in whole] != [container.id for container in half]
        with open_cluster(settings) as cluster:
            assert cluster.state.read()["external"]["created"] is True
        # kind's own clean-up of the killed run must not have reached into the new cluster.
        assert up(settings, reporter=SilentReporter()).succeeded


def kill_while(settings: Settings, until: Any, folder: Path, *, after_seconds: float) -> None:
    """Start `up` in a process of its own, wait for ``until`` and a while, and kill it as a power cut would."""
    script = folder / "up.py"
    values = {"name": settings.name, "provider": "kind", "image": settings.image, "config": str(settings.config)}
    script.write_text(
        "import json, os, sys\n"
        "from wasilet.console import PlainReporter\n"
        "from wasilet.settings import load\n"
        "from wasilet.cluster.up import up\n"
        f"up(load(environ=os.environ, kubeconfig={str(settings.kubeconfig)!r}, **json.loads({json.dumps(values)!r})),"
        " reporter=PlainReporter(sys.stderr))\n"
    )
    root = Path(__file__).resolve().parent.parent.parent
    env = {**settings.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-P", script], env=env, stderr=subprocess.DEVNULL, cwd="/") as process:
        try:
            eventually(until, "a container")
            time.sleep(after_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
