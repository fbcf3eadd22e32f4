"""A node that exists for the API server alone: its certificate, its Node object, and pods bound to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wasilet.controlplane.kubectl import ensure_kubectl
from wasilet.controlplane.pki import CLUSTER_CA, Pki
from wasilet.kube.client import api_path

from tests.clusters import TestCluster
from tests.unit.node.server.rig import Authority, Pair


class ControlPlane:
    """The shared API server, its authority to issue certificates, and one node of a name of its own."""

    def __init__(self, cluster: TestCluster, node_name: str) -> None:
        self._cluster = cluster
        self.node_name = node_name
        pki = Pki(cluster.cluster.state.pki)
        self.kube = cluster.kube
        self.authority = Authority(existing=Pair(pki.read_certificate(CLUSTER_CA), pki.key(CLUSTER_CA).read_bytes()))
        self.url = cluster.access.server
        self.node = self.authority.issue(f"system:node:{node_name}", organizations=["system:nodes"])

    def kubectl(self, *arguments: str) -> list[str]:
        """argv of a kubectl command as admin."""
        binary = ensure_kubectl(self._cluster.settings, say=lambda _: None)
        return [str(binary), "--kubeconfig", str(self._cluster.admin_kubeconfig), *arguments]

    def place_node(self, port: int, *, features: Sequence[str] = ()) -> None:
        """The Node object, whose kubelet listens on this port of loopback and declares ``features``."""
        if self.kube.find(api_path("nodes", self.node_name)) is None:
            self.kube.create(api_path("nodes"), {"metadata": {"name": self.node_name}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "declaredFeatures": list(features),
        }
        self.kube.patch(api_path("nodes", self.node_name) + "/status", {"status": status})

    def place_pod(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Create a pod bound to the node, and give back what the API server made of it."""
        spec = {**pod["spec"], "nodeName": self.node_name, "automountServiceAccountToken": False}
        body = {"metadata": {"name": pod["metadata"]["name"]}, "spec": spec}
        made = self.kube.create(api_path("pods", namespace="default"), body)
        return {**made, "status": pod["status"]}
