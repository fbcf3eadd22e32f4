"""The process that sandboxes are forked from: it has loaded everything and has never seen a container's config.

A fork copies all memory. Forked from the supervisor, every sandbox would hold the environments, secrets included, of
all containers that were ever started. So the supervisor forks a zygote before it knows of any container, and all
sandboxes come from there. A sandbox gets its own config and descriptors over a socket, and no one else's.

A few are made ahead of time and wait for that message, so that a start need not wait for a fork. Each is the
supervisor's child, not the zygote's, so it reaps them, they die with it, and the end of the zygote harms no one. As
root each is made so, in its own pid namespace (``pid_namespace``); elsewhere the zygote forks a process that forks the
sandboxes and ends, and the supervisor, being their subreaper, becomes their parent.

What if a process dies: sandboxes that wait and the zygote see the end of their sockets when the supervisor goes. A
zygote that was killed is replaced by one that is executed, since a fork of the supervisor would no longer be clean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from collections import deque
from dataclasses import dataclass
from typing import NoReturn

from wasilet_node.runtime import engine, guest, linux, pid_namespace, rootless, sandbox, wire
from wasilet_node.runtime.loop import Loop, Watch

logger = logging.getLogger(__name__)

READY_SANDBOXES = 6
"""How many wait; after a burst, twice as many. Each has about 1 MiB of its own."""

REFILL_BELOW = 3
"""Then all that are missing are made at once, since the process between costs a separate fork."""

SANDBOX_NAME = "wasilet-sandbox"
"""What ``ps`` shows of a process that has a container."""

ANSWER_SECONDS = 10.0
"""Of a zygote that has to be executed first; a fork takes 1 to 2 ms."""

_MAX_MESSAGE_BYTES = 4096
_MAX_DESCRIPTORS = 32
_READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Spare:
    """A sandbox that waits for its plan."""

    pid: int
    channel: socket.socket

    def alive(self) -> bool:
        """Whether it still waits."""
        poll = select.poll()
        poll.register(self.channel, select.POLLRDHUP)
        return not poll.poll(0)

    def start(self, plan: sandbox.ChildPlan) -> None:
        """Hand the plan over; it runs from here on. Raises OSError."""
        memory = os.memfd_create("plan", os.MFD_CLOEXEC)
        try:
            named = plan.descriptors()
            body = json.dumps(_encoded(plan, list(named))).encode()
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(body)
            socket.send_fds(self.channel, [b"p"], [memory, *named.values()])
        finally:
            os.close(memory)
            self.channel.close()

    def discard(self) -> None:
        """End it without a plan, and reap it."""
        self.channel.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self.pid, 0)


class Zygote:
    """The supervisor's side. Made before the supervisor knows of any container."""

    def __init__(
        self, tools: guest.GuestTools, *, own_users: bool = False, own_roots: bool = False, own_pids: bool = False
    ) -> None:
        """Fork it. ``own_users``: each sandbox becomes a user of its own, which takes CAP_SETUID and CAP_SETGID.
        ``own_roots``: each has a file tree of its own; ``own_pids``: and a pid namespace, which both take
        CAP_SYS_ADMIN. Raises OSError."""
        self.own_users = own_users
        self.own_roots = own_roots
        self._own_pids = own_pids
        linux.become_subreaper()
        self._ready: deque[Spare] = deque()
        self._asked = 0
        self._loop: Loop | None = None
        self._watch: Watch | None = None
        self._socket, theirs = _pair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _run(theirs, parent, tools)
        theirs.close()

    def attach(self, loop: Loop) -> None:
        """From here on sandboxes are made ahead of time."""
        self._loop = loop
        self._observe()
        self._refill()

    def take(self) -> Spare:
        """A sandbox, at once where one waits. Raises OSError when none can be made."""
        while True:
            while self._ready:
                spare = self._ready.popleft()
                self._refill()
                if spare.alive():
                    return spare
                spare.discard()
            self._make_one()

    def close(self) -> None:
        """End the zygote and all that wait."""
        self._forget()
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self._pid, 0)
        while self._ready:
            self._ready.popleft().discard()

    @property
    def pid(self) -> int:
        """The zygote's."""
        return self._pid

    def _make_one(self) -> None:
        """Wait for one. Raises OSError."""
        try:
            self._wait_for_answer()
        except (ConnectionError, EOFError, TimeoutError):
            self._replace()
            self._wait_for_answer()
        if self._loop is not None and not self._asked:
            # None was left, so many are started at once: the next are made while these begin.
            with contextlib.suppress(OSError):
                self._ask(READY_SANDBOXES)

    def _wait_for_answer(self) -> None:
        if not self._asked:
            self._ask(READY_SANDBOXES)
        self._receive(ANSWER_SECONDS)

    def _refill(self) -> None:
        if self._loop is None or self._asked or len(self._ready) >= REFILL_BELOW:
            return
        try:
            self._ask(READY_SANDBOXES - len(self._ready))
        except OSError:
            logger.warning("the zygote is gone; the next start makes another")

    def _ask(self, count: int) -> None:
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.send(json.dumps({"count": count, "own_pids": self._own_pids}).encode())
        self._asked = count

    def _readable(self) -> None:
        try:
            self._receive(0)
        except BlockingIOError:
            pass  # a start that waited has taken it
        except (ConnectionError, EOFError):
            logger.warning("the zygote is gone; the next start makes another")
            self._unwatch()
        except OSError as error:
            logger.warning("no sandbox made ahead of time: %s", error)

    def _receive(self, timeout_seconds: float) -> None:
        """One answer. Raises OSError, EOFError."""
        self._socket.settimeout(timeout_seconds)
        message, descriptors, _, _ = socket.recv_fds(
            self._socket, _MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            raise EOFError("the zygote is gone")
        self._asked = 0
        answer = json.loads(message)
        for pid, descriptor in zip(answer["pids"], descriptors, strict=True):
            self._ready.append(Spare(int(pid), socket.socket(fileno=descriptor)))
        if "error" in answer:
            raise OSError(answer["number"], answer["error"])

    def _replace(self) -> None:
        logger.warning("the zygote is gone: executing another")
        self._forget()
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self._pid, 0)
        self._socket, theirs = _pair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _execute(theirs, parent)
        theirs.close()
        self._observe()

    def _observe(self) -> None:
        if self._loop is not None:
            self._watch = self._loop.watch(self._socket.fileno(), lambda _events: self._readable(), urgent=True)

    def _unwatch(self) -> None:
        if self._watch is not None and self._loop is not None:
            self._loop.unwatch(self._watch)
            self._watch = None

    def _forget(self) -> None:
        self._unwatch()
        self._socket.close()
        self._asked = 0


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _encoded(plan: sandbox.ChildPlan, names: list[str]) -> wire.Message:
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {**fields, "config": wire.dump_config(plan.config), "cgroup_files": [], "descriptors": names}


