"""Run a module in the foreground, in the same sandbox as a pod's container but without supervisor or cluster.

``run_local`` compiles through the same cache and then starts ``python -P -m wasilet_node.runtime.foreground`` with the
descriptors it was given: a separate process, because the caller may have threads and a fork would copy their locks.
What to run goes through a pipe and never on the command line, since environments hold secrets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from wasilet_common.components import ComponentError, read_interfaces

from wasilet_node.runtime import linux, wire
from wasilet_node.runtime.compile import Compiler
from wasilet_node.runtime.engine import is_component
from wasilet_node.runtime.protocol import ContainerConfig, GuestKind, HttpPolicy, Mount, ServerSettings
from wasilet_node.settings import ImageSettings

INTERRUPTED_EXIT_CODE = 130
TIMEOUT_EXIT_CODE = 124
START_ERROR_EXIT_CODE = 126
DEFAULT_PORT = 8080
"""Of a component that answers HTTP requests: that of a container that names none."""

SERVING = "serving "
"""How the line begins that names the URL."""

_KILL_AFTER_SECONDS = 2.0


def run_local(
    module_path: Path,
    *,
    argv: Sequence[str],
    env: Mapping[str, str],
    mounts: Sequence[Mount],
    allowed_origins: Sequence[str],
    stdout_fd: int = 1,
    stderr_fd: int = 2,
    stdin_fd: int = 0,
    cache_dir: Path,
    timeout_seconds: float | None = None,
    port: int = DEFAULT_PORT,
    reuse: int | None = None,
) -> int:
    """The guest's exit code; 134 and its message on ``stderr_fd`` for a trap, 126 and why for one that cannot start,
    124 after ``timeout_seconds``, 130 after Ctrl-C, 128 + n for signal n.

    A component that answers HTTP requests listens on ``port`` of loopback (0: any that is free), and reports it on
    ``stderr_fd``: ``SERVING`` and its URL. ``reuse`` is the setting of that name (``ServerSettings``).

    Raises CompileError with the compiler's message, and OSError when ``module_path`` cannot be read.
    """
    with module_path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        kind = GuestKind.COMPONENT if is_component(head) else GuestKind.MODULE
    except ValueError as error:
        _print_line(stderr_fd, f"{module_path}: {error}")
        return START_ERROR_EXIT_CODE
    server = kind is GuestKind.COMPONENT and _answers_requests(module_path)
    artifact = asyncio.run(_compile(module_path, f"sha256:{digest}", kind, cache_dir, server=server))
    config = ContainerConfig(
        id=digest,
        pod_uid="",
        pod_namespace="",
        pod_name="",
        container_name=module_path.stem,
        attempt=0,
        artifact=str(artifact),
        kind=kind,
        argv=tuple(argv) or (module_path.name,),
        env=tuple(env.items()),
        mounts=tuple(mounts),
        log_path="",
        # The user who types the command is the machine's operator: what is allowed by name is allowed here too.
        http=HttpPolicy(allowed_origins=tuple(allowed_origins), local_origins=tuple(allowed_origins)),
        server=ServerSettings(port=port, reuse=reuse) if server else None,
    )
    return _run(config, stdin_fd, stdout_fd, stderr_fd, timeout_seconds)


def _answers_requests(component: Path) -> bool:
    with component.open("rb") as file:
        try:
            return read_interfaces(file).is_server
        except ComponentError:
            return False  # what is wrong with it, the compiler says


async def _compile(module_path: Path, digest: str, kind: GuestKind, cache_dir: Path, *, server: bool) -> Path:
    return await Compiler(cache_dir, ImageSettings()).compile(module_path, digest, kind, server=server)


def _run(config: ContainerConfig, stdin_fd: int, stdout_fd: int, stderr_fd: int, timeout_seconds: float | None) -> int:
    plan_read, plan_write = os.pipe2(os.O_CLOEXEC)
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "wasilet_node.runtime.foreground",
                str(plan_read),
                str(report_write),
                str(os.getpid()),
            ],
            stdin=stdin_fd,
            stdout=stdout_fd,
            stderr=stderr_fd,
            pass_fds=(plan_read, report_write),
        )
    except BaseException:
        for descriptor in (plan_read, plan_write, report_read, report_write):
            os.close(descriptor)
        raise
    os.close(plan_read)
    os.close(report_write)
    try:
        with contextlib.suppress(BrokenPipeError), os.fdopen(plan_write, "wb") as file:
            file.write(json.dumps(wire.dump_config(config)).encode())
        code = _wait(process, timeout_seconds)
        report = _read_report(report_read)
    finally:
        os.close(report_read)
        if process.poll() is None:
            process.kill()
            process.wait()
    if code is None:
        _print_line(stderr_fd, f"stopped after {timeout_seconds:g} s")
        return TIMEOUT_EXIT_CODE
    if "error" in report:
        _print_line(stderr_fd, str(report["error"]))
        return START_ERROR_EXIT_CODE
    if "trap" in report:
        _print_line(stderr_fd, str(report["trap"]))
    if code == -signal.SIGINT:
        return INTERRUPTED_EXIT_CODE
    return code if code >= 0 else 128 - code


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float | None) -> int | None:
    """The wait status; None: timed out. Ctrl-C reaches the guest too, being of the same foreground group."""
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return -signal.SIGINT


def _read_report(descriptor: int) -> dict[str, object]:
    data = b""
    while piece := os.read(descriptor, 65536):
        data += piece
    report: dict[str, object] = {}
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            report.update(json.loads(line))
    return report


def _print_line(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, (text.rstrip() + "\n").encode(errors="replace"))


def main(arguments: list[str]) -> None:
    """The child's side: read the plan, confine, run, ``os._exit``."""
    plan_fd, report_fd, parent_pid = (int(argument) for argument in arguments)
    linux.set_parent_death_signal()
    if os.getppid() != parent_pid:
        os._exit(START_ERROR_EXIT_CODE)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from wasilet_node.runtime import guest, sandbox
    from wasilet_node.runtime.engine import make_linkers

    with os.fdopen(plan_fd, "rb") as file:
        config = wire.load_config(json.loads(file.read()))
    linux.drop_privileges()
    tools = guest.make_tools(make_linkers())
    sandbox.run_here(config, tools, report=report_fd, on_listening=_print_address)


def _print_address(port: int) -> None:
    _print_line(2, f"{SERVING}http://127.0.0.1:{port} (Ctrl-C ends it)")


if __name__ == "__main__":
    main(sys.argv[1:])
