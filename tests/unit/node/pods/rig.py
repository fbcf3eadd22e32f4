"""A pod manager among stand-ins, and what the API server then shows of its pods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from wasilet_node.pods.manager import PodManager

from tests.unit.node.pods.fakes import Fakes, eventually


@contextlib.asynccontextmanager
async def running(fakes: Fakes) -> AsyncIterator[PodManager]:
    manager = PodManager(fakes.dependencies(), node_name="n")
    task = asyncio.create_task(manager.run())
    try:
        await eventually(manager.synced.is_set)
        yield manager
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def phase(fakes: Fakes, name: str = "a") -> str:
    return str(fakes.kube.pod(name)["status"]["phase"])


def container(fakes: Fakes, name: str = "c", pod: str = "a") -> dict[str, Any]:
    status = fakes.kube.pod(pod)["status"]
    listed = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return next((each for each in listed if each["name"] == name), {})


def condition(fakes: Fakes, type_: str) -> dict[str, Any]:
    return next(c for c in fakes.kube.pod("a")["status"]["conditions"] if c["type"] == type_)


def gone(fakes: Fakes, name: str = "a") -> bool:
    return f"/api/v1/namespaces/default/pods/{name}" not in fakes.kube.objects
