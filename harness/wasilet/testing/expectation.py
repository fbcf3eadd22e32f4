"""Whether pods do what is expected of them: judged after each change that an observer sees, until it is so, until it
never will be, or until the time is over.

The one judge of ``demo.yaml`` and of the plugin's assertions, so that the two cannot disagree. A yes rests on what was
seen. A no, and every statement about what is *absent*, rests on whole logs: read to the end where the container is
over, and to the line that was the last one at the time of the question where it runs on. Where a log cannot be read
whole, that is the verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from wasilet_common.pod_fields import TERMINAL_PHASES

from wasilet.errors import ApiError
from wasilet.kube.client import KubeObject
from wasilet.testing.log_follow import InstanceLog, last_written
from wasilet.testing.log_match import Judge
from wasilet.testing.log_spool import nanoseconds_of
from wasilet.testing.merged_log import LogLines, Reading
from wasilet.testing.observe import Observer, PodView
from wasilet.testing.pod_status import FINAL_WAITING, container_statuses, ends_of, main_status

TICK_SECONDS = 0.2
"""A wait looks at least this often whether it was cancelled."""

CATCH_UP_SECONDS = 5.0
"""So much longer a log may be read whose lines were there when the time was over."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The pods that an expectation is about."""

    name: str
    """``pod/x``, ``job/x``: for messages."""

    belongs: Callable[[PodView], bool] = lambda _: True
    owner: tuple[str, str, str] | None = None
    """Plural, API group and name of what makes the pods; None for a pod that a user made directly."""

    @property
    def is_job(self) -> bool:
        """Whether the pods come to an end for good: those of other owners are replaced."""
        return self.owner is not None and self.owner[0] == "jobs"


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is expected. What is left out is not looked at."""

    judge: Judge | None = None
    """Of the log."""

    container: str = ""
    """Only of this one; else of all in the log, and of the first in what follows."""

    phase: str = ""
    """Of the pod, or the type of a condition of the owner."""

    exit_code: int | None = None
    reason: str = ""
    restarts: int | None = None
    """At least so many."""

    @property
    def waits(self) -> bool:
        """Whether anything has to come; else only the end is a proof."""
        log = self.judge is not None and not self.judge.only_absent
        return log or bool(self.phase or self.reason) or self.exit_code is not None or self.restarts is not None


@dataclass
class _Known:
    """A look at the observer: copies, so that judging holds up no watch."""

    revision: int
    views: list[PodView]
    owner: KubeObject | None
    logs: list[InstanceLog]
    ended: frozenset[str]
    """The instances whose logs had ended at this look. The logs grow on while they are judged, so what a judge has
    certainly read is what was there before it began to read."""

    last: dict[str, bytes]
    """The last line of each that was there at this look, as read; by instance."""


@dataclass
class Wait:
    """One expectation of some pods."""

    observer: Observer
    subject: Subject
    expected: Expectation
    missing: str = ""
    """What had not come at the last look, as text."""

    seconds: float = 0.0
    """How long it was waited for."""

    _reading: Reading | None = field(init=False, default=None)
    _asked: dict[str, bytes] = field(init=False, default_factory=dict)
    """Of running containers: when the line that was the last one at the time of the question was written."""

    _ask_error: str = field(init=False, default="")
    _behind: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.expected.judge is not None:
            self._reading = Reading(self.expected.judge)

    def run(self, *, within_seconds: float, tick: Callable[[], None] = lambda: None) -> str:
        """Wait; empty when all is as expected, else why it is not."""
        began = time.monotonic()
        deadline = began + within_seconds
        end = deadline + CATCH_UP_SECONDS
        if self.subject.owner is not None:
            self.observer.watch_owner(*self.subject.owner)
        try:
            while True:
                tick()
                known = self._look()
                last = time.monotonic() >= deadline or self.observer.closed
                self._behind = ""
                verdict = self._verdict(known, last=last)
                if verdict is not None:
                    return verdict
                if last and (not self._behind or time.monotonic() >= end or self.observer.closed):
                    return self._behind or f"{self.missing} did not come within {within_seconds:g} s"
                self._sleep(known.revision, end if last else deadline)
        finally:
            self.seconds = time.monotonic() - began

    @property
    def lines(self) -> LogLines:
        """The log as far as it has been read."""
        return LogLines([log.spool for log in self._look().logs])

    def views(self) -> list[PodView]:
        """The pods that it is about."""
        with self.observer.changed:
            return [view for view in self.observer.pods.values() if self.subject.belongs(view)]

    def errors(self) -> list[str]:
        """Why a log could not be read."""
        return [log.lost or log.error for log in self._look().logs if log.lost or log.error]

    # --- looking ---------------------------------------------------------------------------------------------------

    def _look(self) -> _Known:
        observer, container = self.observer, self.expected.container
        with observer.changed:
            views = [view for view in observer.pods.values() if self.subject.belongs(view)]
            if self._reading is not None:
                for view in views:
                    observer.follow(view)
            owner = observer.owners.get((self.subject.owner[0], self.subject.owner[2])) if self.subject.owner else None
            logs = [log for view in views for log in view.logs.values() if container in {"", log.container}]
            ended = frozenset(log.instance for log in logs if log.ended)
            last = {log.instance: log.kept.last or b"" for log in logs}
            return _Known(observer.revision, views, owner, logs, ended, last)

    def _sleep(self, revision: int, deadline: float) -> None:
        with self.observer.changed:
            left = min(TICK_SECONDS, max(0.0, deadline - time.monotonic()))
            self.observer.changed.wait_for(lambda: self.observer.revision != revision, left)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _verdict(self, known: _Known, *, last: bool) -> str | None:
        """None: wait on; empty: all is as expected; else why it is not, nor will be."""
        over = self._over(known)
        judge = self.expected.judge
        if self._reading is not None:
            self._reading.read([log.spool for log in known.logs])
        if judge is not None and judge.forbidden:
            return self._forbidden_text(judge)
        self.missing = self._missing(known)
        if not self.missing and self.expected.waits:
            return self._absent_is_proven(known, over=over)
        hopeless = self._hopeless(known)
        if hopeless:
            return hopeless
        if not self.missing:
            return self._absent_is_proven(known, over=over) if over or last else None
        if not over:
            return None
        unread = self._unread(known)
        if unread:
            return f"{over}, and {self.missing} cannot be judged: {unread}"
        return f"{over} without {self.missing}"

    def _forbidden_text(self, judge: Judge) -> str:
        _, text = judge.forbidden[0]
        what = text if isinstance(text, str) else text.pattern
        return f"the log of {self.subject.name} holds {what!r}, which it must not"

    def _missing(self, known: _Known) -> str:
        expected, name = self.expected, self.subject.name
        views = [view for view in known.views if not view.deleted]
        if not known.views:
            return f"{name} to appear"
        if expected.judge is not None and expected.judge.missing:
            return _first_missing(expected.judge)
        phase = self._phase(known)
        if expected.phase and phase != expected.phase:
            return f"phase {expected.phase} of {name} (it is {phase or 'unknown'})"
        ends = [end for view in views for end in ends_of(main_status(view.object, expected.container) or {})]
        if expected.exit_code is not None and not any(end.get("exitCode") == expected.exit_code for end in ends):
            return f"exit code {expected.exit_code} of {name}"
        if expected.reason and not any(end.get("reason") == expected.reason for end in ends):
            return f"reason {expected.reason} of {name}"
        if expected.restarts is not None and self._restarts(views) < expected.restarts:
            return f"{expected.restarts} restarts of {name}"
        return ""

    def _phase(self, known: _Known) -> str:
        if self.subject.owner is None:
            there = [view for view in known.views if not view.deleted] or known.views[-1:]
            return there[0].phase
        met = _conditions(known.owner)
        return self.expected.phase if self.expected.phase in met else ", ".join(sorted(met))

    def _restarts(self, views: Sequence[PodView]) -> int:
        entries = [main_status(view.object, self.expected.container) or {} for view in views]
        return sum(int(entry.get("restartCount") or 0) for entry in entries)

    def _hopeless(self, known: _Known) -> str | None:
        """Why it will never come, though not all is over."""
        for view in known.views:
            for entry in [] if view.deleted else self._needed(view):
                waiting = (entry.get("state") or {}).get("waiting") or {}
                if waiting.get("reason") in FINAL_WAITING:
                    said = waiting.get("message") or "no message"
                    return f"pod/{view.name} waits: {waiting['reason']}: {said} (container {entry.get('name')})"
        failed = _conditions(known.owner).get("Failed") if self.subject.is_job else None
        if failed and self.expected.phase not in {"", "Failed"}:
            return f"{self.subject.name} failed: {failed.get('message') or failed.get('reason')}"
        return None

    def _needed(self, view: PodView) -> list[KubeObject]:
        """The containers that must start for anything to come: those that run first, and the one that is meant."""
        regular = (view.object.get("status") or {}).get("containerStatuses") or []
        meant = self.expected.container
        return [
            entry for entry in container_statuses(view.object)
            if entry not in regular or meant in {"", entry.get("name")}
        ]  # fmt: skip

    def _over(self, known: _Known) -> str:
        """That nothing further can come, as text; empty while something can."""
        views = known.views
        if not views or any(not (view.deleted or view.phase in TERMINAL_PHASES) for view in views):
            return ""
        if self._reading is not None and any(log.instance not in known.ended for log in known.logs):
            return ""
        phases = ", ".join(sorted({view.phase if view.phase in TERMINAL_PHASES else "gone" for view in views}))
        if self.subject.owner is None:
            # One that was deleted may be made again by that name, but it is not the one that was meant.
            return f"{self.subject.name} is over ({phases})"
        if not self.subject.is_job:
            return ""
        finished = {kind: c for kind, c in _conditions(known.owner).items() if kind in {"Complete", "Failed"}}
        for kind, condition in finished.items():
            said = condition.get("message") or ""
            return f"{self.subject.name} is over ({kind}{': ' if said else ''}{said})"
        return ""

    # --- whole logs ------------------------------------------------------------------------------------------------

    def _absent_is_proven(self, known: _Known, *, over: str) -> str | None:
        """Before the yes: whether all was read that had been written when it could have been answered."""
        judge = self.expected.judge
        if judge is None or not judge.absent:
            return ""
        unread = self._unread(known)
        if unread:
            return f"what is absent cannot be judged: {unread}"
        if over:
            return ""
        behind = [log for log in known.logs if log.instance not in known.ended and not self._is_caught_up(known, log)]
        if not behind:
            return ""
        why = self._ask_error or f"it has {behind[0].count} lines so far"
        self._behind = f"what is absent cannot be judged: the log of {behind[0].container} is still being read ({why})"
        return None

    def _unread(self, known: _Known) -> str:
        lost = [f"the log of {log.container}: {log.lost}" for log in known.logs if log.lost]
        lost += [
            f"pod/{view.name} was started again so often that the logs of {count} instances were not read"
            for view in known.views
            if view.from_birth and (count := view.unread_instances(self.expected.container))
        ]
        return lost[0] if lost else ""

    def _is_caught_up(self, known: _Known, log: InstanceLog) -> bool:
        if log.instance not in self._asked:
            view = next(view for view in known.views if log.instance in view.logs)
            try:
                self._asked[log.instance] = last_written(self.observer.kube, view.object, log.container)
            except ApiError as error:
                self._ask_error = error.message
                return False
        read, asked = known.last[log.instance], self._asked[log.instance]
        if nanoseconds_of(read) == nanoseconds_of(asked) and read != asked:
            # Lines that a program writes at once have one time, so this is some line before it, or one after it.
            del self._asked[log.instance]
            return False
        return nanoseconds_of(read) >= nanoseconds_of(asked)


def _first_missing(judge: Judge) -> str:
    """All that may come in any order, and the next of what has an order."""
    ordered = [want for want in judge.missing if want.how == "in order"]
    return ", ".join(map(str, [*(want for want in judge.missing if want.how != "in order"), *ordered[:1]]))


def _conditions(owner: KubeObject | None) -> dict[str, KubeObject]:
    """Those that are met, by type."""
    found = ((owner or {}).get("status") or {}).get("conditions") or []
    return {str(entry.get("type")): entry for entry in found if entry.get("status") == "True"}
