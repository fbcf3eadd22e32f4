"""The agent's side of the runtime: one client over one or more supervisors.

After an upgrade the old supervisor keeps its containers and a new one takes new ones: the client asks all of them and
sends each request to the one that has the container. It heals itself: a call after a lost connection finds or starts a
supervisor first; a call during the loss raises RuntimeUnavailableError. Containers never notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Mapping, Sequence

from wasilet_node.runtime import supervisor_registry, wire
from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerStatus,
    ContainerUsage,
    ExecResult,
    Resources,
    RuntimeCapabilities,
    RuntimeUnavailableError,
    StartError,
    UnknownContainerError,
)
from wasilet_node.runtime.streams import SupervisorStream
from wasilet_node.runtime.supervisor_connection import Link, connect, hello_to, open_connection
from wasilet_node.runtime.supervisor_start import find_or_start
from wasilet_node.settings import LogSettings, NodePaths

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_SECONDS = 30.0
EXEC_GRACE_SECONDS = 5.0
PING_TIMEOUT_SECONDS = 10.0
"""Also of a supervisor that has to be started first."""

RETRY_SECONDS = 0.5
_EVENT_BACKLOG = 65536


async def _feed(stream: SupervisorStream, data: bytes) -> None:
    await stream.write_stdin(data)
    await stream.close_stdin()


class RuntimeClient:
    """Implements ``wasilet_node.runtime.protocol.Runtime``. Made by ``ensure_supervisor``; closed by ``close``."""

    def __init__(self, paths: NodePaths, logs: LogSettings) -> None:
        self._paths = paths
        self._logs = logs
        self._links: list[Link] = []
        self._main: Link | None = None
        self._closed = False
        self._complete = False
        """Every living supervisor is among the links."""

        self._attempt: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._failed_at = 0.0

    @property
    def capabilities(self) -> RuntimeCapabilities:
        """Of the supervisor that takes new containers. Raises RuntimeUnavailableError before the first connection."""
        if self._main is None or self._main.capabilities is None:
            raise RuntimeUnavailableError("not connected to a supervisor")
        return self._main.capabilities

    async def connect(self) -> None:
        """Find or start a supervisor, and the older ones that still keep containers. Raises RuntimeUnavailableError.

        A caller that comes while an attempt is under way shares its outcome, and for a moment after a failure its
        error: a thousand pods do not start a thousand supervisors one after the other.
        """
        if self._closed:
            raise RuntimeUnavailableError("the client is closed")
        if self._complete and not any(link.lost for link in self._links):
            return
        if self._attempt is None:
            now = asyncio.get_running_loop().time()
            if self._failure is not None and now < self._failed_at + RETRY_SECONDS:
                raise RuntimeUnavailableError(str(self._failure))
            self._attempt = asyncio.create_task(self._connect(), name="find or start a supervisor")
            self._attempt.add_done_callback(self._attempt_ended)
        await asyncio.shield(self._attempt)

    def _attempt_ended(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        self._failure = None if attempt.cancelled() else attempt.exception()
        self._failed_at = asyncio.get_running_loop().time()

    async def _connect(self) -> None:
        self._complete = False
        for link in [link for link in self._links if link.lost]:
            self._links.remove(link)
            await link.close()
        if self._main is None or self._main.lost:
            self._main = None
            pointer = await find_or_start(self._paths, self._logs)
            self._main = await connect(pointer)
            self._links.append(self._main)
            for fence in self.capabilities.fences:
                logger.log(logging.INFO if fence.holds else logging.WARNING, "%s", fence.line)
        known = {link.pointer.pid for link in self._links}
        for _, pointer in list(supervisor_registry.pointers(self._paths.data)):
            if pointer.pid not in known and pointer.alive():
                await self._adopt(pointer)
        self._complete = True

    async def _adopt(self, pointer: supervisor_registry.Pointer) -> None:
        """An older supervisor, which is to take no new containers. One that lives and does not answer makes the whole
        runtime unavailable: without it a container that it keeps would look lost, and be started once more."""
        try:
            old = await connect(pointer)
            try:
                await old.call({"op": "retire"})
            except BaseException:
                await old.close()
                raise
        except RuntimeUnavailableError:
            if pointer.alive():
                raise
        else:
            self._links.append(old)

    async def ping(self) -> None:
        """Reach every supervisor, or start one. Raises RuntimeUnavailableError within ``PING_TIMEOUT_SECONDS``."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_SECONDS):
                links = await self._all()
                await asyncio.gather(*(link.call(hello_to(link.pointer)) for link in links))
        except TimeoutError:
            raise RuntimeUnavailableError(f"no answer from the supervisor in {PING_TIMEOUT_SECONDS} s") from None

    async def close(self) -> None:
        """Disconnect; containers go on."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait({self._attempt})
        for link in self._links:
            await link.close()
        self._links.clear()
        self._main = None

    async def start(self, config: ContainerConfig) -> ContainerStatus:
        """See ``Runtime``. Raises StartError, RuntimeUnavailableError."""
        for link in await self._all():
            if link is not self._main:
                for status in await self._statuses(link):
                    if status.id == config.id:
                        return status
        main = await self._current()
        answer = await main.call({"op": "start", "config": wire.dump_config(config)})
        return wire.load_status(answer)

    async def stop(
        self, container_id: str, *, timeout_seconds: float = 10.0, grace_seconds: float = 0.0
    ) -> ContainerStatus | None:
        """See ``Runtime``. Raises RuntimeUnavailableError, also when it was not reaped in time."""
        request = {"op": "stop", "id": container_id, "grace_seconds": grace_seconds}
        for link in await self._all():
            answer = await link.call(request, timeout_seconds=timeout_seconds + grace_seconds)
            if answer is not None:
                return wire.load_status(answer)
        return None

    async def resize(
        self, container_id: str, resources: Resources, *, annotations: Mapping[str, str]
    ) -> ContainerStatus:
        """See ``Runtime``. Raises ResizeError, UnknownContainerError, RuntimeUnavailableError."""
        request = {
            "op": "resize",
            "id": container_id,
            "resources": dataclasses.asdict(resources),
            "annotations": dict(annotations),
        }
        unknown = UnknownContainerError(f"container {container_id} is not running")
        for link in await self._all():
            try:
                return wire.load_status(await link.call(request))
            except UnknownContainerError as error:
                unknown = error
        raise unknown

    async def list(self) -> Sequence[ContainerStatus]:
        """See ``Runtime``. Raises RuntimeUnavailableError."""
        found: dict[str, ContainerStatus] = {}
        for link in await self._all():
            for status in await self._statuses(link):
                found[status.id] = status
        return tuple(found.values())

    async def remove(self, container_id: str) -> None:
        """See ``Runtime``; one that still runs is killed first. Raises RuntimeUnavailableError."""
        for link in await self._all():
            await link.call({"op": "remove", "id": container_id})

    async def usage(self) -> Sequence[ContainerUsage]:
        """See ``Runtime``. Raises RuntimeUnavailableError."""
        found = []
        for link in await self._all():
            found += [wire.load_usage(item) for item in await link.call({"op": "usage"})]
        return tuple(found)

    async def events(self) -> AsyncIterator[ContainerStatus]:
        """See ``Runtime``. Raises RuntimeUnavailableError when a supervisor is lost: iterate again, then ``list``."""
        queue: asyncio.Queue[ContainerStatus | None] = asyncio.Queue(_EVENT_BACKLOG)
        links = await self._all()
        try:
            for link in links:
                await link.subscribe(queue)
            while True:
                status = await queue.get()
                if status is None:
                    raise RuntimeUnavailableError("the connection to the supervisor was lost")
                yield status
        finally:
            for link in links:
                link.unsubscribe(queue)

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        timeout_seconds: float,
        max_output_bytes: int = 16 * 1024,
        stdin: bytes = b"",
    ) -> ExecResult:
        """See ``Runtime``. Raises UnknownContainerError, RuntimeUnavailableError."""
        try:
            stream = await self._exec_stream(container_id, argv, stdin=bool(stdin), timeout_seconds=timeout_seconds)
        except StartError as error:
            return ExecResult(exit_code=126, output=b"", error=str(error))
        output = bytearray()
        try:
            async with asyncio.timeout(timeout_seconds + EXEC_GRACE_SECONDS):
                feeder = asyncio.create_task(_feed(stream, stdin)) if stdin else None
                try:
                    async for frame in stream.frames():
                        output += frame.data[: max(max_output_bytes - len(output), 0)]
                finally:
                    if feeder is not None:
                        feeder.cancel()
                        with contextlib.suppress(asyncio.CancelledError, RuntimeUnavailableError):
                            await feeder
        except TimeoutError:
            return ExecResult(exit_code=137, output=bytes(output), timed_out=True, error="timed out")
        finally:
            await stream.close()
        return ExecResult(
            exit_code=stream.exit_code if stream.exit_code is not None else 137,
            output=bytes(output),
            timed_out=stream.timed_out,
            error=stream.error,
        )

    async def exec_stream(self, container_id: str, argv: Sequence[str], *, stdin: bool = False) -> SupervisorStream:
        """A fresh instance beside a container. Raises UnknownContainerError, StartError, RuntimeUnavailableError."""
        return await self._exec_stream(container_id, argv, stdin=stdin, timeout_seconds=None)

    async def attach(self, container_id: str, *, stdin: bool = False) -> SupervisorStream:
        """Output of a running container from now on, and with ``stdin`` its input, if it has one.

        Raises UnknownContainerError, RuntimeUnavailableError.
        """
        return await self._session(container_id, {"op": "attach", "id": container_id, "stdin": stdin})

    async def _exec_stream(
        self, container_id: str, argv: Sequence[str], *, stdin: bool, timeout_seconds: float | None
    ) -> SupervisorStream:
        request: wire.Message = {"op": "exec", "id": container_id, "argv": list(argv), "stdin": stdin}
        if timeout_seconds is not None:
            request["timeout_seconds"] = timeout_seconds
        return await self._session(container_id, request)

    async def _session(self, container_id: str, request: wire.Message) -> SupervisorStream:
        unknown = UnknownContainerError(f"container {container_id} is not running")
        for link in await self._all():
            reader, writer = await open_connection(link.pointer)
            stream = SupervisorStream(reader, writer)
            try:
                await stream.begin(hello_to(link.pointer), request)
                return stream
            except UnknownContainerError as error:
                unknown = error
                await stream.close()
            except BaseException:
                await stream.close()
                raise
        raise unknown

    @staticmethod
    async def _statuses(link: Link) -> Sequence[ContainerStatus]:
        return [wire.load_status(item) for item in await link.call({"op": "list"})]

    async def _current(self) -> Link:
        await self.connect()
        if self._main is None:
            raise RuntimeUnavailableError("the client is closed")
        return self._main

    async def _all(self) -> Sequence[Link]:
        await self.connect()
        return tuple(self._links)


async def ensure_supervisor(paths: NodePaths, logs: LogSettings) -> RuntimeClient:
    """A client of the living supervisor of this data folder, or of a new one. Raises RuntimeUnavailableError."""
    client = RuntimeClient(paths, logs)
    try:
        await client.connect()
    except BaseException:
        await client.close()
        raise
    return client


async def shutdown(paths: NodePaths) -> None:
    """Stop all containers of all supervisors of this data folder and end these. Raises RuntimeUnavailableError."""
    for _, pointer in list(supervisor_registry.pointers(paths.data)):
        if not pointer.alive():
            continue
        link = await connect(pointer)
        try:
            await link.call({"op": "shutdown"}, timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS)
        finally:
            await link.close()
        await _until_gone(pointer)


async def _until_gone(pointer: supervisor_registry.Pointer) -> None:
    deadline = asyncio.get_running_loop().time() + SHUTDOWN_TIMEOUT_SECONDS
    while pointer.alive():
        if asyncio.get_running_loop().time() > deadline:
            raise RuntimeUnavailableError(f"supervisor {pointer.pid} did not end in {SHUTDOWN_TIMEOUT_SECONDS} s")
        await asyncio.sleep(0.01)
