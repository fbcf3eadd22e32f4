"""What is the same for every cluster that Wasilet did not build itself from processes: kind, k3d, minikube, any other.

Such a cluster is *found* or *created* by its own tool; from there on nothing but its API is used. The rule of
ownership: what the harness did not create, it never deletes. Whether a cluster was created here is written down before
its tool is started (``creating``) and again when it is whole (``created``), so that a killed run leaves a note of what
it was about to make; an adopted cluster gets back what was added to it and nothing else.

The facts that nodes need (server, authorities, this machine's address as the cluster sees it) are read once per run, by
the step that finds the cluster, and kept in ``cluster.json`` under ``external``: ``status`` and a node's restart need
no tool of the provider.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wasilet.controlplane.components import Component, component_step
from wasilet.controlplane.joined_network import CREDENTIALS
from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.credentials import load_yaml, read_credentials
from wasilet.process import ProcessRecord, stop
from wasilet.providers.base import API_SERVER_STEP, BINARIES_STEP, PREPARATION_STEP, Access, Cluster, Detection
from wasilet.providers.client_credential import APPROVER_USER, SIGN_SECONDS, client_credential
from wasilet.providers.detach import HOSTING, OURS, forget_identities, is_ours, withdraw
from wasilet.providers.existing_facts import (
    client_ca,
    cluster_uid,
    facts,
    root_ca,
    update_facts,
    wait_for_answer,
)
from wasilet.providers.preflight import check_node_names
from wasilet.providers.registry_for_nodes import REGISTRY_FOR_NODES, REGISTRY_FOR_NODES_STEP, registry_for_nodes
from wasilet.settings import KRUSTLET_TAINTS, Settings
from wasilet.steps import Finding, Progress, Step
from wasilet.storage import write_file


@dataclass(frozen=True, kw_only=True)
class Found:
    """A cluster that runs and answers."""

    kubeconfig: KubeObject
    """One context, everything embedded or named by absolute path."""

    node_address: str
    """The address of this machine at which the cluster reaches its nodes."""

    created: bool
    """Whether the harness made it."""

    registry_address: str = ""
    """The address of this machine at which the cluster's own nodes may pull; empty: they cannot."""

    ids: tuple[str, ...] = ()
    """What the tool made (containers), for knowing them again."""

    remember: Mapping[str, str] = field(default_factory=dict)
    """Further facts of the provider's own."""


