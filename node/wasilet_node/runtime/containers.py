"""The supervisor's table of containers: start, output, memory watch, exit, records, removal.

State changes in one order only: start record, fork, running; exit record, then exited, then events. A client that asks
in between sees the state before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wasilet_common.cri_log.writer import LineFramer, LogFile
from wasilet_common.time_format import rfc3339_nano

from wasilet_node.runtime import linux, sandbox, wire
from wasilet_node.runtime.cgroups import CgroupManager, Group
from wasilet_node.runtime.component_host.counters import CountersPage
from wasilet_node.runtime.loop import Loop
from wasilet_node.runtime.pod_namespaces import PodNamespaces
from wasilet_node.runtime.process import ForkRefusedError, Outcome, SandboxProcess
from wasilet_node.runtime.protocol import ContainerConfig, ContainerState, ContainerStatus, ContainerUsage, Resources
from wasilet_node.runtime.records import Records, initial_status, valid_id
from wasilet_node.runtime.stdin import GuestInput
from wasilet_node.runtime.zygote import Zygote
from wasilet_node.settings import LogSettings

logger = logging.getLogger(__name__)

MEMORY_WATCH_SECONDS = 0.1
MEMORY_WATCH_NEAR_SECONDS = 0.02
"""While a container uses more than half of its limit."""

WATCH_HEADROOM_BYTES = 256 * 1024 * 1024
"""What a module can touch between two looks, and some: then the kill comes before ``memory.grow`` fails."""

START_REPORT_SECONDS = 5.0
"""A guest whose start function runs longer than this counts as running."""

RECORD_RETRY_SECONDS = 5.0
GROUP_REMOVE_RETRY_SECONDS = 0.05
GROUP_REMOVE_ATTEMPTS = 100
OOM_REASON = "OOMKilled"
START_ERROR_REASON = "StartError"
OutputListener = Callable[[str, bytes], None]


class RequestError(Exception):
    """Refuses a request; ``kind`` tells the client which exception to raise."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(kw_only=True, eq=False)
class Container:
    """One instance."""

    config: ContainerConfig
    status: ContainerStatus
    process: SandboxProcess | None = None
    input: GuestInput | None = None
    """Of a running container that reads what its clients send; None: it reads nothing."""

    group: Group | None = None
    log: LogFile | None = None
    framers: dict[str, LineFramer] = field(default_factory=dict)
    started_waiters: list[Callable[[], None]] = field(default_factory=list)
    exit_waiters: list[Callable[[], None]] = field(default_factory=list)
    commands: list[SandboxProcess] = field(default_factory=list)
    """Instances that run beside it."""

    output_listeners: list[OutputListener] = field(default_factory=list)
    counters: CountersPage | None = None
    """Of a server that runs."""

    stop_requested: bool = False
    oom_by_watch: bool = False
    decided: bool = False
    """Running, exited, or known to have failed: the answer to ``start`` is clear."""


def memory_backstop(limit_bytes: int | None, *, kernel: bool) -> int | None:
    """What ``Store.set_limits`` caps linear memory at, above the container's limit.

    With a memory cgroup the kernel decides, and the cap only bounds address space: far above, since memory that is
    grown and never touched is free. Without one, the cap bounds what can be touched between two looks of the watch.
    """
    if limit_bytes is None:
        return None
    if kernel:
        return max(4 * limit_bytes, limit_bytes + 4 * 1024**3)
    return limit_bytes + WATCH_HEADROOM_BYTES


