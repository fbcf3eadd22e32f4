"""minikube, with its docker and kvm2 drivers. Written against minikube 1.33 to 1.38.

``--name`` is the profile. How the cluster reaches this machine depends on the driver (a bridge of Docker's, a network
of libvirt's); minikube itself writes the address into every node's hosts file as ``host.minikube.internal``, for both.
A new profile gets containerd: Docker, minikube's default, takes ``localhost:5000`` for the node's own.

minikube lists a profile before it has a machine, and writes its context when everything else is done: a profile whose
API server runs may still be half made.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wasilet.errors import ApiError, CommandError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import read_credentials
from wasilet.kube.kubeconfig import read_config
from wasilet.process import run
from wasilet.providers.base import API_SERVER_STEP, Cluster, Detection
from wasilet.providers.docker import is_local
from wasilet.providers.existing import minified
from wasilet.providers.existing_base import ExternalProvider, Found, HalfMadeError, StoppedError
from wasilet.providers.existing_facts import facts
from wasilet.providers.preflight import try_bootstrap_token
from wasilet.providers.registry_for_nodes import REGISTRY_FOR_NODES_STEP, hosts_toml
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE
from wasilet.steps import Finding, Progress, Step

OLDEST = (1, 26)
DRIVERS = frozenset({"docker", "kvm2"})
DRIVER_HINT = "MINIKUBE_DRIVER=docker in the environment chooses one"
AS_ROOT = "DRV_AS_ROOT"
RESERVED_NAMES = frozenset(
    {"start", "stop", "status", "delete", "config", "open", "profile", "addons", "cache", "logs"}
)
"""What minikube takes no profile's name from (pkg/minikube/config of minikube)."""

_EXIT_LINE = re.compile(r"Exiting due to \S+.*")
CREATE_SECONDS = 900
CERTS_D = "/etc/containerd/certs.d"
EXTRA_CONFIG = ("apiserver.enable-bootstrap-token-auth=true",)


