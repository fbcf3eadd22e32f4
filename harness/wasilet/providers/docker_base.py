"""Clusters whose machines are Docker containers (kind, k3d): known by labels, the user's or Wasilet's by container ids.

The ids are written down as containers appear, and a cluster is Wasilet's as long as one of them is there: a node that
the user adds takes nothing away. A run that is killed before it wrote the first one leaves the instant it began.

The API server reaches wasm nodes, and the cluster's own nodes reach the registry, by the gateway of the cluster's
Docker network: both listen there and on loopback, nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence

from wasilet.errors import ApiError, CommandError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.credentials import read_credentials
from wasilet.process import check_cancelled
from wasilet.providers.base import Cluster
from wasilet.providers.docker import Container, Docker, gateway
from wasilet.providers.existing_base import ExternalProvider, Found, HalfMadeError, StoppedError
from wasilet.providers.existing_facts import facts, made_since, update_facts
from wasilet.storage import write_file

_ANSWER_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
"""An engine goes on with a container that it was asked for when the caller is gone."""

_DELETE_ATTEMPTS = 3


class ContainedProvider(ExternalProvider):
    """The base of kind and k3d."""

    def label(self, name: str) -> str:
        """``key=value`` that every container of a cluster has."""
        raise NotImplementedError

    def is_server(self, container: Container) -> bool:
        """Whether a container runs a control plane."""
        raise NotImplementedError

    def is_node(self, container: Container) -> bool:
        """Whether a container runs pods."""
        raise NotImplementedError

    def lasts(self, container: Container) -> bool:  # noqa: ARG002
        """Whether a container stays as long as its cluster, unlike a helper of the tool's."""
        return True

    def is_marked(self, cluster: Cluster, container: Container) -> bool | None:
        """Whether a container that lasts has the mark of this cluster; None: the tool cannot mark."""

    def clear_leftovers(self, cluster: Cluster) -> None:
        """Remove what the tool makes besides containers and forgets when it is interrupted. Raises HarnessError."""

    def kubeconfig(self, cluster: Cluster) -> KubeObject:
        """The administrator's, by the tool. Raises HarnessError when there is none (yet)."""
        raise NotImplementedError

    def delete_by_tool(self, cluster: Cluster) -> None:
        """Delete the cluster. Raises HarnessError."""
        raise NotImplementedError

    def delete_command(self, name: str) -> str:
        """What a user would type."""
        raise NotImplementedError

    def start_command(self, name: str, stopped: Sequence[str]) -> str:
        """What a user would type to start a cluster, of which these containers are stopped."""
        raise NotImplementedError

    # --- ExternalProvider --------------------------------------------------------------------------------------------

    def find(self, cluster: Cluster) -> Found | None:
        """By label."""
        name = cluster.settings.name
        docker = Docker(cluster.settings.environ)
        containers = docker.containers(self.label(name))
        if not containers:
            return None
        ours = self.made_here(cluster, containers)
        servers = [container for container in containers if self.is_server(container)]
        stopped = [container.name for container in containers if self.lasts(container) and not container.running]
        if ours and facts(cluster).creating:
            # An API server answers long before its tool has done its last step.
            if not servers or stopped or self.orphans(cluster) or not self._answers(cluster):
                raise HalfMadeError(f"an interrupted run left {self.name} cluster {name} half made")
        elif not servers and ours:
            raise HalfMadeError(f"{self.name} cluster {name} has lost its control plane")
        elif not servers:
            raise self.half_made(name)
        elif stopped and ours:
            raise StoppedError(f"{self.name} cluster {name} is stopped")
        elif stopped:
            raise UsageError(f"{self.name} cluster {name} is stopped", hint=self.start_command(name, stopped))
        return self.found(cluster, containers, created=ours)

    def found(self, cluster: Cluster, containers: Sequence[Container], *, created: bool) -> Found:
        """The facts of running containers. Raises HarnessError when the cluster is not whole."""
        name = cluster.settings.name
        nodes = [container for container in containers if self.is_node(container)]
        address = cluster.settings.node_ip or gateway(nodes, what=f"{self.name} cluster {name}")
        try:
            kubeconfig = self.kubeconfig(cluster)
        except HarnessError as error:
            raise self.half_made(name) from error
        return Found(
            kubeconfig=kubeconfig,
            node_address=address,
            registry_address=address,
            created=created,
            ids=tuple(container.id for container in containers if self.lasts(container)),
        )

    def note_containers(self, cluster: Cluster) -> None:
        """Write down what is being made, as it appears: by this a later run knows it again."""
        known = set(facts(cluster).ids)
        # The note is a help; an engine that is too busy to answer must not end the creation.
        with contextlib.suppress(CommandError):
            found = Docker(cluster.settings.environ).containers(self.label(cluster.settings.name))
            if new := {container.id for container in found if self.lasts(container)} - known:
                update_facts(cluster, ids=sorted(known | new))

    def made_here(self, cluster: Cluster, containers: Sequence[Container]) -> bool:
        """Whether these are containers that Wasilet had made: one is known by its id or its mark, or, when the run was
        killed before it knew any, all were made since it began."""
        known = facts(cluster)
        if not (known.created or known.creating):
            return False
        ids = set(known.ids)
        lasting = [container for container in containers if self.lasts(container)]
        marks = [self.is_marked(cluster, container) for container in lasting]
        if any(marks) or any(container.id in ids for container in containers):
            return True
        since = known.creating
        if not since or (lasting and ids) or False in marks:
            return False
        return all(made_since(container.created, since) for container in containers)

    def destroy(self, cluster: Cluster) -> str:
        """Delete it, when the containers of that name are those that were made here."""
        name = cluster.settings.name
        docker = Docker(cluster.settings.environ)
        docker.check()
        self._end_orphans(cluster)
        unsettled = bool(facts(cluster).creating)
        deleted = 0
        while deleted < _DELETE_ATTEMPTS:
            containers = docker.containers(self.label(name))
            if containers and not (deleted or self.made_here(cluster, containers)):
                return f"{self.name} cluster {name} is another one by now, and stays"
            if containers:
                self.delete_by_tool(cluster)
                deleted += 1
            elif unsettled:
                unsettled = False
                check_cancelled()
                time.sleep(_SETTLE_SECONDS)
            else:
                break
        self.clear_leftovers(cluster)
        return f"{self.name} cluster {name} " + ("deleted" if deleted else "was gone already")

    def node_containers(self, cluster: Cluster) -> list[Container]:
        """Those that run pods."""
        containers = Docker(cluster.settings.environ).containers(self.label(cluster.settings.name))
        return [container for container in containers if self.is_node(container)]

    def node_ids(self, cluster: Cluster) -> list[str]:
        """Their ids."""
        return [container.id for container in self.node_containers(cluster)]

    def half_made(self, name: str) -> UsageError:
        """There is a cluster of that name, which cannot be used and may not be deleted."""
        return UsageError(
            f"{self.name} cluster {name} has no working control plane, and was not made here",
            hint=f"`{self.delete_command(name)}` removes it",
        )

    def is_whole(self, kube: Kube) -> bool:  # noqa: ARG002
        """Whether the tool has done its last step; not asked while it runs. Raises ApiError."""
        return True

    def _answers(self, cluster: Cluster) -> bool:
        """Whether the cluster is whole after all: the run that made it died after the tool had finished."""
        path = cluster.state.etc / f"{self.name}.look.conf"
        try:
            cluster.state.create()
            write_file(path, json.dumps(self.kubeconfig(cluster)).encode())
            kube = Kube(read_credentials(path))
        except HarnessError:
            return False
        finally:
            path.unlink(missing_ok=True)
        deadline = time.monotonic() + _ANSWER_SECONDS
        try:
            while time.monotonic() < deadline:
                if kube.ready() and kube.get("/api/v1/nodes").get("items") and self.is_whole(kube):
                    return True
                time.sleep(cluster.settings.timeouts.poll_seconds)
        except ApiError:
            return False
        finally:
            kube.close()
        return False
