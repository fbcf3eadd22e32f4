"""What the ended instances of a pod report: the runtime's message, the termination message, the tail of the log.

The file may lie on a volume of the machine that hangs, so it is read in a thread that is given up on after a while, and
never on the event loop. A caller that starts the next instance or removes the volumes waits for the reading first, or
the file would be gone or another's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from wasilet_common import pod_fields
from wasilet_common.cri_log.reader import last_text
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.pods import recovery
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.runtime.protocol import ContainerStatus
from wasilet_node.volumes.base import VolumeError

logger = logging.getLogger(__name__)


class TerminationMessages:
    """Belongs to one pod's worker. ``changed`` is called when a message has been read."""

    def __init__(self, dependencies: PodDependencies, *, changed: Callable[[], None]) -> None:
        self._dependencies = dependencies
        self._changed = changed
        self._texts: dict[str, str] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}

    @property
    def pending(self) -> bool:
        """A message is being read: a status without it would have to be sent again."""
        return bool(self._reading)

    def of(self, instance: ContainerStatus) -> str:
        """The message of an ended instance, as far as it is known."""
        return self._texts.get(instance.id, instance.message)

    def note(self, pod: Pod, instance: ContainerStatus, *, newest: bool) -> None:
        """An instance has ended. Only the newest has its own file that is sure to be there still."""
        if instance.id in self._texts or instance.id in self._reading:
            return
        found = pod_fields.find_container(pod, instance.container_name)
        known = recovery.known_message(pod, instance.id)
        if known is not None or found is None or not newest or not instance.log_path:
            self._texts[instance.id] = instance.message if known is None else known
            return
        task = asyncio.create_task(self._read(pod, found[1], instance), name=f"termination message of {instance.id}")
        self._reading[instance.id] = task
        task.add_done_callback(lambda _: self._read_out(instance.id))

    async def settle(self) -> None:
        """Wait for what is being read; bounded by the threads' own limit."""
        if self._reading:
            await asyncio.wait(self._reading.values())

    def forget(self, container_id: str) -> None:
        """The instance is gone."""
        self._texts.pop(container_id, None)

    async def close(self) -> None:
        """Give up what is being read."""
        tasks = list(self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _read_out(self, container_id: str) -> None:
        self._reading.pop(container_id, None)
        self._changed()

    async def _read(self, pod: Pod, container: Container, instance: ContainerStatus) -> None:
        text = instance.message
        try:
            text = await self._dependencies.host_threads.run(
                "the termination message", lambda: self._message(pod, container, instance)
            )
        except (OSError, ValueError, VolumeError) as error:
            logger.warning("termination message of %s in %s: %s", container["name"], pod_fields.format_pod(pod), error)
        self._texts[instance.id] = text

    def _message(self, pod: Pod, container: Container, instance: ContainerStatus) -> str:
        """The runtime's message (a trap), then the termination message: the file, or the log's tail after a failure."""
        said = self._dependencies.volumes.termination_message(pod, container, attempt=instance.attempt)
        on_error = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not said and on_error and instance.exit_code != 0 and instance.reason != "StartError":
            said = last_text(instance.log_path)
        return ": ".join(part for part in (instance.message, said) if part)