def _decoded(message: wire.Message, descriptors: list[int]) -> sandbox.ChildPlan:
    """The plan with its descriptors as they are numbered here."""
    named = dict(zip(message.pop("descriptors"), descriptors, strict=True))
    groups = tuple(named.pop(name) for name in list(named) if name.startswith("cgroup"))
    fields = {**message, **named, "cgroup_files": groups, "config": wire.load_config(message["config"])}
    return sandbox.ChildPlan(**fields)


# --- the zygote's own process ---------------------------------------------------------------------------------------


def _run(commands: socket.socket, parent: int, tools: guest.GuestTools) -> NoReturn:
    code = 1
    try:
        linux.close_range_except((commands.fileno(),))
        linux.set_parent_death_signal()
        if os.getppid() == parent:
            _serve(commands, tools)
            code = 0
    except BaseException:
        logger.exception("the zygote ended")
    finally:
        os._exit(code)


def _serve(commands: socket.socket, tools: guest.GuestTools) -> None:
    """Make sandboxes on demand until the supervisor is gone."""
    linux.set_name("wasilet-zygote")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is loaded now stays shared with every child: the collector must not write into it.
    gc.collect()
    gc.freeze()
    gc.disable()
    while request := commands.recv(_MAX_MESSAGE_BYTES):
        answer: wire.Message = {"pids": []}
        channels: list[socket.socket] = []
        try:
            wanted = json.loads(request)
            make = _make_in_namespaces if wanted["own_pids"] else _make
            answer["pids"], channels = make(wanted["count"], tools)
        except OSError as error:
            answer |= {"error": error.strerror or str(error), "number": error.errno or 0}
        socket.send_fds(commands, [json.dumps(answer).encode()], [channel.fileno() for channel in channels])
        for channel in channels:
            channel.close()


