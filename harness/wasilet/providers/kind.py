"""kind: Kubernetes in Docker. The cluster is named by ``--name``; one of that name that runs is adopted.

kind's own kubeconfig entry goes to Wasilet's own file and not into the user's, since ``up`` adds one for every
provider."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from wasilet.controlplane.acquire import acquire, locate
from wasilet.errors import CommandError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.credentials import load_yaml
from wasilet.process import run
from wasilet.providers.base import API_SERVER_STEP, Cluster, Detection
from wasilet.providers.docker import Container, Docker
from wasilet.providers.docker_base import ContainedProvider
from wasilet.providers.existing_base import Found
from wasilet.providers.existing_facts import facts
from wasilet.providers.joined_network_steps import joined_network_steps
from wasilet.providers.registry_for_nodes import REGISTRY_FOR_NODES_STEP, hosts_toml
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE
from wasilet.steps import Finding, Progress, Step

OLDEST = (0, 27)
"""Its node images are the first whose containerd reads registry hosts without being configured to."""

CREATE_SECONDS = 600.0
"""For ``kind create cluster``, which may pull a node image of 400 MB."""

CERTS_D = "/etc/containerd/certs.d"
CLUSTER_LABEL = "io.x-k8s.kind.cluster"
ROLE_LABEL = "io.x-k8s.kind.role"
NAME_LENGTH = 49
"""A node is called ``NAME-control-plane``, and a host name has 63 characters."""


class KindProvider(ContainedProvider):
    """See the module."""

    name = "kind"
    summary = "kind's cluster in Docker containers, with wasm nodes beside it"
    options = ("image", "kubernetes_version", "config")

    def detect(self, settings: Settings) -> Detection:
        """Docker must answer; kind itself is installed when it is not there. Raises UsageError."""
        if len(settings.name) > NAME_LENGTH:
            raise UsageError(
                f"{settings.name!r} is no name for a kind cluster: {len(settings.name)} characters",
                hint=f"{NAME_LENGTH} at most, for the names of its nodes; choose another --name",
            )
        version = Docker(settings.environ).check()
        theirs = user_kind(settings)
        kind = f"kind {theirs[1]} ({theirs[0]})" if theirs else "kind will be acquired"
        return Detection(usable=True, detail=f"Docker {version}, {kind}")

    # --- the cluster -------------------------------------------------------------------------------------------------

    def label(self, name: str) -> str:
        """kind's own."""
        return f"{CLUSTER_LABEL}={name}"

    def is_server(self, container: Container) -> bool:
        """By its role; the balancer before several control planes has another one."""
        return container.labels.get(ROLE_LABEL) == "control-plane"

    def is_node(self, container: Container) -> bool:
        """Control planes run pods too."""
        return container.labels.get(ROLE_LABEL) in {"control-plane", "worker"}

    def is_whole(self, kube: Kube) -> bool:
        """By its StorageClass, which kind makes after all else on a control plane."""
        return bool(kube.get("/apis/storage.k8s.io/v1/storageclasses").get("items"))

    def kubeconfig(self, cluster: Cluster) -> KubeObject:
        """``kind get kubeconfig``."""
        words = ("get", "kubeconfig", "--name", cluster.settings.name)
        data = load_yaml(self._kind(cluster, *words, timeout_seconds=30.0))
        if not isinstance(data, dict):
            raise HarnessError(f"kind gave no kubeconfig for {cluster.settings.name}")
        return data

    def create(self, cluster: Cluster, say: Progress) -> Found:
        """``kind create cluster``, its progress passed on."""
        settings = cluster.settings

        def progress(line: str) -> None:
            words = re.sub(r"[^\x20-\x7e]", "", line).strip()
            if words.endswith("..."):
                say(words.removesuffix("...").strip())
                self.note_containers(cluster)

        arguments = ["create", "cluster", "--name", settings.name, "--kubeconfig", self._own_file(cluster)]
        if image := node_image(settings):
            arguments += ["--image", image]
        if settings.config is not None:
            arguments += ["--config", str(settings.config)]
        self._kind(cluster, *arguments, timeout_seconds=CREATE_SECONDS, on_line=progress)
        return self.found(cluster, Docker(settings.environ).containers(self.label(settings.name)), created=True)

    def start(self, cluster: Cluster, say: Progress) -> None:
        """``docker start``: kind has no command for it, its nodes put themselves right."""
        docker = Docker(cluster.settings.environ)
        stopped = [c.name for c in docker.containers(self.label(cluster.settings.name)) if not c.running]
        say(f"starting {', '.join(stopped)}")
        docker.run("start", *stopped, timeout_seconds=60.0)

    def delete_by_tool(self, cluster: Cluster) -> None:
        """``kind delete cluster``."""
        file = self._own_file(cluster)
        words = ("delete", "cluster", "--name", cluster.settings.name, "--kubeconfig", file)
        self._kind(cluster, *words, timeout_seconds=120.0)
        Path(file).unlink(missing_ok=True)

    def delete_command(self, name: str) -> str:
        """For messages."""
        return f"kind delete cluster --name {name}"

    def start_command(self, name: str, stopped: Sequence[str]) -> str:  # noqa: ARG002
        """For messages."""
        return f"docker start {' '.join(stopped)}"

    def _own_file(self, cluster: Cluster) -> str:
        return str(cluster.state.etc / "kind.conf")

    # --- the tool ----------------------------------------------------------------------------------------------------

    def tool_steps(self, cluster: Cluster) -> Sequence[Step]:
        """The user's kind, else the pinned one."""
        settings = cluster.settings

        def look() -> Finding:
            if theirs := user_kind(settings):
                return Finding.ok(f"{theirs[0]}, {theirs[1]}")
            found = locate("kind", cache=settings.cache, environ={})
            if found is None:
                return Finding.differs("acquire kind", ["+ kind"])
            return Finding.ok(f"{found.path}, {found.version}")

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

        return (Step(name="kind's command line", look=look, change=change, after=()),)

    def _kind(self, cluster: Cluster, *arguments: str, timeout_seconds: float, on_line: Progress | None = None) -> str:
        settings = cluster.settings
        theirs = user_kind(settings)
        path = Path(theirs[0]) if theirs else None
        if path is None:
            found = locate("kind", cache=settings.cache, environ={})
            if found is None:
                raise HarnessError("kind is not there", hint="`invoke up` brings it")
            path = found.path
        # The run id finds a kind that outlived the run that started it.
        env = {**settings.environ, RUN_ID_VARIABLE: cluster.state.cluster.run_id}
        return run(
            [path, *arguments], timeout_seconds=timeout_seconds, env=env, on_line=on_line, headline=first_error
        ).stdout

    # --- the pod network ---------------------------------------------------------------------------------------------

    def network_steps(self, cluster: Cluster) -> Sequence[Step]:
        """Wasm pods beside kind's own, by the bridge of its Docker network."""
        return joined_network_steps(cluster, lambda: self.node_containers(cluster))

    # --- the registry ------------------------------------------------------------------------------------------------

    def registry_steps(self, cluster: Cluster) -> Sequence[Step]:
        """kind's documented way: a ``hosts.toml`` in each node's containerd."""
        docker = Docker(cluster.settings.environ)

        def unwired() -> list[str]:
            folder, text = hosts_toml(cluster)
            return [
                node for node in self.node_ids(cluster) if docker.read(node, f"{CERTS_D}/{folder}/hosts.toml") != text
            ]

        def look() -> Finding:
            if not facts(cluster).registry_address or "registry_for_nodes" not in cluster.ports():
                return Finding.differs("tell kind's nodes where it is")
            try:
                nodes = unwired()
            except CommandError:  # its nodes do not run; when this is to be changed they do
                return Finding.differs("see that kind's nodes know where it is")
            if nodes:
                return Finding.differs(f"tell {len(nodes)} nodes where it is")
            return Finding.ok("known to each node")

        def change(_: Progress) -> str:
            folder, text = hosts_toml(cluster)
            nodes = unwired()
            for node in nodes:
                docker.write(node, f"{CERTS_D}/{folder}/hosts.toml", text)
            if unwired():
                raise HarnessError(f"kind's nodes did not keep what they were told of {folder}")
            if any(CERTS_D not in docker.read(node, "/etc/containerd/config.toml") for node in nodes):
                return f"containerd is not set up for {CERTS_D}: Linux images of {folder} cannot be pulled"
            return f"{folder}, in {len(nodes)} nodes"

        return (
            Step(
                name="registry of kind's nodes",
                look=look,
                change=change,
                after=(API_SERVER_STEP, REGISTRY_FOR_NODES_STEP),
            ),
        )

    def unwire(self, cluster: Cluster) -> None:
        """Remove the ``hosts.toml`` again."""
        folder, _ = hosts_toml(cluster)
        docker = Docker(cluster.settings.environ)
        for node in self.node_ids(cluster):
            docker.remove(node, f"{CERTS_D}/{folder}")


def node_image(settings: Settings) -> str:
    """What to pass as ``--image``; empty: kind's own default."""
    if settings.image or not settings.kubernetes_version:
        return settings.image
    return f"kindest/node:v{settings.kubernetes_version.removeprefix('v')}"


def first_error(lines: Sequence[str]) -> str | None:
    """Why kind failed; what follows is the output of a command within a node."""
    return next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), None)


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
