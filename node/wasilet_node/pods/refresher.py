"""When the volumes of a running pod are brought up to date: now and then, and at once after a change of labels."""

from __future__ import annotations

import asyncio
import logging
import random

from wasilet_common import pod_fields
from wasilet_common.backoff import NotBefore
from wasilet_common.pod_fields import Pod

from wasilet_node.kube.base import KubeError
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.volumes.base import ContainerConfigError, VolumeError

logger = logging.getLogger(__name__)

_REFRESHED_KINDS = frozenset({"configMap", "secret", "projected", "downwardAPI"})


class Refresher:
    """Belongs to one pod's worker. Times are seconds since the epoch."""

    def __init__(self, dependencies: PodDependencies) -> None:
        self._dependencies = dependencies
        self._due = NotBefore()
        self._task: asyncio.Task[None] | None = None

    def set_up(self) -> None:
        """The volumes have just been made, so they are fresh."""
        self._due = NotBefore(self._dependencies.wall_clock(), self._interval())

    def at_once(self) -> None:
        """Labels or annotations have changed, which downwardAPI volumes show."""
        self._due = NotBefore()

    def check(self, pod: Pod, now: float) -> float | None:
        """Refresh if it is time. Returns in how many seconds to ask again; None: this pod has nothing to refresh."""
        if not any(_REFRESHED_KINDS & volume.keys() for volume in pod["spec"].get("volumes") or ()):
            return None
        if self._due.left(now) <= 0 and self._task is None:
            self._due = NotBefore(now, self._interval())
            self._task = asyncio.create_task(
                self._refresh(pod), name=f"refresh volumes of {pod_fields.format_pod(pod)}"
            )
            self._task.add_done_callback(self._ended)
        return self._due.left(now) or self._interval()

    async def close(self) -> None:
        """Stop, also one that is under way; the old content stays, since a swap is atomic."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _interval(self) -> float:
        return self._dependencies.timing.volume_refresh * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load

    async def _refresh(self, pod: Pod) -> None:
        try:
            await self._dependencies.volumes.refresh(pod)
        except (VolumeError, ContainerConfigError, KubeError) as error:
            self._dependencies.events.event(pod, "Warning", "FailedMount", str(error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("volumes could not be refreshed", exc_info=error)
