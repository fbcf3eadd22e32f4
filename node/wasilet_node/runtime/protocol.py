"""What the agent and the supervisor say to each other, and what the rest of the agent knows of the runtime.

The wire is length-prefixed JSON over a Unix socket (see ``wasilet_node.runtime.client``). Its version is part of the
first message, so that an agent that was upgraded can still talk to the supervisor that keeps its older containers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

PROTOCOL_VERSION = 2
"""2: a hello carries the supervisor's secret."""


class GuestKind(StrEnum):
    """What a compiled file holds."""

    MODULE = "module"
    """A core module that imports wasi_snapshot_preview1."""

    COMPONENT = "component"
    """A component of world ``wasi:cli/command``."""


class ContainerState(StrEnum):
    """CRI's container states."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One preopened directory. ``host`` is an absolute path of a directory, ``guest`` the name the module sees."""

    host: str
    guest: str
    read_only: bool = False
    root: str = ""
    """Not empty: a folder above ``host`` whose inside guests may change while a container starts (a subPath). The
    sandbox must then open ``host`` by ``wasilet_node.runtime.safe_path.open_directory(root, host)``, which follows no
    link, and preopen ``/proc/self/fd/<fd>``; a path that was checked by name could have been swapped since."""


@dataclass(frozen=True, kw_only=True)
class HttpPolicy:
    """What wasi-experimental-http may do: origins with scheme (``https://api.example``), and a limit in flight."""

    allowed_origins: tuple[str, ...]
    """The pod's list."""

    max_concurrent_requests: int | None = None
    local_origins: tuple[str, ...] = ()
    """Origins that the node's operator lets pods call although ``wasilet_common.addresses`` refuses them."""

    own_addresses: tuple[str, ...] = ()
    """The node's, which no origin may lead to."""

    api_servers: tuple[tuple[str, int], ...] = ()
    """Hosts or addresses of the cluster's API server, with their ports: refused, too."""

    kubelet_ports: tuple[int, ...] = ()
    """Refused on every address, beside 10250 and 10255."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a component that answers HTTP requests (``wasi:http``) is served. The defaults are what is safe for most."""

    port: int = 8080
    """TCP, on all addresses of the network that the container runs in."""

    reuse: int | None = None
    """Requests that one instance answers; None: 1 for WASI 0.2, whose guests do not expect to keep state between
    requests, and 128 for 0.3, whose do."""

    max_concurrent_requests: int = 128
    """More wait for their turn, and get 503 when ``request_timeout_seconds`` has passed."""

    max_connections: int = 1000
    """The one that was idle longest is closed for one more."""

    request_timeout_seconds: float = 30.0
    """From a request's head to the head of its answer."""

    idle_timeout_seconds: float = 60.0
    """Between two pieces of a body, and of a connection without a request."""

    header_timeout_seconds: float = 10.0
    """From a request's first byte to the end of its head."""

    max_header_bytes: int = 32 * 1024
    max_body_bytes: int = 8 * 1024 * 1024
    """Of a request."""

    linger_seconds: float = 5.0
    """Once a stop was asked for, connections are still taken while they come, this long at most: those who send
    requests here learn of the end a moment later."""


@dataclass(frozen=True, kw_only=True)
class HttpCounters:
    """What a server has counted since its start."""

    in_flight: int
    connections: int
    instances: int
    """Made so far."""

    seconds: float
    """Of all requests together."""

    buckets: tuple[int, ...]
    """Requests by duration: ``component_host.counters.BUCKET_SECONDS``, and one more for those that took longer."""

    statuses: Mapping[int, int]
    """Requests by status; 499: the client had gone."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """All that is needed to run one instance of a container. Serialisable to JSON; secrets in ``env`` stay off argv."""

    id: str
    """64 hex digits, unique for each instance (each restart is a new id)."""

    pod_uid: str
    pod_namespace: str
    pod_name: str
    container_name: str
    attempt: int
    """0 for the first instance: the ``n`` of ``<n>.log`` and of ``restartCount``."""

    artifact: str
    """Path of the precompiled file."""

    kind: GuestKind
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    mounts: tuple[Mount, ...]
    log_path: str
    """Absolute path of the CRI log file; its folder is made by the supervisor."""

    image: str = ""
    image_id: str = ""
    memory_limit_bytes: int | None = None
    cpu_limit_millicores: int | None = None
    cpu_request_millicores: int | None = None
    http: HttpPolicy | None = None
    server: ServerSettings | None = None
    """None: it runs and ends. Otherwise the component answers HTTP requests, and was compiled with epochs."""

    network: str = ""
    """The key of the pod's network namespace, which the guest runs in and may open sockets in; empty: it runs in the
    machine's, without sockets."""

    etc_files: tuple[tuple[str, str], ...] = ()
    """What the process sees in place of files of the machine's /etc (absolute path there, file to show), by a mount
    namespace of its own: name lookup. Needs ``network``."""

    stdin: bool = False
    """Hold a pipe to the guest's stdin for those who attach; otherwise the guest reads end of file at once."""

    stdin_once: bool = False
    """The first attached client that ends its input, or leaves, ends the guest's."""

    tty: bool = False
    """An attached client may interrupt the guest, as a terminal's Ctrl-C does."""

    annotations: dict[str, str] = field(default_factory=dict)
    """Opaque to the runtime, given back by ``list``: what the agent needs after its own restart."""