class MinikubeProvider(ExternalProvider):
    """See the module."""

    name = "minikube"
    summary = "a minikube profile (docker or kvm2 driver), with wasm nodes beside it"
    options = ("kubernetes_version",)

    def detect(self, settings: Settings) -> Detection:
        """minikube must be there, and its profile's name be one; whether its driver works, it reports itself. Raises
        UsageError."""
        check_name(settings.name)
        path, version = user_minikube(settings)
        return Detection(usable=True, detail=f"minikube {version} ({path})")

    # --- the cluster -------------------------------------------------------------------------------------------------

    def find(self, cluster: Cluster) -> Found | None:
        """By ``minikube profile list``."""
        name = cluster.settings.name
        profile = self._profile(cluster)
        ours = self._ours(cluster)
        if profile is None:
            self._check_driver_wish(cluster)
            return None
        if not profile.get("Config"):
            if ours:
                raise HalfMadeError(f"minikube profile {name} is damaged")
            raise UsageError(f"minikube profile {name} is damaged", hint=f"`minikube delete -p {name}` removes it")
        running = self._running(cluster)
        whole = running and profile["Config"].get("Driver") in DRIVERS and self._has_context(cluster)
        if facts(cluster).creating and not whole:
            raise HalfMadeError(f"an interrupted run left minikube profile {name} half made")
        self._check_driver(cluster, profile)
        if not running:
            if not ours:
                raise UsageError(f"minikube profile {name} does not run", hint=f"minikube start -p {name}")
            raise StoppedError(f"minikube profile {name} does not run")
        if ours and not self._has_context(cluster):
            # `minikube start` writes it again, into Wasilet's file.
            raise StoppedError(f"the context of minikube profile {name} is lost")
        return self._found(cluster, profile, created=ours)

    def _check_driver(self, cluster: Cluster, profile: dict[str, Any]) -> None:
        driver = str((profile.get("Config") or {}).get("Driver") or "")
        if driver not in DRIVERS:
            raise UsageError(
                f"minikube profile {cluster.settings.name} has driver {driver or 'none'!r}; docker and kvm2 are "
                "supported",
                hint="--provider existing --context NAME takes any cluster that reaches this machine",
            )

    def _check_driver_wish(self, cluster: Cluster) -> None:
        """Before a profile is made. Which driver minikube takes when no one names one is seen afterwards."""
        wanted = cluster.settings.environ.get("MINIKUBE_DRIVER") or cluster.settings.environ.get("MINIKUBE_VM_DRIVER")
        if wanted and wanted not in DRIVERS | {"kvm"}:
            raise UsageError(
                f"minikube is told to use driver {wanted!r}; docker and kvm2 are supported", hint=DRIVER_HINT
            )

    def _found(self, cluster: Cluster, profile: dict[str, Any], *, created: bool) -> Found:
        runtime = ((profile.get("Config") or {}).get("KubernetesConfig") or {}).get("ContainerRuntime")
        address = cluster.settings.node_ip or self._host_address(cluster)
        return Found(
            kubeconfig=self._kubeconfig(cluster, created=created),
            node_address=address,
            # Only containerd can be told that localhost:5000 is elsewhere.
            registry_address=address if runtime == "containerd" else "",
            created=created,
        )

    def create(self, cluster: Cluster, say: Progress) -> Found:
        """``minikube start``; its driver is minikube's choice, or that of MINIKUBE_DRIVER."""
        self.start(cluster, say)
        profile = self._profile(cluster)
        if profile is None:
            raise HarnessError(f"minikube made no profile {cluster.settings.name}")
        try:
            self._check_driver(cluster, profile)
        except UsageError as error:
            # It was made a moment ago, no one can use it, and the next run would only find it again.
            self._minikube(cluster, "delete", timeout_seconds=180.0)
            raise UsageError(f"{error.message}; it was deleted again", hint=DRIVER_HINT) from error
        return self._found(cluster, profile, created=True)

    def destroy(self, cluster: Cluster) -> str:
        """``minikube delete``, unless the profile is another cluster by now."""
        name = cluster.settings.name
        self._end_orphans(cluster)
        if self._profile(cluster) is None:
            return f"minikube profile {name} was gone already"
        if facts(cluster).created and self._is_another(cluster):
            return f"minikube profile {name} is another cluster by now, and stays"
        self._minikube(cluster, "delete", timeout_seconds=180.0)
        return f"minikube profile {name} deleted"

    def preflight(self, cluster: Cluster, kube: Kube, say: Progress) -> None:
        """kubeadm switches bootstrap tokens on; an --extra-config may have switched them off."""
        say("trying a bootstrap token")
        try_bootstrap_token(kube, read_credentials(cluster.state.admin_kubeconfig))

    def start(self, cluster: Cluster, say: Progress) -> None:
        """``minikube start``, which makes a profile or starts one."""
        settings = cluster.settings
        arguments = [
            "start",
            "--container-runtime=containerd",
            "--embed-certs",
            "--interactive=false",
            *(f"--extra-config={option}" for option in EXTRA_CONFIG),
            "--wait=apiserver,default_sa",
        ]
        if settings.kubernetes_version:
            arguments.append(f"--kubernetes-version=v{settings.kubernetes_version.removeprefix('v')}")

        def progress(line: str) -> None:
            words = re.sub(r"[^\x20-\x7e]", "", line).strip(" *-|\\/")  # emoji, in every terminal's way
            if words.endswith("..."):
                say(words.removesuffix("...").strip())

        self._minikube(cluster, *arguments, timeout_seconds=CREATE_SECONDS, on_line=progress)

    def _profile(self, cluster: Cluster) -> dict[str, Any] | None:
        # Exit code 0 also when there is none; a profile that is damaged is listed as invalid.
        answer = json.loads(self._minikube(cluster, "profile", "list", "--output=json", profile=False) or "{}")
        for kind in ("valid", "invalid"):
            for profile in answer.get(kind) or []:
                if profile.get("Name") == cluster.settings.name:
                    return dict(profile)
        return None

    def _running(self, cluster: Cluster) -> bool:
        first = next(iter(self._statuses(cluster)), {})
        return first.get("Host") == "Running" and first.get("APIServer") == "Running"

    def _statuses(self, cluster: Cluster) -> list[dict[str, Any]]:
        """One entry per node, control planes first; empty when there is no profile.

        The exit code has a bit for each part that does not run; the text on stdout says the same. One node is an
        object, several are a list, and a missing profile is two lines of events with exit code 85."""
        done = self._minikube(cluster, "status", "--output=json", check=False)
        try:
            status = json.loads(done)
        except ValueError:
            return []
        entries = status if isinstance(status, list) else [status]
        return [entry for entry in entries if isinstance(entry, dict) and entry.get("Host")]

    def _running_nodes(self, cluster: Cluster) -> list[str]:
        """What ``--node`` takes; the first one, which has no name of its own in every version, is empty."""
        nodes = [
            ("" if index == 0 else str(entry.get("Name") or ""), entry.get("Host"))
            for index, entry in enumerate(self._statuses(cluster))
        ]
        return [name for name, host in nodes if host == "Running"]

    def _ssh(self, cluster: Cluster, script: str, *, node: str = "") -> str:
        chosen = (f"--node={node}",) if node else ()
        return self._minikube(cluster, "ssh", *chosen, "--", script).replace("\r", "")

    def _host_address(self, cluster: Cluster) -> str:
        name = cluster.settings.name
        text = self._ssh(cluster, "grep host.minikube.internal /etc/hosts")
        address = text.split()[0] if text.split() else ""
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise HarnessError(
                f"minikube profile {name} does not know this machine (host.minikube.internal)",
                hint="--node-ip ADDRESS names an address that it reaches",
            ) from None
        if not is_local(address):
            raise HarnessError(
                f"{address}, which minikube profile {name} knows this machine by, is none of its addresses",
                hint="--node-ip ADDRESS names one that it reaches",
            )
        return address

    def _kubeconfig(self, cluster: Cluster, *, created: bool) -> KubeObject:
        """Wasilet's is in its own file; an adopted profile's context is where minikube put it."""
        name = cluster.settings.name
        file = self._context_file(cluster, created=created)
        if not _has_context(file, name):
            if created:
                raise HarnessError(f"{file} has no context {name}", hint="`invoke up` writes it again")
            raise HarnessError(
                f"{file} has no context {name}", hint=f"`minikube update-context -p {name}` writes it again"
            )
        return minified(file, name)

    def _has_context(self, cluster: Cluster) -> bool:
        return _has_context(self._context_file(cluster, created=self._ours(cluster)), cluster.settings.name)

    def _context_file(self, cluster: Cluster, *, created: bool) -> Path:
        from wasilet.kube.kubeconfig import kubeconfig_files

        # minikube takes the first of $KUBECONFIG, whether it is there or not.
        return self._own_file(cluster) if created else kubeconfig_files(cluster.settings.environ)[0]

    def _is_another(self, cluster: Cluster) -> bool:
        try:
            found = cluster.admin().get(api_path("namespaces", "kube-system"), timeout_seconds=5.0)
        except (ApiError, UsageError):
            return False
        return bool(found["metadata"]["uid"] != facts(cluster).uid)

    @staticmethod
    def _ours(cluster: Cluster) -> bool:
        return bool(facts(cluster).created or facts(cluster).creating)

    def _own_file(self, cluster: Cluster) -> Path:
        return cluster.state.etc / "minikube.conf"

    def _minikube(
        self,
        cluster: Cluster,
        *arguments: str,
        timeout_seconds: float = 60.0,
        check: bool = True,
        profile: bool = True,
        on_line: Progress | None = None,
    ) -> str:
        settings = cluster.settings
        path, _ = user_minikube(settings)
        env = {**settings.environ, RUN_ID_VARIABLE: cluster.state.cluster.run_id}
        if self._ours(cluster):
            env["KUBECONFIG"] = str(self._own_file(cluster))
        chosen = (f"--profile={settings.name}",) if profile else ()
        try:
            return run(
                [path, arguments[0], *chosen, *arguments[1:]],
                timeout_seconds=timeout_seconds,
                env=env,
                check=check,
                on_line=on_line,
                headline=exit_line,
            ).stdout
        except CommandError as error:
            if AS_ROOT in error.message:
                error.hint = "run it as another user, or set MINIKUBE_FORCE=true if it is to run as root"
            raise

    # --- the registry ------------------------------------------------------------------------------------------------

    def registry_steps(self, cluster: Cluster) -> Sequence[Step]:
        """A ``hosts.toml`` in the node's containerd, written through ``minikube ssh``."""

        def path() -> str:
            return f"{CERTS_D}/{hosts_toml(cluster)[0]}/hosts.toml"

        def unwired() -> tuple[list[str], int]:
            wanted = hosts_toml(cluster)[1].strip()
            nodes = self._running_nodes(cluster)
            script = f"sudo cat {path()} 2>/dev/null || true"
            return [node for node in nodes if self._ssh(cluster, script, node=node).strip() != wanted], len(nodes)

        def look() -> Finding:
            if facts(cluster).found and not facts(cluster).registry_address:
                return Finding.skip("its nodes run Docker: `minikube image load` brings Linux images, see the docs")
            if not facts(cluster).found or "registry_for_nodes" not in cluster.ports():
                return Finding.differs("tell minikube's nodes where it is")
            try:
                nodes, count = unwired()
            except CommandError:  # the profile does not run; when this is to be changed it does
                nodes, count = [], 0
            if not count:
                return Finding.differs("see that minikube's nodes know where it is")
            if nodes:
                return Finding.differs(f"tell {len(nodes)} of minikube's nodes where it is")
            return Finding.ok("known" if count == 1 else f"known to {count} nodes")

        def change(_: Progress) -> str:
            folder, text = hosts_toml(cluster)
            quoted = text.replace("\n", "\\n").replace('"', '\\"')
            script = f'sudo mkdir -p {CERTS_D}/{folder} && printf "{quoted}" | sudo tee {path()} >/dev/null'
            nodes, _count = unwired()
            for node in nodes:
                self._ssh(cluster, script, node=node)
            if unwired()[0]:
                raise HarnessError(f"minikube's nodes did not keep what they were told of {folder}")
            return folder

        return (
            Step(
                name="registry of minikube's nodes",
                look=look,
                change=change,
                after=(API_SERVER_STEP, REGISTRY_FOR_NODES_STEP),
            ),
        )

    def unwire(self, cluster: Cluster) -> None:
        """Remove the ``hosts.toml`` again."""
        if facts(cluster).registry_address:
            for node in self._running_nodes(cluster):
                self._ssh(cluster, f"sudo rm -rf {CERTS_D}/{hosts_toml(cluster)[0]}", node=node)


