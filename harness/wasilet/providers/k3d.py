"""k3d: k3s in Docker. Written against k3d 5.8 and k3s 1.31 to 1.34.

k3s differs from kubeadm in what matters here. It reaches kubelets through a tunnel that only its own agents open,
unless the servers run with ``--egress-selector-mode=disabled``; that cannot be changed on a running cluster, so an
adopted one without it is refused. It creates no RBAC for joining nodes (the RBAC step does). Its servers' authority is
another one than its clients' (``external`` reads both). Its containerd is configured by a registries file at creation.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence

from wasilet.controlplane.local_registry import registry_address
from wasilet.errors import CommandError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.credentials import load_yaml, read_credentials
from wasilet.process import run
from wasilet.providers.base import API_SERVER_STEP, Cluster, Detection
from wasilet.providers.docker import Container, Docker
from wasilet.providers.docker_base import ContainedProvider
from wasilet.providers.existing_base import REGISTRY_FOR_NODES_STEP, Found, facts
from wasilet.providers.preflight import try_bootstrap_token
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE
from wasilet.steps import Finding, Progress, Step
from wasilet.storage import write_file

OLDEST = (5, 0)
"""``--k3s-arg`` with node filters came with it."""

CREATE_SECONDS = 600
EGRESS = "--egress-selector-mode=disabled"
SERVER_ARGUMENTS = (EGRESS, "--kube-apiserver-arg=enable-bootstrap-token-auth=true")
_CONFIG_FILES = ("/etc/rancher/k3s/config.yaml",)


class K3dProvider(ContainedProvider):
    """See the module."""

    name = "k3d"
    summary = "k3s in Docker containers, with wasm nodes beside it"
    options = ("image", "kubernetes_version", "config")
    wanted_ports = ("apiserver",)

    def detect(self, settings: Settings) -> Detection:
        """Docker must answer and k3d be there. Raises UsageError."""
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
        registries = cluster.state.etc / "registries.yaml"
        port = cluster.state.allocate_ports({"registry_for_nodes": 0})["registry_for_nodes"]
        # The gateway is known only once the network is made; k3d writes this name for it into every node's hosts file.
        endpoint = f"http://host.k3d.internal:{port}"
        mirrors = {registry_address(cluster.ports()["registry"]): {"endpoint": [endpoint]}}
        write_file(registries, json.dumps({"mirrors": mirrors}).encode())
        arguments = [
            *("cluster", "create", settings.name),
            f"--api-port=127.0.0.1:{cluster.ports()['apiserver']}",
            f"--registry-config={registries}",
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
            words = re.sub(r"\x1b\[[0-9;]*m", "", line)
            if found := re.search(r"(?:INFO\S*\s+|msg=\"?)([^\"]+)", words):
                say(found[1].strip())
                self.note_containers(cluster)

        self._k3d(cluster, *arguments, timeout_seconds=CREATE_SECONDS + 30.0, on_line=progress)
        return self.found(cluster, Docker(settings.environ).containers(self.label(settings.name)), created=True)

    def start(self, cluster: Cluster, say: Progress) -> None:
        """``k3d cluster start``, which tells the nodes anew what this machine is called."""
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
        """The registries file does it at creation; on an adopted cluster it is the user's."""

        def look() -> Finding:
            if facts(cluster) and not facts(cluster).get("created"):
                name = registry_address(cluster.ports()["registry"])
                return Finding.skip(f"adopted: to pull Linux images of {name}, see docs/providers/k3d.md")
            return Finding.ok("told at creation")

        after = (API_SERVER_STEP, REGISTRY_FOR_NODES_STEP)
        return (Step(name="registry of k3d's nodes", look=look, change=lambda _: "", after=after),)

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
        return run([path, *arguments], timeout_seconds=timeout_seconds, env=env, on_line=on_line).stdout


def node_image(settings: Settings) -> str:
    """What to pass as ``--image``; empty: k3d's own default."""
    if settings.image or not settings.kubernetes_version:
        return settings.image
    return f"docker.io/rancher/k3s:v{settings.kubernetes_version.removeprefix('v')}-k3s1"


def egress_disabled(docker: Docker, server: Container) -> bool:
    """Whether a server was started with the flag, on its command line or in its configuration file."""
    words = " ".join(server.command).replace("--egress-selector-mode ", "--egress-selector-mode=")
    if EGRESS in words.split():
        return True
    for path in _CONFIG_FILES:
        try:
            data = load_yaml(docker.read(server.id, path))
        except CommandError:
            continue
        if isinstance(data, dict) and data.get("egress-selector-mode") == "disabled":
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
    found = re.search(r"k3d version v(\d+)\.(\d+)\.(\d+)", words)
    if found is None:
        raise UsageError(f"{path} does not tell its version: {words.strip()[:80]!r}")
    version = f"{found[1]}.{found[2]}.{found[3]}"
    if (int(found[1]), int(found[2])) < OLDEST:
        raise UsageError(f"{path} is k3d {version}, and 5.0 or newer is needed", hint="update it")
    return path, version
