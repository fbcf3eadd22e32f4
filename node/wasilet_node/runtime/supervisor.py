"""The supervisor: ``python -P -m wasilet_node.runtime.supervisor --data-dir DIR [--ready-fd N]``.

A small process of one thread that takes a sandbox of its zygote for each container, reaps it, writes its log, and
outlives the agent. It loads everything before it forks the zygote and never builds a ``Module``, which would start
threads. It daemonises itself, so that the agent that started it has no child to reap.

It ends on ``shutdown`` (containers are killed and their exits recorded first), on SIGTERM likewise, when it was
retired and nothing is left of its containers, and when its data folder is gone, since then no one can reach it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hmac
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from wasilet_node.runtime import (
    engine,
    guest,
    linux,
    rootless,
    sandbox,
    supervisor_registry,
    user_namespace,
    wire,
)
from wasilet_node.runtime.cgroups import CgroupManager
from wasilet_node.runtime.containers import Container, Containers, RequestError
from wasilet_node.runtime.fences import examine
from wasilet_node.runtime.loop import READ, Loop, Watch
from wasilet_node.runtime.pod_namespaces import PodNamespaces
from wasilet_node.runtime.protocol import PROTOCOL_VERSION, ContainerStatus, RuntimeCapabilities
from wasilet_node.runtime.records import Owner, Records
from wasilet_node.runtime.sessions import AttachSession, Connection, ExecSession
from wasilet_node.runtime.stale_cleanup import remove_traces_of_the_dead
from wasilet_node.runtime.supervisor_log import OwnLog
from wasilet_node.runtime.zygote import Zygote
from wasilet_node.settings import LogSettings, NodePaths

logger = logging.getLogger(__name__)

FOLDER_CHECK_SECONDS = 10.0
SHUTDOWN_SECONDS = 20.0
OOM_SCORE = -999
"""kubelet's own: with it end all containers. Each of these makes itself the first to go."""

ACCEPT_RETRY_SECONDS = 0.5
_CAPABILITIES = frozenset(
    {
        linux.CAP_DAC_OVERRIDE,
        linux.CAP_KILL,
        linux.CAP_SETGID,
        linux.CAP_SETUID,
        linux.CAP_SETPCAP,
        linux.CAP_SYS_ADMIN,
        linux.CAP_SYS_PTRACE,
    }
)
"""What it keeps in its own user namespace: sandboxes are put into namespaces and become other users, whom it ends and
whose memory it measures (/proc/PID/smaps_rollup). They drop all of it but the first."""


