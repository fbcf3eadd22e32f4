"""What a provider is: the part of a cluster that is not Wasilet's own.

A provider creates an API server with a controller-manager and a scheduler behind it, or finds one. Everything else
(registry, approver, bootstrap token, nodes, kubeconfig) is the same for all and lives in ``wasilet.cluster.up``. To add
one: write the class, name it in ``wasilet.providers.by_name``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from wasilet.errors import HarnessError, UsageError
from wasilet.kube.client import Kube
from wasilet.kube.credentials import Credentials, read_credentials
from wasilet.settings import Settings
from wasilet.state import State

if TYPE_CHECKING:
    from wasilet.controlplane.components import Component
    from wasilet.steps import Step

API_SERVER_STEP = "api-server"
"""The key of the step after which the administrator's kubeconfig works; every provider has one."""

NETWORK_STEP = "pod-network"
"""The key of the step, where a provider has one, after which nodes know which network their pods get."""

BINARIES_STEP = "binaries"
PREPARATION_STEP = "preparation"


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the parts that Wasilet adds reach the cluster, and are reached by it."""

    server: str
    """The API server's URL, as nodes on this machine use it."""

    ca: bytes | None
    """PEM of the authority of the API server's certificate; None: one that the system trusts."""

    client_ca: bytes | None
    """PEM of the authority that signs clients (the API server when it calls a node); None: unknown, tokens only."""

    node_address: str
    """The address of this machine at which the API server reaches nodes."""

    notes: tuple[str, ...] = ()
    """Lines to print for the user, such as that proxies will not work on loopback."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Whether a provider can be used on this machine."""

    usable: bool
    detail: str
    hint: str = ""


@dataclass(kw_only=True)
class Cluster:
    """One run's view of one cluster: settings, folder, and what its steps learn on the way."""

    settings: Settings
    state: State
    provider: Provider
    binaries: dict[str, Path] = field(default_factory=dict)
    client: Kube | None = field(default=None, repr=False)
    """An open one with the administrator's rights; :meth:`admin` makes it."""

    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> Self:
        """So that :meth:`close` is not forgotten."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to the API server; another one is opened when it is needed again."""
        with self._lock:
            if self.client is not None:
                self.client.close()

    def binary(self, name: str) -> str:
        """The path of an acquired binary. Raises HarnessError when the acquiring step did not run."""
        try:
            return str(self.binaries[name])
        except KeyError:
            raise HarnessError(f"{name} is not there yet", hint="`invoke up` brings it") from None

    def ports(self) -> Mapping[str, int]:
        """The remembered ports."""
        return self.state.cluster.ports

    def admin(self) -> Kube:
        """A client with the administrator's rights, by ``state.admin_kubeconfig``. Raises UsageError."""
        with self._lock:
            if self.client is None:
                self.client = Kube(self.admin_credentials())
            return self.client

    def forget_admin(self) -> None:
        """Read ``state.admin_kubeconfig`` again when a client is next asked for."""
        with self._lock:
            if self.client is not None:
                self.client.close()
            self.client = None

    def admin_credentials(self) -> Credentials:
        """What is in ``state.admin_kubeconfig``."""
        if not self.state.admin_kubeconfig.is_file():
            raise UsageError(f"cluster {self.settings.name!r} is not up", hint="`invoke up` brings it up")
        return read_credentials(self.state.admin_kubeconfig)

    def node_count(self) -> int:
        """How many nodes the cluster has or is to have; a cluster never loses one by `up`."""
        return max(self.settings.nodes, self.state.cluster.nodes, 1)

    def node_names(self) -> tuple[str, ...]:
        """The names of the nodes that Wasilet runs."""
        return tuple(f"{self.settings.name[:50]}-{number}" for number in range(1, self.node_count() + 1))

    def taints(self) -> tuple[str, ...]:
        """What new nodes register."""
        return self.provider.default_taints if self.settings.taints is None else self.settings.taints


PROVIDER_OPTIONS = ("image", "kubernetes_version", "config", "context", "pod_security")


def check_options(provider: Provider, settings: Settings) -> None:
    """Raises UsageError for an option that the provider would silently ignore."""
    for option in PROVIDER_OPTIONS:
        if getattr(settings, option) and option not in provider.options:
            raise UsageError(
                f"--{option.replace('_', '-')} means nothing to provider {provider.name!r}", hint=provider.summary
            )


class Provider(Protocol):
    """One way of having a cluster."""

    @property
    def name(self) -> str:
        """As typed after ``--provider``."""

    @property
    def summary(self) -> str:
        """One line for tables."""

    @property
    def options(self) -> tuple[str, ...]:
        """Which of ``PROVIDER_OPTIONS`` mean something to it."""

    @property
    def default_taints(self) -> tuple[str, ...]:
        """Taints that wasm nodes register: none where they are the only nodes."""

    @property
    def binaries(self) -> tuple[str, ...]:
        """What ``wasilet.controlplane.acquire`` must install, besides the registry and kubectl."""

    @property
    def wanted_ports(self) -> tuple[str, ...]:
        """Names of PortSettings that must be allocated, besides ``registry`` and ``kubelet``."""

    def detect(self, settings: Settings) -> Detection:
        """Whether what the provider needs is on this machine; reads only, and answers within seconds."""

    def confirm(self, settings: Settings) -> None:
        """Called before the first change, never in check mode. Raises UsageError when the user has to agree first."""

    def create_steps(self, cluster: Cluster) -> Sequence[Step]:
        """The steps that stand the cluster up or adopt a running one, after BINARIES_STEP and PREPARATION_STEP.
        One has the key API_SERVER_STEP, and writes ``state.admin_kubeconfig`` before or while it runs."""

    def must_settle(self) -> tuple[str, ...]:
        """Names of steps that need not be over when nodes join, but must be when ``up`` ends."""

    def access(self, cluster: Cluster) -> Access:
        """Facts for nodes; called after API_SERVER_STEP."""

    def approver_kubeconfig(self, cluster: Cluster) -> Path:
        """A kubeconfig with the rights of ``wasilet:approver`` alone; called after RBAC exists. Made when missing."""

    def components(self, cluster: Cluster) -> Mapping[str, Callable[[], Component]]:
        """The provider's own long-lived processes by name, for ``status`` and ``logs``; empty when it has none."""

    def deletion(self, cluster: Cluster) -> str:
        """What :meth:`delete` would do, as text; empty: nothing."""

    def delete(self, cluster: Cluster, *, purge: bool) -> list[str]:
        """End what the provider started, but for the processes in ``state.records()``, which are ended for it.
        Returns lines for the report. An adopted cluster is left as it was."""
