"""Leaving a cluster that is not Wasilet's, or that is another one by now.

What was added is taken back, by name; what belongs to one cluster only (certificates of nodes, the pods they had) is
forgotten, since under the old name there may be another cluster tomorrow.
"""

from __future__ import annotations

import contextlib
import shutil

from wasilet.kube.client import KubeObject, api_path
from wasilet.providers.base import Cluster

HOSTING = api_path("configmaps", "local-registry-hosting", namespace="kube-public")
"""KEP-1755's notice."""

OURS = "app.kubernetes.io/managed-by"
"""The label of what the harness makes in a cluster; its value is ``wasilet``."""


def is_ours(obj: KubeObject) -> bool:
    """Whether the harness made an object of the cluster."""
    return bool(((obj.get("metadata") or {}).get("labels") or {}).get(OURS) == "wasilet")


def forget_identities(cluster: Cluster) -> None:
    """Remove what belongs to one cluster only: certificates of nodes and the pods they had. Images and compiled
    modules stay, they are the same everywhere. Agents that still run are ended first."""
    from wasilet.providers.node_process import end_node, node_component

    state = cluster.state
    for name in ("approver.conf", "bootstrap.conf"):
        (state.etc / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        for folder in sorted((state.path / "nodes").iterdir()):
            if state.alive(node_component(folder.name)):
                end_node(cluster, folder.name)
            for entry in folder.iterdir():
                if entry.name in {"images", "compiled"}:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def withdraw(cluster: Cluster) -> int:
    """Delete from a cluster what the harness added: its Nodes, its token, the notice, and those roles and bindings
    that it created. Returns how many. Raises ApiError."""
    from wasilet.kube.bootstrap_token import bootstrap_token_id, delete_token
    from wasilet.kube.manifests import object_path

    kube = cluster.admin()
    count = 0
    for node in cluster.node_names():
        count += kube.delete(api_path("nodes", node))
    if token := bootstrap_token_id(cluster.state.bootstrap_file):
        count += delete_token(kube, token)
    notice = kube.find(HOSTING)
    if notice is not None and is_ours(notice):
        count += kube.delete(HOSTING)
    for entry in cluster.state.cluster.created_objects:
        kind, _, name = entry.partition("/")
        count += kube.delete(object_path({"kind": kind, "metadata": {"name": name}}))
    return count
