"""What the kubelet API knows of pods, and the pod routes: ``/pods`` and ``/runningpods/``.

Pods are decoded JSON with their latest status, as the pod manager holds them; ``PodSource`` is all that is asked of it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from aiohttp import web
from wasilet_common.pod_fields import Pod

from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, Runtime


class PodSource(Protocol):
    """The pods of this node, from memory; all of it is cheap and never waits."""

    @property
    def synced(self) -> asyncio.Event:
        """Set once the pods are known, some moments after the start."""

    def pods(self) -> list[Pod]:
        """All pods bound to this node, each with its latest status."""

    def pod(self, namespace: str, name: str) -> Pod | None:
        """One pod with its latest status; None: this node has no such pod."""


def known_pod(pods: PodSource, namespace: str, name: str) -> Pod | None:
    """One pod, None when there is none. Raises as ``require_synced``: before that it cannot be known."""
    pod = pods.pod(namespace, name)
    if pod is None:
        require_synced(pods)
    return pod


def require_synced(pods: PodSource) -> None:
    """Raises HTTPServiceUnavailable while the agent has not listed its pods yet."""
    if not pods.synced.is_set():
        raise web.HTTPServiceUnavailable(
            text="the node agent has just started and does not know its pods yet: try again",
            headers={"Retry-After": "1"},
        )


class PodViews:
    """The handlers of the pod routes."""

    def __init__(self, *, pods: PodSource, runtime: Runtime) -> None:
        self._pods = pods
        self._runtime = runtime

    async def list(self, _: web.Request) -> web.Response:
        """``GET /pods``: v1.PodList of the pods bound to this node."""
        require_synced(self._pods)
        return _pod_list([{"apiVersion": "v1", "kind": "Pod", **pod} for pod in self._pods.pods()])

    async def running(self, _: web.Request) -> web.Response:
        """``GET /runningpods/``: what the runtime runs, whether or not the API server knows of it."""
        by_uid: dict[str, list[ContainerStatus]] = {}
        for status in await self._runtime.list():
            if status.state is ContainerState.RUNNING:
                by_uid.setdefault(status.pod_uid, []).append(status)
        return _pod_list(
            [
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": group[0].pod_name, "namespace": group[0].pod_namespace, "uid": uid},
                    "spec": {"containers": [{"name": each.container_name, "image": each.image} for each in group]},
                    "status": {},
                }
                for uid, group in by_uid.items()
            ]
        )


def _pod_list(items: list[Pod]) -> web.Response:
    return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