class Supervisor:
    """Serves requests until it is told to end."""

    def __init__(
        self,
        paths: NodePaths,
        logs: LogSettings,
        *,
        use_cgroups: bool = True,
        not_isolated: str = "not tried",
        pod_networks: bool = False,
    ) -> None:
        """``not_isolated``: why this process is not in its own user namespace that knows all ids, and may own network
        namespaces; empty: it is. ``pod_networks``: it is in another one that may. Raises OSError when the data folder
        cannot be used."""
        pid = os.getpid()
        start_time = linux.start_time(pid)
        if start_time is None:
            raise OSError("/proc does not show this process; is it mounted?")
        fences = examine(not_isolated, rootless_rights=pod_networks)
        for fence in fences.each():
            logger.log(logging.INFO if fence.holds else logging.WARNING, "%s", fence.line)
        # Before anything is known of any container.
        self._zygote = Zygote(
            guest.make_tools(engine.make_linkers()),
            own_users=not fences.user,
            own_roots=not fences.files,
            own_pids=not fences.pids,
        )
        owner = Owner(pid=pid, start_time=start_time)
        self._paths = paths
        self._connections: set[Connection] = set()
        self._retired = False
        self._ending = False
        remove_traces_of_the_dead(paths.data)
        self._loop = Loop()
        self._cgroups = CgroupManager(f"{pid}-{start_time}", enabled=use_cgroups)
        self._capabilities = RuntimeCapabilities(
            cpu_limits=self._cgroups.cpu,
            memory_cgroup=self._cgroups.memory,
            wasmtime_version=engine.wasmtime_version(),
            pod_networks=pod_networks or not not_isolated,
            fences=fences.each(),
        )
        self._namespaces = PodNamespaces(self._loop)
        self._containers = Containers(
            self._loop,
            self._zygote,
            Records(paths.containers, owner),
            self._cgroups,
            logs=logs,
            artifacts=paths.compiled,
            on_change=self._changed,
            namespaces=self._namespaces,
        )
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._listener, self._accepting, path = self._listen()
        self._folder = _identity(paths.data)
        self._pointer = supervisor_registry.Pointer(
            pid=pid,
            start_time=start_time,
            socket=str(path),
            protocol_version=PROTOCOL_VERSION,
            build=engine.engine_key(),
            secret=secrets.token_hex(32),
            cgroups=self._cgroups.directories,
        )
        supervisor_registry.write_pointer(paths.data, self._pointer)
        self._loop.call_later(FOLDER_CHECK_SECONDS, self._check_folder)
        self._operations: dict[str, Callable[[Connection, wire.Message, object], None]] = {
            "start": self._start,
            "stop": self._stop,
            "remove": self._remove,
            "resize": self._resize,
            "list": self._list,
            "usage": self._usage,
            "subscribe": self._subscribe,
            "exec": self._exec,
            "attach": self._attach,
            "namespaces": self._serve_namespaces,
            "retire": self._retire,
            "shutdown": self._shutdown_request,
        }

    def run(self) -> None:
        """Serve; returns when everything is put away."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGTERM, _noted)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def woken(_events: int) -> None:
            if signal.SIGTERM in os.read(reader, 64):
                logger.info("SIGTERM: stopping all containers")
                self._shutdown(lambda: None)

        self._loop.watch(reader, woken, urgent=True)
        self._zygote.attach(self._loop)
        try:
            self._loop.run()
        finally:
            supervisor_registry.withdraw(self._paths.data, self._pointer)
            for connection in list(self._connections):
                connection.close()
            self._listener.close()
            self._namespaces.close()
            self._zygote.close()
            self._cgroups.close()

    def handle(self, connection: Connection, message: wire.Message) -> None:
        """One request. Raises RequestError."""
        operation, seq = message.get("op"), message.get("seq")
        if operation == "hello":
            versions = message.get("versions") or []
            if PROTOCOL_VERSION not in versions:
                raise RequestError("Version", f"this supervisor speaks protocol {PROTOCOL_VERSION}, not {versions}")
            if not hmac.compare_digest(str(message.get("secret") or "").encode(), self._pointer.secret.encode()):
                raise RequestError(
                    "Secret", f"a client must send the secret of {self._paths.data / supervisor_registry.POINTER_NAME}"
                )
            connection.greeted = True
            connection.answer(
                seq,
                {
                    "protocol_version": PROTOCOL_VERSION,
                    "pid": self._pointer.pid,
                    "build": self._pointer.build,
                    "capabilities": dataclasses.asdict(self._capabilities),
                },
            )
            return
        if not connection.greeted:
            raise RequestError("Version", "the first message must be a hello")
        function = self._operations.get(str(operation))
        if function is None:
            raise RequestError("BadRequest", f"unknown operation {operation!r}")
        function(connection, message, seq)

    def closed(self, connection: Connection) -> None:
        """A client went away; containers do not mind."""
        self._connections.discard(connection)

    def _accept(self) -> None:
        try:
            sock = self._accepted()
        except OSError as error:
            # Without a free descriptor the listener stays ready, and looking at it again at once would take all cpu.
            logger.warning("cannot accept a connection: %s", error)
            self._loop.change(self._accepting, 0)
            self._loop.call_later(ACCEPT_RETRY_SECONDS, lambda: self._loop.change(self._accepting, READ))
            return
        try:
            peer = wire.peer(sock)
            welcome = peer.uid in {os.geteuid(), 0} and not linux.is_descendant(peer.pid, self._pointer.pid)
        except OSError:
            sock.close()
            return
        if not welcome:
            # What a sandbox would do that broke out of its guest: it has this user, and is a child of this process.
            logger.warning("refused a connection of process %d, uid %d", peer.pid, peer.uid)
            sock.close()
            return
        sock.setblocking(False)  # noqa: FBT003
        self._connections.add(Connection(self._loop, self, sock))

    def _accepted(self) -> socket.socket:
        """The next connection; where no descriptor is free, in place of the one that is kept for this: who asks is to
        be refused at once, not left waiting. Raises OSError."""
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE} or self._reserve < 0:
                raise
        os.close(self._reserve)
        self._reserve = -1
        self._loop.call_later(ACCEPT_RETRY_SECONDS, self._keep_reserve)
        return self._listener.accept()[0]

    def _keep_reserve(self) -> None:
        """Have the spare descriptor again, as soon as one is free."""
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._loop.call_later(ACCEPT_RETRY_SECONDS, self._keep_reserve)

    def _changed(self, status: ContainerStatus) -> None:
        for connection in tuple(self._connections):
            connection.event(status)

    def _start(self, connection: Connection, message: wire.Message, seq: object) -> None:
        if self._ending:
            raise RequestError("StartError", "the supervisor is shutting down")
        try:
            config = wire.load_config(message["config"])
        except wire.WireError as error:
            raise RequestError("StartError", str(error)) from error
        _require_beneath(self._paths.compiled, config.artifact, "the compiled file")
        _require_beneath(self._paths.logs, config.log_path, "the log file")

        def done(container: Container) -> None:
            status = container.status
            if status.reason == "StartError":
                connection.refuse(seq, "StartError", status.message)
            else:
                connection.answer(seq, wire.dump_status(status))

        self._containers.start(config, done)

    def _stop(self, connection: Connection, message: wire.Message, seq: object) -> None:
        container = self._containers.get(str(message["id"]))
        if container is None:
            connection.answer(seq, None)
            return
        known = container
        grace = float(message.get("grace_seconds") or 0)
        self._containers.stop(
            known, lambda: connection.answer(seq, wire.dump_status(known.status)), grace_seconds=grace
        )

    def _remove(self, connection: Connection, message: wire.Message, seq: object) -> None:
        def done() -> None:
            connection.answer(seq, None)
            self._end_if_idle()

        self._containers.remove(str(message["id"]), done)

    def _resize(self, connection: Connection, message: wire.Message, seq: object) -> None:
        container = self._running_container(message)
        annotations = {str(name): str(value) for name, value in (message.get("annotations") or {}).items()}
        try:
            resources = wire.load_resources(message.get("resources") or {})
        except wire.WireError as error:
            raise RequestError("ResizeError", str(error)) from error
        self._containers.resize(container, resources, annotations)
        connection.answer(seq, wire.dump_status(container.status))

    def _list(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        connection.answer(seq, [wire.dump_status(status) for status in self._containers.statuses()])

    def _usage(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        connection.answer(seq, [dataclasses.asdict(usage) for usage in self._containers.usage()])

    def _subscribe(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        connection.subscribed = True
        connection.answer(seq, None)

    def _running_container(self, message: wire.Message) -> Container:
        container_id = str(message["id"])
        container = self._containers.get(container_id)
        if container is None or container.process is None:
            raise RequestError("UnknownContainer", f"container {container_id} is not running")
        return container

    def _exec(self, connection: Connection, message: wire.Message, seq: object) -> None:
        container = self._running_container(message)
        argv = tuple(str(argument) for argument in message["argv"])
        if container.config.server is not None:
            raise RequestError("StartError", "the component answers HTTP requests: it has no command that could be run")
        config = dataclasses.replace(container.config, argv=argv)
        try:
            sandbox.check_config(config)
        except sandbox.ConfigError as error:
            raise RequestError("StartError", str(error)) from error
        timeout = message.get("timeout_seconds")
        connection.session = ExecSession(
            self._loop,
            self._containers,
            connection,
            container,
            argv=argv,
            stdin=bool(message.get("stdin")),
            timeout_seconds=float(timeout) if timeout is not None else None,
        )
        connection.answer(seq, None)

    def _attach(self, connection: Connection, message: wire.Message, seq: object) -> None:
        container = self._running_container(message)
        connection.session = AttachSession(connection, container, stdin=bool(message.get("stdin")))
        connection.answer(seq, None)

    def _serve_namespaces(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        if not self._capabilities.pod_networks:
            raise RequestError("Unsupported", "this supervisor has no user namespace that could own pods' networks")
        connection.answer(seq, None)
        self._namespaces.serve(connection.hand_over())

    def _retire(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        self._retired = True
        connection.answer(seq, None)
        self._end_if_idle()

    def _shutdown_request(self, connection: Connection, _message: wire.Message, seq: object) -> None:
        self._shutdown(lambda: connection.answer(seq, None))

    def _shutdown(self, done: Callable[[], None]) -> None:
        self._ending = True
        running = self._containers.running()
        left = len(running)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                done()
                self._loop.stop()

        if not running:
            one_less()
        for container in running:
            self._containers.stop(container, one_less)
        self._loop.call_later(SHUTDOWN_SECONDS, self._loop.stop)

    def _end_if_idle(self) -> None:
        if self._retired and self._containers.empty():
            logger.info("retired, and the last container is gone")
            self._loop.stop()

    def _listen(self) -> tuple[socket.socket, Watch, Path]:
        listener, path = supervisor_registry.listen(self._paths.data)
        return listener, self._loop.watch(listener.fileno(), lambda _events: self._accept(), urgent=True), path

    def _check_folder(self) -> None:
        if _identity(self._paths.data) != self._folder:
            logger.warning("the data folder is gone, so no agent can reach this supervisor: stopping all containers")
            self._shutdown(lambda: None)
            return
        self._loop.call_later(FOLDER_CHECK_SECONDS, self._check_folder)
        if not supervisor_registry.is_announced(self._paths.data, self._pointer):
            try:
                self._announce_again()
            except OSError as error:
                logger.error("cannot be found by others: %s", error)  # noqa: TRY400

    def _announce_again(self) -> None:
        """Someone removed the socket or the pointer: containers must not die of that, nor be started once more by an
        agent that takes this supervisor for gone. Raises OSError."""
        logger.warning("the socket or the pointer of this supervisor is gone: made again")
        if not Path(self._pointer.socket).is_socket():
            listener, accepting, path = self._listen()
            self._loop.unwatch(self._accepting)
            self._listener.close()
            self._listener, self._accepting = listener, accepting
            self._pointer = dataclasses.replace(self._pointer, socket=str(path))
        supervisor_registry.write_pointer(self._paths.data, self._pointer, current=not self._retired)


def _require_beneath(folder: Path, path: str, what: str) -> None:
    """Raises RequestError unless ``path`` lies in ``folder`` by its name; the links in it are this user's own."""
    if os.path.normpath(path) != path or not Path(path).is_relative_to(folder):
        raise RequestError("StartError", f"{what} {path} does not lie in {folder}")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another folder of the same name is not this supervisor's."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _noted(_number: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor carries the signal into the loop."""


