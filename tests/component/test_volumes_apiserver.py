"""Volumes and environments with nothing but a node's rights, on a real API server with the Node authorizer."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet.kube.client import api_path
from wasilet_node.kube.base import ForbiddenError, NotFoundError
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.kube.references import References
from wasilet_node.pods.environment import EnvironmentBuilder
from wasilet_node.settings import NodePaths
from wasilet_node.volumes.base import ContainerConfigError, VolumeError
from wasilet_node.volumes.manager import VolumeManager

from tests.clusters import TestCluster
from tests.component.plane import ControlPlane

pytestmark = pytest.mark.component


@pytest.fixture(scope="module")
def plane(control_plane_cluster: TestCluster) -> ControlPlane:
    plane = ControlPlane(control_plane_cluster, "volumes-1")
    plane.place_node(10250)
    return plane


class Node:
    """A node's agent, as far as volumes and environments go."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.kube = KubeClient(
            Cluster(server=plane.url, ca_data=plane.authority.pem.decode()),
            Credentials(certificate=plane.node.certificate.decode(), key=plane.node.key.decode()),
            user_agent="test",
        )
        self.references = References(self.kube)
        self.references.start()
        (folder / "shm").mkdir()
        self.volumes = VolumeManager(
            NodePaths(data=folder / "data"), self.references, allocatable=dict, shared_memory=folder / "shm"
        )

    async def put(self, kind: str, name: str, **body: Any) -> None:
        path = api_path(kind, namespace="default")
        await asyncio.to_thread(self.plane.kube.create, path, {"metadata": {"name": name}, **body})

    async def bind(
        self, name: str, *volumes: dict[str, Any], env: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """A pod bound to the node this very moment, which mounts all of ``volumes`` at ``/v<n>``."""
        mounts = [{"name": volume["name"], "mountPath": f"/v{index}"} for index, volume in enumerate(volumes)]
        container = {"name": "main", "image": "x", "volumeMounts": mounts, "env": env or []}
        spec = {"containers": [container], "volumes": list(volumes), "serviceAccountName": "default"}
        return await asyncio.to_thread(
            self.plane.place_pod, {"metadata": {"name": name}, "spec": spec, "status": {"phase": "Pending"}}
        )

    async def host(self, pod: dict[str, Any], guest: str) -> Path:
        await self.volumes.setup(pod)
        found = self.volumes.mounts(pod, pod["spec"]["containers"][0], {})
        return next(Path(mount.host) for mount in found if mount.guest == guest)

    async def close(self) -> None:
        self.volumes.close()
        await self.references.close()
        await self.kube.close()


@pytest.fixture
async def node(plane: ControlPlane, tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(plane, tmp_path)
    yield node
    await node.close()


async def test_right_after_binding_every_pod_gets_its_own_secret(node: Node) -> None:
    for number in range(20):
        name = f"own-{number}"
        await node.put("secrets", name, data={"key": base64.b64encode(name.encode()).decode()})
        pod = await node.bind(name, {"name": "s", "secret": {"secretName": name}})
        assert (await node.host(pod, "/v0") / "key").read_text() == name
        await node.volumes.teardown(pod["metadata"]["uid"])


async def test_a_token_is_bound_to_its_pod_and_audience(node: Node) -> None:
    sources = [
        {"serviceAccountToken": {"path": "plain", "expirationSeconds": 3607}},
        {"serviceAccountToken": {"path": "vault", "audience": "vault"}},
    ]
    pod = await node.bind("token", {"name": "t", "projected": {"sources": sources}})
    folder = await node.host(pod, "/v0")
    for name, audiences in (("plain", []), ("vault", ["vault"])):
        review = await node.kube.create(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            {"spec": {"token": (folder / name).read_text(), "audiences": audiences}},
        )
        assert review["status"]["authenticated"], review
        assert review["status"]["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]


async def test_what_does_not_exist_is_named_and_found_once_it_does(node: Node) -> None:
    reference = {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "late", "key": "k"}}}
    pod = await node.bind("late", {"name": "c", "configMap": {"name": "late"}}, env=[reference])

    async def build() -> dict[str, str]:
        return await EnvironmentBuilder(node.references, node.volumes).build(
            pod, pod["spec"]["containers"][0], pod_ips=[], host_ips=[], allocatable={}
        )

    with pytest.raises(VolumeError, match=r'^MountVolume.SetUp failed for volume "c" : configmap "late" not found$'):
        await node.volumes.setup(pod)
    with pytest.raises(ContainerConfigError, match=r'^configmap "late" not found$'):
        await build()
    await node.put("configmaps", "late", data={"k": "now"})
    assert (await node.host(pod, "/v0") / "k").read_text() == "now"
    environment = await build()
    assert environment["X"] == "now"
    service = node.plane.kube.get(api_path("services", "kubernetes", namespace="default"))
    assert environment["KUBERNETES_SERVICE_HOST"] == service["spec"]["clusterIP"]


async def test_an_update_of_a_shared_config_map_reaches_both_pods(node: Node) -> None:
    await node.put("configmaps", "shared", data={"k": "1"})
    pods = [await node.bind(f"share-{number}", {"name": "c", "configMap": {"name": "shared"}}) for number in range(2)]
    files = [await node.host(pod, "/v0") / "k" for pod in pods]
    body = {"metadata": {"name": "shared"}, "data": {"k": "2"}}
    await asyncio.to_thread(node.plane.kube.replace, api_path("configmaps", "shared", namespace="default"), body)
    until = time.monotonic() + 10
    while [file.read_text() for file in files] != ["2", "2"]:
        assert time.monotonic() < until, "the watch did not bring the update"
        await asyncio.sleep(0.05)
        for pod in pods:
            await node.volumes.refresh(pod)


async def test_what_no_pod_of_this_node_names_is_forbidden(node: Node) -> None:
    await node.put("secrets", "foreign", data={})
    begun = time.monotonic()
    with pytest.raises(ForbiddenError):
        await node.references.secret("default", "foreign", pod_uid="nobody")
    assert time.monotonic() - begun > 0.9, "the lag is waited out"


async def test_a_claim_on_a_local_volume_is_read_by_name(node: Node, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": "pv-1"}
    pod = await node.bind("claim", {"name": "d", "persistentVolumeClaim": {"claimName": "data"}})
    with pytest.raises(VolumeError, match='persistentvolumeclaims "data" not found'):
        await node.volumes.setup(pod)
    await node.put("persistentvolumeclaims", "data", spec=claim)
    with pytest.raises(VolumeError, match="error processing PVC default/data: PVC is not bound"):
        await node.volumes.setup(pod)
    path = api_path("persistentvolumeclaims", "data", namespace="default")
    made = await asyncio.to_thread(node.plane.kube.get, path)
    reference = {"namespace": "default", "name": "data", "uid": made["metadata"]["uid"]}
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "claimRef": reference,
        "hostPath": {"path": str(tmp_path / "disk")},
    }
    body = {"metadata": {"name": "pv-1"}, "spec": volume}
    await asyncio.to_thread(node.plane.kube.create, api_path("persistentvolumes"), body)
    until = time.monotonic() + 20
    while (await asyncio.to_thread(node.plane.kube.get, path))["status"].get("phase") != "Bound":
        assert time.monotonic() < until, "the controller did not bind the claim"
        await asyncio.sleep(0.1)
    assert await node.host(pod, "/v0") == tmp_path / "disk"


async def test_a_missing_secret_is_a_404_for_a_node_that_may_ask(node: Node) -> None:
    pod = await node.bind("asks", {"name": "s", "secret": {"secretName": "never"}})
    with pytest.raises(NotFoundError, match=r'^secret "never" not found$'):
        await node.references.secret("default", "never", pod_uid=pod["metadata"]["uid"])
