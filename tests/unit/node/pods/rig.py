"""A pod manager among stand-ins, and what the API server then shows of its pods."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from wasilet_node.pods.manager import PodManager
from wasilet_node.settings import NodeSettings

from tests.unit.node.pods.fakes import Fakes, eventually


@contextlib.asynccontextmanager
async def running(fakes: Fakes) -> AsyncIterator[PodManager]:
    services = fakes.dependencies()
    manager = PodManager(
        kube=services.kube,
        runtime=services.runtime,
        images=services.images,
        volumes=services.volumes,
        events=services.events,
        settings=NodeSettings(node_name="n", paths=services.paths),
        environment=services.environments,
        references=services.references,
        parse_credentials=services.parse_credentials,
        node=services.node,
        timing=fakes.timing,
    )
    manager._services = dataclasses.replace(services, room=manager.room)
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