def main(arguments: list[str]) -> int:
    """Detach, load, say that it is ready, serve."""
    parser = argparse.ArgumentParser(prog="wasilet_node.runtime.supervisor")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--log-max-size", type=int, default=LogSettings.max_size_bytes)
    parser.add_argument("--log-max-files", type=int, default=LogSettings.max_files)
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--no-cgroups", action="store_true", help="behave as where no control group may be made")
    options = parser.parse_args(arguments)
    inside, outside = socket.socketpair()
    pid = os.fork()
    if pid != 0:
        with outside, contextlib.suppress(OSError):
            inside.close()
            user_namespace.map_child(pid, outside)
        return 0
    outside.close()
    with contextlib.suppress(PermissionError):
        os.setsid()
    os.chdir("/")
    os.umask(0o077)
    logging.basicConfig(
        level=logging.INFO,
        handlers=[OwnLog(options.data_dir)],
        format="%(asctime)s %(levelname)s supervisor[%(process)d] %(message)s",
    )
    _write_message(options.ready_fd, {"pid": os.getpid()})
    try:
        linux.raise_open_files_limit()
        # What it holds are the environments of all containers, secrets included.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        logs = LogSettings(max_size_bytes=options.log_max_size, max_files=options.log_max_files)
        linux.set_oom_score(OOM_SCORE)  # while the capability for it is held
        not_isolated = user_namespace.enter(inside)
        inside.close()
        rootless_networks = rootless.is_inside()
        linux.drop_privileges(keep=_kept(isolated=not not_isolated, rootless_networks=rootless_networks))
        supervisor = Supervisor(
            NodePaths(data=options.data_dir),
            logs,
            use_cgroups=not options.no_cgroups,
            not_isolated=not_isolated,
            pod_networks=rootless_networks,
        )
    except Exception as error:
        logger.exception("cannot start")
        _write_message(options.ready_fd, {"error": f"{type(error).__name__}: {error}"})
        return 1
    _write_message(options.ready_fd, {"ready": True})
    with contextlib.suppress(OSError):
        os.close(options.ready_fd)
    supervisor.run()
    return 0


def _kept(*, isolated: bool, rootless_networks: bool) -> frozenset[int]:
    """The capabilities that stay. Those of an ordinary user put sandboxes into networks, and do nothing else."""
    if rootless_networks:
        return frozenset({linux.CAP_SYS_ADMIN})
    return _CAPABILITIES if isolated else frozenset({linux.CAP_DAC_OVERRIDE})


def _write_message(descriptor: int, message: dict[str, object]) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
