"""The network namespaces of pods, as the supervisor keeps them: descriptors, by a key that the agent chose.

A namespace lives while a descriptor of it is open or a process is in it, so pods' networks live exactly as long as the
supervisor, and the kernel removes what a killed one leaves. They are made by one child, since a process that has
unshared cannot come back, and they belong to the supervisor's user namespace: only so may its sandboxes enter them.
The agent gets each descriptor and plugs it in.

The agent speaks to this over its own connection (operation ``namespaces``): one request at a time, each a line of
JSON with at most one descriptor (SCM_RIGHTS), and each answered by such a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from wasilet_node.runtime import linux, netns
from wasilet_node.runtime.loop import GONE, Loop, Watch

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 * 1024
MAX_NAMESPACES = 4096
_MAKE, _MADE = b"make", b"made"

Made = Callable[[int, str], None]
"""Called with a descriptor and an empty text, or with -1 and why there is none."""


class NamespaceMaker:
    """Makes network namespaces in a separate child process, one after the other."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: deque[Made] = deque()
        self._socket: socket.socket | None = None
        self._watch: Watch | None = None
        self._pid = 0

    def make(self, made: Made) -> None:
        """A new, empty network namespace. The descriptor is the callee's to close."""
        try:
            (self._socket or self._start()).send(_MAKE)
        except OSError as error:
            made(-1, f"no network namespace can be made: {error.strerror or error}")
            return
        self._waiting.append(made)

    def close(self) -> None:
        """End the child; idempotent."""
        if self._socket is None:
            return
        if self._watch is not None:
            self._loop.unwatch(self._watch)
        self._socket.close()
        self._socket = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        waiting, self._waiting = self._waiting, deque()
        for made in waiting:
            made(-1, "the process that makes network namespaces has ended")

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            _run_child(theirs, parent)
        theirs.close()
        self._pid = pid
        self._socket = ours
        self._watch = self._loop.watch(ours.fileno(), lambda _events: self._receive(), urgent=True)
        return ours

    def _receive(self) -> None:
        if self._socket is None:
            return
        message, descriptors = b"", list[int]()
        with contextlib.suppress(OSError):
            message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            logger.warning("the process that makes network namespaces has ended")
            self.close()
            return
        made = self._waiting.popleft()
        if message == _MADE and descriptors:
            made(descriptors[0], "")
        else:
            made(-1, message.decode(errors="replace"))


def _run_child(commands: socket.socket, parent: int) -> None:
    """The maker's whole life: never returns."""
    code = 1
    try:
        linux.close_range_except((commands.fileno(),))
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        linux.set_parent_death_signal()
        if os.getppid() != parent:
            os._exit(code)
        _serve(commands)
        code = 0
    finally:
        os._exit(code)


def _serve(commands: socket.socket) -> None:
    home = -1
    while commands.recv(64):
        try:
            if home < 0:
                netns.unshare(netns.CLONE_NEWNET)
                home = netns.open_own()
            netns.unshare(netns.CLONE_NEWNET)
            descriptor = netns.open_own()
        except OSError as error:
            commands.send(f"no network namespace can be made: {error.strerror}".encode())
            continue
        socket.send_fds(commands, [_MADE], [descriptor])
        os.close(descriptor)
        # Not to stay in it: a namespace lives while a process is there.
        netns.setns(home)


class PodNamespaces:
    """What is kept, and the connections of agents that ask for it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._maker = NamespaceMaker(loop)
        self._kept: dict[str, int] = {}
        self._sessions: set[NamespaceSession] = set()

    def descriptor(self, key: str) -> int | None:
        """The namespace of that key, still the table's own."""
        return self._kept.get(key)

    def serve(self, connection: socket.socket) -> None:
        """Take a connection of an agent over."""
        self._sessions.add(NamespaceSession(self._loop, self, connection))

    def close(self) -> None:
        """Let go of everything."""
        for session in list(self._sessions):
            session.close()
        self._maker.close()
        self.drop(list(self._kept))

    def make(self, key: str, made: Made) -> None:
        """A new namespace under ``key``; ``made`` must not close the descriptor."""
        if key in self._kept or len(self._kept) >= MAX_NAMESPACES:
            made(-1, f"{key} is kept already" if key in self._kept else f"{MAX_NAMESPACES} namespaces are kept already")
            return

        def keep(descriptor: int, problem: str) -> None:
            if descriptor >= 0:
                self.hold(key, descriptor)
            made(descriptor, problem)

        self._maker.make(keep)

    def hold(self, key: str, descriptor: int) -> None:
        """Keep a namespace that someone else made."""
        before = self._kept.get(key)
        self._kept[key] = descriptor
        if before is not None:
            os.close(before)

    def drop(self, keys: list[str]) -> None:
        """Forget; the kernel deletes a namespace when no process is in it any more."""
        for key in keys:
            descriptor = self._kept.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)

    def keys(self) -> list[str]:
        """Of all that are kept."""
        return list(self._kept)

    def ended(self, session: NamespaceSession) -> None:
        """A connection is gone; what is kept stays."""
        self._sessions.discard(session)


class NamespaceSession:
    """One agent's connection: one request at a time, each answered by one message."""

    def __init__(self, loop: Loop, namespaces: PodNamespaces, connection: socket.socket) -> None:
        self._loop = loop
        self._namespaces = namespaces
        self._socket = connection
        self._socket.setblocking(False)  # noqa: FBT003
        self._watch: Watch | None = loop.watch(connection.fileno(), self._ready, urgent=True)
        self._answer({"ready": True})

    def close(self) -> None:
        """Idempotent."""
        if self._watch is not None:
            self._loop.unwatch(self._watch)
            self._watch = None
            self._socket.close()
            self._namespaces.ended(self)

    def _ready(self, events: int) -> None:
        descriptors = list[int]()
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
            if not data:
                self.close()
                return
            request = json.loads(data)
            self._handle(request, descriptors)
        except BlockingIOError:
            if events & GONE:
                self.close()
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("an agent's request for a network namespace failed: %s", error)
            self.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _handle(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Takes a descriptor that it keeps out of ``descriptors``."""
        match request["op"]:
            case "make":
                key = str(request["key"])
                self._namespaces.make(key, lambda descriptor, problem: self._made_again(key, descriptor, problem))
            case "get":
                self._made(self._namespaces.descriptor(str(request["key"])) or -1, "not kept here")
            case "hold":
                self._namespaces.hold(str(request["key"]), descriptors.pop(0))
                self._answer({})
            case "drop":
                self._namespaces.drop([str(key) for key in request["keys"]])
                self._answer({})
            case "list":
                self._answer({"keys": self._namespaces.keys()})
            case operation:
                self._answer({"error": f"unknown operation {operation!r}"})

    def _made_again(self, key: str, descriptor: int, problem: str) -> None:
        self._made(descriptor, problem)
        if descriptor >= 0 and self._watch is None:
            # The agent gave up waiting: it asks under another key, and no one would drop this one.
            self._namespaces.drop([key])

    def _made(self, descriptor: int, problem: str) -> None:
        if descriptor < 0:
            self._answer({"error": problem})
        else:
            self._answer({}, descriptor)

    def _answer(self, message: dict[str, Any], descriptor: int = -1) -> None:
        if self._watch is None:
            return
        data = json.dumps(message).encode() + b"\n"
        try:
            # The agent waits for each answer, so there is room in the socket's buffer for one.
            sent = socket.send_fds(self._socket, [data], [descriptor] if descriptor >= 0 else [])
        except OSError:
            sent = 0
        if sent != len(data):
            self.close()
