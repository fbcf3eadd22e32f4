"""Exec and attach on the agent's side: a connection each, so that back-pressure is the socket's own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import AsyncGenerator

from wasilet_node.runtime import wire
from wasilet_node.runtime.protocol import RuntimeUnavailableError, StreamFrame
from wasilet_node.runtime.supervisor_connection import CALL_TIMEOUT_SECONDS, error_of, read_message


class SupervisorStream:
    """Implements ``wasilet_node.runtime.protocol.ExecStream`` over its own connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._stdin_lock = asyncio.Lock()
        self._exit_code: int | None = None
        self._error = ""
        self._ended = False
        self.timed_out = False

    @property
    def exit_code(self) -> int | None:
        """None until ``frames`` ended."""
        return self._exit_code

    @property
    def error(self) -> str:
        """Why it could not be started, or a trap's message."""
        return self._error

    async def begin(self, hello: wire.Message, request: wire.Message) -> None:
        """Hello and request. Raises StartError, UnknownContainerError, RuntimeUnavailableError."""
        for message in (hello, request):
            seq = next(self._numbers)
            try:
                async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                    self._writer.write(wire.encode({**message, "seq": seq}))
                    await self._writer.drain()
                    answer = await read_message(self._reader)
            except (TimeoutError, OSError, EOFError, wire.WireError) as error:
                raise RuntimeUnavailableError(f"the supervisor did not answer: {error}") from error
            if "error" in answer:
                raise error_of(answer["error"])

    async def frames(self) -> AsyncGenerator[StreamFrame, None]:
        """Output until the end. Raises RuntimeUnavailableError."""
        try:
            while not self._ended:
                message = await read_message(self._reader)
                if "stream" in message:
                    yield StreamFrame(stream=str(message["stream"]), data=base64.b64decode(message["data"]))
                elif "exit" in message:
                    self._end(message["exit"])
                else:
                    future = self._acks.pop(message.get("seq", 0), None)
                    if future is not None and not future.done():
                        future.set_result(None)
        except (OSError, EOFError, wire.WireError) as error:
            raise RuntimeUnavailableError(f"the stream broke off: {error}") from error
        finally:
            self._release()

    async def write_stdin(self, data: bytes) -> None:
        """Waits until the guest's pipe has it, which needs someone to iterate ``frames`` meanwhile."""
        for start in range(0, len(data), 65536):
            await self._stdin({"data": base64.b64encode(data[start : start + 65536]).decode("ascii")})

    async def close_stdin(self) -> None:
        """End of file for the guest."""
        await self._stdin({"eof": True})

    async def interrupt(self) -> None:
        """SIGINT for the guest."""
        await self._request({"op": "interrupt"})

    async def close(self) -> None:
        """Closing the connection kills an exec; idempotent."""
        self._ended = True
        self._release()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _stdin(self, fields: wire.Message) -> None:
        async with self._stdin_lock:
            await self._request({"op": "stdin", **fields})

    async def _request(self, message: wire.Message) -> None:
        """Returns when it was answered, or the stream has ended."""
        if self._ended:
            return
        seq = next(self._numbers)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._acks[seq] = future
        try:
            self._writer.write(wire.encode({**message, "seq": seq}))
            await self._writer.drain()
        except OSError:
            return
        await future

    def _end(self, result: wire.Message) -> None:
        code = result.get("code")
        self._exit_code = int(code) if code is not None else None
        self._error = str(result.get("error") or "")
        self.timed_out = bool(result.get("timed_out"))
        self._ended = True

    def _release(self) -> None:
        for future in self._acks.values():
            if not future.done():
                future.set_result(None)
        self._acks.clear()
