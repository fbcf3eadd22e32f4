"""Stand-ins for what pod workers work with: an API server that keeps pods, a runtime that only pretends."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet_common.oci.credentials import Credential
from wasilet_node.images.model import EventSink, Image, ImageError, PullPolicy
from wasilet_node.kube.base import ConflictError, KubeObject, NotFoundError, WatchEvent
from wasilet_node.network.attachment import MachineNetwork, Networks
from wasilet_node.pods.dependencies import PodDependencies, Timing
from wasilet_node.pods.nodeinfo import NodeInfo
from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerState,
    ContainerStatus,
    ContainerUsage,
    ExecResult,
    GuestKind,
    Mount,
    Resources,
    RuntimeCapabilities,
    RuntimeUnavailableError,
    StartError,
)
from wasilet_node.settings import NodePaths
from wasilet_node.volumes.removal import Usage

from tests.unit.node.fake_kube import FakeKube

Pod = dict[str, Any]


def make_pod(name: str = "a", *, uid: str = "", containers: Sequence[Pod] | None = None, **spec: Any) -> Pod:
    """A pod as the API server would show it: bound to this node, with the defaults that matter."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid or f"uid-{name}",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "nodeName": "n",
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "containers": list(containers or [{"name": "c", "image": "reg/hello:1"}]),
            **spec,
        },
        "status": {"phase": "Pending", "qosClass": "BestEffort"},
    }


def make_instance(name: str = "c", *, attempt: int = 0, state: str = "running", **fields: Any) -> ContainerStatus:
    """An instance of a container of pod ``a``."""
    base = ContainerStatus(
        id=fields.pop("id", f"{name}-{attempt}"),
        pod_uid="uid-a",
        pod_namespace="default",
        pod_name="a",
        container_name=name,
        attempt=attempt,
        image=fields.pop("image", "reg/hello:1"),
        image_id="reg/hello@sha256:1",
        log_path="",
        state=ContainerState(state),
        created_at_ns=1_767_225_600_000_000_000 + attempt,
        started_at_ns=1_767_225_600_000_000_000,
        finished_at_ns=1_767_225_601_000_000_000 if state == "exited" else 0,
        exit_code=fields.pop("exit_code", 0 if state == "exited" else None),
    )
    return dataclasses.replace(base, **fields)


def _merge_status(status: Pod, patch: Mapping[str, Any]) -> None:
    for name, value in patch.items():
        if value is None:
            status.pop(name, None)
        elif name == "conditions":
            listed = status.setdefault("conditions", [])
            for change in value:
                if change.get("$patch") == "delete":
                    listed[:] = [each for each in listed if each["type"] != change["type"]]
                    continue
                for condition in listed:
                    if condition["type"] == change["type"]:
                        condition.update(change)
                        for gone in [k for k, v in change.items() if v is None]:
                            del condition[gone]
                        break
                else:
                    listed.append({"lastProbeTime": None, **change})
        elif isinstance(value, list) and value and value[-1] == {"$patch": "replace"}:
            status[name] = value[:-1]
        else:
            status[name] = copy.deepcopy(value)


