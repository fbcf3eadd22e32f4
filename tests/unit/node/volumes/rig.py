"""What the tests of volumes, references and environments share: an API server in memory, pods, and a guest.

The guest is a real module in wasmtime, which reads and writes files below its preopens on command: whether a layout of
links and folders works for modules is a question for the sandbox, not for Python's ``open``.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import wasmtime
from wasilet_node.kube.base import ForbiddenError, KubeObject, NotFoundError, WatchEvent
from wasilet_node.kube.pod_certificates import PodCertificates
from wasilet_node.kube.references import References, ReferenceSettings
from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import open_directory, opened
from wasilet_node.settings import NodePaths
from wasilet_node.volumes.manager import VolumeManager
from wasilet_node.volumes.tokens import Tokens

from tests.unit.node.fake_kube import FakeKube


class ReferenceKube(FakeKube):
    """An API server in memory: ``put`` and ``remove`` reach watches at once."""

    def __init__(self) -> None:
        self.objects: dict[str, KubeObject] = {}
        self.calls: Counter[str] = Counter()
        self.forbidden: Counter[str] = Counter()
        self.bodies: list[KubeObject] = []
        self.unavailable: Exception | None = None
        self.delay_seconds = 0.0
        self.token_seconds = 3600
        self.certificates_served = True
        self.certificate_status: dict[str, Any] = {}
        """Of new PodCertificateRequests."""

        self.now = 1_800_000_000.0
        self._watches: list[tuple[str, str | None, asyncio.Queue[WatchEvent | Exception]]] = []

    def put(self, path: str, **body: Any) -> KubeObject:
        parts = path.split("/")
        metadata = {
            "name": parts[-1],
            "namespace": parts[4] if "namespaces" in parts else "",
            "uid": f"uid-of-{parts[-1]}",
        }
        known = path in self.objects
        self.objects[path] = {"metadata": metadata, **body}
        self._tell(path, WatchEvent(type="MODIFIED" if known else "ADDED", object=self.objects[path]))
        return self.objects[path]

    def config_map(self, name: str, data: dict[str, str], **more: Any) -> None:
        self.put(f"/api/v1/namespaces/default/configmaps/{name}", data=data, **more)

    def secret(self, name: str, data: dict[str, bytes], **more: Any) -> None:
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        self.put(f"/api/v1/namespaces/default/secrets/{name}", data=encoded, **more)

    def remove(self, path: str) -> None:
        self._tell(path, WatchEvent(type="DELETED", object=self.objects.pop(path)))

    def break_watches(self, error: Exception) -> None:
        for _, _, queue in self._watches:
            queue.put_nowait(error)

    @property
    def watching(self) -> int:
        return len(self._watches)

    def _matches(self, path: str, collection: str, selector: str | None) -> bool:
        parent, _, name = path.rpartition("/")
        if selector is not None and selector != f"metadata.name={name}":
            return False
        return parent == collection or (collection == "/api/v1/services" and parent.endswith("/services"))

    def _tell(self, path: str, event: WatchEvent) -> None:
        for collection, selector, queue in self._watches:
            if self._matches(path, collection, selector):
                queue.put_nowait(event)

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        self.calls[path] += 1
        await asyncio.sleep(self.delay_seconds)
        if self.unavailable is not None:
            raise self.unavailable
        if self.forbidden[path] > 0:
            self.forbidden[path] -= 1
            raise ForbiddenError(403, "Forbidden", f'"{path.rpartition("/")[2]}" is forbidden: no relationship found')
        if path not in self.objects:
            raise NotFoundError(404, "NotFound", f'things "{path.rpartition("/")[2]}" not found')
        return self.objects[path]

    async def list(
        self,
        path: str,
        *,
        field_selector: str | None = None,
        label_selector: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        assert path.endswith("/clustertrustbundles"), "nodes read other references one by name"
        self.calls[path] += 1
        await asyncio.sleep(self.delay_seconds)
        if self.unavailable is not None:
            raise self.unavailable
        found = [each for known, each in self.objects.items() if known.startswith(f"{path}/")]
        if not found and path not in self.objects:
            raise NotFoundError(404, "NotFound", "the server could not find the requested resource")
        return {"items": found}

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        self.calls[path] += 1
        self.bodies.append(body)
        if self.unavailable is not None:
            raise self.unavailable
        if self.forbidden[path] > 0:
            self.forbidden[path] -= 1
            raise NotFoundError(404, "NotFound", 'pods "p" not found')
        expires = self.now + self.token_seconds
        if path.endswith("/podcertificaterequests"):
            if not self.certificates_served:
                raise NotFoundError(404, "NotFound", "the server could not find the requested resource")
            name = f"req-{self.calls[path]}"
            return self.put(f"{path}/{name}", spec=body["spec"], status=self.certificate_status)
        claims = {
            "iat": int(self.now),
            "exp": int(expires),
            "kubernetes.io": {"pod": {"uid": body["spec"]["boundObjectRef"]["uid"]}},
            "n": self.calls[path],
        }
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        stamp = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"status": {"token": f"head.{payload}.sign", "expirationTimestamp": stamp}}

    async def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        queue: asyncio.Queue[WatchEvent | Exception] = asyncio.Queue()
        entry = (path, field_selector, queue)
        self._watches.append(entry)
        self.calls[f"watch {path} {field_selector}"] += 1
        try:
            for known, found in list(self.objects.items()):
                if self._matches(known, path, field_selector):
                    yield WatchEvent(type="SYNC", object=found)
            yield WatchEvent(type="SYNCED", object={})
            while True:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._watches.remove(entry)


def make_pod(
    *,
    uid: str = "pod-1",
    volumes: Sequence[dict[str, Any]] = (),
    containers: Sequence[dict[str, Any]] = (),
    **spec: Any,
) -> dict[str, Any]:
    return {
        "metadata": {"name": "web", "namespace": "default", "uid": uid, "labels": {"app": "web"}, "annotations": {}},
        "spec": {
            "serviceAccountName": "default",
            "nodeName": "wasm-1",
            "volumes": list(volumes),
            "containers": list(containers) or [make_container()],
            **spec,
        },
    }


def make_container(*mounts: dict[str, Any], name: str = "main", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "image": "x",
        "terminationMessagePath": "/dev/termination-log",
        "volumeMounts": list(mounts),
        **more,
    }


class Rig:
    """A volume manager with everything around it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.kube = ReferenceKube()

        def node() -> tuple[str, str | None]:
            return "wasm-1", "uid-node"

        self.references = References(
            self.kube,
            settings=ReferenceSettings(**{"lag_seconds": 0.2, **settings}),
            node=node,
            pod_certificates=PodCertificates(self.kube, node=node, jitter=lambda: 0.0, look_seconds=(0.01, 0.01)),
        )
        self.tokens = Tokens(self.references, clock=lambda: self.kube.now, jitter=lambda: 0.0)
        self.folder = folder
        self.memory = folder / "shm"
        self.memory.mkdir(exist_ok=True)
        self.volumes = self.manager()

    def manager(self) -> VolumeManager:
        """A manager as after a restart of the agent."""
        return VolumeManager(
            NodePaths(data=self.folder / "data"),
            self.references,
            allocatable=lambda: {"cpu": "4", "memory": "8Gi"},
            addresses=lambda _pod: ["10.1.2.3"],
            shared_memory=self.memory,
            tokens=self.tokens,
        )

    @property
    def pods(self) -> Path:
        return self.folder / "data" / "pods"

    async def mounts(
        self, pod: dict[str, Any], environment: dict[str, str] | None = None, **more: Any
    ) -> dict[str, Mount]:
        """Set up the pod; the mounts of its first container by guest name."""
        await self.volumes.setup(pod)
        found = self.volumes.mounts(pod, pod["spec"]["containers"][0], environment or {}, **more)
        assert len({mount.guest for mount in found}) == len(found), "a guest name was preopened twice"
        return {mount.guest: mount for mount in found}

    async def close(self) -> None:
        self.volumes.close()
        await self.references.close()


