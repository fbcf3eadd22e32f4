"""The API server of the node's unit tests: refuses every call, until a test's own kind of it answers some.

So each of those kinds holds only what it is about (pods, references, reviews, a Node, events), and a call that a test
did not foresee fails by its path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from wasilet_node.kube.base import KubeObject, WatchEvent


class FakeKube:
    """``wasilet_node.kube.base.Kube``, all of it unforeseen."""

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        raise AssertionError(f"unforeseen: get {path}")

    async def list(
        self,
        path: str,
        *,
        field_selector: str | None = None,
        label_selector: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        raise AssertionError(f"unforeseen: list {path}")

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        raise AssertionError(f"unforeseen: create {path}")

    async def replace(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        raise AssertionError(f"unforeseen: replace {path}")

    async def patch(
        self,
        path: str,
        body: KubeObject,
        *,
        content_type: str = "application/strategic-merge-patch+json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        raise AssertionError(f"unforeseen: patch {path}")

    async def delete(
        self,
        path: str,
        *,
        grace_period_seconds: int | None = None,
        uid: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        raise AssertionError(f"unforeseen: delete {path}")

    def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        raise AssertionError(f"unforeseen: watch {path}")
