"""Connections of the supervisor: requests and answers, events, and sessions (exec, attach) that take over a connection.

An exec's or attach's output has its own connection, so that back-pressure is the socket's: while its buffer is
full the exec's pipes are not read, and the guest waits. An attach must never slow its container down: one that does not
keep up is cut off.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from wasilet_node.runtime import wire
from wasilet_node.runtime.containers import Container, Containers, RequestError
from wasilet_node.runtime.loop import GONE, READ, WRITE, Loop, Timer, Watch
from wasilet_node.runtime.process import ForkRefusedError, Outcome, SandboxProcess
from wasilet_node.runtime.protocol import ContainerStatus
from wasilet_node.runtime.stdin import GuestInput

logger = logging.getLogger(__name__)

READ_BYTES = 256 * 1024
MAX_CONTROL_BUFFER_BYTES = 128 * 1024 * 1024
SESSION_HIGH_WATER_BYTES = 1024 * 1024
ATTACH_LIMIT_BYTES = 8 * 1024 * 1024
MAX_EXEC_SECONDS = 24 * 3600.0
MAX_EXECS = 32
"""Per container, probes included. Each may use as much memory as the container itself."""


class Hub(Protocol):
    """What connections need of the supervisor."""

    def handle(self, connection: Connection, message: wire.Message) -> None:
        """Serve one request; answers by ``connection.answer``. Raises RequestError."""

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""


class Session(Protocol):
    """What has taken a connection over."""

    def on_message(self, message: wire.Message) -> None:
        """A message of the client."""

    def on_writable(self) -> None:
        """The buffer is empty again."""

    def on_closed(self) -> None:
        """The client is gone."""


class Connection:
    """One client, its uid already checked."""

    def __init__(self, loop: Loop, hub: Hub, sock: socket.socket) -> None:
        self._loop = loop
        self._hub = hub
        self._socket = sock
        self._decoder = wire.Decoder()
        self._out = bytearray()
        self._watch: Watch = loop.watch(sock.fileno(), self._ready, urgent=True)
        self._ending = False
        self.open = True
        self.greeted = False
        self.subscribed = False
        self.session: Session | None = None

    @property
    def buffered(self) -> int:
        """Bytes that the client has not taken yet."""
        return len(self._out)

    def answer(self, seq: object, result: object) -> None:
        """The result of request ``seq``."""
        self.send({"seq": seq, "result": result})

    def refuse(self, seq: object, kind: str, message: str) -> None:
        """The failure of request ``seq``."""
        self.send({"seq": seq, "error": {"type": kind, "message": message}})

    def event(self, status: ContainerStatus) -> None:
        """Notify a subscriber of a change."""
        if self.subscribed:
            self.send({"event": wire.dump_status(status)})

    def send(self, message: wire.Message) -> None:
        """Queue a message; a client that does not read is cut off."""
        if not self.open:
            return
        self._out += wire.encode(message)
        if len(self._out) > MAX_CONTROL_BUFFER_BYTES:
            logger.warning("a client does not read its answers; it is cut off")
            self.close()
            return
        self._flush()

    def finish(self) -> None:
        """Close when all is sent."""
        self._ending = True
        self._flush()

    def hand_over(self) -> socket.socket:
        """The socket, for the caller that uses another protocol over it from now on; this connection is over."""
        if self._out:
            raise RequestError("BadRequest", "answers are still on their way")
        self.open = False
        self._loop.unwatch(self._watch)
        self._hub.closed(self)
        return self._socket

    def close(self) -> None:
        """Close now; idempotent."""
        if not self.open:
            return
        self.open = False
        self._loop.unwatch(self._watch)
        self._socket.close()
        session, self.session = self.session, None
        if session is not None:
            session.on_closed()
        self._hub.closed(self)

    def _ready(self, events: int) -> None:
        if events & GONE:
            # No one waits for the answers. What a client asked for before it was gone must not be done late: a start
            # that lay here while this process could not run would come beside the one that the next agent asks for.
            self.close()
            return
        if events & WRITE:
            self._flush()
            if self.open and not self._out and self.session is not None:
                self.session.on_writable()
        if self.open and events & ~WRITE:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            for message in self._decoder.feed(data):
                if not self.open:
                    return
                self._dispatch(message)
        except wire.WireError as error:
            logger.warning("a client is cut off: %s", error)
            self.close()

    def _dispatch(self, message: wire.Message) -> None:
        try:
            if self.session is not None:
                self.session.on_message(message)
            else:
                self._hub.handle(self, message)
        except RequestError as error:
            self.refuse(message.get("seq"), error.kind, str(error))
        except (KeyError, TypeError, ValueError) as error:
            self.refuse(message.get("seq"), "BadRequest", f"a malformed request: {error!r}")
        except Exception as error:
            logger.exception("request %s failed", message.get("op"))
            self.refuse(message.get("seq"), "Failed", f"the supervisor failed: {error!r}")

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._socket.send(self._out[:READ_BYTES])
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
            del self._out[:sent]
        if not self._out and self._ending:
            self.close()
            return
        if self.open:
            self._loop.change(self._watch, READ | WRITE if self._out else READ)


def _output_message(stream: str, data: bytes) -> wire.Message:
    return {"stream": stream, "data": base64.b64encode(data).decode("ascii")}


class _Stdin:
    """One client's side of a guest's stdin: a piece at a time, answered when the guest's pipe has taken it."""

    def __init__(self, connection: Connection, guest: GuestInput | None) -> None:
        """``guest`` is None for one that reads nothing: what is sent to it is answered and dropped."""
        self._connection = connection
        self._guest = guest
        self._busy = False

    def on_message(self, message: wire.Message) -> None:
        """The operation ``stdin``. Raises RequestError."""
        if self._busy:
            raise RequestError("BadRequest", "the last piece of stdin was not answered yet")
        seq = message.get("seq", 0)

        def taken() -> None:
            self._busy = False
            self._connection.answer(seq, None)

        self._busy = True
        data = base64.b64decode(message.get("data") or "")
        if self._guest is None:
            taken()
        else:
            self._guest.write(self, data, taken)

    def leave(self) -> None:
        """The client has gone."""
        if self._guest is not None:
            self._guest.leave(self)


