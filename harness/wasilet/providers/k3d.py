"""k3d: k3s in Docker. Written against k3d 5.8 and 5.9, and k3s 1.31 to 1.34.

k3s differs from kubeadm in what matters here. It reaches kubelets through a tunnel that only its own agents open,
unless the servers run with ``--egress-selector-mode=disabled``; that cannot be changed on a running cluster, so an
adopted one without it is refused. It creates no RBAC for joining nodes (the RBAC step does). Its servers' authority is
another one than its clients' (``external`` reads both). Its containerd is configured by a registries file at creation,
which knows this machine as ``host.k3d.internal``; k3d writes that name into its nodes' hosts files, and the engine
drops it when a node is restarted by anything but k3d.

k3d makes a network, a volume and a helper (``k3d-NAME-tools``) before the first node. Nodes carry the run id as a
label. ``k3d cluster delete`` learns of networks from nodes alone, so what an interrupted run left is removed here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from wasilet.controlplane.local_registry import registry_address
from wasilet.errors import CommandError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.credentials import load_yaml, read_credentials
from wasilet.process import run
from wasilet.providers.base import API_SERVER_STEP, Cluster, Detection
from wasilet.providers.docker import Container, Docker
from wasilet.providers.docker_base import ContainedProvider
from wasilet.providers.existing_base import Found
from wasilet.providers.existing_facts import facts, update_facts
from wasilet.providers.k3s_config import EGRESS_FLAG, egress_disabled, registries_with
from wasilet.providers.preflight import try_bootstrap_token
from wasilet.providers.registry_for_nodes import REGISTRY_FOR_NODES_STEP
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE
from wasilet.steps import Finding, Progress, Step
from wasilet.storage import write_file

OLDEST = (5, 0)
"""``--k3s-arg`` with node filters came with it."""

CREATE_SECONDS = 600
EGRESS = f"--{EGRESS_FLAG}=disabled"
SERVER_ARGUMENTS = (EGRESS, "--kube-apiserver-arg=enable-bootstrap-token-auth=true")
HOST_NAME = "host.k3d.internal"
RUN_LABEL = "wasilet.run"
"""The run id, on every node of a new cluster."""

NAME_LENGTH = 32
"""k3d's DefaultClusterNameMaxLength: names of its nodes are longer, and host names have 63 characters."""

_RED_LINE = re.compile(r"(?:(ERRO|FATA)(?:\[\d*\])?|.*level=(error|fatal) msg=)\s*(.+)")