class ExternalProvider:
    """The base of the providers beside ``host``. Subclasses say how a cluster is found, created and destroyed."""

    name = ""
    summary = ""
    options: tuple[str, ...] = ()
    default_taints: tuple[str, ...] = KRUSTLET_TAINTS
    binaries: tuple[str, ...] = ()
    wanted_ports: tuple[str, ...] = ()

    # --- what a subclass defines -----------------------------------------------------------------------------------

    def detect(self, settings: Settings) -> Detection:
        """See Provider."""
        raise NotImplementedError

    def confirm(self, settings: Settings) -> None:
        """See Provider."""

    def find(self, cluster: Cluster) -> Found | None:
        """The cluster of that name, None when there is none. Reads only. Raises HarnessError when there is one that
        cannot be used; HalfMadeError when it is what a killed run of the harness left; StoppedError."""
        raise NotImplementedError

    def create(self, cluster: Cluster, say: Progress) -> Found:
        """Make the cluster. Raises HarnessError."""
        raise NotImplementedError

    def start(self, cluster: Cluster, say: Progress) -> None:
        """Start a cluster that the harness created and that was stopped. Raises HarnessError."""
        raise NotImplementedError

    def destroy(self, cluster: Cluster) -> str:
        """Delete a cluster that the harness created; text for the report. Raises HarnessError."""
        raise NotImplementedError

    def preflight(self, cluster: Cluster, kube: Kube, say: Progress) -> None:
        """Look at an adopted cluster closer, once, before anything is added. Raises HarnessError."""

    def tool_steps(self, cluster: Cluster) -> Sequence[Step]:  # noqa: ARG002
        """Steps that install the provider's own command line."""
        return ()

    def registry_steps(self, cluster: Cluster) -> Sequence[Step]:  # noqa: ARG002
        """Steps that let the cluster's own nodes pull from the local registry, after REGISTRY_FOR_NODES."""
        return ()

    def network_steps(self, cluster: Cluster) -> Sequence[Step]:  # noqa: ARG002
        """Steps that give wasm pods addresses of the cluster's; nodes start after NETWORK_STEP."""
        return ()

    def unwire(self, cluster: Cluster) -> None:
        """Take back what ``registry_steps`` wrote into the nodes of an adopted cluster. Raises HarnessError."""

    # --- Provider --------------------------------------------------------------------------------------------------

    def create_steps(self, cluster: Cluster) -> Sequence[Step]:
        """The tool, the cluster, and where its own nodes find the registry."""
        tools = tuple(self.tool_steps(cluster))
        steps = [*tools, self._cluster_step(cluster, after=tuple(step.key for step in tools))]
        steps += self.network_steps(cluster)
        if registry := tuple(self.registry_steps(cluster)):
            steps += [self._registry_proxy_step(cluster), *registry, self._hosting_step(cluster)]
        return steps

    def _registry_proxy_step(self, cluster: Cluster) -> Step:
        step = component_step(
            lambda: registry_for_nodes(cluster),
            REGISTRY_FOR_NODES,
            title="registry for the cluster's nodes",
            key=REGISTRY_FOR_NODES_STEP,
            state=cluster.state,
            settings=cluster.settings,
            after=(API_SERVER_STEP,),
        )

        def look() -> Finding:
            known = facts(cluster)
            if known.uid and not known.registry_address:
                return Finding.skip("its nodes could not be told of it")
            return step.look()

        return replace(step, look=look)

    def must_settle(self) -> tuple[str, ...]:
        """Nothing: what runs behind the API server is the cluster's own affair."""
        return ()

    def components(self, cluster: Cluster) -> Mapping[str, Callable[[], Component]]:
        """The registry's second entry point, where the cluster's own nodes have one."""
        if not facts(cluster).registry_address:
            return {}
        return {REGISTRY_FOR_NODES: lambda: registry_for_nodes(cluster)}

    def access(self, cluster: Cluster) -> Access:
        """As the last run of the cluster's step found it. Raises UsageError before that."""
        known = facts(cluster)
        if not known.server:
            raise UsageError(f"cluster {cluster.settings.name!r} is not up", hint="`invoke up` brings it up")
        return Access(
            server=known.server,
            ca=_read(cluster.state.etc / "ca.crt"),
            client_ca=_read(cluster.state.etc / "client-ca.crt"),
            node_address=known.node_address,
        )

    def approver_kubeconfig(self, cluster: Cluster) -> Path:
        """A separate client certificate, renewed by ``up`` in the last third of its life."""
        path = cluster.state.etc / "approver.conf"
        access = self.access(cluster)
        client_credential(
            cluster.admin, path, user=APPROVER_USER, server=access.server, ca=access.ca, sign_seconds=patience(cluster)
        )
        return path

    def deletion(self, cluster: Cluster) -> str:
        """What ``delete`` would do, as text."""
        if facts(cluster).created or facts(cluster).creating:
            return f"delete the {self.name} cluster {cluster.settings.name}"
        return f"leave the {self.name} cluster as it was" if facts(cluster).found else ""

    def delete(self, cluster: Cluster, *, purge: bool) -> list[str]:  # noqa: ARG002
        """Delete what was created here; take back what was added to what was not."""
        known = facts(cluster)
        report: list[str] = []
        if known.created or known.creating:
            report.append(self.destroy(cluster))
        elif known.found:
            report += self._withdraw(cluster)
        forget_identities(cluster)
        for file in (
            "admin.conf",
            "approver.conf",
            "approver-policy.json",
            "bootstrap.conf",
            "ca.crt",
            "client-ca.crt",
            *CREDENTIALS,
        ):
            (cluster.state.etc / file).unlink(missing_ok=True)
        if cluster.state.exists():
            cluster.state.update(external={}, created_objects=[], known_nodes={}, service_ranges=[], pod_network={})
        return report

    # --- steps -----------------------------------------------------------------------------------------------------

    def _cluster_step(self, cluster: Cluster, *, after: tuple[str, ...]) -> Step:
        found: list[Found | None] = []
        stopped: list[str] = []

        def look() -> Finding:
            try:
                found[:] = [self.find(cluster)]
            except StoppedError as error:
                stopped.append(error.message)
                return Finding.differs(f"{error.message}; start it")
            except HalfMadeError as error:
                return Finding.differs(f"{error.message}; make it again", [f"- {self.name} cluster", "+ another one"])
            there = found[0]
            if there is None:
                return Finding.differs(f"create a {self.name} cluster", [f"+ {self.name} cluster"])
            words = "made here" if there.created else "adopted"
            if self._unchanged(cluster, there):
                return Finding.ok(f"{facts(cluster).server}, {words}")
            verb = "take up" if there.created else "adopt"
            return Finding.differs(f"{verb} the {self.name} cluster {cluster.settings.name}")

        def change(say: Progress) -> str:
            if stopped:
                self.start(cluster, say)
                found[:] = [self.find(cluster)]
            there = found[0] if found else None
            if not found:
                say("deleting what an interrupted run left of the cluster")
                self.destroy(cluster)
                update_facts(cluster, creating=None, created=False, ids=[])
            if there is None:
                there = self._create(cluster, say)
            self._take_up(cluster, there, say)
            return f"{facts(cluster).server}, {'made here' if there.created else 'adopted'}"

        return Step(
            name="API server",
            key=API_SERVER_STEP,
            look=look,
            change=change,
            after=(BINARIES_STEP, PREPARATION_STEP, *after),
        )

    def _create(self, cluster: Cluster, say: Progress) -> Found:
        self._end_orphans(cluster)
        update_facts(cluster, creating=_now(), created=False, ids=[])
        there = self.create(cluster, say)
        update_facts(cluster, creating=None, created=True, ids=list(there.ids))
        return there

    def _end_orphans(self, cluster: Cluster) -> None:
        """A tool that outlived the run that started it would undo, or double, what is made now."""
        stop(self.orphans(cluster), grace_seconds=cluster.settings.timeouts.stop_grace_seconds)

    def orphans(self, cluster: Cluster) -> list[ProcessRecord]:
        """The processes of its tool that outlived the run that started them."""
        known = {record.process.pid for record in cluster.state.records()}
        strays = [process for process in cluster.state.stray_processes() if process.pid not in known]
        return [process for process in strays if self.name in _programs(process.pid)]

    def _unchanged(self, cluster: Cluster, there: Found) -> bool:
        known = facts(cluster)
        path = cluster.state.admin_kubeconfig
        if not path.is_file() or load_yaml(path.read_bytes()) != there.kubeconfig:
            return False
        if known.node_address != there.node_address or known.created is not there.created:
            return False
        if known.registry_address != there.registry_address:
            return False
        try:
            return cluster_uid(cluster.admin()) == known.uid and client_ca(cluster.admin()) == _read(
                cluster.state.etc / "client-ca.crt"
            )
        except ApiError:
            return False

    def _take_up(self, cluster: Cluster, there: Found, say: Progress) -> None:
        """Keep the facts. Written in such an order that a run that dies in between takes it up again."""
        state = cluster.state
        cluster.close()
        write_file(state.admin_kubeconfig, _dump(there.kubeconfig))
        cluster.forget_admin()
        credentials = read_credentials(state.admin_kubeconfig)
        kube = cluster.admin()
        another = f"`invoke down --purge --name {cluster.settings.name}`, then `invoke up`, makes another one"
        uid = wait_for_answer(kube, cluster.settings, say, hint=another if there.created else "")
        if uid != facts(cluster).uid:
            if not there.created:
                check_node_names(kube, cluster.node_names())
                self.preflight(cluster, kube, say)
            # Another cluster under the old name: certificates of the old one are worth nothing here.
            forget_identities(cluster)
        ca = credentials.ca if credentials.verify and credentials.ca else root_ca(kube)
        for file, pem in (("ca.crt", ca), ("client-ca.crt", client_ca(kube))):
            if pem:
                write_file(state.etc / file, pem)
            else:
                (state.etc / file).unlink(missing_ok=True)
        update_facts(
            cluster,
            uid=uid,
            server=credentials.server,
            node_address=there.node_address,
            registry_address=there.registry_address,
            created=there.created,
            creating=None,
            ids=list(there.ids),
            **there.remember,
        )

    def _hosting_step(self, cluster: Cluster) -> Step:
        """KEP-1755: how tools (Tilt, Skaffold, ctlptl) learn of a local registry."""
        from wasilet.controlplane.local_registry import registry_address

        def wanted() -> KubeObject:
            host = registry_address(cluster.ports()["registry"])
            inside = f"{facts(cluster).registry_address}:{cluster.ports()['registry_for_nodes']}"
            text = f'host: "{host}"\nhostFromContainerRuntime: "{inside}"\n'
            return {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": "local-registry-hosting",
                    "namespace": "kube-public",
                    "labels": {OURS: "wasilet"},
                },
                "data": {"localRegistryHosting.v1": text},
            }

        def look() -> Finding:
            if not cluster.state.admin_kubeconfig.is_file():
                return Finding.differs("say in kube-public where the registry is")
            if not facts(cluster).registry_address:
                return Finding.skip("the cluster's nodes cannot pull from it")
            try:
                there = cluster.admin().find(HOSTING)
            except ApiError as error:
                if error.code:
                    raise
                # The cluster is stopped; when this is to be changed it runs.
                return Finding.differs("see that kube-public says where the registry is")
            if there is None:
                return Finding.differs("say in kube-public where the registry is", ["+ local-registry-hosting"])
            if not is_ours(there):
                return Finding.ok("kube-public names another registry already; left alone")
            if there.get("data") != wanted()["data"]:
                return Finding.differs("correct it", ["- local-registry-hosting", "+ local-registry-hosting"])
            return Finding.ok("kube-public/local-registry-hosting")

        def change(_: Progress) -> str:
            kube = cluster.admin()
            if kube.find(HOSTING) is None:
                kube.create(HOSTING.rpartition("/")[0], wanted())
            else:
                kube.patch(HOSTING, {"data": wanted()["data"]})
            return "kube-public/local-registry-hosting"

        return Step(
            name="registry's notice", look=look, change=change, after=(API_SERVER_STEP, REGISTRY_FOR_NODES_STEP)
        )

    # --- leaving an adopted cluster ----------------------------------------------------------------------------------

    def _withdraw(self, cluster: Cluster) -> list[str]:
        try:
            with contextlib.suppress(HarnessError):
                self.unwire(cluster)
            return [f"the {self.name} cluster stays; took back {withdraw(cluster)} objects"]
        except (ApiError, UsageError) as error:
            return [f"the {self.name} cluster stays as it is: {error.message}"]


class StoppedError(HarnessError):
    """A cluster that the harness created does not run, as after the machine was restarted; it can be started."""


class HalfMadeError(HarnessError):
    """A cluster that a killed run of the harness began and did not finish; it can be deleted and made again."""


def patience(cluster: Cluster) -> float:
    """How long the signer of certificates may take, in seconds: in a cluster that was made a moment ago the
    controller-manager may still be starting."""
    return cluster.settings.timeouts.ready_seconds if facts(cluster).created else SIGN_SECONDS


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat().replace("+00:00", "Z")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _dump(data: KubeObject) -> bytes:
    import yaml

    return yaml.safe_dump(data, sort_keys=False).encode()


def _programs(pid: int) -> set[str]:
    """What a process may be called: a tool that is a script has its interpreter, and that one's options, before it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3]
    except OSError:
        return set()
    return {Path(word.decode(errors="replace")).name for word in words}