class AttachSession:
    """The output of a running container from now on, and its stdin where it has one and the client asked for it."""

    def __init__(self, connection: Connection, container: Container, *, stdin: bool) -> None:
        self._connection = connection
        self._container = container
        self._guest = container.input if stdin else None
        self._stdin = _Stdin(connection, self._guest)
        container.output_listeners.append(self._output)
        container.exit_waiters.append(self._ended)

    def on_message(self, message: wire.Message) -> None:
        """``stdin`` and ``interrupt``; anything else is answered and dropped."""
        operation = message.get("op")
        if operation == "stdin":
            self._stdin.on_message(message)
            if message.get("eof"):
                self._end_of_input()
            return
        if operation == "interrupt" and self._container.config.tty and self._container.process is not None:
            self._container.process.interrupt()
        if "seq" in message:
            self._connection.answer(message["seq"], None)

    def on_writable(self) -> None:
        """Nothing waits."""

    def _end_of_input(self) -> None:
        # Without stdinOnce the stream stays open across attach sessions, and the guest never reads an end of file.
        if self._guest is not None and self._container.config.stdin_once:
            self._guest.close()

    def on_closed(self) -> None:
        """Stop listening."""
        self._end_of_input()
        self._stdin.leave()
        with contextlib.suppress(ValueError):
            self._container.output_listeners.remove(self._output)
        with contextlib.suppress(ValueError):
            self._container.exit_waiters.remove(self._ended)

    def _output(self, stream: str, data: bytes) -> None:
        if self._connection.buffered > ATTACH_LIMIT_BYTES:
            self._connection.close()
            return
        self._connection.send(_output_message(stream, data))

    def _ended(self) -> None:
        status = self._container.status
        self._connection.send({"exit": {"code": status.exit_code, "error": status.message, "timed_out": False}})
        self._connection.finish()


class ExecSession:
    """A fresh instance beside a container; it ends with its connection, its container or its deadline."""

    def __init__(
        self,
        loop: Loop,
        containers: Containers,
        connection: Connection,
        container: Container,
        *,
        argv: tuple[str, ...],
        stdin: bool,
        timeout_seconds: float | None,
    ) -> None:
        self._connection = connection
        self._container = container
        self._timed_out = False
        self._deadline: Timer | None = None
        if len(container.commands) >= MAX_EXECS:
            raise RequestError("StartError", f"{MAX_EXECS} commands run in this container already: end one first")
        try:
            self._process: SandboxProcess = containers.make_process(
                container,
                dataclasses.replace(container.config, argv=argv),
                stdin=stdin,
                on_output=self._output,
                on_started=lambda: None,
                on_exit=self._ended,
            )
        except ForkRefusedError as error:
            raise RequestError("StartError", str(error)) from error
        self._guest = GuestInput(loop, self._process)
        self._stdin = _Stdin(connection, self._guest)
        self._deadline = loop.call_later(min(timeout_seconds or MAX_EXEC_SECONDS, MAX_EXEC_SECONDS), self._expire)
        self._kill: Callable[[], None] = self._process.kill
        container.commands.append(self._process)
        container.exit_waiters.append(self._kill)

    def on_message(self, message: wire.Message) -> None:
        """``stdin`` (answered when the guest's pipe has taken it) and ``kill``."""
        operation = message.get("op")
        if operation == "kill":
            self._process.kill()
            return
        if operation == "interrupt":
            self._process.interrupt()
            self._connection.answer(message.get("seq", 0), None)
            return
        if operation != "stdin":
            raise RequestError("BadRequest", f"an exec has no operation {operation!r}")
        self._stdin.on_message(message)
        if message.get("eof"):
            self._guest.close()

    def on_writable(self) -> None:
        """The client has taken all: read the guest's output again."""
        self._process.resume()

    def on_closed(self) -> None:
        """No one waits for the outcome."""
        self._process.kill()

    def _output(self, stream: str, data: bytes) -> None:
        self._connection.send(_output_message(stream, data))
        if self._connection.buffered > SESSION_HIGH_WATER_BYTES:
            self._process.pause()

    def _expire(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _ended(self, outcome: Outcome) -> None:
        self._container.commands.remove(self._process)
        if self._deadline is not None:
            self._deadline.cancel()
        self._guest.end()
        if self._container.group is not None:
            # An exec that the kernel killed for memory must not be taken for the container itself later.
            self._container.group.new_oom_kill()
        with contextlib.suppress(ValueError):
            self._container.exit_waiters.remove(self._kill)
        self._connection.send(
            {
                "exit": {
                    "code": outcome.exit_code,
                    "error": outcome.message,
                    "timed_out": self._timed_out,
                    "start_failed": outcome.start_failed,
                }
            }
        )
        self._connection.finish()