_GUEST = """
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (memory (export "memory") 2)
  ;; The path is at 1024, the data at 8192; 0: fd, 4: iovec, 12: count. A result below zero is an errno.
  (func (export "read") (param $dir i32) (param $length i32) (result i32)
    (local $errno i32)
    (local.set $errno (call $open (local.get $dir) (i32.const 1) (i32.const 1024) (local.get $length)
      (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 0)))
    (if (local.get $errno) (then (return (i32.sub (i32.const 0) (local.get $errno)))))
    (i32.store (i32.const 4) (i32.const 8192))
    (i32.store (i32.const 8) (i32.const 65536))
    (local.set $errno (call $read (i32.load (i32.const 0)) (i32.const 4) (i32.const 1) (i32.const 12)))
    (drop (call $close (i32.load (i32.const 0))))
    (if (local.get $errno) (then (return (i32.sub (i32.const 0) (local.get $errno)))))
    (i32.load (i32.const 12)))
  (func (export "write") (param $dir i32) (param $length i32) (param $size i32) (result i32)
    (local $errno i32)
    (local.set $errno (call $open (local.get $dir) (i32.const 1) (i32.const 1024) (local.get $length)
      (i32.const 9) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 0)))
    (if (local.get $errno) (then (return (i32.sub (i32.const 0) (local.get $errno)))))
    (i32.store (i32.const 4) (i32.const 8192))
    (i32.store (i32.const 8) (local.get $size))
    (local.set $errno (call $write (i32.load (i32.const 0)) (i32.const 4) (i32.const 1) (i32.const 12)))
    (drop (call $close (i32.load (i32.const 0))))
    (i32.sub (i32.const 0) (local.get $errno))))
"""


