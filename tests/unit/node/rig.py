"""A Node and a Lease, as the API server keeps them, for tests of registration."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

from wasilet_node.kube.base import ConflictError, KubeError, KubeObject, NotFoundError, WatchEvent

from tests.unit.node.fake_kube import FakeKube


class NodeKube(FakeKube):
    """``wasilet_node.kube.base.Kube`` for one Node and its Lease; patches merge as the API server merges them."""

    def __init__(self) -> None:
        self.objects: dict[str, KubeObject] = {}
        self.calls: list[tuple[str, str, KubeObject]] = []
        self.failures: list[KubeError] = []
        self._version = 0
        self._events: asyncio.Queue[WatchEvent] = asyncio.Queue()

    def count(self, verb: str, path: str) -> int:
        """How often that was called."""
        return sum(each[:2] == (verb, path) for each in self.calls)

    def put(self, path: str, body: KubeObject) -> KubeObject:
        """Write as somebody else."""
        self._version += 1
        body = copy.deepcopy(body)
        body["metadata"].setdefault("uid", f"uid-{self._version}")
        body["metadata"]["resourceVersion"] = str(self._version)
        type_ = "MODIFIED" if path in self.objects else "ADDED"
        self.objects[path] = body
        if "/nodes/" in path:
            self._events.put_nowait(WatchEvent(type=type_, object=copy.deepcopy(body)))
        return copy.deepcopy(body)

    def drop(self, path: str) -> None:
        """Delete as somebody else."""
        gone = self.objects.pop(path)
        self._events.put_nowait(WatchEvent(type="DELETED", object=gone))

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        self._note("GET", path, {})
        return copy.deepcopy(self._found(path))

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        self._note("POST", path, body)
        target = f"{path}/{body['metadata']['name']}"
        if target in self.objects:
            raise ConflictError(409, "AlreadyExists", f"{target} already exists")
        return self.put(target, body)

    async def patch(
        self, path: str, body: KubeObject, *, content_type: str = "", timeout_seconds: float = 10.0
    ) -> KubeObject:
        self._note("PATCH", path, body)
        target = path.removesuffix("/status")
        return self.put(target, _merge(self._found(target), body))

    async def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        assert field_selector is not None
        name = field_selector.removeprefix("metadata.name=")
        while not self._events.empty():
            self._events.get_nowait()
        if (found := self.objects.get(f"{path}/{name}")) is not None:
            yield WatchEvent(type="SYNC", object=copy.deepcopy(found))
        yield WatchEvent(type="SYNCED", object={})
        while True:
            yield await self._events.get()

    def _note(self, verb: str, path: str, body: KubeObject) -> None:
        self.calls.append((verb, path, copy.deepcopy(body)))
        if self.failures:
            raise self.failures.pop(0)

    def _found(self, path: str) -> KubeObject:
        if path not in self.objects:
            raise NotFoundError(404, "NotFound", f"{path} not found")
        return self.objects[path]


class Recorded:
    """``wasilet_node.kube.base.EventRecorder`` that keeps what it is told."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.uids: list[str] = []

    def event(self, obj: KubeObject, type_: str, reason: str, message: str, *, field_path: str = "") -> None:
        assert obj["metadata"]["name"]
        self.reasons.append(reason)
        self.uids.append(str(obj["metadata"]["uid"]))


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if isinstance(new, list):
            return [item for item in new if item != {"$patch": "replace"}]
        return new
    merged = {**old}
    for key, value in new.items():
        merged[key] = _merge(old.get(key), value)
    return merged
