"""``/exec`` and ``/attach``: what ``kubectl exec`` and ``kubectl attach`` talk to.

exec runs a fresh instance of the container's module, with the same mounts and environment and the given arguments: a
wasm module cannot start a program inside a running instance, and this is the nearest honest thing. attach shows the
output of the running instance from now on, and feeds its standard input where the container asks for one (``stdin``).

Order and texts are those of kubelet and of its CRI streaming server (k8s.io/kubelet/pkg/cri/streaming).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web
from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod

from wasilet_node.runtime.protocol import (
    ContainerState,
    ExecStream,
    Runtime,
    RuntimeUnavailableError,
    StartError,
    UnknownContainerError,
)
from wasilet_node.server.pods import PodSource, known_pod
from wasilet_node.server.streams.channels import Channels, StreamOptions, open_channels
from wasilet_node.server.streams.terminal import LineDiscipline, to_screen
from wasilet_node.server.streams.upgrade import LIMITS, Upgraded

logger = logging.getLogger(__name__)

IDLE_SECONDS = 4 * 3600.0
"""kubelet's ``streamingConnectionIdleTimeout``: a session without a byte in either direction ends."""

INTERRUPTED_EXIT_CODE = 130

SUCCESS: dict[str, Any] = {"metadata": {}, "status": "Success"}


class StreamRuntime(Runtime, Protocol):
    """A runtime that can also stream; ``wasilet_node.runtime.client.RuntimeClient`` does."""

    async def exec_stream(self, container_id: str, argv: Sequence[str], *, stdin: bool = False) -> ExecStream:
        """A fresh instance beside a container. Raises UnknownContainerError, StartError, RuntimeUnavailableError."""

    async def attach(self, container_id: str, *, stdin: bool = False) -> ExecStream:
        """Output of a running container from now on, and with ``stdin`` its input, if it has one.

        Raises UnknownContainerError, RuntimeUnavailableError.
        """


def find_pod(pods: PodSource, request: web.Request) -> Pod:
    """The pod that a streaming route names. Raises HTTPNotFound with kubelet's texts, HTTPServiceUnavailable."""
    pod = known_pod(pods, request.match_info["namespace"], request.match_info["pod"])
    if pod is None:
        raise web.HTTPNotFound(text="pod does not exist")
    uid = request.match_info.get("uid")
    if uid is not None and uid != pod_fields.uid(pod):
        raise web.HTTPNotFound(text="pod not found")
    return pod


class RemoteCommandViews:
    """The handlers of the two routes."""

    def __init__(self, *, pods: PodSource, runtime: StreamRuntime) -> None:
        self._pods = pods
        self._runtime = runtime

    async def exec(self, request: web.Request) -> web.StreamResponse:
        """``GET|POST /exec/{namespace}/{pod}[/{uid}]/{container}?command=...``."""
        options = StreamOptions.of(request)
        container_id = await self._running(request)
        argv = request.query.getall("command", [])
        if not argv:
            raise web.HTTPBadRequest(text="you must specify at least one command for the container")
        return await self._serve(
            request,
            options,
            verb="executing command in container",
            start=lambda: self._runtime.exec_stream(container_id, argv, stdin=options.stdin),
            input_=Input(wanted=options.stdin),
            with_exit_code=True,
        )

    async def attach(self, request: web.Request) -> web.StreamResponse:
        """``GET|POST /attach/{namespace}/{pod}[/{uid}]/{container}``."""
        options = StreamOptions.of(request)
        container_id = await self._running(request)
        pod, name = find_pod(self._pods, request), request.match_info["container"]
        _, container = pod_fields.find_container(pod, name) or (None, {})
        wanted = options.stdin and bool(container.get("stdin"))
        return await self._serve(
            request,
            options,
            verb="attaching to container",
            start=lambda: self._runtime.attach(container_id, stdin=wanted),
            input_=Input(wanted=wanted, ends=bool(container.get("stdinOnce")), interrupts=bool(container.get("tty"))),
            with_exit_code=False,
        )

    async def _running(self, request: web.Request) -> str:
        """The id of the instance that runs, from the runtime: a status may be older than this process, and a user who
        may write it could name another pod's container. Raises RuntimeUnavailableError."""
        pod = find_pod(self._pods, request)
        pod_name, uid = pod_fields.name(pod), pod_fields.uid(pod)
        name = request.match_info["container"]
        if pod_fields.find_container(pod, name) is None:
            raise web.HTTPNotFound(text=f'container not found ("{name}")')
        running = [
            each
            for each in await self._runtime.list()
            if (each.pod_uid, each.container_name, each.state) == (uid, name, ContainerState.RUNNING)
        ]
        if not running:
            raise web.HTTPInternalServerError(text=f'container "{name}" in pod "{pod_name}" is not running')
        return max(running, key=lambda each: each.attempt).id

    async def _serve(
        self,
        request: web.Request,
        options: StreamOptions,
        *,
        verb: str,
        start: Callable[[], Awaitable[ExecStream]],
        input_: Input,
        with_exit_code: bool,
    ) -> web.StreamResponse:
        uid = pod_fields.uid(find_pod(self._pods, request))
        try:
            with request.app[LIMITS].stream(uid):
                return await self._stream(
                    request, options, verb=verb, start=start, input_=input_, with_exit_code=with_exit_code
                )
        except TimeoutError:
            logger.debug("a client opened no streams in time")
        return Upgraded()

    async def _stream(
        self,
        request: web.Request,
        options: StreamOptions,
        *,
        verb: str,
        start: Callable[[], Awaitable[ExecStream]],
        input_: Input,
        with_exit_code: bool,
    ) -> web.StreamResponse:
        async with open_channels(request, options) as channels:
            try:
                guest = await start()
            except (StartError, UnknownContainerError, RuntimeUnavailableError) as error:
                await channels.finish(internal_error(f"error {verb}: {error}"))
                return Upgraded()
            session = Session(channels, guest, tty=options.tty, input_=input_)
            try:
                code = await session.run()
                if code is None and guest.exit_code is None and guest.error:
                    await channels.finish(internal_error(f"error {verb}: {guest.error}"))
                else:
                    await channels.finish(exit_status(code or 0) if with_exit_code else SUCCESS)
            except RuntimeUnavailableError as error:
                await channels.finish(internal_error(f"error {verb}: {error}"))
            finally:
                await asyncio.shield(guest.close())
        return Upgraded()


