"""Whether the cluster shows what a demo promises: a ``demo.yaml`` in the terms of the one judge.

The log lines of an expectation are wanted in their order, each in its own line; see
:mod:`wasilet.testing.expectation` for what is watched and when waiting is given up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wasilet.apps.samples import Expectation, Line
from wasilet.errors import HarnessError
from wasilet.kube.client import Kube, api_path
from wasilet.process import check_cancelled
from wasilet.testing.expectation import Expectation as Expected
from wasilet.testing.expectation import Subject, Wait
from wasilet.testing.log_match import Judge
from wasilet.testing.observe import Observer
from wasilet.testing.pod_status import describe, events_of

Say = Callable[[str], None]
_SHOWN_LINES = 15
_SHOWN_EVENTS = 10


class ExpectationError(HarnessError):
    """The cluster showed something else; the message says what, with the log, the pod's status and its events."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What satisfied an expectation."""

    lines: Sequence[str]
    """The log, as far as it was read; it is kept on disk when it is long."""

    pod: str
    seconds: float
    """From the start of the wait."""


def judge_of(lines: Sequence[Line], *, where: str = "") -> Judge | None:
    """The judge of such lines; None when there are none. ``where``: whose log, for messages."""
    if not lines:
        return None
    wanted = [line for line in lines if not line.absent]
    judge = Judge(
        in_order=[re.compile(line.matches) if line.matches else line.contains for line in wanted],
        absent=[line.absent for line in lines if line.absent],
    )
    for want, line in zip(judge.wanted, wanted, strict=True):
        want.words = f"{line}{where}"
    return judge


def lacking(judge: Judge | None) -> str:
    """The first of the wanted lines that a log lacks, or what it holds and must not; empty when all is as wanted."""
    if judge is None:
        return ""
    if judge.forbidden:
        return f"no line with {judge.forbidden[0][1]!r}"
    return next((str(want) for want in judge.missing), "")


def missing_line(wanted: Sequence[Line], lines: Sequence[str]) -> str:
    """The same of a log that is known as a whole."""
    judge = judge_of(wanted)
    if judge is not None:
        judge.feed(lines)
    return lacking(judge)


def wait_for(kube: Kube, expectation: Expectation, *, namespace: str, say: Say = lambda _: None) -> Seen:
    """Wait until the cluster shows ``expectation``. Raises ExpectationError with a diagnosis when it does not come
    within ``within_seconds``, or as soon as it is certain that it never will."""
    name = expectation.object_name
    pods, owner = _watched(kube, expectation, namespace)
    expected = Expected(
        judge=judge_of(expectation.log, where=f" in the log of {name}"),
        container=expectation.container,
        phase=expectation.phase,
        exit_code=expectation.exit_code,
        reason=expectation.reason,
        restarts=expectation.restarts,
    )
    with Observer(kube, namespace, pods=pods, whole_logs=True) as observer:
        waiting = Wait(observer, Subject(name=name, owner=owner), expected)

        def tick() -> None:
            check_cancelled()
            say(_last_line(waiting) or f"waiting for {waiting.missing or name}")

        verdict = waiting.run(within_seconds=expectation.within_seconds, tick=tick)
        if verdict:
            raise _failure(verdict, waiting)
        return Seen(lines=waiting.lines, pod=next(view.name for view in waiting.views()), seconds=waiting.seconds)


def _watched(
    kube: Kube, expectation: Expectation, namespace: str
) -> tuple[dict[str, str], tuple[str, str, str] | None]:
    """The selector of the pods, and their owner. Raises ApiError when a Deployment is not there."""
    if expectation.pod:
        return {"fieldSelector": f"metadata.name={expectation.pod}"}, None
    if expectation.job:
        return {"labelSelector": f"batch.kubernetes.io/job-name={expectation.job}"}, ("jobs", "batch", expectation.job)
    path = api_path("deployments", expectation.deployment, group="apps", namespace=namespace)
    labels = kube.get(path).get("spec", {}).get("selector", {}).get("matchLabels") or {}
    selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return {"labelSelector": selector}, ("deployments", "apps", expectation.deployment)


def _last_line(waiting: Wait) -> str:
    lines = waiting.lines
    return lines[-1] if lines else ""


def _failure(reason: str, waiting: Wait) -> ExpectationError:
    observer = waiting.observer
    said = [reason]
    for view in waiting.views():
        said += describe(view.name, view.object)
        events = events_of(observer.kube, view.namespace or observer.namespace, view.uid)
        said += [f"  event  {text}" for text in events[-_SHOWN_EVENTS:]]
    lines = waiting.lines
    shown = lines[-_SHOWN_LINES:]
    said.append(f"  log    the last {len(shown)} of {len(lines)} lines:" if shown else "  log    (empty)")
    said += [f"  | {line}" for line in shown]
    said += [f"  error  {message}" for message in dict.fromkeys([*waiting.errors(), observer.error]) if message]
    return ExpectationError("\n".join(said))