class K3dProvider(ContainedProvider):
    """See the module."""

    name = "k3d"
    summary = "k3s in Docker containers, with wasm nodes beside it"
    options = ("image", "kubernetes_version", "config")
    wanted_ports = ("apiserver",)

    def detect(self, settings: Settings) -> Detection:
        """Docker must answer and k3d be there. Raises UsageError."""
        if len(settings.name) > NAME_LENGTH:
            raise UsageError(
                f"{settings.name!r} is no name for a k3d cluster: {len(settings.name)} characters",
                hint=f"k3d takes {NAME_LENGTH} at most; choose another --name",
            )
        docker = Docker(settings.environ).check()
        path, version = user_k3d(settings)
        return Detection(usable=True, detail=f"Docker {docker}, k3d {version} ({path})")

    def label(self, name: str) -> str:
        """k3d's own."""
        return f"k3d.cluster={name}"

    def is_server(self, container: Container) -> bool:
        """By its role."""
        return container.labels.get("k3d.role") == "server"

    def is_node(self, container: Container) -> bool:
        """Not the balancer."""
        return container.labels.get("k3d.role") in {"server", "agent"}

    def lasts(self, container: Container) -> bool:
        """Not the helper ``k3d-NAME-tools``, whose role is ``noRole``."""
        return container.labels.get("k3d.role") != "noRole"

    def is_marked(self, cluster: Cluster, container: Container) -> bool | None:
        """By the label of the run id; k3d marks servers and agents alone."""
        if not self.is_node(container):
            return None
        return container.labels.get(RUN_LABEL) == cluster.state.cluster.run_id

    def kubeconfig(self, cluster: Cluster) -> KubeObject:
        """``k3d kubeconfig get``. It names the wildcard address when the port is published on all."""
        data = load_yaml(self._k3d(cluster, "kubeconfig", "get", cluster.settings.name))
        if not isinstance(data, dict) or not data.get("clusters"):
            raise HarnessError(f"k3d gave no kubeconfig for {cluster.settings.name}")
        entry = data["clusters"][0]["cluster"]
        entry["server"] = str(entry["server"]).replace("://0.0.0.0:", "://127.0.0.1:")
        return data

    def create(self, cluster: Cluster, say: Progress) -> Found:
        """``k3d cluster create``."""
        settings = cluster.settings
        registries = self._write_registries(cluster)
        self._note_before(cluster)
        arguments = [
            *("cluster", "create", settings.name),
            f"--api-port=127.0.0.1:{cluster.ports()['apiserver']}",
            f"--registry-config={registries}",
            # No balancer: a configuration may do without one, and k3d refuses a filter that names nothing.
            f"--runtime-label={RUN_LABEL}={cluster.state.cluster.run_id}@server:*;agent:*",
            *(f"--k3s-arg={argument}@server:*" for argument in SERVER_ARGUMENTS),
            "--kubeconfig-update-default=false",
            "--kubeconfig-switch-context=false",
            "--wait",
            f"--timeout={CREATE_SECONDS}s",
        ]
        if image := node_image(settings):
            arguments.append(f"--image={image}")
        if settings.config is not None:
            arguments.append(f"--config={settings.config}")

        def progress(line: str) -> None:
            if found := re.search(r"(?:INFO\S*\s+|msg=\"?)([^\"]+)", line):
                say(found[1].strip())
                self.note_containers(cluster)

        self._k3d(cluster, *arguments, timeout_seconds=CREATE_SECONDS + 30.0, on_line=progress)
        return self.found(cluster, Docker(settings.environ).containers(self.label(settings.name)), created=True)

    def _write_registries(self, cluster: Cluster) -> Path:
        settings = cluster.settings
        port = cluster.state.allocate_ports({"registry_for_nodes": 0})["registry_for_nodes"]
        # The gateway is known only once the network is made; k3d writes this name for it into every node's hosts file.
        wanted = registries_with(
            registry_address(cluster.ports()["registry"]),
            f"http://{HOST_NAME}:{port}",
            config=settings.config,
            environ=settings.environ,
        )
        path = cluster.state.etc / "registries.yaml"
        write_file(path, json.dumps(wanted).encode())
        return path

    def _note_before(self, cluster: Cluster) -> None:
        """Write down what of the cluster's name is the user's, after removing what an interrupted run left: k3d would
        take a network that is there for someone else's, and never delete it."""
        self.clear_leftovers(cluster)
        networks, volumes = self._networks_and_volumes(cluster)
        update_facts(cluster, before={"networks": networks, "volumes": volumes})

    def clear_leftovers(self, cluster: Cluster) -> None:
        """The network and the volumes of the cluster, but for those that were there before it. Only where no container
        of that name is left."""
        before = facts(cluster).before
        docker = Docker(cluster.settings.environ)
        if before is None or docker.containers(self.label(cluster.settings.name)):
            return
        networks, volumes = self._networks_and_volumes(cluster)
        for network in set(networks) - set(before.networks):
            docker.remove_network(network)
        for volume in set(volumes) - set(before.volumes):
            docker.remove_volume(volume)

    def _networks_and_volumes(self, cluster: Cluster) -> tuple[list[str], list[str]]:
        docker, name = Docker(cluster.settings.environ), cluster.settings.name
        return docker.networks(f"k3d-{name}", "app=k3d"), docker.volumes(self.label(name))

    def start(self, cluster: Cluster, say: Progress) -> None:
        """``k3d cluster start``, which tells the nodes again what this machine is called."""
        name = cluster.settings.name
        say(f"starting {name}")
        arguments = ("cluster", "start", name, "--wait", f"--timeout={CREATE_SECONDS}s")
        self._k3d(cluster, *arguments, timeout_seconds=CREATE_SECONDS + 30.0)

    def delete_by_tool(self, cluster: Cluster) -> None:
        """``k3d cluster delete``; with the user's kubeconfig out of its reach, since nothing of it is there."""
        self._k3d(cluster, "cluster", "delete", cluster.settings.name, timeout_seconds=120.0)

    def delete_command(self, name: str) -> str:
        """For messages."""
        return f"k3d cluster delete {name}"

    def start_command(self, name: str, stopped: Sequence[str]) -> str:  # noqa: ARG002
        """For messages."""
        return f"k3d cluster start {name}"

    def preflight(self, cluster: Cluster, kube: Kube, say: Progress) -> None:
        """What an adopted cluster had to be created with. Raises HarnessError."""
        docker = Docker(cluster.settings.environ)
        for server in docker.containers(self.label(cluster.settings.name)):
            if self.is_server(server) and not egress_disabled(docker, server):
                raise HarnessError(
                    f"k3d cluster {cluster.settings.name} reaches nodes only through k3s's own tunnel, so "
                    "`kubectl logs` would fail on wasm nodes",
                    hint=f"it cannot be changed later: create it with --k3s-arg '{EGRESS}@server:*'",
                )
        say("trying a bootstrap token")
        try_bootstrap_token(kube, read_credentials(cluster.state.admin_kubeconfig))

    def registry_steps(self, cluster: Cluster) -> Sequence[Step]:
        """The registries file does it at creation, as long as its nodes know this machine by the name in it; on an
        adopted cluster both are the user's."""
        docker = Docker(cluster.settings.environ)

        def unaware() -> list[str]:
            address = facts(cluster).registry_address
            nodes = self.node_ids(cluster)
            return [node for node in nodes if not _knows_host(docker.read(node, "/etc/hosts"), address)]

        def look() -> Finding:
            if facts(cluster).found and not facts(cluster).created:
                name = registry_address(cluster.ports()["registry"])
                return Finding.skip(f"adopted: to pull Linux images of {name}, see docs/providers/k3d.md")
            if not facts(cluster).registry_address:
                return Finding.differs("tell k3d's nodes where it is")
            try:
                nodes = unaware()
            except CommandError:  # its nodes do not run; when this is to be changed they do
                return Finding.differs(f"see that its nodes know {HOST_NAME}")
            if nodes:
                return Finding.differs(f"give {len(nodes)} nodes the name {HOST_NAME} back", [f"+ {HOST_NAME}"])
            return Finding.ok("told at creation")

        def change(_: Progress) -> str:
            nodes = unaware()
            for node in nodes:
                docker.append(node, "/etc/hosts", f"{facts(cluster).registry_address} {HOST_NAME}")
            return f"{HOST_NAME}, in {len(nodes)} nodes" if nodes else "told at creation"

        after = (API_SERVER_STEP, REGISTRY_FOR_NODES_STEP)
        return (Step(name="registry of k3d's nodes", look=look, change=change, after=after),)

    def _k3d(
        self, cluster: Cluster, *arguments: str, timeout_seconds: float = 30.0, on_line: Progress | None = None
    ) -> str:
        settings = cluster.settings
        path, _ = user_k3d(settings)
        # k3d touches the file that KUBECONFIG names when it deletes; the user's must stay as it is.
        own = {
            RUN_ID_VARIABLE: cluster.state.cluster.run_id,
            "KUBECONFIG": str(cluster.state.etc / "k3d.conf"),
        }
        env = {**settings.environ, **own}
        return run(
            [path, *arguments], timeout_seconds=timeout_seconds, env=env, on_line=on_line, headline=first_error
        ).stdout