class PodKube(FakeKube):
    """Keeps pods by path and tells one watcher; deletes with grace as the API server does."""

    def __init__(self) -> None:
        self.objects: dict[str, Pod] = {}
        self.patches: list[tuple[str, Pod]] = []
        self.deletes: list[tuple[str, int | None, str | None]] = []
        self.fail: Callable[[str, str], Exception | None] = lambda _verb, _path: None
        self._versions = itertools.count(10)
        self._watchers: list[asyncio.Queue[WatchEvent]] = []

    def _path(self, pod: Pod) -> str:
        return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"

    def _tell(self, type_: str, pod: Pod) -> None:
        for queue in self._watchers:
            queue.put_nowait(WatchEvent(type=type_, object=copy.deepcopy(pod)))

    def add(self, pod: Pod) -> None:
        pod = copy.deepcopy(pod)
        pod["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[self._path(pod)] = pod
        self._tell("ADDED", pod)

    def change(self, name: str, change: Callable[[Pod], None]) -> None:
        pod = self.objects[f"/api/v1/namespaces/default/pods/{name}"]
        change(pod)
        pod["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("MODIFIED", pod)

    def ask_deletion(self, name: str, *, grace: int = 30) -> None:
        path = f"/api/v1/namespaces/default/pods/{name}"
        pod = self.objects[path]
        if grace == 0:
            self._drop(path)
            return
        pod["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:30Z", "deletionGracePeriodSeconds": grace}
        pod["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("MODIFIED", pod)

    def _drop(self, path: str) -> None:
        pod = self.objects[path]
        pod["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 0}
        pod["metadata"]["resourceVersion"] = str(next(self._versions))
        if pod["metadata"].get("finalizers"):
            self._tell("MODIFIED", pod)
            return
        del self.objects[path]
        self._tell("DELETED", pod)

    def pod(self, name: str) -> Pod:
        return self.objects[f"/api/v1/namespaces/default/pods/{name}"]

    def _find(self, path: str) -> Pod:
        if path not in self.objects:
            raise NotFoundError(404, "NotFound", f'pods "{path}" not found')
        return self.objects[path]

    def _check(self, verb: str, path: str) -> None:
        error = self.fail(verb, path)
        if error is not None:
            raise error

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        await asyncio.sleep(0)
        self._check("get", path)
        return copy.deepcopy(self._find(path))

    async def patch(
        self,
        path: str,
        body: KubeObject,
        *,
        content_type: str = "application/strategic-merge-patch+json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        await asyncio.sleep(0)
        path = path.removesuffix("/status")
        self._check("patch", path)
        pod = self._find(path)
        if body["metadata"]["uid"] != pod["metadata"]["uid"]:
            raise ConflictError(409, "Conflict", "Precondition failed: UID in precondition")
        self.patches.append((path, copy.deepcopy(body["status"])))
        _merge_status(pod["status"], body["status"])
        pod["metadata"]["resourceVersion"] = str(next(self._versions))
        self._tell("MODIFIED", pod)
        return copy.deepcopy(pod)

    async def delete(
        self,
        path: str,
        *,
        grace_period_seconds: int | None = None,
        uid: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        await asyncio.sleep(0)
        self._check("delete", path)
        self.deletes.append((path, grace_period_seconds, uid))
        pod = self._find(path)
        if uid is not None and uid != pod["metadata"]["uid"]:
            raise ConflictError(409, "Conflict", "Precondition failed: UID in precondition")
        self._drop(path)
        return copy.deepcopy(pod)

    async def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue()
        for pod in list(self.objects.values()):
            queue.put_nowait(WatchEvent(type="SYNC", object=copy.deepcopy(pod)))
        queue.put_nowait(WatchEvent(type="SYNCED", object={}))
        self._watchers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)


def _touch(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


class FakeRuntime:
    """Instances run until a test ends them with ``exit``."""

    def __init__(self) -> None:
        self.known: dict[str, ContainerStatus] = {}
        self.configs: list[ContainerConfig] = []
        self.stopped: list[str] = []
        self.removed: list[str] = []
        self.execs: list[tuple[str, tuple[str, ...]]] = []
        self.exec_result: Callable[[Sequence[str]], ExecResult] = lambda _argv: ExecResult(exit_code=0, output=b"")
        self.start_error: dict[str, str] = {}
        self.start_delay = 0.0
        self.stop_delay = 0.0
        self.lost_answers = 0
        self.capabilities = RuntimeCapabilities(cpu_limits=True, memory_cgroup=True, wasmtime_version="1")
        self.resized: list[Resources] = []
        self.resize_error: Exception | None = None
        self.memory: dict[str, int] = {}
        self._listeners: list[asyncio.Queue[ContainerStatus]] = []

    def _change(self, status: ContainerStatus) -> None:
        self.known[status.id] = status
        for queue in self._listeners:
            queue.put_nowait(status)

    def latest(self, container: str = "c", pod: str = "a") -> ContainerStatus:
        found = [i for i in self.known.values() if (i.container_name, i.pod_name) == (container, pod)]
        return max(found, key=lambda i: i.attempt)

    def running(self) -> list[str]:
        return [i.container_name for i in self.known.values() if i.state is ContainerState.RUNNING]

    def exit(self, container: str = "c", code: int = 0, *, pod: str = "a", message: str = "") -> None:
        self._end(self.latest(container, pod), code, message)

    def lose(self) -> None:
        """The supervisor dies with all that it runs. Its successor, which listeners reach by listing, has its records.

        As after a restart of the machine, a ``shutdown``, or a crash.
        """
        for instance in list(self.known.values()):
            ended = instance
            if instance.state is not ContainerState.EXITED:
                ended = dataclasses.replace(
                    instance, state=ContainerState.EXITED, exit_code=137, reason="ContainerStatusUnknown"
                )
            self.known[instance.id] = dataclasses.replace(ended, inherited=True)

    def _end(self, instance: ContainerStatus, code: int, message: str = "") -> None:
        self._change(
            dataclasses.replace(
                instance,
                state=ContainerState.EXITED,
                exit_code=code,
                finished_at_ns=time.time_ns(),
                reason="Completed" if code == 0 else "Error",
                message=message,
            )
        )

    async def start(self, config: ContainerConfig) -> ContainerStatus:
        await asyncio.sleep(0)
        if self.lost_answers > 0 and config.id in self.known:
            self.lost_answers -= 1
            raise RuntimeUnavailableError("the answer was lost")
        if config.id in self.known:
            return self.known[config.id]
        self.configs.append(config)
        if config.container_name in self.start_error:
            raise StartError(self.start_error[config.container_name])
        status = ContainerStatus(
            id=config.id,
            pod_uid=config.pod_uid,
            pod_namespace=config.pod_namespace,
            pod_name=config.pod_name,
            container_name=config.container_name,
            attempt=config.attempt,
            image=config.image,
            image_id=config.image_id,
            log_path=config.log_path,
            state=ContainerState.RUNNING,
            created_at_ns=time.time_ns(),
            started_at_ns=time.time_ns(),
            annotations=config.annotations,
        )
        _touch(config.log_path)
        if self.lost_answers > 0:
            # It runs, but no report of it arrives: the connection broke.
            self.known[status.id] = status
            raise RuntimeUnavailableError("the answer was lost")
        if self.start_delay:
            await asyncio.sleep(self.start_delay)
        self._change(status)
        return status

    async def stop(
        self, container_id: str, *, timeout_seconds: float = 10.0, grace_seconds: float = 0.0
    ) -> ContainerStatus | None:
        await asyncio.sleep(self.stop_delay)
        instance = self.known.get(container_id)
        if instance is None:
            return None
        if instance.state is ContainerState.RUNNING:
            self.stopped.append(instance.container_name)
            self._end(instance, 137)
        return self.known[container_id]

    async def resize(
        self, container_id: str, resources: Resources, *, annotations: Mapping[str, str]
    ) -> ContainerStatus:
        await asyncio.sleep(0)
        if self.resize_error is not None:
            raise self.resize_error
        self.resized.append(resources)
        before = self.known[container_id]
        self._change(dataclasses.replace(before, annotations={**before.annotations, **annotations}))
        return self.known[container_id]

    async def list(self) -> Sequence[ContainerStatus]:
        await asyncio.sleep(0)
        return list(self.known.values())

    async def remove(self, container_id: str) -> None:
        await asyncio.sleep(0)
        self.removed.append(container_id)
        self.known.pop(container_id, None)

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        timeout_seconds: float,
        max_output_bytes: int = 16 * 1024,
        stdin: bytes = b"",
    ) -> ExecResult:
        await asyncio.sleep(0)
        self.execs.append((container_id, tuple(argv)))
        return self.exec_result(argv)

    async def usage(self) -> Sequence[ContainerUsage]:
        return [
            ContainerUsage(id=i.id, cpu_nanoseconds=0, memory_bytes=self.memory.get(i.pod_name, 0), timestamp_ns=0)
            for i in self.known.values()
            if i.state is ContainerState.RUNNING
        ]

    async def events(self) -> AsyncIterator[ContainerStatus]:
        queue: asyncio.Queue[ContainerStatus] = asyncio.Queue()
        self._listeners.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.remove(queue)


class FakeImages:
    """Has every image; ``errors`` and ``delay`` by reference."""

    def __init__(self) -> None:
        self.errors: dict[str, ImageError] = {}
        self.delay: dict[str, float] = {}
        self.asked: list[tuple[str, tuple[Credential, ...]]] = []
        self.in_use: frozenset[str] = frozenset()
        self.kind = GuestKind.MODULE
        self.server = False

    async def ensure(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        self.asked.append((reference, tuple(credentials)))
        await asyncio.sleep(self.delay.get(reference, 0))
        if reference in self.errors:
            raise self.errors[reference]
        return Image(
            reference=reference,
            image_id=f"{reference}@sha256:1",
            manifest_digest="sha256:1",
            module_digest="sha256:2",
            module_path=Path("/m.wasm"),
            kind=self.kind,
            server=self.server,
            size_bytes=1,
            module_name="hello.wasm",
        )

    async def ensure_files(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        return await self.ensure(reference, policy=policy, credentials=credentials, event=event, pod_uid=pod_uid)

    async def compiled(self, image: Image, *, owner: str = "", event: EventSink | None = None) -> Path:
        return Path("/compiled")

    async def list(self) -> Sequence[dict[str, object]]:
        return []

    async def delete_unused(self) -> int:
        return 0

    def set_in_use(self, module_digests: frozenset[str]) -> None:
        self.in_use = module_digests


class FakeVolumes:
    """Volumes that need nothing, unless a test says so."""

    def __init__(self) -> None:
        self.refuse: Exception | None = None
        self.setup_error: Exception | None = None
        self.image_error: Exception | None = None
        self.placed: list[tuple[str, str]] = []
        self.message = ""
        self.set_up: list[str] = []
        self.torn_down: list[str] = []
        self.refreshed: list[str] = []
        self.on_disk: list[str] = []

    def check(self, pod: Pod) -> None:
        if self.refuse is not None:
            raise self.refuse

    async def setup(self, pod: Pod) -> None:
        if self.setup_error is not None:
            raise self.setup_error
        self.set_up.append(pod["metadata"]["uid"])

    async def place_image(self, pod: Pod, volume: str, archive: Path, digest: str) -> None:
        if self.image_error is not None:
            raise self.image_error
        self.placed.append((volume, digest))

    def mounts(
        self,
        pod: Pod,
        container: Pod,
        environment: Mapping[str, str],
        *,
        attempt: int = 0,
        working_dir: str = "",
    ) -> Sequence[Mount]:
        return []

    async def read_file(self, pod: Pod, volume: str, path: str, *, limit_bytes: int) -> bytes | None:
        return None

    def termination_message(self, pod: Pod, container: Pod, *, attempt: int = 0) -> str:
        return self.message

    async def refresh(self, pod: Pod) -> None:
        self.refreshed.append(pod["metadata"]["uid"])

    async def teardown(self, pod_uid: str) -> None:
        self.torn_down.append(pod_uid)

    async def usage(self, pod: Pod) -> Mapping[str, Usage]:
        return {}

    def loose_pods(self) -> Sequence[str]:
        return ()

    async def loose_usage(self, pod: Pod) -> Mapping[str, Usage]:
        return {}

    def instance_folder(self, pod: Pod, container: str, attempt: int) -> Path:
        return Path("/nothing/is/here")

    async def orphans(self) -> Sequence[str]:
        return self.on_disk


class FakeEvents:
    """Remembers events as ``reason: message``."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.paths: list[str] = []

    def event(self, obj: KubeObject, type_: str, reason: str, message: str, *, field_path: str = "") -> None:
        self.said.append(f"{reason}: {message}")
        self.paths.append(field_path)

    def has(self, start: str) -> bool:
        return any(line.startswith(start) for line in self.said)


class FakeReferences:
    """No secrets; remembers who let go."""

    def __init__(self) -> None:
        self.secrets: dict[str, KubeObject] = {}
        self.released: list[str] = []

    async def secret(self, namespace: str, name: str, *, pod_uid: str, max_age_seconds: float = 0.0) -> KubeObject:
        if name not in self.secrets:
            raise NotFoundError(404, "NotFound", f'secret "{name}" not found')
        return self.secrets[name]

    def release(self, pod_uid: str) -> None:
        self.released.append(pod_uid)


class FakeEnvironments:
    """An environment of literals."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def build(
        self,
        pod: Pod,
        container: Pod,
        *,
        pod_ips: Sequence[str],
        host_ips: Sequence[str],
        allocatable: Mapping[str, str],
    ) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {str(entry["name"]): str(entry.get("value", "")) for entry in container.get("env") or ()}


NODE = NodeInfo(
    name="n",
    addresses=("192.0.2.1",),
    labels={"kubernetes.io/os": "wasm32-wasi"},
    allocatable={"cpu": "2", "memory": "1Gi", "pods": "3"},
)
TIMING = Timing(image_retry=0.02, config_retry_first=0.02, config_retry_max=0.02, volume_refresh=3600)


@dataclasses.dataclass
class Fakes:
    """One of each."""

    data: Path
    kube: PodKube = dataclasses.field(default_factory=PodKube)
    runtime: FakeRuntime = dataclasses.field(default_factory=FakeRuntime)
    images: FakeImages = dataclasses.field(default_factory=FakeImages)
    volumes: FakeVolumes = dataclasses.field(default_factory=FakeVolumes)
    events: FakeEvents = dataclasses.field(default_factory=FakeEvents)
    references: FakeReferences = dataclasses.field(default_factory=FakeReferences)
    environments: FakeEnvironments = dataclasses.field(default_factory=FakeEnvironments)
    networks: Networks = dataclasses.field(default_factory=MachineNetwork)
    node: NodeInfo = NODE
    offset: float = 0.0
    """Seconds that the wall clock is ahead."""

    timing: Timing = TIMING

    @property
    def paths(self) -> NodePaths:
        return NodePaths(data=self.data)

    def dependencies(self) -> PodDependencies:
        return PodDependencies(
            kube=self.kube,
            runtime=self.runtime,
            images=self.images,
            volumes=self.volumes,
            events=self.events,
            environments=self.environments,
            references=self.references,
            parse_credentials=lambda secrets: [Credential(registry=str(s["registry"])) for s in secrets],
            paths=self.paths,
            node=lambda: self.node,
            timing=self.timing,
            networks=self.networks,
            wall_clock=lambda: time.time() + self.offset,
        )


async def eventually(condition: Callable[[], object], *, seconds: float = 3.0, what: str = "") -> None:
    """Wait until a condition holds; fail naming it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what or condition}"
        await asyncio.sleep(0.002)
