"""What every pod worker works with: one object per node, handed down by the manager."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from wasilet_common.oci.credentials import Credential
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.images.model import Images
from wasilet_node.kube.base import EventRecorder, Kube, KubeObject
from wasilet_node.network.attachment import MachineNetwork, Networks
from wasilet_node.pods.http_policy import Outbound
from wasilet_node.pods.nodeinfo import NodeSource
from wasilet_node.pods.probes import ProbeObserver, ignore
from wasilet_node.pods.status_pace import StatusPace
from wasilet_node.pods.under_way import UnderWay
from wasilet_node.runtime.protocol import Runtime
from wasilet_node.settings import NodePaths
from wasilet_node.volumes.base import Volumes
from wasilet_node.volumes.host_threads import HostThreads


class Environments(Protocol):
    """``wasilet_node.pods.environment.EnvironmentBuilder``, as the workers use it."""

    async def build(
        self,
        pod: Pod,
        container: Container,
        *,
        pod_ips: Sequence[str],
        host_ips: Sequence[str],
        allocatable: Mapping[str, str],
    ) -> dict[str, str]:
        """The variables of one container. Raises ContainerConfigError."""


class PullSecretReader(Protocol):
    """``wasilet_node.kube.references.References``, as far as pull secrets go."""

    async def secret(self, namespace: str, name: str, *, pod_uid: str, max_age_seconds: float = 0.0) -> KubeObject:
        """The Secret. Raises KubeError."""

    def release(self, pod_uid: str) -> None:
        """The pod is gone."""


CredentialParser = Callable[[Sequence[KubeObject]], Sequence[Credential]]
"""Pull secrets, decoded, into what ``Images.ensure`` takes."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Intervals of the workers, in seconds; tests shorten them."""

    image_retry: float = 10.0
    """Between attempts to have an image; within the registry's own back-off they cost nothing."""

    config_retry_first: float = 1.0
    config_retry_max: float = 10.0
    volume_refresh: float = 60.0
    stop_timeout: float = 30.0
    """How long the runtime may take to kill and reap an instance."""


@dataclass(frozen=True, kw_only=True)
class PodDependencies:
    """All that a worker calls. ``wall_clock``: seconds since the epoch."""

    kube: Kube
    runtime: Runtime
    images: Images
    volumes: Volumes
    events: EventRecorder
    environments: Environments
    references: PullSecretReader
    parse_credentials: CredentialParser
    paths: NodePaths
    node: NodeSource
    timing: Timing = Timing()
    observe_probe: ProbeObserver = ignore
    host_threads: HostThreads = field(default_factory=HostThreads)
    """For files that may lie on a volume of the machine."""

    networks: Networks = field(default_factory=MachineNetwork)

    outbound: Outbound = field(default_factory=Outbound)
    """Where no pod's modules may connect to."""

    room: Callable[[Pod], str] = lambda _pod: ""
    """Why the node has no room for a pod that is here, as its spec would have it; empty: it has."""

    wall_clock: Callable[[], float] = time.time

    status_pace: StatusPace = field(default_factory=lambda: StatusPace(time.monotonic))
    under_way: UnderWay = field(default_factory=UnderWay)