@dataclass(frozen=True, kw_only=True)
class Input:
    """What becomes of what a client sends."""

    wanted: bool
    """False: it is read and dropped."""

    ends: bool = True
    """Ctrl-D on an empty line is the end of it; else the guest never sees one, and the terminal stays open."""

    interrupts: bool = False
    """Ctrl-C interrupts the guest, whose end then ends the session; else the session alone ends."""


class Session:
    """Moves bytes between a client and a guest until one of them ends."""

    def __init__(self, channels: Channels, guest: ExecStream, *, tty: bool, input_: Input) -> None:
        self._channels = channels
        self._guest = guest
        self._terminal = LineDiscipline() if tty else None
        self._policy = input_
        self._interrupted = False
        self._active = asyncio.get_running_loop().time()

    async def run(self) -> int | None:
        """The exit code. None: it never ran, the client went away, or nothing moved for too long.

        Raises RuntimeUnavailableError when the supervisor is lost.
        """
        output = asyncio.create_task(self._output())
        feed = asyncio.create_task(self._input())
        gone = asyncio.create_task(self._channels.closed.wait())
        idle = asyncio.create_task(self._idle())
        tasks = (output, feed, gone, idle)
        try:
            pending: set[asyncio.Task[Any]] = set(tasks)
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if self._interrupted:
                    return INTERRUPTED_EXIT_CODE
                if output in done:
                    output.result()
                    return self._guest.exit_code
                if gone in done or idle in done:
                    return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _output(self) -> None:
        async for frame in self._guest.frames():
            self._active = asyncio.get_running_loop().time()
            await self._write(frame.stream, frame.data)
        if self._guest.error and self._guest.exit_code is not None:
            await self._write("stderr", self._guest.error.rstrip("\n").encode() + b"\n")

    async def _write(self, name: str, data: bytes) -> None:
        if self._terminal is not None:
            await self._channels.write("stdout", to_screen(data))
        else:
            await self._channels.write(name, data)

    async def _input(self) -> None:
        async for data in self._channels.stdin():
            self._active = asyncio.get_running_loop().time()
            if not self._policy.wanted:
                continue
            if self._terminal is None:
                await self._guest.write_stdin(data)
                continue
            typed = self._terminal.type(data)
            if typed.echo:
                await self._channels.write("stdout", typed.echo)
            if typed.interrupt and not self._policy.interrupts:
                self._interrupted = True
                return
            if typed.interrupt:
                await self._guest.interrupt()
                continue
            if typed.input:
                await self._guest.write_stdin(typed.input)
            if typed.end and self._policy.ends:
                break
        if self._policy.wanted:
            await self._guest.close_stdin()

    async def _idle(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._active + IDLE_SECONDS - loop.time()) > 0:  # noqa: ASYNC110 - a timer that is put off
            await asyncio.sleep(left)


def exit_status(code: int) -> dict[str, Any]:
    """The v1.Status of an exit code, as remotecommand clients take it apart."""
    if code == 0:
        return SUCCESS
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def internal_error(message: str) -> dict[str, Any]:
    """The v1.Status of something that went wrong here."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {message}",
        "reason": "InternalError",
        "details": {"causes": [{"message": message}]},
        "code": 500,
    }