def node_image(settings: Settings) -> str:
    """What to pass as ``--image``; empty: k3d's own default."""
    if settings.image or not settings.kubernetes_version:
        return settings.image
    return f"docker.io/rancher/k3s:v{settings.kubernetes_version.removeprefix('v')}-k3s1"


def first_error(lines: Sequence[str]) -> str | None:
    """Why k3d failed: its first error. The last line is about the rollback."""
    for line in lines:
        if found := _RED_LINE.match(line):
            return found[3].strip('"')
    return None


def _knows_host(hosts: str, address: str) -> bool:
    """Whether a hosts file has the name that the registries file was written with, for that address."""
    for line in hosts.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == [address] and HOST_NAME in words[1:]:
            return True
    return False


def user_k3d(settings: Settings) -> tuple[str, str]:
    """Path and version of k3d. Raises UsageError when there is none, or it is too old."""
    path = shutil.which("k3d", path=settings.environ.get("PATH", ""))
    if path is None:
        raise UsageError("k3d is not installed, or not on PATH", hint="see https://k3d.io, or use --provider host")
    try:
        words = run([path, "version"], timeout_seconds=15.0, env=settings.environ).stdout
    except CommandError as error:
        raise UsageError(f"{path} does not work: {error.message}") from error
    found = re.search(r"k3d version v((\d+)(?:\.(\d+))?\S*)", words)
    if found is None:
        raise UsageError(f"{path} does not tell its version: {words.strip()[:80]!r}")
    # One that was built from a checkout calls itself v5-dev.
    if (int(found[2]), int(found[3] or 0)) < OLDEST:
        raise UsageError(f"{path} is k3d {found[1]}, and 5.0 or newer is needed", hint="update it")
    return path, found[1]
