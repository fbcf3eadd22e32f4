"""kind: Kubernetes in Docker. The cluster is called as ``--name`` says; one of that name that runs is adopted.

The wasm node is a process of this machine beside kind's containers. The API server reaches it, and kind's own nodes
reach the registry, by the gateway of the cluster's Docker network; both listen there and on loopback, nowhere else.
kind's own files are left alone: its kubeconfig entry goes to a file of ours, since ``up`` adds one for every provider.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from harness.controlplane.acquire import acquire, locate
from harness.errors import ApiError, CommandError, HarnessError, UsageError
from harness.kube import Kube, KubeObject, load_yaml, read_credentials
from harness.play import Finding, Progress, Step
from harness.process import run
from harness.providers.base import API_SERVER_STEP, Cluster, Detection
from harness.providers.docker import Container, Docker, gateway
from harness.providers.external import (
    REGISTRY_FOR_NODES_STEP,
    ExternalProvider,
    Found,
    HalfMadeError,
    facts,
    hosts_toml,
    made_since,
    update_facts,
)
from harness.settings import Settings
from harness.state import RUN_ID_VARIABLE, write_file

OLDEST = (0, 27)
"""Its node images are the first whose containerd reads registry hosts without being configured to."""

CREATE_SECONDS = 600.0
"""For ``kind create cluster``, which may pull a node image of 400 MB."""

CERTS_D = "/etc/containerd/certs.d"
CLUSTER_LABEL = "io.x-k8s.kind.cluster"
ROLE_LABEL = "io.x-k8s.kind.role"
TOOL_STEP = "kind's command line"
WIRE_STEP = "registry of kind's nodes"
_ANSWER_SECONDS = 5.0


class KindProvider(ExternalProvider):
    """See the module."""

    name = "kind"
    summary = "kind's cluster in Docker containers, with wasm nodes beside it"
    options = ("image", "kubernetes_version", "config")

    def detect(self, settings: Settings) -> Detection:
        """Docker must answer; kind itself is brought when it is not there. Raises UsageError."""
        version = Docker(settings.environ).check()
        theirs = user_kind(settings)
        kind = f"kind {theirs[1]} ({theirs[0]})" if theirs else "kind will be acquired"
        return Detection(usable=True, detail=f"Docker {version}, {kind}")

    # --- the cluster -------------------------------------------------------------------------------------------------

    def find(self, cluster: Cluster) -> Found | None:
        """By the labels that kind gives its containers."""
        name = cluster.settings.name
        docker = Docker(cluster.settings.environ)
        containers = docker.containers(f"{CLUSTER_LABEL}={name}")
        if not containers:
            return None
        ours = _ours(cluster, containers)
        planes = [container for container in containers if container.labels.get(ROLE_LABEL) == "control-plane"]
        stopped = [container.name for container in containers if not container.running]
        unfinished = bool(facts(cluster).get("creating"))
        if ours and unfinished:
            if not planes or stopped or not self._answers(cluster):
                raise HalfMadeError(f"an interrupted run left kind cluster {name} half made")
        elif stopped and ours:
            docker.run("start", *stopped, timeout_seconds=60.0)
        elif stopped:
            raise UsageError(f"kind cluster {name} is stopped", hint=f"docker start {' '.join(stopped)}")
        elif not planes:
            raise _half_made(name)
        return self._found(cluster, docker.containers(f"{CLUSTER_LABEL}={name}"), created=ours)

    def _found(self, cluster: Cluster, containers: Sequence[Container], *, created: bool) -> Found:
        address = cluster.settings.node_ip or gateway(containers, what=f"kind cluster {cluster.settings.name}")
        return Found(
            kubeconfig=self._kubeconfig(cluster),
            node_address=address,
            registry_address=address,
            created=created,
            ids=tuple(container.id for container in containers),
        )

    def _kubeconfig(self, cluster: Cluster) -> KubeObject:
        name = cluster.settings.name
        try:
            text = self._kind(cluster, "get", "kubeconfig", "--name", name, timeout_seconds=30.0)
        except CommandError as error:
            raise _half_made(name) from error
        data = load_yaml(text)
        if not isinstance(data, dict):
            raise _half_made(name)
        return data

    def _answers(self, cluster: Cluster) -> bool:
        """Whether the cluster is whole after all: the run that made it died after kind had finished."""
        path = cluster.state.etc / "kind.conf"
        try:
            write_file(path, json.dumps(self._kubeconfig(cluster)).encode())
            kube = Kube(read_credentials(path))
        except HarnessError:
            return False
        deadline = time.monotonic() + _ANSWER_SECONDS
        try:
            while time.monotonic() < deadline:
                if kube.ready() and kube.get("/api/v1/nodes").get("items"):
                    return True
                time.sleep(cluster.settings.timeouts.poll_seconds)
        except ApiError:
            return False
        finally:
            kube.close()
        return False

    def create(self, cluster: Cluster, say: Progress) -> Found:
        """``kind create cluster``, its progress passed on."""
        settings = cluster.settings
        docker = Docker(settings.environ)
        label = f"{CLUSTER_LABEL}={settings.name}"

        def progress(line: str) -> None:
            words = re.sub(r"[^\x20-\x7e]", "", line).strip()
            if not words.endswith("..."):
                return
            say(words.removesuffix("...").strip())
            if not facts(cluster).get("ids"):
                update_facts(cluster, ids=[container.id for container in docker.containers(label)])

        arguments = ["create", "cluster", "--name", settings.name, "--kubeconfig", str(cluster.state.etc / "kind.conf")]
        if image := node_image(settings):
            arguments += ["--image", image]
        if settings.config is not None:
            arguments += ["--config", str(settings.config)]
        self._kind(cluster, *arguments, timeout_seconds=CREATE_SECONDS, on_line=progress)
        return self._found(cluster, docker.containers(label), created=True)

    def destroy(self, cluster: Cluster) -> str:
        """``kind delete cluster``, when the containers of that name are those that were made here."""
        name = cluster.settings.name
        docker = Docker(cluster.settings.environ)
        docker.check()
        self._end_orphans(cluster)
        containers = docker.containers(f"{CLUSTER_LABEL}={name}")
        if not containers:
            return f"kind cluster {name} was gone already"
        if not _ours(cluster, containers):
            return f"kind cluster {name} is another one by now, and stays"
        conf = str(cluster.state.etc / "kind.conf")
        self._kind(cluster, "delete", "cluster", "--name", name, "--kubeconfig", conf, timeout_seconds=120.0)
        Path(conf).unlink(missing_ok=True)
        return f"kind cluster {name} deleted"

    # --- the tool ----------------------------------------------------------------------------------------------------

    def tool_steps(self, cluster: Cluster) -> Sequence[Step]:
        """The user's kind, else the pinned one."""
        settings = cluster.settings

        def look() -> Finding:
            if theirs := user_kind(settings):
                return Finding.ok(f"{theirs[0]}, {theirs[1]}")
            found = locate("kind", cache=settings.cache, environ={})
            return (
                Finding.ok(f"{found.path}, {found.version}") if found else Finding.differs("acquire kind", ["+ kind"])
            )

        def change(progress: Progress) -> str:
            found = acquire(
                ["kind"],
                cache=settings.cache,
                environ=settings.environ,
                progress=progress,
                mirror=settings.mirror,
                allow_download=settings.download,
            )["kind"]
            return f"kind {found.version} ({found.source})"

        return (Step(name=TOOL_STEP, look=look, change=change, after=()),)

    def _kind(
        self,
        cluster: Cluster,
        *arguments: str,
        timeout_seconds: float,
        on_line: Progress | None = None,
    ) -> str:
        settings = cluster.settings
        theirs = user_kind(settings)
        path = Path(theirs[0]) if theirs else None
        if path is None:
            found = locate("kind", cache=settings.cache, environ={})
            if found is None:
                raise HarnessError("kind is not there", hint="`invoke up` brings it")
            path = found.path
        env = {**settings.environ, RUN_ID_VARIABLE: cluster.state.run_id()}
        return run([path, *arguments], timeout_seconds=timeout_seconds, env=env, on_line=on_line).stdout

    # --- the registry ------------------------------------------------------------------------------------------------

    def registry_steps(self, cluster: Cluster) -> Sequence[Step]:
        """kind's documented way: a ``hosts.toml`` in each node's containerd."""
        docker = Docker(cluster.settings.environ)

        def unwired() -> list[str]:
            folder, text = hosts_toml(cluster)
            nodes = facts(cluster).get("ids") or []
            return [node for node in nodes if docker.read(node, f"{CERTS_D}/{folder}/hosts.toml") != text]

        def look() -> Finding:
            if not facts(cluster).get("registry_address") or "registry_for_nodes" not in cluster.ports():
                return Finding.differs("tell kind's nodes where it is")
            nodes = unwired()
            return (
                Finding.differs(f"tell {len(nodes)} nodes where it is") if nodes else Finding.ok("known to each node")
            )

        def change(_: Progress) -> str:
            folder, text = hosts_toml(cluster)
            nodes = unwired()
            for node in nodes:
                docker.write(node, f"{CERTS_D}/{folder}/hosts.toml", text)
            deaf = [node for node in nodes if CERTS_D not in docker.read(node, "/etc/containerd/config.toml")]
            if deaf:
                return f"its containerd is not set up for {CERTS_D}: Linux images of {folder} cannot be pulled"
            return f"{folder}, in {len(nodes)} nodes"

        return (Step(name=WIRE_STEP, look=look, change=change, after=(API_SERVER_STEP, REGISTRY_FOR_NODES_STEP)),)

    def unwire(self, cluster: Cluster) -> None:
        """Remove the ``hosts.toml`` again."""
        folder, _ = hosts_toml(cluster)
        docker = Docker(cluster.settings.environ)
        for node in facts(cluster).get("ids") or []:
            docker.remove(node, f"{CERTS_D}/{folder}")