def check_name(name: str) -> None:
    """Raises UsageError for a name that minikube refuses for a profile, though it is one for a cluster."""
    if len(name) < 2:
        raise UsageError(
            f"{name!r} is no name for a minikube profile",
            hint="minikube takes 2 characters at least; choose another --name",
        )
    if name in RESERVED_NAMES:
        raise UsageError(
            f"{name!r} is no name for a minikube profile", hint="it is a command of minikube's; choose another --name"
        )


def exit_line(lines: Sequence[str]) -> str | None:
    """Why minikube failed. What follows is advice in a box."""
    return next((found[0] for line in lines if (found := _EXIT_LINE.search(line))), None)


def _has_context(file: Path, name: str) -> bool:
    contexts = read_config(file).get("contexts") or []
    return name in [entry.get("name") for entry in contexts if isinstance(entry, dict)]


def user_minikube(settings: Settings) -> tuple[str, str]:
    """Path and version of minikube. Raises UsageError when there is none, or it is too old."""
    path = shutil.which("minikube", path=settings.environ.get("PATH", ""))
    if path is None:
        raise UsageError(
            "minikube is not installed, or not on PATH",
            hint="see https://minikube.sigs.k8s.io, or use --provider host",
        )
    try:
        words = run([path, "version", "--short"], timeout_seconds=15.0, env=settings.environ).stdout
    except CommandError as error:
        raise UsageError(f"{path} does not work: {error.message}") from error
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", words)
    if found is None:
        raise UsageError(f"{path} does not tell its version: {words.strip()[:80]!r}")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise UsageError(f"{path} is minikube {found[0]}, and v1.26 or newer is needed", hint="update it")
    return path, found[0]