class Containers:
    """All containers of this supervisor, and finished ones that it found on disk."""

    def __init__(
        self,
        loop: Loop,
        zygote: Zygote,
        records: Records,
        cgroups: CgroupManager,
        *,
        logs: LogSettings,
        artifacts: Path,
        on_change: Callable[[ContainerStatus], None],
        namespaces: PodNamespaces | None = None,
    ) -> None:
        self._loop = loop
        self._zygote = zygote
        self._records = records
        self._cgroups = cgroups
        self._logs = logs
        self._artifacts = artifacts
        self._on_change = on_change
        self._namespaces = namespaces
        self._table: dict[str, Container] = {}
        self._watching = False
        for start, status in records.load():
            self._table[status.id] = Container(config=start.config, status=status, decided=True)

    def get(self, container_id: str) -> Container | None:
        """The container of this id."""
        return self._table.get(container_id)

    def running(self) -> list[Container]:
        """Those that have a process."""
        return [container for container in self._table.values() if container.process is not None]

    def statuses(self) -> list[ContainerStatus]:
        """All of them."""
        return [container.status for container in self._table.values()]

    def empty(self) -> bool:
        """Nothing to keep."""
        return not self._table

    def start(self, config: ContainerConfig, done: Callable[[Container], None]) -> None:
        """Start once; ``done`` is called when it runs, has ended or could not be started. Raises RequestError."""
        known = self._table.get(config.id)
        if known is not None:
            self._when_decided(known, done)
            return
        if not valid_id(config.id):
            raise RequestError("StartError", f"{config.id!r} is no container id")
        if self._records.exists(config.id):
            raise RequestError("StartError", f"container {config.id} belongs to another supervisor")
        try:
            sandbox.check_config(config)
        except sandbox.ConfigError as error:
            raise RequestError("StartError", str(error)) from error
        created = time.time_ns()
        try:
            record = self._records.write_start(config, created)
        except OSError as error:
            self._records.remove(config.id)
            raise RequestError("StartError", f"cannot write the container's start record: {error}") from error
        container = Container(config=config, status=initial_status(config, created))
        self._table[config.id] = container
        container.started_waiters.append(lambda: done(container))
        try:
            self._spawn(container, record)
        except (ForkRefusedError, OSError) as error:
            self._ended(container, Outcome(exit_code=128, message=str(error), start_failed=True))
        finally:
            os.close(record)

    def stop(self, container: Container, done: Callable[[], None], *, grace_seconds: float = 0.0) -> None:
        """Kill; ``done`` is called when it is reaped and its log is complete. A server drains first, within the grace;
        being asked again without one ends that."""
        if container.process is None:
            done()
            return
        container.stop_requested = True
        container.exit_waiters.append(done)
        process = container.process
        if container.config.server is not None and grace_seconds > 0 and process.started:
            process.terminate()
            self._loop.call_later(grace_seconds, process.kill)
        else:
            process.kill()

    def remove(self, container_id: str, done: Callable[[], None]) -> None:
        """Forget; a running one is killed first, as CRI's RemoveContainer does. Unknown ids are fine."""
        container = self._table.get(container_id)
        if container is None:
            if valid_id(container_id) and not self._records.exists(container_id):
                self._records.remove(container_id)
            done()
            return

        def forget() -> None:
            self._table.pop(container_id, None)
            try:
                self._records.remove(container_id)
            except OSError as error:
                # What is left belongs to an ended container, which the next supervisor lists and the agent removes.
                logger.error("cannot remove the records of container %s: %s", container_id, error)  # noqa: TRY400
            done()

        self.stop(container, forget)

    def resize(self, container: Container, resources: Resources, annotations: Mapping[str, str]) -> None:
        """Move the limits of a running container. Raises RequestError; then the old ones hold."""
        if container.process is None:
            raise RequestError("UnknownContainer", f"container {container.config.id} is not running")
        self._check_memory(container, resources.memory_limit_bytes)
        try:
            container.group = self._cgroups.change(
                container.config.id[:64],
                container.group,
                pid=container.process.pid,
                memory_bytes=resources.memory_limit_bytes,
                cpu_limit=resources.cpu_limit_millicores,
                cpu_request=resources.cpu_request_millicores,
            )
        except OSError as error:
            raise RequestError("ResizeError", f"the kernel refuses the limits: {error.strerror or error}") from error
        container.config = dataclasses.replace(
            container.config,
            memory_limit_bytes=resources.memory_limit_bytes,
            cpu_limit_millicores=resources.cpu_limit_millicores,
            cpu_request_millicores=resources.cpu_request_millicores,
        )
        known = {**container.status.annotations, **annotations}
        container.status = dataclasses.replace(container.status, annotations=known)
        self._on_change(container.status)

    @staticmethod
    def _check_memory(container: Container, limit: int | None) -> None:
        """A limit below what is in use would be the container's end, so it is refused, as kubelet does."""
        before = container.config.memory_limit_bytes
        if limit == before:
            return
        group = container.group
        if limit is None or before is None or group is None or group.memory is None:
            raise RequestError("ResizeError", "the memory limit belongs to the instance: it moves at a restart only")
        in_use = group.memory_bytes()
        if limit < before and (in_use is None or in_use >= limit):
            name = container.config.container_name
            raise RequestError(
                "ResizeError",
                f"cannot decrease memory limits: attempting to set container {json.dumps(name)} memory limit ({limit}) "
                f"below current usage ({in_use})",
            )

    def usage(self) -> list[ContainerUsage]:
        """Usage of all that run."""
        found = []
        for container in self.running():
            pid = container.process.pid if container.process else 0
            cpu = linux.process_cpu_nanoseconds(pid)
            if cpu is None:
                continue
            memory = container.group.working_set_bytes() if container.group else None
            found.append(
                ContainerUsage(
                    id=container.config.id,
                    cpu_nanoseconds=cpu,
                    memory_bytes=memory if memory is not None else linux.private_bytes(pid),
                    timestamp_ns=time.time_ns(),
                    http=wire.load_counters(container.counters.read()) if container.counters is not None else None,
                )
            )
        return found

    def make_process(
        self,
        container: Container,
        config: ContainerConfig,
        *,
        stdin: bool,
        on_output: OutputListener,
        on_started: Callable[[], None],
        on_exit: Callable[[Outcome], None],
        record: int = -1,
    ) -> SandboxProcess:
        """Fork a sandbox in the groups of ``container``; the file ``record``, if any, is on disk before its guest
        runs. Raises ForkRefusedError."""
        process = SandboxProcess(self._loop, config, on_output=on_output, on_started=on_started, on_exit=on_exit)
        kernel = container.group is not None and container.group.memory is not None
        process.spawn(
            self._zygote,
            network=self._network_of(config),
            guest_stdin=stdin,
            group=container.group,
            backstop_bytes=memory_backstop(config.memory_limit_bytes, kernel=kernel),
            record=record,
            counters=container.counters.descriptor if config.server is not None and container.counters else -1,
        )
        return process

    def _network_of(self, config: ContainerConfig) -> int:
        """The descriptor of the network namespace that a container belongs into; -1: the machine's. Raises
        ForkRefusedError."""
        if not config.network:
            return -1
        found = self._namespaces.descriptor(config.network) if self._namespaces is not None else None
        if found is None:
            raise ForkRefusedError("the pod's network namespace is gone")
        return found

    def _spawn(self, container: Container, record: int) -> None:
        config = container.config
        container.log = LogFile(
            Path(config.log_path), max_size_bytes=self._logs.max_size_bytes, max_files=self._logs.max_files
        )
        container.framers = {name: LineFramer(name) for name in ("stdout", "stderr")}
        try:
            container.group = self._cgroups.make(
                config.id[:64],
                memory_bytes=config.memory_limit_bytes,
                cpu_limit=config.cpu_limit_millicores,
                cpu_request=config.cpu_request_millicores,
            )
        except OSError as error:
            logger.warning("no control group for container %s: %s", config.id, error)
        if config.server is not None:
            container.counters = CountersPage()
        container.process = self.make_process(
            container,
            config,
            stdin=config.stdin,
            on_output=lambda stream, data: self._output(container, stream, data),
            on_started=lambda: self._running(container),
            on_exit=lambda outcome: self._ended(container, outcome),
            record=record,
        )
        if container.counters is not None:
            container.counters.close_descriptor()
        if config.stdin:
            container.input = GuestInput(self._loop, container.process)
        self._loop.call_later(START_REPORT_SECONDS, lambda: self._running(container))
        if config.memory_limit_bytes is not None and (container.group is None or container.group.memory is None):
            self._watch_memory()

    def _output(self, container: Container, stream: str, data: bytes) -> None:
        if container.log is not None:
            lines = container.framers[stream].feed(data, rfc3339_nano(time.time_ns()))
            if lines:
                container.log.write(lines)
        for listener in tuple(container.output_listeners):
            listener(stream, data)

    def _running(self, container: Container) -> None:
        if container.decided or container.process is None:
            return
        container.status = dataclasses.replace(
            container.status,
            state=ContainerState.RUNNING,
            pid=container.process.pid,
            started_at_ns=time.time_ns(),
        )
        self._on_change(container.status)
        self._decide(container)

    def _ended(self, container: Container, outcome: Outcome) -> None:
        now = time.time_ns()
        if container.input is not None:
            container.input.end()
            container.input = None
        if container.log is not None:
            for framer in container.framers.values():
                container.log.write(framer.finish(rfc3339_nano(now)))
            if container.log.dropped_bytes:
                logger.warning("container %s: %d log bytes lost", container.config.id, container.log.dropped_bytes)
            container.log.close()
            container.log = None
        killed = outcome.signal == 9 and not container.stop_requested
        kernel_oom = container.group is not None and container.group.new_oom_kill()
        oom = container.oom_by_watch or (killed and kernel_oom)
        reason = "Completed" if outcome.exit_code == 0 else "Error"
        message = outcome.message
        if outcome.start_failed:
            reason = START_ERROR_REASON
        if oom:
            reason = OOM_REASON
            message = f"memory limit of {container.config.memory_limit_bytes} bytes exceeded"
        status = dataclasses.replace(
            container.status,
            state=ContainerState.EXITED,
            pid=None,
            started_at_ns=container.status.started_at_ns or (0 if outcome.start_failed else now),
            finished_at_ns=now,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            reason=reason,
            message=message,
        )
        container.status = status
        # Reported even if it cannot be written: the agent puts it into the pod's status, the record that matters most.
        self._write_exit(container)
        if outcome.bad_artifact:
            self._drop_artifact(container.config.artifact)
        container.process = None
        if container.counters is not None:
            container.counters.close()
            container.counters = None
        if container.group is not None:
            self._remove_group(container.group, GROUP_REMOVE_ATTEMPTS)
            container.group = None
        self._on_change(status)
        self._decide(container)
        waiters, container.exit_waiters = container.exit_waiters, []
        for waiter in waiters:
            waiter()

    def _write_exit(self, container: Container) -> None:
        """Until it is on disk or the container is removed: the disk may be full for a while."""
        if self._table.get(container.config.id) is not container:
            return
        try:
            self._records.write_exit(container.status)
        except OSError as error:
            logger.error("cannot write the exit record of container %s: %s", container.config.id, error)  # noqa: TRY400
            self._loop.call_later(RECORD_RETRY_SECONDS, lambda: self._write_exit(container))

    def _decide(self, container: Container) -> None:
        container.decided = True
        waiters, container.started_waiters = container.started_waiters, []
        for waiter in waiters:
            waiter()

    @staticmethod
    def _when_decided(container: Container, done: Callable[[Container], None]) -> None:
        if container.decided:
            done(container)
        else:
            container.started_waiters.append(lambda: done(container))

    def _drop_artifact(self, artifact: str) -> None:
        """A precompiled file that does not load would fail for ever; without it the agent compiles again."""
        path = Path(artifact)
        if path.parent == self._artifacts and path.suffix == ".cwasm":
            logger.warning("removing the precompiled file %s, which does not load", path.name)
            path.unlink(missing_ok=True)

    def _remove_group(self, group: Group, attempts: int) -> None:
        if not group.remove() and attempts > 0:
            self._loop.call_later(GROUP_REMOVE_RETRY_SECONDS, lambda: self._remove_group(group, attempts - 1))

    def _watch_memory(self, seconds: float = MEMORY_WATCH_NEAR_SECONDS) -> None:
        if not self._watching:
            self._watching = True
            self._loop.call_later(seconds, self._look_at_memory)

    def _look_at_memory(self) -> None:
        self._watching = False
        again = False
        seconds = MEMORY_WATCH_SECONDS
        for container in self.running():
            limit = container.config.memory_limit_bytes
            if limit is None or container.process is None:
                continue
            if container.group is not None and container.group.memory is not None:
                continue
            again = True
            # The limit is for all of the container's processes, and the largest goes first, as the kernel has it. What
            # was killed takes a while to go on a busy machine, and must not take another with it.
            processes = [process for process in (container.process, *container.commands) if not process.ending]
            # The resident set is cheap to read but counts what is shared with this process; the rest is exact.
            if sum(linux.resident_bytes(process.pid) for process in processes) <= limit // 2:
                continue
            private = [linux.private_bytes(process.pid) for process in processes]
            if sum(private) > limit // 2:
                seconds = MEMORY_WATCH_NEAR_SECONDS
            if sum(private) > limit:
                victim = processes[private.index(max(private))]
                container.oom_by_watch = container.oom_by_watch or victim is container.process
                victim.kill()
        if again:
            self._watch_memory(seconds)