class Guest:
    """A running module with preopens. Paths are resolved as wasi-libc does it: longest prefix."""

    def __init__(self, mounts: Sequence[Mount]) -> None:
        engine = wasmtime.Engine()
        store = wasmtime.Store(engine)
        config = wasmtime.WasiConfig()
        for mount in mounts:
            if not mount.root:
                config.preopen_dir(mount.host, mount.guest, not mount.read_only)
                continue
            with opened(open_directory(mount.root, mount.host)) as fd:
                config.preopen_dir(f"/proc/self/fd/{fd}", mount.guest, not mount.read_only)
        store.set_wasi(config)
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        instance = linker.instantiate(store, wasmtime.Module(engine, _GUEST))
        self._store = store
        self._exports: Any = instance.exports(store)
        self._preopens = [(mount.guest.lstrip("/."), 3 + index) for index, mount in enumerate(mounts)]

    def _resolve(self, path: str) -> tuple[int, bytes]:
        path = path.lstrip("/")
        matching = [
            (len(prefix), fd, prefix)
            for prefix, fd in self._preopens
            if prefix in {"", path} or path.startswith(prefix + "/")
        ]
        if not matching:
            raise FileNotFoundError(path)
        length, fd, _ = max(matching)
        return fd, (path[length:].lstrip("/") or ".").encode()

    def read(self, path: str) -> bytes:
        """Raises OSError with the WASI errno."""
        fd, relative = self._resolve(path)
        memory = self._exports["memory"]
        memory.write(self._store, relative, 1024)
        count = self._exports["read"](self._store, fd, len(relative))
        if count < 0:
            raise OSError(-count, f"WASI errno {-count}", path)
        return bytes(memory.read(self._store, 8192, 8192 + count))

    def write(self, path: str, data: bytes) -> None:
        """Raises OSError with the WASI errno."""
        fd, relative = self._resolve(path)
        memory = self._exports["memory"]
        memory.write(self._store, relative, 1024)
        memory.write(self._store, data, 8192)
        errno = self._exports["write"](self._store, fd, len(relative), len(data))
        if errno:
            raise OSError(-errno, f"WASI errno {-errno}", path)
