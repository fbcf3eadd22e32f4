"""``wasilet-node shutdown``: the explicit request to stop everything of one data folder.

Ending the agent leaves containers running, on purpose; this is the other thing. The agent goes first, or it would start
a new supervisor for the containers that vanish. The folder's lock is held meanwhile, so that an agent that a service
manager starts again waits its turn, and fails with a message instead of racing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

from wasilet_node import instance
from wasilet_node.settings import NodePaths

logger = logging.getLogger(__name__)

_EXIT_FAILED = 1
_AGENT_SHARE = 0.5
"""Of the whole time, for the agent to end by itself."""

_KILL_SECONDS = 1.0


def shutdown(data: Path, *, timeout_seconds: float) -> int:
    """Stop agent, containers and supervisors. 0: nothing is left. ``timeout_seconds`` bounds all of it."""
    deadline = time.monotonic() + timeout_seconds
    if not data.is_dir():
        logger.info("no node has run in %s", data)
        return 0
    try:
        record = instance.read(data)
        if record is not None and instance.stop(record, grace_seconds=timeout_seconds * _AGENT_SHARE):
            logger.info("the agent (pid %d) ended", record.pid)
        lock = instance.acquire(data)
    except (instance.InstanceError, PermissionError, TimeoutError) as error:
        logger.error("%s; where a service manager starts it again, stop the service first", error)  # noqa: TRY400
        return _EXIT_FAILED
    from wasilet_node.runtime.stale_cleanup import remove_traces_of_the_dead

    try:
        _stop_supervisors(NodePaths(data=data), max(0.5, deadline - time.monotonic() - _KILL_SECONDS))
        # Of the one that had to be killed, and of those that had died before: no one comes after this to do it.
        remove_traces_of_the_dead(data)
    except TimeoutError as error:
        logger.error("%s", error)  # noqa: TRY400  # a traceback says no more
        return _EXIT_FAILED
    else:
        from wasilet_node.volumes.pod_dirs import PodDirs

        PodDirs(NodePaths(data=data).pods).clear_memory()
        instance.remove(data)
        return 0
    finally:
        os.close(lock)


def _stop_supervisors(paths: NodePaths, seconds: float) -> None:
    """In good order, so that exit records are written; else by SIGKILL, which takes their containers along."""
    from wasilet_node.runtime import client, supervisor_registry
    from wasilet_node.runtime.protocol import RuntimeUnavailableError

    living = [pointer for _, pointer in supervisor_registry.pointers(paths.data) if pointer.alive()]
    if not living:
        return

    async def orderly() -> None:
        async with asyncio.timeout(seconds):
            await client.shutdown(paths)

    try:
        asyncio.run(orderly())
    except (RuntimeUnavailableError, TimeoutError, OSError) as error:
        logger.warning("the supervisor did not stop in good order (%s); killing it", error or "timed out")
    for pointer in living:
        record = instance.AgentRecord(
            pid=pointer.pid, start_time=pointer.start_time, node_name="", address="", port=0
        )  # fmt: skip
        instance.stop(record, grace_seconds=0.0, kill_seconds=_KILL_SECONDS)
    logger.info("containers and supervisor ended")
