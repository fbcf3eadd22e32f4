"""The agent's process: its signals, its limits, how long its end may take, and what its exit code means."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import threading
from pathlib import Path

from wasilet_node import instance
from wasilet_node.agent import Agent
from wasilet_node.network import keeper
from wasilet_node.network.errors import NetworkError
from wasilet_node.settings import NodeSettings

logger = logging.getLogger(__name__)

_EXIT_FAILED = 1
_STOP_LIMIT_SECONDS = 5.0
_OPEN_FILES_WANTED = 65536


def run_agent(settings: NodeSettings, *, kubeconfig_copy: Path | None, version: str) -> int:
    """Run until SIGTERM or SIGINT (0) or until something fails (1). ``kubeconfig_copy``: see
    ``wasilet_node.commandline``.

    Raises InstanceError, and OSError when the data folder cannot be had.
    """
    lock = instance.acquire(settings.paths.data)
    try:
        # While there is one thread.
        machine = keeper.enter(settings.network.keeper) if settings.network and settings.network.keeper else None
        return asyncio.run(_until_stopped(settings, kubeconfig_copy, version, machine))
    except NetworkError as error:
        log_failure(error)
        return _EXIT_FAILED
    finally:
        os.close(lock)


async def _until_stopped(
    settings: NodeSettings, kubeconfig_copy: Path | None, version: str, machine: int | None
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _raise_open_files()
    logger.info("wasilet %s, node %s, data in %s", version, settings.node_name, settings.paths.data)
    agent = asyncio.create_task(Agent(settings, kubeconfig_copy, version, machine).run(), name="agent")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait({agent, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    code = 0 if stop.is_set() else _EXIT_FAILED
    # Whatever hangs in the clean-up (a thread in a dead network file system) must not keep the process.
    _exit_in(_STOP_LIMIT_SECONDS, code)
    if stop.is_set():
        logger.info("stopping; containers run on")
    agent.cancel()
    (outcome,) = await asyncio.gather(agent, return_exceptions=True)
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        log_failure(outcome)
        return _EXIT_FAILED
    instance.remove(settings.paths.data)
    return code


def _raise_open_files() -> None:
    """1,000 pods need thousands of descriptors; 1,024 is the usual soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning("the limit of open files stays at %d: %s", soft, error)


def _exit_in(seconds: float, code: int) -> None:
    def leave() -> None:
        logger.error("the clean-up did not end in %g s; leaving", seconds)
        os._exit(code or _EXIT_FAILED)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def log_failure(error: BaseException) -> None:
    """What a person can act on is one line; anything else is a defect, and comes with its traceback."""
    for leaf in _leaves(error):
        if _is_expected(leaf):
            logger.error("%s", leaf)
        else:
            logger.error("the agent failed", exc_info=leaf)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _is_expected(error: BaseException) -> bool:
    from wasilet_node.certificates import JoinError
    from wasilet_node.images.store import StoreError
    from wasilet_node.registration import NodeTakenError
    from wasilet_node.runtime.protocol import RuntimeUnavailableError
    from wasilet_node.server.tls import ServerError

    expected = JoinError | NetworkError | NodeTakenError | RuntimeUnavailableError | ServerError | StoreError
    return isinstance(error, expected)
