"""The one entry point to other programs: argument lists, time limits, typed failures, and daemons that are found again.

No shell, ever. A program that is run for its result (:func:`run`) gets its own session, so that a time-out or
Ctrl-C ends everything it started. A daemon (:func:`spawn`) is remembered as its pid *with its start time and the boot
it belongs to*: a pid alone is reused, and a harness that kills by number sooner or later kills an unrelated process.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from wasilet_common.plain_text import plain

from wasilet.errors import CancelledError, CommandError, HarnessError

__all__ = [
    "CommandError",
    "Completed",
    "ProcessRecord",
    "cancelled_by",
    "check_cancelled",
    "find",
    "is_alive",
    "last_lines",
    "run",
    "send_signal",
    "spawn",
    "stop",
    "tail_of",
    "with_environment",
]

TAIL_LINES = 20
KILL_GRACE_SECONDS = 2.0
CANCEL_POLL_SECONDS = 0.1

_cancellation: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("cancellation", default=None)


@contextlib.contextmanager
def cancelled_by(event: threading.Event) -> Iterator[None]:
    """Within this block (and this thread), :func:`run` and :func:`check_cancelled` give up once ``event`` is set."""
    token = _cancellation.set(event)
    try:
        yield
    finally:
        _cancellation.reset(token)


def check_cancelled() -> None:
    """Raise CancelledError when the run that this thread belongs to was given up; for use in waits."""
    event = _cancellation.get()
    if event is not None and event.is_set():
        raise CancelledError


@dataclass(frozen=True)
class Completed:
    """The result of :func:`run`; text is decoded as UTF-8, undecodable bytes replaced."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class ProcessRecord:
    """Names one process for as long as the machine runs."""

    pid: int
    start_time: int
    """Clock ticks between boot and the process's start: field 22 of ``/proc/<pid>/stat``."""

    boot_id: str

    def to_json(self) -> dict[str, Any]:
        """Fields as a JSON object; :meth:`from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProcessRecord:
        """Raises KeyError, TypeError or ValueError on anything but what :meth:`to_json` wrote."""
        return cls(pid=int(data["pid"]), start_time=int(data["start_time"]), boot_id=str(data["boot_id"]))


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_seconds: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | bytes | None = None,  # noqa: A002  (subprocess's own name for it)
    check: bool = True,
    on_line: Callable[[str], None] | None = None,
    headline: Callable[[Sequence[str]], str | None] | None = None,
) -> Completed:
    """Run a program to its end and return what it wrote.

    ``env`` replaces the whole environment when given. ``on_line`` is called, in this thread, with every line of stdout
    and stderr as it comes. The program reads ``input``, or nothing. ``headline`` chooses, from the lines of a program
    that failed, the one that says why; None, and without it: the last one. Lines and errors are free of colours.

    Raises CommandError: it is missing, took longer than ``timeout_seconds``, or (``check``) exited with another code
    than 0; CancelledError: see :func:`cancelled_by`. In each case, as on Ctrl-C, its whole process group is gone.
    """
    args = tuple(os.fspath(a) for a in argv)
    data = input.encode() if isinstance(input, str) else input
    try:
        process = subprocess.Popen(
            args,
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise _cannot_start(args, error, cwd) from error
    with process:
        try:
            stdout, stderr = _pump(process, args, data, timeout_seconds, on_line)
        except BaseException:
            _end_group(process)
            raise
    completed = Completed(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    if check and completed.returncode != 0:
        text = plain(completed.stderr) if completed.stderr.strip() else plain(completed.stdout)
        tail = last_lines(text)
        why = headline(text.splitlines()) if headline is not None else None
        reason = _exit_text(completed.returncode)
        message = f"{_name(args)} {reason}" + (f": {(why or tail[-1]).strip()}" if tail else "")
        raise CommandError(message, argv=args, returncode=completed.returncode, tail=tail)
    return completed


def _pump(
    process: subprocess.Popen[bytes],
    args: tuple[str, ...],
    data: bytes | None,
    timeout_seconds: float,
    on_line: Callable[[str], None] | None,
) -> tuple[bytes, bytes]:
    """Feed stdin and collect both outputs until they close and the process is gone."""
    deadline = time.monotonic() + timeout_seconds
    chunks: dict[IO[bytes], bytearray] = {}
    pending: dict[IO[bytes], bytes] = {}
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            assert stream is not None  # noqa: S101  (both were asked for as pipes)
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, stream)
            chunks[stream], pending[stream] = bytearray(), b""
        remaining = memoryview(data or b"")
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            check_cancelled()
            left = deadline - time.monotonic()
            if left <= 0:
                raise _too_long(args, timeout_seconds, chunks[process.stderr] if process.stderr else bytearray())
            if process.poll() is not None:
                left = min(left, CANCEL_POLL_SECONDS)
            ready = selector.select(min(left, CANCEL_POLL_SECONDS if _cancellation.get() else left, 1.0))
            if not ready and process.poll() is not None and process.stdin not in _streams(selector):
                # The program is gone but something it left behind holds its pipes: do not wait for that.
                break
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    remaining = _feed(selector, process, remaining)
                    continue
                stream = key.data
                block = _read(stream)
                if block is None:
                    continue
                if not block:
                    selector.unregister(stream)
                    continue
                chunks[stream] += block
                if on_line is not None:
                    *lines, pending[stream] = (pending[stream] + block).split(b"\n")
                    for line in lines:
                        on_line(plain(line.decode(errors="replace")))
    if on_line is not None:
        for rest in pending.values():
            if rest:
                on_line(plain(rest.decode(errors="replace")))
    _wait(process, args, deadline, timeout_seconds)
    out, err = (bytes(buffer) for buffer in chunks.values())
    return out, err


def _streams(selector: selectors.BaseSelector) -> list[Any]:
    return [key.fileobj for key in selector.get_map().values()]


def _read(stream: IO[bytes]) -> bytes | None:
    try:
        return os.read(stream.fileno(), 65536)
    except BlockingIOError:
        return None


def _feed(selector: selectors.BaseSelector, process: subprocess.Popen[bytes], remaining: memoryview) -> memoryview:
    stdin = process.stdin
    assert stdin is not None  # noqa: S101  (registered only when it is a pipe)
    try:
        remaining = remaining[os.write(stdin.fileno(), remaining[:65536]) :]
    except BlockingIOError:
        return remaining
    except BrokenPipeError:
        remaining = remaining[:0]
    if not remaining:
        selector.unregister(stdin)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
    return remaining


def _wait(process: subprocess.Popen[bytes], args: tuple[str, ...], deadline: float, timeout_seconds: float) -> None:
    while True:
        check_cancelled()
        left = deadline - time.monotonic()
        try:
            process.wait(max(0.0, min(left, CANCEL_POLL_SECONDS if _cancellation.get() else left)))
            return
        except subprocess.TimeoutExpired:
            if left <= 0:
                raise _too_long(args, timeout_seconds, bytearray()) from None


def _too_long(args: tuple[str, ...], timeout_seconds: float, stderr: bytearray) -> CommandError:
    return CommandError(
        f"{_name(args)} took longer than {timeout_seconds:g} s and was stopped",
        argv=args,
        returncode=None,
        tail=last_lines(plain(stderr.decode(errors="replace"))),
    )


def _cannot_start(args: tuple[str, ...], error: OSError, cwd: Path | None) -> HarnessError:
    if error.errno == errno.ENOENT and cwd is not None and not cwd.is_dir():
        return CommandError(f"{_name(args)}: no such folder: {cwd}", argv=args, returncode=None)
    if error.errno == errno.ENOENT:
        return CommandError(f"{args[0]} is not installed, or not on PATH", argv=args, returncode=None)
    return CommandError(f"{args[0]} cannot be started: {error.strerror}", argv=args, returncode=None)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """TERM, a short grace, KILL: to the group, which is the process's own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        try:
            process.wait(KILL_GRACE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    # A grandchild may have ignored TERM while its leader obeyed.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _name(args: tuple[str, ...]) -> str:
    words = [os.path.basename(args[0]), *(a for a in args[1:3] if not a.startswith("-"))]  # noqa: PTH119
    return " ".join(words)


def _exit_text(returncode: int) -> str:
    if returncode >= 0:
        return f"failed with exit code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"


def last_lines(text: str, count: int = TAIL_LINES) -> tuple[str, ...]:
    """The last ``count`` lines that are not blank."""
    return tuple(deque((line for line in text.splitlines() if line.strip()), maxlen=count))


def tail_of(path: Path, count: int = TAIL_LINES, *, limit_bytes: int = 65536, start_bytes: int = 0) -> tuple[str, ...]:
    """The last lines of a log file, but for its first ``start_bytes`` (an earlier process's); empty when there is
    none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            # A log that is shorter than it was has been rotated since.
            file.seek(max(start_bytes if start_bytes <= size else 0, size - limit_bytes))
            return last_lines(file.read().decode(errors="replace"), count)
    except OSError:
        return ()


# --- daemons -----------------------------------------------------------------------------------------------------


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> ProcessRecord:
    """Start a daemon: its own session, no inherited descriptors, stdin empty, stdout and stderr appended to
    ``log`` (made with mode 0600). Returns at once; raises CommandError when the program cannot be started."""
    args = tuple(os.fspath(a) for a in argv)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            args,
            cwd=cwd or Path("/"),
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as error:
        raise _cannot_start(args, error, cwd) from error
    finally:
        os.close(fd)
    # The daemon outlives this process on purpose: Popen must neither warn about that nor reap it unseen.
    process.returncode = 0
    record = find(process.pid)
    if record is None:
        raise CommandError(f"{args[0]} was gone as soon as it started", argv=args, returncode=None, tail=tail_of(log))
    return record


def find(pid: int) -> ProcessRecord | None:
    """The record of a running process; None when there is no such pid."""
    stat = _stat(pid)
    return None if stat is None else ProcessRecord(pid, stat[1], boot_id())


def is_alive(record: ProcessRecord) -> bool:
    """Whether this very process still runs. A zombie is gone (and is reaped here when it is a child of this process),
    but for one whose other threads are still on their way out: until the last of them is, its ports are taken."""
    if record.boot_id != boot_id():
        return False
    stat = _stat(record.pid)
    if stat is None or stat[1] != record.start_time:
        return False
    if stat[0] in "ZX":
        if stat[2] > 1:
            return True
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)
        return False
    return True


def stop(records: ProcessRecord | Iterable[ProcessRecord], *, grace_seconds: float) -> list[ProcessRecord]:
    """SIGTERM to all at once, SIGKILL to those still there after ``grace_seconds``. Returns what survived even that
    (a process in uninterruptible sleep, or another user's). Only the named processes are signalled, never groups."""
    waiting = [records] if isinstance(records, ProcessRecord) else list(records)
    for signum, limit_seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_GRACE_SECONDS)):
        waiting = [record for record in waiting if send_signal(record, signum)]
        deadline = time.monotonic() + limit_seconds
        pause = 0.002
        while waiting and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
            waiting = [record for record in waiting if is_alive(record)]
        if not waiting:
            break
    return waiting


def send_signal(record: ProcessRecord, signum: int) -> bool:
    """Signal exactly this process; whether it was still there. The pidfd closes the gap between look and signal."""
    try:
        fd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EPERM}:
            raise
        if not is_alive(record):
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(record.pid, signum)
        return is_alive(record)
    try:
        if not is_alive(record):
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(fd, signum)
        return True
    finally:
        os.close(fd)


def boot_id() -> str:
    """This boot's own name; empty where the kernel does not report it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def with_environment(name: str, value: str) -> list[ProcessRecord]:
    """Running processes of this user whose environment was started with exactly ``name=value``.

    This finds what a run started and could not write down any more because it was killed at that moment."""
    wanted = f"{name}={value}".encode()
    found: list[ProcessRecord] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            record = find(int(entry.name))
            if record is not None and is_alive(record):
                found.append(record)
    return found


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State letter, start time, number of threads. The name in parentheses may itself hold blanks and parentheses."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    try:
        return fields[0], int(fields[19]), int(fields[17])
    except (IndexError, ValueError):
        return None
