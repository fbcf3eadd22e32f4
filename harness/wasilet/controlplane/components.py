"""The long-lived processes of a cluster: what they are started with, when they are ready, how they are repaired.

A :class:`Component` is started when its process is gone, and started again when its command line or the files it
reads have changed since. Readiness is asked of the process itself (its health endpoint), and a process that dies while
it is waited for fails the wait at once, with the end of its log.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wasilet.controlplane.health import LOOPBACK
from wasilet.errors import ComponentError, WaitTimeoutError
from wasilet.ports import port_is_free, port_taken
from wasilet.process import check_cancelled, is_alive, spawn, stop, tail_of
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE, ComponentRecord, State
from wasilet.steps import Finding, Progress, Step

PORT_RELEASE_SECONDS = 3.0

_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "XDG_RUNTIME_DIR", "USER", "LOGNAME"),
    # Where a node finds the component host that the harness built.
    *("WASILET_CACHE", "XDG_CACHE_HOME", "WASILET_COMPONENT_HOST"),
)
_PASSED_ON_TO_CLIENTS = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One long-lived process."""

    name: str
    """As in ``status`` and ``logs``: ``kube-apiserver``."""

    argv: tuple[str, ...]
    ready: Callable[[], bool]
    """Whether all is well with it. Must answer within a second or two and never raise."""

    serving: Callable[[], bool] | None = None
    """What those that build on it wait for, asked every 50 ms; None: ``ready``."""

    gate: Callable[[], bool] | None = None
    """What must be true before it is started; None: it copes with whatever is not there yet."""

    ports: Mapping[str, int] = field(default_factory=dict)
    """TCP ports it will listen on, by what they are for."""

    inputs: tuple[Path, ...] = ()
    """Files whose content it reads at its start only."""

    clients: bool = False
    """Whether it connects to other hosts, hence gets the proxy and trust variables."""

    addresses: tuple[str, ...] = (LOOPBACK,)
    """What it listens on."""

    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own."""


def component_step(
    component: Callable[[], Component],
    name: str,
    *,
    title: str,
    state: State,
    settings: Settings,
    after: tuple[str, ...] | None = None,
    wait: bool = True,
    key: str = "",
) -> Step:
    """The step that has a component running (and, with ``wait``, ready); its key is the component's name, unless
    another is given. ``component`` is called when it is its turn,
    because ports and paths are known only then."""

    def look() -> Finding:
        record = state.alive(name)
        if record is None:
            dead = state.record(name) is not None
            return Finding.differs("start it again: its process is gone" if dead else "start", ["+ " + name])
        made = component()
        if record.argv_digest != digest(made):
            return Finding.differs("restart: its configuration changed", [f"- pid {record.process.pid}", f"+ {name}"])
        # What `change` waits for counts here, too: else a second `up` right after the first one changes something.
        if wait and not (made.serving or made.ready)():
            return Finding.differs(f"pid {record.process.pid} runs, but is not ready")
        return Finding.ok(f"pid {record.process.pid}")

    def change(progress: Progress) -> str:
        made = component()
        if made.gate is not None:
            _wait_gate(made, made.gate, settings=settings)
        before = state.alive(name)
        record = ensure_running(made, state=state, settings=settings)
        if not wait:
            return f"pid {record.process.pid}"
        limit = settings.timeouts.ready_seconds
        try:
            wait_ready(made, record, timeout_seconds=limit, settings=settings, say=progress)
        except ComponentError:
            # One that ran before may have been on its way out: then it has not failed to start, it has to be started.
            if before is None or before.process != record.process or is_alive(record.process):
                raise
            record = ensure_running(made, state=state, settings=settings)
            wait_ready(made, record, timeout_seconds=limit, settings=settings, say=progress)
        return f"pid {record.process.pid}"

    return Step(name=title, key=key or name, look=look, change=change, after=after, log=state.log(name))


def ensure_running(component: Component, *, state: State, settings: Settings) -> ComponentRecord:
    """The running process of a component, started (again) where that is needed. Raises PortTakenError, CommandError."""
    wanted = digest(component)
    record = state.alive(component.name)
    if record is not None and record.argv_digest == wanted:
        return record
    if record is not None:
        stop(record.process, grace_seconds=settings.timeouts.stop_grace_seconds)
    _end_unrecorded(component, state=state, settings=settings)
    _wait_for_ports(component, state=state, settings=settings)
    log = state.log(component.name)
    rotate(log)
    before_bytes = log.stat().st_size if log.exists() else 0
    process = spawn(component.argv, log=log, env=environment(component, state=state, settings=settings))
    started = ComponentRecord(
        name=component.name, process=process, log=log, argv_digest=wanted, log_start_bytes=before_bytes
    )
    state.remember(started)
    return started


def _wait_for_ports(component: Component, *, state: State, settings: Settings) -> None:
    """See that its ports are free. Raises PortTakenError."""
    # One that was killed a moment ago gives its ports back only when the kernel has ended its last thread.
    patience = time.monotonic() + (PORT_RELEASE_SECONDS if state.record(component.name) else 0.0)
    for what, port in component.ports.items():
        for address in component.addresses:
            while not port_is_free(port, address):
                if time.monotonic() >= patience:
                    raise port_taken(port, f"{component.name} ({what})")
                time.sleep(settings.timeouts.poll_seconds)


def _end_unrecorded(component: Component, *, state: State, settings: Settings) -> None:
    """End what a run that was killed between starting a process and writing that down has left.

    Only the very same command line is meant: the steps run beside each other, and what another one has started this
    moment is not written down yet either. A node's supervisor, which no record names, is not touched."""
    known = {record.process.pid for record in state.records()}
    wanted = [word.encode() for word in component.argv]
    strays = []
    for process in state.stray_processes():
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:-1]
            if process.pid not in known and argv == wanted:
                strays.append(process)
    stop(strays, grace_seconds=settings.timeouts.stop_grace_seconds)


