"""Ansible's idea in one small module: look first, then change only what differs, and report which it was.

A :class:`Step` has two functions. ``look`` reads facts and changes nothing; ``change`` applies what ``look`` found
wanting. Idempotence, ``--check`` and ``--diff`` fall out of that. A :class:`Play` is a list of steps that reads like a
table of contents; a step that names what it comes ``after`` starts as soon as that is done, so the list may run in
parallel without the reader having to care.

Steps run in threads: they wait for sockets and processes, nothing else. A step that fails stops those that build on
it (they are reported as skipped, with the reason); what runs beside it is told to give up at its next wait.
"""

from __future__ import annotations

import contextvars
import enum
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wasilet.errors import CancelledError, CommandError, ComponentError, HarnessError, PortTakenError
from wasilet.process import cancelled_by, tail_of
from wasilet.storage import os_error_text

GIVE_UP_SECONDS = 10.0
"""How long running steps get to notice that the play is given up."""

Progress = Callable[[str], None]
"""What a step reports about itself while it runs; one message per line, never a secret."""


class Status(enum.Enum):
    """How a step ended."""

    OK = "ok"
    CHANGED = "changed"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What ``look`` found. Made by :meth:`ok`, :meth:`differs` and :meth:`skip`."""

    status: Status
    detail: str = ""
    diff: tuple[str, ...] = ()

    @classmethod
    def ok(cls, detail: str = "") -> Finding:
        """All is as it should be."""
        return cls(status=Status.OK, detail=detail)

    @classmethod
    def differs(cls, detail: str = "", diff: Sequence[str] = ()) -> Finding:
        """``change`` has to run. ``diff``: lines beginning with ``+``, ``-`` or a blank."""
        return cls(status=Status.CHANGED, detail=detail, diff=tuple(diff))

    @classmethod
    def skip(cls, why: str) -> Finding:
        """The step does not apply here."""
        return cls(status=Status.SKIPPED, detail=why)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of a play."""

    name: str
    """For people; may be worded differently tomorrow."""

    look: Callable[[], Finding]
    change: Callable[[Progress], str]
    """Makes it so and returns a detail for the report. Raises HarnessError."""

    key: str = ""
    """What other steps call it; empty: its name."""

    after: tuple[str, ...] | None = None
    """Keys of earlier steps; None: the one before this in the list; (): starts at once."""

    log: Path | None = None
    """Whose last lines are shown when the step fails."""

    def __post_init__(self) -> None:
        """A step that no one refers to needs no key of its own."""
        object.__setattr__(self, "key", self.key or self.name)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one step went."""

    name: str
    key: str = ""
    status: Status
    detail: str = ""
    seconds: float = 0.0
    diff: tuple[str, ...] = ()
    hint: str = ""
    log: Path | None = None
    log_tail: tuple[str, ...] = ()
    error: HarnessError | None = None

    def to_json(self) -> dict[str, Any]:
        """``name, status, detail, seconds`` always; ``diff, hint, log`` where there is something to say."""
        data: dict[str, Any] = {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "seconds": round(self.seconds, 3),
        }
        if self.diff:
            data["diff"] = list(self.diff)
        if self.hint:
            data["hint"] = self.hint
        if self.log is not None:
            data["log"] = str(self.log)
        return data


@dataclass(frozen=True, kw_only=True)
class Recap:
    """How the whole play went; outcomes in the order of the list."""

    title: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    check: bool = False

    @property
    def succeeded(self) -> bool:
        """No step failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The steps that failed; those that were given up because of them count as skipped."""
        return tuple(o for o in self.outcomes if o.status is Status.FAILED)

    @property
    def changed(self) -> bool:
        """Some step changed something (or would, in check mode)."""
        return any(o.status is Status.CHANGED for o in self.outcomes)

    def counts(self) -> dict[str, int]:
        """``{"ok": n, "changed": n, "skipped": n, "failed": n}``."""
        counter = Counter(o.status for o in self.outcomes)
        return {status.value: counter[status] for status in Status}

    def line(self) -> str:
        """The recap in one line."""
        counts = "  ".join(f"{name}={count}" for name, count in self.counts().items())
        mode = " (check: nothing was changed)" if self.check else ""
        return f"{self.title}: {counts}  in {self.seconds:.1f} s{mode}"

    def to_json(self) -> dict[str, Any]:
        """What ``--output json`` prints."""
        return {
            "play": self.title,
            "check": self.check,
            "succeeded": self.succeeded,
            "changed": self.changed,
            "seconds": round(self.seconds, 3),
            "counts": self.counts(),
            "steps": [o.to_json() for o in self.outcomes],
        }

    def raise_for_failure(self) -> None:
        """Raise HarnessError when a step failed; its message names the step."""
        for outcome in self.failures:
            error = outcome.error
            raise ComponentError(
                f"{outcome.name}: {error.message if error else outcome.detail}",
                log=outcome.log,
                tail=outcome.log_tail,
                hint=outcome.hint,
            )


class Reporter(Protocol):
    """What receives reports about a play. Called from one thread at a time."""

    def play_started(self, title: str) -> None: ...
    def step_started(self, name: str) -> None: ...
    def step_progress(self, name: str, message: str) -> None: ...
    def step_finished(self, outcome: Outcome) -> None: ...
    def play_finished(self, recap: Recap) -> None: ...
    def notice(self, message: str) -> None: ...


class SilentReporter:
    """Says nothing: for fixtures and tests."""

    def play_started(self, title: str) -> None:
        """Nothing."""

    def step_started(self, name: str) -> None:
        """Nothing."""

    def step_progress(self, name: str, message: str) -> None:
        """Nothing."""

    def step_finished(self, outcome: Outcome) -> None:
        """Nothing."""

    def play_finished(self, recap: Recap) -> None:
        """Nothing."""

    def notice(self, message: str) -> None:
        """Nothing."""


_Event = tuple[str, Step, "str | Outcome"]


@dataclass
class Play:
    """An ordered list of steps."""

    title: str
    steps: Sequence[Step]
    give_up_seconds: float = GIVE_UP_SECONDS
    _cancel: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError when a step's key or name is used twice or ``after`` names no earlier step."""
        seen: set[str] = set()
        names: set[str] = set()
        for step in self.steps:
            unknown = set(step.after or ()) - seen
            if unknown or step.key in seen or step.name in names:
                raise ValueError(f"step {step.name!r}: name used twice, or after unknown steps {sorted(unknown)}")
            seen.add(step.key)
            names.add(step.name)

    def run(self, *, reporter: Reporter | None = None, check: bool = False) -> Recap:
        """Run every step; never raises for a failed one. KeyboardInterrupt (and SystemExit from a signal handler) is
        raised again after the running steps have been told to give up and were given ``give_up_seconds`` to do so."""
        reporter = reporter or SilentReporter()
        started = time.monotonic()
        events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        outcomes: dict[str, Outcome] = {}
        waiting = self._dependencies()
        running: dict[str, threading.Thread] = {}
        reporter.play_started(self.title)
        try:
            while waiting or running:
                self._start_ready(waiting, running, outcomes, events, reporter, check=check)
                if running:
                    self._handle(events.get(), running, outcomes, reporter)
        except BaseException:
            self._give_up(running, events, outcomes, reporter)
            reporter.play_finished(self._recap(outcomes, started, check=check))
            raise
        recap = self._recap(outcomes, started, check=check)
        reporter.play_finished(recap)
        return recap

    def _dependencies(self) -> dict[str, tuple[Step, frozenset[str]]]:
        waiting: dict[str, tuple[Step, frozenset[str]]] = {}
        previous: tuple[str, ...] = ()
        for step in self.steps:
            waiting[step.key] = (step, frozenset(previous if step.after is None else step.after))
            previous = (step.key,)
        return waiting

    def _start_ready(
        self,
        waiting: dict[str, tuple[Step, frozenset[str]]],
        running: dict[str, threading.Thread],
        outcomes: dict[str, Outcome],
        events: queue.SimpleQueue[_Event],
        reporter: Reporter,
        *,
        check: bool,
    ) -> None:
        for key, (step, needs) in list(waiting.items()):
            broken = [outcomes[n].name for n in needs if n in outcomes and outcomes[n].error is not None]
            if broken or self._cancel.is_set():
                del waiting[key]
                reason = f"because {broken[0]} failed" if broken else "because another step failed"
                error = CancelledError(f"{step.name} was not tried")
                outcomes[key] = Outcome(name=step.name, key=key, status=Status.SKIPPED, detail=reason, error=error)
                reporter.step_finished(outcomes[key])
            elif all(n in outcomes for n in needs):
                del waiting[key]
                reporter.step_started(step.name)
                context = contextvars.copy_context()
                thread = threading.Thread(
                    target=context.run, args=(self._run_step, step, events, check), name=f"step {key}", daemon=True
                )
                running[key] = thread
                thread.start()

    def _run_step(self, step: Step, events: queue.SimpleQueue[_Event], check: bool) -> None:  # noqa: FBT001
        started = time.monotonic()
        with cancelled_by(self._cancel):
            outcome = _attempt(step, lambda message: events.put(("progress", step, message)), check=check)
        events.put(("finished", step, _timed(outcome, time.monotonic() - started)))

    def _handle(
        self,
        event: _Event,
        running: dict[str, threading.Thread],
        outcomes: dict[str, Outcome],
        reporter: Reporter,
    ) -> None:
        _, step, payload = event
        if isinstance(payload, str):
            reporter.step_progress(step.name, payload)
            return
        outcomes[step.key] = payload
        running.pop(step.key, None)
        reporter.step_finished(payload)
        if payload.status is Status.FAILED:
            self._cancel.set()

    def _give_up(
        self,
        running: dict[str, threading.Thread],
        events: queue.SimpleQueue[_Event],
        outcomes: dict[str, Outcome],
        reporter: Reporter,
    ) -> None:
        self._cancel.set()
        deadline = time.monotonic() + self.give_up_seconds
        while running and (left := deadline - time.monotonic()) > 0:
            try:
                self._handle(events.get(timeout=left), running, outcomes, reporter)
            except queue.Empty:
                break

    def _recap(self, outcomes: dict[str, Outcome], started: float, *, check: bool) -> Recap:
        ordered = tuple(outcomes[step.key] for step in self.steps if step.key in outcomes)
        return Recap(title=self.title, outcomes=ordered, seconds=time.monotonic() - started, check=check)


