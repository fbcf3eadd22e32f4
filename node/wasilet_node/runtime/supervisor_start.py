"""Find the supervisor of a data folder, or start one.

Under a file lock, so that two agents that start at once end up with one supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from wasilet_node.runtime import rootless, supervisor_log, supervisor_registry, systemd_scope
from wasilet_node.runtime.engine import engine_key
from wasilet_node.runtime.protocol import PROTOCOL_VERSION, RuntimeUnavailableError
from wasilet_node.settings import LogSettings, NodePaths

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 30.0


async def find_or_start(paths: NodePaths, logs: LogSettings) -> supervisor_registry.Pointer:
    """The living supervisor that fits this version, or a new one. Raises RuntimeUnavailableError."""
    try:
        paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(paths.data / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RuntimeUnavailableError(f"cannot look for a supervisor: {error}") from error
    try:
        await _acquire(lock)
        pointer = supervisor_registry.current(paths.data)
        if pointer is not None and pointer.build == engine_key() and pointer.protocol_version == PROTOCOL_VERSION:
            return pointer
        await _start_supervisor(paths, logs)
        pointer = supervisor_registry.current(paths.data)
        if pointer is None:
            raise RuntimeUnavailableError("the supervisor ended right after its start; see supervisor.log")
        return pointer
    finally:
        os.close(lock)


async def _acquire(lock: int) -> None:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline:
                raise RuntimeUnavailableError("another agent is starting a supervisor and does not finish") from None
            await asyncio.sleep(0.02)


async def _start_supervisor(paths: NodePaths, logs: LogSettings) -> None:
    prefix = systemd_scope.command_prefix()
    try:
        answer = await _spawn(paths, logs, prefix)
        if prefix and not answer:
            logger.warning("%s makes no scope for the supervisor: no control groups; see supervisor.log", prefix[0])
            answer = await _spawn(paths, logs, ())
    except OSError as error:
        raise RuntimeUnavailableError(f"cannot start the supervisor: {error}") from error
    try:
        message = json.loads(answer)
    except ValueError:
        message = {"error": f"it ended without a word; see {paths.data / 'supervisor.log'}"}
    if "error" in message:
        raise RuntimeUnavailableError(f"the supervisor did not start: {message['error']}")


async def _spawn(paths: NodePaths, logs: LogSettings, prefix: Sequence[str]) -> bytes:
    """Its last message on whether it is ready. Raises OSError, RuntimeUnavailableError."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    reader = asyncio.StreamReader()
    with (
        os.fdopen(write_end, "wb", 0) as ready,
        os.fdopen(read_end, "rb", 0) as pipe,
        contextlib.ExitStack() as rights,
    ):
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            log = supervisor_log.open_log(paths.data)
            try:
                # A supervisor that is to keep pods' networks needs this process's rights in its user namespace.
                if rootless.is_inside():
                    rights.enter_context(rootless.passing_on())
                process = await asyncio.create_subprocess_exec(
                    *prefix,
                    sys.executable,
                    "-P",
                    "-m",
                    "wasilet_node.runtime.supervisor",
                    f"--data-dir={paths.data.absolute()}",
                    f"--log-max-size={logs.max_size_bytes}",
                    f"--log-max-files={logs.max_files}",
                    f"--ready-fd={ready.fileno()}",
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(ready.fileno(),),
                    start_new_session=True,
                    env=_environment(),
                )
            finally:
                rights.close()
                os.close(log)
            ready.close()
            return await _wait_until_ready(reader, process)
        finally:
            transport.close()


async def _wait_until_ready(reader: asyncio.StreamReader, process: asyncio.subprocess.Process) -> bytes:
    """First the supervisor reports its pid, then whether it is ready. One that does not get so far is ended: it keeps
    no container yet, and the process that starts the next must not find it there some day."""
    descriptor = -1
    try:
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            await process.wait()
            if first := await reader.readline():
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(int(json.loads(first)["pid"]))
            return await reader.read()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            if descriptor >= 0:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            else:
                process.kill()
        raise RuntimeUnavailableError(f"the supervisor was not ready after {START_TIMEOUT_SECONDS} s") from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _environment() -> dict[str, str]:
    """The supervisor's environment: no secrets of the agent's, and what TLS and locale need."""
    names = [
        *(
            "PATH",
            "HOME",
            "LANG",
            "LC_ALL",
            "TZ",
            "XDG_RUNTIME_DIR",
            "DBUS_SESSION_BUS_ADDRESS",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "PYTHONPATH",
            "XDG_CACHE_HOME",
            "WASILET_CACHE",
            "WASILET_COMPONENT_HOST",
        ),
        "WASILET_RUN_ID",  # by which the harness finds what it started, whichever process started it in between
    ]
    return {name: os.environ[name] for name in names if name in os.environ}
