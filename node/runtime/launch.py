"""Find the supervisor of a data folder, or start one.

Under a file lock, so that two agents that start at once end up with one supervisor.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys

from node.runtime import locate
from node.runtime.engine import engine_key
from node.runtime.protocol import PROTOCOL_VERSION, RuntimeUnavailableError
from node.settings import LogSettings, NodePaths

START_TIMEOUT_SECONDS = 30.0


async def find_or_start(paths: NodePaths, logs: LogSettings) -> locate.Pointer:
    """The living supervisor that fits this version, or a new one. Raises RuntimeUnavailableError."""
    paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(paths.data / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await _acquire(lock)
        pointer = locate.current(paths.data)
        if pointer is not None and pointer.build == engine_key() and pointer.protocol_version == PROTOCOL_VERSION:
            return pointer
        await _start_supervisor(paths, logs)
        pointer = locate.current(paths.data)
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
    log = os.open(paths.data / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "node.runtime.supervisor",
                f"--data-dir={paths.data.absolute()}",
                f"--log-max-size={logs.max_size_bytes}",
                f"--log-max-files={logs.max_files}",
                f"--ready-fd={ready_write}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(ready_write,),
                start_new_session=True,
                env=_environment(),
            )
        finally:
            os.close(ready_write)
            os.close(log)
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            answer = await asyncio.to_thread(_read_all, ready_read)
            await process.wait()
    except (OSError, TimeoutError) as error:
        raise RuntimeUnavailableError(f"cannot start the supervisor: {error or 'timed out'}") from error
    finally:
        os.close(ready_read)
    try:
        message = json.loads(answer)
    except ValueError:
        message = {"error": f"it ended without a word; see {paths.data / 'supervisor.log'}"}
    if "error" in message:
        raise RuntimeUnavailableError(f"the supervisor did not start: {message['error']}")


def _read_all(descriptor: int) -> bytes:
    data = b""
    while piece := os.read(descriptor, 65536):
        data += piece
    return data


def _environment() -> dict[str, str]:
    """The supervisor's environment: no secrets of the agent's, and what TLS and locale need."""
    names = [
        *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "XDG_RUNTIME_DIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "PYTHONPATH"),
        "WASILET_RUN_ID",  # by which the harness finds what it started, whoever started it in between
    ]
    return {name: os.environ[name] for name in names if name in os.environ}
