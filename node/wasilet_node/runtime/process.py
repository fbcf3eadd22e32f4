"""One sandbox as the supervisor sees it: pipes, report, pidfd, outcome.

The write ends of a child's pipes are closed in the parent before the next fork, so end of file means that this very
child is gone. What it wrote before it died is still in the pipes then, and is read before its end is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from wasilet_common.cri_log.writer import READ_BYTES

from wasilet_node.runtime import guest, own_user, sandbox
from wasilet_node.runtime.cgroups import Group
from wasilet_node.runtime.loop import Loop, Watch
from wasilet_node.runtime.protocol import ContainerConfig
from wasilet_node.runtime.zygote import Spare, Zygote

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 256 * 1024
NICE_WITHOUT_CGROUP = 10
"""Where no cpu group can be made, modules yield to agent and supervisor by this."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sandbox ended."""

    exit_code: int
    signal: int | None = None
    message: str = ""
    start_failed: bool = False
    bad_artifact: bool = False


class ForkRefusedError(Exception):
    """No sandbox could be made; the message is for the user."""


class SandboxProcess:
    """Begins with ``spawn``; calls ``on_output(stream, data)``, ``on_started()`` once, ``on_exit(outcome)`` last."""

    def __init__(
        self,
        loop: Loop,
        config: ContainerConfig,
        *,
        on_output: Callable[[str, bytes], None],
        on_started: Callable[[], None],
        on_exit: Callable[[Outcome], None],
    ) -> None:
        self._loop = loop
        self._config = config
        self._on_output = on_output
        self._on_started = on_started
        self._on_exit = on_exit
        self._watches: dict[str, Watch] = {}
        self._fds: dict[str, int] = {}
        self._report = b""
        self._pidfd = -1
        self._pid_watch: Watch | None = None
        self._paused = False
        self._interrupted = False
        self.pid = 0
        self.stdin = -1
        self.started = False
        self.ending = False
        """Whether it was killed, and may not be gone yet."""

        self.finished = False

    def spawn(
        self,
        zygote: Zygote,
        *,
        guest_stdin: bool,
        group: Group | None,
        backstop_bytes: int | None,
        record: int = -1,
        counters: int = -1,
        network: int = -1,
    ) -> None:
        """Take a sandbox of the zygote's. Raises ForkRefusedError; nothing is left behind then."""
        spare: Spare | None = None
        opened: list[int] = []

        def pipe() -> tuple[int, int]:
            ends = os.pipe2(os.O_CLOEXEC)
            opened.extend(ends)
            return ends

        try:
            out_read, out_write = pipe()
            err_read, err_write = pipe()
            report_read, report_write = pipe()
            stdin_write = -1
            if guest_stdin:
                stdin_read, stdin_write = pipe()
            else:
                stdin_read = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                opened.append(stdin_read)
            groups = []
            for path in group.procs if group else ():
                groups.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                opened.append(groups[-1])
            plan = sandbox.ChildPlan(
                config=self._config,
                stdin=stdin_read,
                stdout=out_write,
                stderr=err_write,
                report=report_write,
                guest_stdin=guest_stdin,
                cgroup_files=tuple(groups),
                memory_backstop_bytes=backstop_bytes,
                record=record,
                counters=counters,
                network=network,
                own_root=zygote.own_roots,
                nice=0 if group is not None and group.cpu_managed else NICE_WITHOUT_CGROUP,
            )
            spare = zygote.take()
            self.pid = spare.pid
            if zygote.own_users:
                plan = dataclasses.replace(plan, user=own_user.FIRST_UID + spare.pid)
            self._pidfd = os.pidfd_open(self.pid)
            opened.append(self._pidfd)
            if stdin_write >= 0:
                os.set_blocking(stdin_write, False)
            for name, descriptor in (("stdout", out_read), ("stderr", err_read), ("report", report_read)):
                os.set_blocking(descriptor, False)
                self._fds[name] = descriptor
                self._watch(name)
            self._pid_watch = self._loop.watch(self._pidfd, lambda _events: self._reap(), urgent=True)
            spare.start(plan)  # last: a sandbox that no one watches must not run, since its end would never be reported
        except OSError as error:
            if spare is not None:
                spare.discard()
            if self._pid_watch is not None:
                self._loop.unwatch(self._pid_watch)
            for watch in self._watches.values():
                self._loop.unwatch(watch)
            for descriptor in opened:
                os.close(descriptor)
            self._pidfd = -1
            raise ForkRefusedError(f"cannot make a sandbox: {error}") from error
        keep = {out_read, err_read, report_read, stdin_write, self._pidfd}
        for descriptor in opened:
            if descriptor not in keep:
                os.close(descriptor)
        self.stdin = stdin_write

    def kill(self) -> None:
        """SIGKILL; idempotent. The rest comes by ``on_exit``."""
        self.ending = True
        if not self.finished and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM, on which a server drains and ends."""
        if not self.finished and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def interrupt(self) -> None:
        """End it as SIGINT does, of which a guest dies: it can handle no signal. The first process of a pid namespace
        would ignore the signal itself."""
        self._interrupted = True
        self.kill()

    def pause(self) -> None:
        """Stop reading output: the guest blocks when its pipe is full."""
        if not self._paused:
            self._paused = True
            for name in ("stdout", "stderr"):
                watch = self._watches.pop(name, None)
                if watch is not None:
                    self._loop.unwatch(watch)

    def resume(self) -> None:
        """Read on."""
        if self._paused:
            self._paused = False
            for name in ("stdout", "stderr"):
                if name in self._fds:
                    self._watch(name)

    def close_stdin(self) -> None:
        """End of file for the guest; idempotent."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def _watch(self, name: str) -> None:
        self._watches[name] = self._loop.watch(
            self._fds[name], lambda _events: self._readable(name), urgent=name == "report"
        )

    def _readable(self, name: str) -> bool:
        """Read once; False: nothing more will or can come now."""
        descriptor = self._fds.get(name)
        if descriptor is None:
            return False
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close(name)
            return False
        if name != "report":
            self._on_output(name, data)
            return True
        if len(self._report) < MAX_REPORT_BYTES:
            self._report += data
        if not self.started and self._report.startswith(b'{"started"'):
            self.started = True
            self._on_started()
        return True

    def _close(self, name: str) -> None:
        watch = self._watches.pop(name, None)
        if watch is not None:
            self._loop.unwatch(watch)
        descriptor = self._fds.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def _reap(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return
        self.finished = True
        if self._pid_watch is not None:
            self._loop.unwatch(self._pid_watch)
        os.close(self._pidfd)
        self._pidfd = -1
        for name in ("report", "stdout", "stderr"):
            while self._readable(name):
                pass
            self._close(name)
        self._on_exit(self._outcome(os.waitstatus_to_exitcode(status)))
        self.close_stdin()

    def _outcome(self, code: int) -> Outcome:
        report: dict[str, object] = {}
        for line in self._report.splitlines():
            with contextlib.suppress(ValueError):
                parsed = json.loads(line)
                if isinstance(parsed, dict):
                    report.update(parsed)
        if "exit" in report:
            return Outcome(exit_code=int(str(report["exit"])) & 0xFF)
        if "trap" in report:
            return Outcome(exit_code=guest.TRAP_EXIT_CODE, message=str(report["trap"]))
        if "error" in report:
            return Outcome(
                exit_code=sandbox.START_ERROR_EXIT_CODE,
                message=str(report["error"]),
                start_failed=not self.started,
                bad_artifact=bool(report.get("artifact")),
            )
        if self._interrupted and code == -signal.SIGKILL:
            code = -signal.SIGINT
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            return Outcome(exit_code=128 - code, signal=-code, message=f"killed by {name}")
        return Outcome(exit_code=code, message="the sandbox ended without a report", start_failed=not self.started)