def _make(count: int, tools: guest.GuestTools) -> tuple[list[int], list[socket.socket]]:
    """Sandboxes that wait, with the supervisor's ends of their sockets. Raises OSError; those that were made until then
    see end of file on their sockets."""
    _require_one_thread()
    pairs: list[tuple[socket.socket, socket.socket]] = []
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pairs.extend(_pair() for _ in range(count))
        middle = os.fork()
        if middle == 0:
            _make_and_end(pairs, writer, tools)
        os.close(writer)
        writer = -1
        # Only when it is gone are its children the supervisor's.
        os.waitpid(middle, 0)
        pids = [int(word) for word in os.read(reader, _MAX_MESSAGE_BYTES).split()]
        if len(pids) != count:
            raise OSError(0, "no process can be made")
    except BaseException:
        for ours, _ in pairs:
            ours.close()
        raise
    finally:
        for _, theirs in pairs:
            theirs.close()
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    return pids, [ours for ours, _ in pairs]


def _require_one_thread() -> None:
    threads = linux.thread_count()
    if threads != 1:
        raise OSError(0, f"the zygote has {threads} threads and must not fork")


def _make_in_namespaces(count: int, tools: guest.GuestTools) -> tuple[list[int], list[socket.socket]]:
    """The same, each in its own pid namespace; fewer where the kernel refuses more. Raises OSError when there is
    none."""
    _require_one_thread()
    pids: list[int] = []
    channels: list[socket.socket] = []
    for _ in range(count):
        ours, theirs = _pair()
        with theirs:
            try:
                pid = pid_namespace.clone_beside()
            except OSError:
                ours.close()
                if not pids:
                    raise
                break
            if pid == 0:
                _wait(theirs.fileno(), tools)
        pids.append(pid)
        channels.append(ours)
    return pids, channels


def _make_and_end(pairs: list[tuple[socket.socket, socket.socket]], writer: int, tools: guest.GuestTools) -> NoReturn:
    code = 1
    try:
        for _, theirs in pairs:
            pid = os.fork()
            if pid == 0:
                _wait(theirs.fileno(), tools)
            os.write(writer, b"%d " % pid)
        code = 0
    finally:
        os._exit(code)


def _wait(channel: int, tools: guest.GuestTools) -> NoReturn:
    """A sandbox, from its fork to its plan, which it then carries out."""
    try:
        linux.close_range_except((channel,))
        linux.set_name("wasilet-ready")
        with socket.socket(fileno=channel) as sock:
            message, descriptors, _, _ = socket.recv_fds(sock, 1, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        with os.fdopen(descriptors[0], "rb") as file:
            file.seek(0)
            plan = _decoded(json.loads(file.read()), descriptors[1:])
        linux.set_name(SANDBOX_NAME)
    except BaseException:  # noqa: BLE001 - there is no one to report to yet but the supervisor, by the end
        os._exit(1)
    sandbox.run_child(plan, tools)


def _execute(commands: socket.socket, parent: int) -> NoReturn:
    try:
        descriptor = commands.fileno()
        linux.close_range_except((descriptor,))
        os.set_inheritable(descriptor, True)  # noqa: FBT003
        if rootless.is_inside():
            linux.pass_on_capabilities()
        os.execv(  # noqa: S606 - no shell is wanted
            sys.executable, [sys.executable, "-P", "-m", "wasilet_node.runtime.zygote", str(descriptor), str(parent)]
        )
    finally:
        os._exit(1)


def main(arguments: list[str]) -> NoReturn:
    """A zygote in place of one that was killed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s zygote[%(process)d] %(message)s")
    descriptor, parent = (int(argument) for argument in arguments)
    _run(socket.socket(fileno=descriptor), parent, guest.make_tools(engine.make_linkers()))


if __name__ == "__main__":
    main(sys.argv[1:])