def _wait_gate(component: Component, gate: Callable[[], bool], *, settings: Settings) -> None:
    deadline = time.monotonic() + settings.timeouts.ready_seconds
    while not gate():
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"{component.name} was not started: what it needs was not ready in time")
        check_cancelled()
        time.sleep(settings.timeouts.poll_seconds)


def wait_ready(
    component: Component,
    record: ComponentRecord,
    *,
    timeout_seconds: float,
    settings: Settings,
    say: Progress = lambda _: None,
) -> None:
    """Wait until a component serves. Raises ComponentError when it dies or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    say("waiting until it is ready")
    answers = component.serving or component.ready
    while not answers():
        if not is_alive(record.process):
            tail = tail_of(record.log, start_bytes=record.log_start_bytes)
            why = reason_line(tail)
            raise ComponentError(
                f"{component.name} ended while it was starting" + (f": {why[:300]}" if why else ""),
                log=record.log,
                tail=tail,
            )
        if time.monotonic() >= deadline:
            raise ComponentError(
                f"{component.name} was not ready within {timeout_seconds:g} s",
                log=record.log,
                tail=tail_of(record.log, start_bytes=record.log_start_bytes),
            )
        check_cancelled()
        time.sleep(settings.timeouts.poll_seconds)


def reason_line(tail: tuple[str, ...]) -> str:
    """The line of a log's end that says why a program ended; empty when there is none. A Go program that panics ends
    with its stack, the reason stands above it."""
    for sign in ("no space left on device", "panic: ", "fatal", "rror: "):
        for line in tail:
            if sign in line:
                return line.strip() if sign != "no space left on device" else sign
    return tail[-1].strip() if tail else ""


def digest(component: Component) -> str:
    """Changes when the command line or a file that is read at start does."""
    hasher = hashlib.sha256("\0".join(component.argv).encode())
    for path in component.inputs:
        with contextlib.suppress(OSError):
            hasher.update(b"\0" + path.read_bytes())
    return hasher.hexdigest()


def environment(component: Component, *, state: State, settings: Settings) -> dict[str, str]:
    """A chosen part of the user's environment, and the cluster's run id."""
    chosen = environment_for_tools(settings, clients=component.clients)
    return {**chosen, **component.environ, RUN_ID_VARIABLE: state.run_id()}


def environment_for_tools(settings: Settings, *, clients: bool = False) -> dict[str, str]:
    """The part of the user's environment that Wasilet's programs need; nothing that could change what it does."""
    names = list(_PASSED_ON)
    if clients:
        names += [variant for name in _PASSED_ON_TO_CLIENTS for variant in (name, name.lower())]
    return {name: settings.environ[name] for name in names if name in settings.environ}


def rotate(log: Path, *, keep_bytes: int = 20_000_000) -> None:
    """Start a new log when the old one has grown large; one old one is kept."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > keep_bytes:
            log.replace(log.with_suffix(".log.1"))


def cat_facts_origin(port: int) -> str:
    """The origin of the demos' own API, which the nodes allow pods to call on this machine."""
    return f"http://{LOOPBACK}:{port}"
