"""The floor of ``invoke bench floor``: a node that runs nothing and only writes what a kubelet must write.

``python -m wasilet_dev.floor_agent KUBECONFIG NODE [--events]`` registers NODE and reports each pod that is bound to it
as Running, by the API client of the real node. With ``--events`` it also writes the kubelet's three Events of a start,
one after another behind the status, and at the end of a pod its last status and the Killing Event. What is faster than
this is not a node; so the distance to it is what the real node itself costs. It ends with the process that holds its
standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from wasilet_common.time_format import rfc3339, rfc3339_micro
from wasilet_node.kube import kubeconfig
from wasilet_node.kube.base import ConflictError, KubeError, KubeObject, NotFoundError
from wasilet_node.kube.client import KubeClient

PODS = 10_000
HOSTNAME = "kubernetes.io/hostname"
_LEASE_SECONDS = 10.0
_START_EVENTS = ("Pulled", "Created", "Started")
_NODES = "/api/v1/nodes"
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class FloorAgent:
    """One node and its pods."""

    def __init__(self, kube: KubeClient, node: str, *, events: bool) -> None:
        self._kube = kube
        self._node = node
        self._events = events
        self._started: set[str] = set()
        self._ended: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled. Raises KubeError when the node cannot be registered."""
        await self._register()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            group.create_task(self._follow())

    async def _register(self) -> None:
        metadata = {"name": self._node, "labels": {HOSTNAME: self._node}}
        node: KubeObject = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        try:
            await self._kube.create(_NODES, node)
        except ConflictError:
            pass
        sizes = {"cpu": "64", "memory": "256Gi", "pods": str(PODS)}
        now = _now()
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
        status = {"capacity": sizes, "allocatable": sizes, "conditions": [{**ready, "lastTransitionTime": now}]}
        await self._kube.patch(f"{_NODES}/{self._node}/status", {"status": status})

    async def _renew(self) -> None:
        path = f"{_LEASES}/{self._node}"
        while True:
            spec = {"holderIdentity": self._node, "leaseDurationSeconds": 40, "renewTime": _now(micro=True)}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._node}}
            try:
                await self._kube.patch(path, {"spec": spec}, content_type="application/merge-patch+json")
            except NotFoundError:
                await self._kube.create(_LEASES, {**lease, "spec": spec})
            except KubeError as error:
                sys.stderr.write(f"floor agent: {error}\n")
            await asyncio.sleep(_LEASE_SECONDS)

    async def _follow(self) -> None:
        async for change in self._kube.watch("/api/v1/pods", field_selector=f"spec.nodeName={self._node}"):
            if change.type in ("SYNC", "ADDED", "MODIFIED"):
                self._see(change.object)

    def _see(self, pod: KubeObject) -> None:
        uid = pod["metadata"]["uid"]
        if "deletionTimestamp" in pod["metadata"]:
            if uid not in self._ended:
                self._ended.add(uid)
                self._spawn(self._end(pod))
        elif uid not in self._started:
            self._started.add(uid)
            self._spawn(self._start(pod))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            sys.stderr.write(f"floor agent: {error}\n")

    async def _start(self, pod: KubeObject) -> None:
        now = _now()
        state = {"running": {"startedAt": now}}
        conditions = [
            {"type": type_, "status": "True", "lastTransitionTime": now}
            for type_ in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady")
        ]
        await self._patch(pod, {"phase": "Running", "startTime": now, "conditions": conditions}, state, ready=True)
        if self._events:
            for reason in _START_EVENTS:
                await self._event(pod, reason)

    async def _end(self, pod: KubeObject) -> None:
        path = _path(pod)
        try:
            if self._events:
                state = {"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": _now()}}
                await self._patch(pod, {"phase": "Failed"}, state, ready=False)
            await self._kube.delete(path, grace_period_seconds=0, uid=pod["metadata"]["uid"])
        except NotFoundError:
            return
        if self._events:
            await self._event(pod, "Killing")

    async def _patch(self, pod: KubeObject, status: dict[str, Any], state: dict[str, Any], *, ready: bool) -> None:
        containers = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": container["image"],
                "containerID": f"floor://{pod['metadata']['uid']}",
                "ready": ready,
                "started": ready,
                "restartCount": 0,
                "state": state,
            }
            for container in pod["spec"]["containers"]
        ]
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {**status, "containerStatuses": containers}}
        await self._kube.patch(f"{_path(pod)}/status", body)

    async def _event(self, pod: KubeObject, reason: str) -> None:
        metadata, now = pod["metadata"], _now()
        involved = {"kind": "Pod", "apiVersion": "v1", "name": metadata["name"], "namespace": metadata["namespace"]}
        name = f"{metadata['name']}.{time.time_ns():x}"
        body: KubeObject = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": {**involved, "uid": metadata["uid"]},
            "type": "Normal",
            "reason": reason,
            "message": f"{reason} container main",
            "source": {"component": "floor", "host": self._node},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self._kube.create(f"/api/v1/namespaces/{metadata['namespace']}/events", body)


def _path(pod: KubeObject) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _now(*, micro: bool = False) -> str:
    return (rfc3339_micro if micro else rfc3339)(time.time_ns())


def _end_with_parent() -> None:
    """The other end of standard input is closed by whatever way the benchmark ends."""
    sys.stdin.buffer.read()
    os._exit(0)


async def _main(path: Path, node: str, *, events: bool) -> None:
    found = kubeconfig.load(path)
    kube = KubeClient(found.cluster, found.credentials, user_agent="wasilet-floor")
    try:
        await FloorAgent(kube, node, events=events).run()
    finally:
        await kube.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m wasilet_dev.floor_agent", description=__doc__)
    parser.add_argument("kubeconfig", type=Path)
    parser.add_argument("node")
    parser.add_argument("--events", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, name="standard input", daemon=True).start()
    asyncio.run(_main(options.kubeconfig, options.node, events=options.events))


if __name__ == "__main__":
    main()
