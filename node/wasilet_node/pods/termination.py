"""Stopping containers: events, preStop hooks, the order of sidecars, and a grace that can only shrink.

A module gets no signal in WASI, so there is nothing to wait for between asking and killing: the grace is a limit for
preStop hooks and for the turn of sidecars, never a separate wait. Sidecars end after the regular containers, in
reverse order of the spec; when the grace is over all that is left is killed at once (KEP-753).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.backoff import RetryBackoff
from wasilet_common.pod_fields import Container, Pod, Role

from wasilet_node.pods import hooks
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.runtime.protocol import ContainerStatus, RuntimeUnavailableError

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 8


class Grace:
    """The time that is left to a stopping pod; needs a running loop."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._over = asyncio.Event()
        self._timer = self._loop.call_at(self._deadline, self._over.set)

    @property
    def remaining(self) -> float:
        """Seconds; 0 when it is over."""
        return max(0.0, self._deadline - self._loop.time())

    def shorten(self, seconds: float) -> None:
        """At most ``seconds`` from now on; a longer time changes nothing (a deletion's grace can only decrease)."""
        deadline = self._loop.time() + seconds
        if deadline < self._deadline:
            self._deadline = deadline
            self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._over.set)

    async def run(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do ``work`` until it ends (True; its exception is raised) or the grace does (False; it is cancelled)."""
        task = asyncio.ensure_future(work)
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                return True
            return False
        finally:
            for each in (task, over):
                each.cancel()
            await asyncio.gather(task, over, return_exceptions=True)

    def close(self) -> None:
        """No longer needed."""
        self._timer.cancel()


def kill_grace(pod: Pod, container: Mapping[str, Any], reason: str) -> float:
    """How long a single container may take to end: a probe can have its own limit (KEP-2238)."""
    field = {"LivenessProbe": "livenessProbe", "StartupProbe": "startupProbe"}.get(reason, "")
    own = (container.get(field) or {}).get("terminationGracePeriodSeconds")
    return pod_fields.grace_seconds(pod) if own is None else float(own)


Observe = Callable[[ContainerStatus], None]


async def kill_container(
    dependencies: PodDependencies,
    pod: Pod,
    container: Container,
    instance: ContainerStatus,
    *,
    message: str,
    grace: Grace,
    turn: Coroutine[Any, Any, None] | None = None,
) -> ContainerStatus | None:
    """Stop one instance. ``turn``: what to wait for after preStop, within the grace. None: the runtime no longer
    knows it. Raises RuntimeUnavailableError when the runtime stays away."""
    path = pod_fields.field_path(pod, container["name"])
    dependencies.events.event(pod, "Normal", "Killing", message, field_path=path)
    hook = (container.get("lifecycle") or {}).get("preStop")
    try:
        if hook is not None and grace.remaining > 0:
            try:
                done = await grace.run(
                    hooks.run_hook(
                        dependencies.runtime,
                        pod,
                        container,
                        instance.id,
                        hook,
                        timeout_seconds=grace.remaining,
                        networks=dependencies.networks,
                    )
                )
                if not done:
                    logger.info(
                        "preStop of %s in %s did not end in time", container["name"], pod_fields.format_pod(pod)
                    )
            except hooks.HookError as error:
                logger.info("%s", error)
                dependencies.events.event(pod, "Warning", "FailedPreStopHook", "PreStopHook failed", field_path=path)
        if turn is not None:
            waiting, turn = turn, None
            await grace.run(waiting)
    finally:
        if turn is not None:
            turn.close()
    drained: list[ContainerStatus] = []
    await grace.run(_drain(dependencies, instance.id, grace, drained))
    return drained[0] if drained else await stop_instance(dependencies, instance.id)


async def _drain(
    dependencies: PodDependencies, container_id: str, grace: Grace, drained: list[ContainerStatus]
) -> None:
    """A server ends when its requests are answered; everything else does at once. A grace that is shortened ends this,
    and so does a runtime that does not answer: killing follows."""
    seconds = grace.remaining
    if seconds <= 0:
        return
    with contextlib.suppress(RuntimeUnavailableError):
        stopped = await dependencies.runtime.stop(
            container_id, timeout_seconds=dependencies.timing.stop_timeout, grace_seconds=seconds
        )
        if stopped is not None:
            drained.append(stopped)


async def stop_instance(dependencies: PodDependencies, container_id: str) -> ContainerStatus | None:
    """Kill and reap; waits for a runtime that is being replaced. Raises RuntimeUnavailableError after 8 attempts."""
    retry = RetryBackoff(initial=0.2, maximum=5.0)
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return await dependencies.runtime.stop(container_id, timeout_seconds=dependencies.timing.stop_timeout)
        except RuntimeUnavailableError:
            if attempt == _MAX_ATTEMPTS:
                raise
            await asyncio.sleep(retry.next())
    return None


async def stop_pod(
    dependencies: PodDependencies, pod: Pod, live: Mapping[str, ContainerStatus], *, grace: Grace, observe: Observe
) -> None:
    """Stop all instances in ``live`` (by container name), each in its turn; ``observe`` receives every end."""
    dead = {name: asyncio.Event() for name in live}

    async def turn(before: list[str]) -> None:
        for name in before:
            await dead[name].wait()

    async def stop(role: Role, container: Container, instance: ContainerStatus) -> None:
        name = container["name"]
        try:
            stopped = await kill_container(
                dependencies,
                pod,
                container,
                instance,
                message=f"Stopping container {name}",
                grace=grace,
                turn=turn(_before(pod, name, live)) if role is Role.SIDECAR else None,
            )
            if stopped is not None:
                observe(stopped)
        finally:
            dead[name].set()

    async with asyncio.TaskGroup() as group:
        for name, instance in live.items():
            found = pod_fields.find_container(pod, name)
            role, container = found or (Role.REGULAR, {"name": name})
            group.create_task(stop(role, container, instance))


def _before(pod: Pod, sidecar: str, live: Mapping[str, ContainerStatus]) -> list[str]:
    """The containers that end before this sidecar does: all regular ones, and the init containers after it."""
    names = [container["name"] for container in pod_fields.init_containers(pod)]
    earlier = set(names[: names.index(sidecar) + 1])
    return [name for name in live if name not in earlier]