def _attempt(step: Step, progress: Progress, *, check: bool) -> Outcome:
    diff: tuple[str, ...] = ()
    try:
        finding = step.look()
        if finding.status is not Status.CHANGED:
            return Outcome(name=step.name, key=step.key, status=finding.status, detail=finding.detail)
        diff = finding.diff
        detail = f"would: {finding.detail}" if check else (step.change(progress) or finding.detail)
        return Outcome(name=step.name, key=step.key, status=Status.CHANGED, detail=detail, diff=diff)
    except HarnessError as error:
        return _failed(step, error, diff)
    except OSError as error:
        return _failed(step, HarnessError(os_error_text(error)), diff)
    except Exception as error:  # noqa: BLE001  (a bug in a step must not hang the play; it is reported as what it is)
        failure = HarnessError(f"internal error: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return _failed(step, failure, diff)


def _failed(step: Step, error: HarnessError, diff: tuple[str, ...]) -> Outcome:
    log: Path | None = step.log
    tail: tuple[str, ...] = ()
    if isinstance(error, ComponentError):
        log, tail = error.log or log, error.tail
    elif isinstance(error, CommandError):
        tail = error.tail
    if log is not None and (not log.exists() or isinstance(error, PortTakenError)):
        # Nothing was started: what the log holds is about an earlier run.
        log = None
    if log is not None and not tail and not isinstance(error, CancelledError):
        tail = tail_of(log)
    if isinstance(error, CancelledError):
        return Outcome(
            name=step.name, key=step.key, status=Status.SKIPPED, detail=error.message, diff=diff, error=error
        )
    return Outcome(
        name=step.name,
        key=step.key,
        status=Status.FAILED,
        detail=error.message,
        diff=diff,
        hint=error.hint,
        log=log,
        log_tail=tail,
        error=error,
    )


def _timed(outcome: Outcome, seconds: float) -> Outcome:
    from dataclasses import replace

    return replace(outcome, seconds=seconds)
