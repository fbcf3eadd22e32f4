"""Every setting of the node agent, as frozen dataclasses: a docstring and a unit under each field.

Nothing here reads the environment or the command line; ``wasilet_node.__main__`` does, and builds these.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NodePaths:
    """Where the agent keeps things. Every folder is made with mode 0700."""

    data: Path
    """The root of all that follows, ``--data-dir``."""

    @property
    def pki(self) -> Path:
        """Client and serving certificates and keys."""
        return self.data / "pki"

    @property
    def pods(self) -> Path:
        """``<pod uid>/``: volumes, token files, termination logs of a pod."""
        return self.data / "pods"

    @property
    def images(self) -> Path:
        """The content-addressed blob store and its index."""
        return self.data / "images"

    @property
    def compiled(self) -> Path:
        """Precompiled modules; trusted, so never readable or writable by others."""
        return self.data / "compiled"

    @property
    def containers(self) -> Path:
        """``<container id>/``: the supervisor's start and exit records."""
        return self.data / "containers"

    @property
    def network(self) -> Path:
        """Records of the pods' networks, and the files that they resolve names by."""
        return self.data / "network"

    @property
    def logs(self) -> Path:
        """The root of ``pods/<ns>_<name>_<uid>/<container>/<n>.log``."""
        return self.data / "logs"


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Container log files, as kubelet's ``containerLogMaxSize`` and ``containerLogMaxFiles``."""

    max_size_bytes: int = 10 * 1024 * 1024
    max_files: int = 5


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Pulling and keeping images."""

    insecure_registries: tuple[str, ...] = ()
    """``host[:port]`` of registries reached by plain HTTP. Loopback always may be."""

    registry_config: Path | None = None
    """A docker ``config.json`` with the node's own logins, which serve every pod after the pod's pull secrets."""

    max_parallel_pulls: int = 4
    connect_timeout_seconds: float = 5.0
    read_timeout_seconds: float = 30.0
    max_image_bytes: int = 512 * 1024 * 1024
    """A larger module is refused before it is read."""

    gc_high_threshold_percent: int = 85
    gc_low_threshold_percent: int = 80
    gc_minimum_age_seconds: float = 120.0
    compile_timeout_seconds: float = 120.0
    compile_memory_bytes: int = 2 * 1024 * 1024 * 1024
    max_parallel_compiles: int = 2


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """A pod network of the node's own. Without it pods share the machine's network."""

    cluster_cidr: ipaddress.IPv4Network
    """Of all pods of the cluster: between those nothing is translated."""

    service_cidr: ipaddress.IPv4Network
    """Of all Services: the machine gets a route there, if it has none yet."""

    uplink: ipaddress.IPv4Interface
    """The node's end of the link to the machine, as ``10.244.255.2/30``; the machine's end is the address below. With a
    ``bridge``: the node's address in that network, as ``172.18.255.254/16``."""

    bridge: str | None = None
    """A bridge of the machine's that the link is a port of, such as that of a container engine's network in which the
    cluster's other nodes are; None: the link leads to the machine alone."""

    gateway: ipaddress.IPv4Address | None = None
    """The machine's address on that bridge."""

    keeper: Path | None = None
    """The socket of what keeps the node's user namespace (``wasilet_node.network.keeper``), where the node is an
    ordinary user's; None: it is joined to the machine itself, as root."""

    cluster_dns: tuple[str, ...] = ()
    """Name servers of pods with dnsPolicy ClusterFirst; none: they use the machine's."""

    cluster_domain: str = "cluster.local"
    kube_proxy: Path | None = None
    """The executable that makes Services work; None: there are none."""

    kube_proxy_kubeconfig: Path | None = None
    """Its credential, with an address of the API server that is reached from the node's network."""

    network_policies_kubeconfig: Path | None = None
    """The credential of what keeps NetworkPolicies; None: they have no effect."""

    @property
    def machine_address(self) -> ipaddress.IPv4Address:
        """The machine's end of the link."""
        return self.gateway if self.gateway is not None else self.uplink.ip - 1


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """The whole agent. See docs/node.md for the flags and environment names."""

    node_name: str
    paths: NodePaths
    bootstrap_file: Path | None = None
    """A kubeconfig with a bootstrap token; needed until the node holds a client certificate."""

    node_ip: str | None = None
    """The address that is advertised; None: found, and found again every 10 s."""

    hostname: str | None = None
    port: int = 10250
    bind_address: str | None = None
    """What the HTTPS server listens on; None: the node's address."""

    labels: dict[str, str] = field(default_factory=dict)
    taints: tuple[str, ...] = ()
    """``key=value:Effect``, registered at creation of the Node only."""

    max_pods: int = 110
    logs: LogSettings = LogSettings()
    images: ImageSettings = ImageSettings()
    network: NetworkSettings | None = None
    """None: pods share the machine's network."""

    network_absent: str = ""
    """Why they do, as the harness that started the node knows it, for the Node's condition."""

    status_interval_seconds: float = 10.0
    status_report_interval_seconds: float = 300.0
    lease_duration_seconds: int = 40
    lease_renew_interval_seconds: float = 10.0
    local_origins: tuple[str, ...] = ()
    """Origins on the node itself, or otherwise refused (``wasilet_common.addresses``), that pods' modules may call when
    their annotation lists them, as ``http://127.0.0.1:8090``."""

    outbound_policy: Path | None = None
    """A file that says which namespaces may call what (``wasilet_node.pods.outbound_policy``); None: what annotations
    list."""

    provider_id: str | None = None