def node_image(settings: Settings) -> str:
    """What to pass as ``--image``; empty: kind's own default."""
    if settings.image or not settings.kubernetes_version:
        return settings.image
    return f"kindest/node:v{settings.kubernetes_version.removeprefix('v')}"


def user_kind(settings: Settings) -> tuple[str, str] | None:
    """Path and version of the kind on PATH; None when there is none. Raises UsageError for one that is too old."""
    path = shutil.which("kind", path=settings.environ.get("PATH", ""))
    if path is None:
        return None
    try:
        words = run([path, "version"], timeout_seconds=15.0, env=settings.environ).stdout
    except CommandError as error:
        raise UsageError(f"{path} does not work: {error.message}") from error
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)\S*", words)
    if found is None:
        raise UsageError(f"{path} does not tell its version: {words.strip()[:80]!r}")
    if (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UsageError(
            f"{path} is kind {found[0]}, and {oldest} or newer is needed",
            hint="update it, or take it off PATH and Wasilet brings its own",
        )
    return path, found[0]


def _ours(cluster: Cluster, containers: Sequence[Container]) -> bool:
    """Whether these are the containers that the harness had made: by their ids, or, when it was killed before it knew
    them, by having been made since it began."""
    known = facts(cluster)
    if ids := known.get("ids"):
        return bool(known.get("created") or known.get("creating")) and set(ids) >= {c.id for c in containers}
    since = str(known.get("creating") or "")
    return bool(since) and all(made_since(container.created, since) for container in containers)


def _half_made(name: str) -> UsageError:
    return UsageError(
        f"kind cluster {name} has no working control plane, and was not made here",
        hint=f"`kind delete cluster --name {name}` removes it",
    )
