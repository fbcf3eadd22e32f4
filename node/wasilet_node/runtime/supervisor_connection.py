"""One connection to one supervisor, on the agent's side: requests with answers, and events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from pathlib import Path
from typing import Any

from wasilet_node.runtime import supervisor_registry, unix_sockets, wire
from wasilet_node.runtime.protocol import (
    PROTOCOL_VERSION,
    ContainerStatus,
    Fence,
    ResizeError,
    RuntimeCapabilities,
    RuntimeUnavailableError,
    StartError,
    UnknownContainerError,
)

logger = logging.getLogger(__name__)

SUPPORTED_VERSIONS = (PROTOCOL_VERSION, 1)
CALL_TIMEOUT_SECONDS = 30.0
CONNECT_TIMEOUT_SECONDS = 5.0
_STREAM_LIMIT_BYTES = 1024 * 1024


class Link:
    """One control connection."""

    def __init__(
        self, pointer: supervisor_registry.Pointer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pointer = pointer
        self.capabilities: RuntimeCapabilities | None = None
        self.lost = False
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listeners: set[asyncio.Queue[ContainerStatus | None]] = set()
        self._subscribed = False
        self._task = asyncio.create_task(self._read(), name=f"supervisor {pointer.pid}")

    async def call(self, message: wire.Message, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> Any:
        """The result. Raises RuntimeUnavailableError, StartError, UnknownContainerError."""
        if self.lost:
            raise RuntimeUnavailableError("the connection to the supervisor is lost")
        seq = next(self._numbers)
        try:
            frame = wire.encode({**message, "seq": seq})
        except wire.WireError as error:
            # Only a container's config can grow like that, and asking again would not make it smaller.
            raise StartError(f"the container's configuration is too large: {error}") from error
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[seq] = future
        try:
            async with asyncio.timeout(timeout_seconds):
                # First: while the supervisor does not read, what waits for it must not grow with every attempt.
                await self._writer.drain()
                self._writer.write(frame)
                return await future
        except TimeoutError:
            operation = message.get("op")
            raise RuntimeUnavailableError(f"the supervisor did not answer {operation} in {timeout_seconds} s") from None
        except OSError as error:
            raise RuntimeUnavailableError(f"the supervisor cannot be reached: {error}") from error
        finally:
            self._waiting.pop(seq, None)

    async def subscribe(self, queue: asyncio.Queue[ContainerStatus | None]) -> None:
        """Put every event into ``queue``, and None when the connection is lost."""
        self._listeners.add(queue)
        if not self._subscribed:
            self._subscribed = True
            await self.call({"op": "subscribe"})

    def unsubscribe(self, queue: asyncio.Queue[ContainerStatus | None]) -> None:
        """No more events."""
        self._listeners.discard(queue)

    async def close(self) -> None:
        """Idempotent."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._lose()

    async def _read(self) -> None:
        try:
            while True:
                self._receive(await read_message(self._reader))
        except (OSError, EOFError, wire.WireError) as error:
            logger.warning("lost supervisor %d: %s", self.pointer.pid, error)
        finally:
            self._lose()

    def _receive(self, message: wire.Message) -> None:
        if "event" in message:
            status = wire.load_status(message["event"])
            for queue in self._listeners:
                if not queue.full():
                    queue.put_nowait(status)
            return
        future = self._waiting.get(message.get("seq", 0))
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(error_of(message["error"]))
        else:
            future.set_result(message.get("result"))

    def _lose(self) -> None:
        if self.lost:
            return
        self.lost = True
        # At once, unsent requests and all: the supervisor must see that no one waits for them any more.
        self._writer.transport.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RuntimeUnavailableError("the connection to the supervisor was lost"))
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)


def error_of(error: wire.Message) -> Exception:
    kind, text = error.get("type"), str(error.get("message", ""))
    if kind == "StartError":
        return StartError(text)
    if kind == "UnknownContainer":
        return UnknownContainerError(text)
    if kind == "ResizeError":
        return ResizeError(text)
    return RuntimeUnavailableError(text)


async def read_message(reader: asyncio.StreamReader) -> wire.Message:
    try:
        (length,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        if length > wire.MAX_FRAME_BYTES:
            raise wire.WireError(f"a frame of {length} bytes")
        return wire.decode_body(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise EOFError("the supervisor closed the connection") from error


async def open_connection(pointer: supervisor_registry.Pointer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raises RuntimeUnavailableError."""
    sock: socket.socket | None = None
    try:
        sock = await asyncio.to_thread(
            unix_sockets.connect, Path(pointer.socket), timeout_seconds=CONNECT_TIMEOUT_SECONDS
        )
        if (uid := wire.peer(sock).uid) != os.geteuid():
            raise RuntimeUnavailableError(f"the socket {pointer.socket} belongs to uid {uid}")
        sock.setblocking(False)  # noqa: FBT003
        return await asyncio.open_unix_connection(sock=sock, limit=_STREAM_LIMIT_BYTES)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise RuntimeUnavailableError(f"cannot connect to supervisor {pointer.pid}: {error}") from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise


def hello_to(pointer: supervisor_registry.Pointer) -> wire.Message:
    """The first message of a connection. A supervisor of version 1 has no secret and asks for none."""
    return {"op": "hello", "versions": list(SUPPORTED_VERSIONS), "secret": pointer.secret}


async def connect(pointer: supervisor_registry.Pointer) -> Link:
    """A control connection that has sent its hello. Raises RuntimeUnavailableError."""
    reader, writer = await open_connection(pointer)
    link = Link(pointer, reader, writer)
    try:
        hello = await link.call(hello_to(pointer))
        found = hello["capabilities"]
        link.capabilities = RuntimeCapabilities(
            cpu_limits=bool(found["cpu_limits"]),
            memory_cgroup=bool(found["memory_cgroup"]),
            wasmtime_version=str(found["wasmtime_version"]),
            pod_networks=bool(found.get("pod_networks")),
            fences=tuple(Fence(**fence) for fence in found.get("fences") or ()),  # an older one reports none
        )
    except BaseException:
        await link.close()
        raise
    return link