@dataclass(frozen=True, kw_only=True)
class ContainerStatus:
    """What the supervisor knows of one instance. Times are nanoseconds since the epoch; 0: not yet."""

    id: str
    pod_uid: str
    pod_namespace: str
    pod_name: str
    container_name: str
    attempt: int
    image: str
    image_id: str
    log_path: str
    state: ContainerState
    pid: int | None = None
    created_at_ns: int = 0
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    """``Completed``, ``Error``, ``OOMKilled``, ``StartError``, ``ContainerStatusUnknown``."""

    message: str = ""
    """A trap's message and backtrace, or why the start failed."""

    inherited: bool = False
    """The supervisor that ran it is gone, and all that it ran with it; this one knows only the record."""

    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ContainerUsage:
    """Resource usage of a running instance."""

    id: str
    cpu_nanoseconds: int
    memory_bytes: int
    timestamp_ns: int
    http: HttpCounters | None = None
    """Of a server."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a running instance is held to from now on. None: no limit, no request."""

    memory_limit_bytes: int | None
    cpu_limit_millicores: int | None
    cpu_request_millicores: int | None


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """The outcome of a fresh instance run beside a container (exec probes, ``kubectl exec``)."""

    exit_code: int
    output: bytes
    """stdout and stderr together, at most the limit that was asked for."""

    timed_out: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """What keeps native code in a sandbox from what is not its own."""

    name: str
    holds: bool
    detail: str
    """What it does; or what is without it, and why it is missing."""

    @property
    def line(self) -> str:
        """For a log."""
        return f"fence of sandboxes, {self.name}: {'holds' if self.holds else 'missing'}, {self.detail}"


@dataclass(frozen=True, kw_only=True)
class RuntimeCapabilities:
    """What this machine lets the runtime enforce; part of the hello."""

    cpu_limits: bool
    """False: ``cpu_limit_millicores`` is not enforced (no cgroup may be made); the agent reports it in an event."""

    memory_cgroup: bool
    """False: memory limits are kept by the supervisor's own watch on resident size instead."""

    wasmtime_version: str
    pod_networks: bool = False
    """Whether containers may run in network namespaces of their pods."""

    fences: tuple[Fence, ...] = ()
    """Of its sandboxes, those that are missing on this machine included."""


@dataclass(frozen=True, kw_only=True)
class StreamFrame:
    """A piece of output of an exec or of an attached container. ``stream``: ``stdout`` or ``stderr``."""

    stream: str
    data: bytes


class RuntimeUnavailableError(Exception):
    """The supervisor does not answer; the agent starts a new one and tries again."""


class StartError(Exception):
    """A container could not be started; the message is meant for status and event (``RunContainerError``)."""


class ResizeError(Exception):
    """The limits of a running container cannot be moved now; the message is meant for status and event."""


class UnknownContainerError(Exception):
    """No running container has this id; the message names it."""


class ExecStream(Protocol):
    """A fresh instance beside a container, or a view of a running one (``attach``), as ``kubectl`` needs it."""

    def frames(self) -> AsyncIterator[StreamFrame]:
        """Output as it comes; ends when the guest does (then ``exit_code`` and ``error`` are set), or is raised
        RuntimeUnavailableError. A reader that is slow slows an exec down, and is cut off from an attach."""

    async def write_stdin(self, data: bytes) -> None:
        """Waits until the guest's pipe has taken it; data for a guest that is gone is dropped."""

    async def close_stdin(self) -> None:
        """End of file for the guest; of an attach only where the container's ``stdin_once`` asks for it."""

    async def interrupt(self) -> None:
        """Ctrl-C: SIGINT for the guest. Of an attach only where the container has a ``tty``."""

    async def close(self) -> None:
        """Kill the exec (an attach only ends); idempotent."""

    @property
    def exit_code(self) -> int | None:
        """None until ``frames`` ended."""

    @property
    def error(self) -> str:
        """Why it could not be started, or a trap's message."""


class Runtime(Protocol):
    """The runtime as the pod workers see it; ``wasilet_node.runtime.client`` implements it, tests have a fake."""

    async def start(self, config: ContainerConfig) -> ContainerStatus:
        """Start an instance; the same id twice starts it once (a start record is written before the fork)."""

    async def stop(
        self, container_id: str, *, timeout_seconds: float = 10.0, grace_seconds: float = 0.0
    ) -> ContainerStatus | None:
        """End an instance and wait until it is reaped and its log is drained. None: unknown id.

        A server drains for ``grace_seconds`` before it is killed; nothing else is told of its end beforehand.
        """

    async def resize(
        self, container_id: str, resources: Resources, *, annotations: Mapping[str, str]
    ) -> ContainerStatus:
        """Move the limits of a running instance without a restart, and note ``annotations`` beside those that it has.
        Raises ResizeError, UnknownContainerError, RuntimeUnavailableError."""

    async def list(self) -> Sequence[ContainerStatus]:
        """All instances that were not removed, exited ones included."""

    async def remove(self, container_id: str) -> None:
        """Forget an exited instance: records and cgroup. Unknown ids are fine. Logs are the agent's to remove."""

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        timeout_seconds: float,
        max_output_bytes: int = 16 * 1024,
        stdin: bytes = b"",
    ) -> ExecResult:
        """Run a fresh instance with the mounts, environment and limits of ``container_id`` and another argv."""

    @property
    def capabilities(self) -> RuntimeCapabilities:
        """What this machine lets it enforce. Raises RuntimeUnavailableError before the first connection."""

    async def usage(self) -> Sequence[ContainerUsage]:
        """Usage of all running instances."""

    def events(self) -> AsyncIterator[ContainerStatus]:
        """Statuses as they change (running, exited). After a reconnect the listener must ``list`` again."""
