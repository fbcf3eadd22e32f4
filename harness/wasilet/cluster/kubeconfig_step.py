"""The step of ``up`` that adds the cluster's context to a kubeconfig, and remembers what was current before."""

from __future__ import annotations

from pathlib import Path

from wasilet.cluster_record import KubeconfigRecord
from wasilet.kube.client import KubeObject
from wasilet.providers.base import API_SERVER_STEP, Cluster
from wasilet.steps import Finding, Progress, Step


def kubeconfig_place(cluster: Cluster) -> Path:
    """The file that gets Wasilet's context: the one asked for, else where it is already, else the user's own."""
    from wasilet.kube.kubeconfig import user_kubeconfig

    if cluster.settings.kubeconfig is not None:
        return cluster.settings.kubeconfig
    recorded = cluster.state.cluster.kubeconfig
    return recorded.path if recorded else user_kubeconfig(cluster.settings.environ)


def _entries(cluster: Cluster) -> KubeObject:
    from wasilet.kube.kubeconfig import renamed

    return renamed(cluster.state.admin_kubeconfig, cluster.settings.context_name)


def kubeconfig_is_right(cluster: Cluster) -> bool:
    from wasilet.kube.kubeconfig import holds

    path = kubeconfig_place(cluster)
    recorded = cluster.state.cluster.kubeconfig
    known = cluster.state.admin_kubeconfig.is_file() and recorded is not None and recorded.path == path
    return known and holds(path, _entries(cluster))


def kubeconfig_step(cluster: Cluster) -> Step:
    from wasilet.kube import kubeconfig as files

    settings, state = cluster.settings, cluster.state

    def look() -> Finding:
        path = kubeconfig_place(cluster)
        if kubeconfig_is_right(cluster):
            return Finding.ok(f"{path}, context {settings.context_name}")
        return Finding.differs(f"add context {settings.context_name} to {path}", [f"+ context {settings.context_name}"])

    def change(_: Progress) -> str:
        path = kubeconfig_place(cluster)
        recorded = state.cluster.kubeconfig
        if recorded is not None and recorded.path != path:
            files.remove(
                recorded.path, settings.context_name, previous=recorded.previous, delete_if_empty=recorded.created
            )
            recorded = None
        previous = str(files.read_config(path).get("current-context") or "")
        if previous == settings.context_name:
            previous = recorded.previous if recorded else ""
        # Written down first: a run that dies between the two must not forget what was current before.
        written = KubeconfigRecord(
            path=path,
            context=settings.context_name,
            server=cluster.admin_credentials().server,
            previous=previous,
            created=(recorded is not None and recorded.created) or not path.exists(),
        )
        state.update(kubeconfig=written.to_json())
        files.add(path, _entries(cluster))
        return f"{path}, context {settings.context_name}"

    return Step(name="kubeconfig", look=look, change=change, after=(API_SERVER_STEP,))
