"""Whether the cluster shows what a demo promises: pods, their logs and their ends, by watches, within a time.

Two kinds of news come in, each from a thread that only reads and queues: objects (watches of the pods and, for a Job or
Deployment, of the owner) and log lines. After each piece of news the expectation is judged anew. Nothing is polled, so
the time from a module's line to its assertion is that of the wire.

A log is followed from the first instance of a container that ran; when that ends unsatisfied and another one starts,
its log is followed too. Lines of all instances count, in the order in which they came.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wasilet.demo.samples import Expectation, Line
from wasilet.errors import ApiError, HarnessError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.process import check_cancelled

Say = Callable[[str], None]

_FINAL_WAITING = frozenset({"InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff"})
"""Waiting reasons that nothing but a change of the manifest, or of the registry, will end."""

_TERMINAL_PHASES = frozenset({"Succeeded", "Failed"})
_SHOWN_LINES = 15
_TICK_SECONDS = 0.2


class ExpectationError(HarnessError):
    """The cluster showed something else; the message says what, with the log, the pod's status and its events."""

    def __init__(self, message: str, *, lines: Sequence[str] = ()) -> None:
        super().__init__(message, exit_code=2)
        self.lines = tuple(lines)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What satisfied an expectation."""

    lines: tuple[str, ...]
    """The log, as far as it was read."""

    pod: str
    seconds: float
    """From the start of the wait."""


@dataclass
class _Follow:
    """One container instance whose log is being read."""

    pod: str
    instance: str
    ended: bool = False


@dataclass
class _Facts:
    """What is known so far."""

    pods: dict[str, KubeObject] = field(default_factory=dict)
    owner: KubeObject | None = None
    lines: list[str] = field(default_factory=list)
    follows: dict[str, _Follow] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def wait_for(kube: Kube, expectation: Expectation, *, namespace: str, say: Say = lambda _: None) -> Seen:
    """Wait until the cluster shows ``expectation``. Raises ExpectationError with a diagnosis when it does not come
    within ``within_seconds``, or as soon as it is certain that it never will."""
    return _Wait(kube, expectation, namespace).run(say)


class _Wait:
    """One expectation being waited for."""

    def __init__(self, kube: Kube, expectation: Expectation, namespace: str) -> None:
        self._kube = kube
        self._expectation = expectation
        self._namespace = namespace
        self._started = time.monotonic()
        self._deadline = self._started + expectation.within_seconds
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._facts = _Facts()

    def run(self, say: Say) -> Seen:
        for kind, path, query in self._watched():
            _thread(self._watch, kind, path, query)
        missing = f"{self._expectation.object_name} to appear"
        while (left := self._deadline - time.monotonic()) > 0:
            check_cancelled()
            with contextlib.suppress(queue.Empty):
                _learn(self._facts, *self._news.get(timeout=min(left, _TICK_SECONDS)))
                while True:
                    _learn(self._facts, *self._news.get_nowait())
            self._follow_new()
            missing = _missing(self._expectation, self._facts)
            if not missing:
                pod = next(iter(self._facts.pods), "")
                seconds = time.monotonic() - self._started
                return Seen(lines=tuple(self._facts.lines), pod=pod, seconds=seconds)
            hopeless = _hopeless(self._expectation, self._facts)
            if hopeless:
                raise self._failure(hopeless)
            say(self._facts.lines[-1] if self._facts.lines else f"waiting for {missing}")
        raise self._failure(f"{missing} did not come within {self._expectation.within_seconds:g} s")

    # --- what is watched -------------------------------------------------------------------------------------------

    def _watched(self) -> list[tuple[str, str, dict[str, str]]]:
        """Kind of news, path and query of each watch."""
        expectation, namespace = self._expectation, self._namespace
        pods = api_path("pods", namespace=namespace)
        if expectation.pod:
            return [("pod", pods, {"fieldSelector": f"metadata.name={expectation.pod}"})]
        if expectation.job:
            collection = api_path("jobs", group="batch", namespace=namespace)
            owner = {"fieldSelector": f"metadata.name={expectation.job}"}
            return [
                ("owner", collection, owner),
                ("pod", pods, {"labelSelector": f"batch.kubernetes.io/job-name={expectation.job}"}),
            ]
        collection = api_path("deployments", group="apps", namespace=namespace)
        path = api_path("deployments", expectation.deployment, group="apps", namespace=namespace)
        labels = self._kube.get(path).get("spec", {}).get("selector", {}).get("matchLabels") or {}
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        return [
            ("owner", collection, {"fieldSelector": f"metadata.name={expectation.deployment}"}),
            ("pod", pods, {"labelSelector": selector}),
        ]

    def _watch(self, kind: str, path: str, query: dict[str, str]) -> None:
        """A watch without a resource version begins with what there is; it ends by itself soon after the deadline."""
        while (left := self._deadline - time.monotonic()) > 0:
            seconds = int(left) + 1
            try:
                with self._kube.watch(path, timeout_seconds=seconds, idle_seconds=seconds + 5.0, **query) as events:
                    for event in events:
                        if event.get("type") in {"ADDED", "MODIFIED"}:
                            self._news.put((kind, event["object"]))
                        elif event.get("type") == "DELETED":
                            self._news.put((f"{kind} deleted", event["object"]))
                        elif event.get("type") == "ERROR":
                            break
            except ApiError as error:
                self._news.put(("error", error.message))
                time.sleep(min(_TICK_SECONDS, max(0.0, self._deadline - time.monotonic())))

    def _follow_new(self) -> None:
        """Follow the log of every container instance that ran and is not followed yet."""
        if not self._expectation.log:
            return
        for name, pod in self._facts.pods.items():
            status = _container_status(pod, self._expectation.container)
            if status is None:
                continue
            state, last = status.get("state") or {}, status.get("lastState") or {}
            now = state.get("running") if state.get("running") is not None else state.get("terminated")
            for facts, previous in ((last.get("terminated"), True), (now, False)):
                if facts is None:
                    continue
                # The running state carries no container id of its own: the status does.
                instance = str(facts.get("containerID") or status.get("containerID") or "")
                if instance and instance not in self._facts.follows:
                    self._facts.follows[instance] = _Follow(pod=name, instance=instance)
                    query = {"container": str(status["name"]), "follow": "true"}
                    if previous:
                        query["previous"] = "true"
                    _thread(
                        self._read_log, api_path("pods", name, namespace=self._namespace, sub="log"), query, instance
                    )

    def _read_log(self, path: str, query: dict[str, str], instance: str) -> None:
        idle = max(1.0, self._deadline - time.monotonic() + 1.0)
        try:
            with self._kube.stream(path, idle_seconds=idle, **query) as lines:
                for line in lines:
                    self._news.put(("line", line))
        except ApiError as error:
            self._news.put(("error", error.message))
        finally:
            self._news.put(("log ended", instance))

    # --- diagnosis -------------------------------------------------------------------------------------------------

    def _failure(self, reason: str) -> ExpectationError:
        facts = self._facts
        lines = [reason]
        for name, pod in facts.pods.items():
            lines += describe(name, pod)
            lines += [f"  event  {text}" for text in _events(self._kube, self._namespace, name)]
        shown = facts.lines[-_SHOWN_LINES:]
        lines.append(f"  log    the last {len(shown)} of {len(facts.lines)} lines:" if shown else "  log    (empty)")
        lines += [f"  | {line}" for line in shown]
        lines += [f"  error  {message}" for message in dict.fromkeys(facts.errors[-3:])]
        return ExpectationError("\n".join(lines), lines=facts.lines)


def _thread(target: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True, name=f"expect {target.__name__}").start()


# --- judging ---------------------------------------------------------------------------------------------------------


def _learn(facts: _Facts, kind: str, value: Any) -> None:
    if kind == "pod":
        facts.pods[value["metadata"]["name"]] = value
    elif kind == "pod deleted":
        facts.pods.pop(value["metadata"]["name"], None)
    elif kind == "owner":
        facts.owner = value
    elif kind == "owner deleted":
        facts.owner = None
    elif kind == "line":
        facts.lines.append(value)
    elif kind == "log ended":
        facts.follows[value].ended = True
    else:
        facts.errors.append(value)


def _missing(expectation: Expectation, facts: _Facts) -> str:
    """What is still wanting, in words; empty when all is there."""
    if not facts.pods:
        return f"{expectation.object_name} to appear"
    wanting = missing_line(expectation.log, facts.lines)
    if wanting:
        return f"{wanting} in the log of {expectation.object_name}"
    phase = _phase(expectation, facts)
    if expectation.phase and phase != expectation.phase:
        return f"phase {expectation.phase} of {expectation.object_name} (it is {phase or 'unknown'})"
    ends = _ends(expectation, facts)
    if expectation.exit_code is not None and not any(end.get("exitCode") == expectation.exit_code for end in ends):
        return f"exit code {expectation.exit_code} of {expectation.object_name}"
    if expectation.reason and not any(end.get("reason") == expectation.reason for end in ends):
        return f"reason {expectation.reason} of {expectation.object_name}"
    if expectation.restarts is not None and _restarts(expectation, facts) < expectation.restarts:
        return f"{expectation.restarts} restarts of {expectation.object_name}"
    return ""


def missing_line(wanted: Sequence[Line], lines: Sequence[str]) -> str:
    """The first of the wanted lines that the log lacks, in words; empty when it has all of them in their order.

    A line that must be absent and is there is wanting too: nothing that comes later makes it good.
    """
    position = 0
    for line in wanted:
        if line.absent:
            if any(line.found_in(text) for text in lines):
                return str(line)
            continue
        while position < len(lines) and not line.found_in(lines[position]):
            position += 1
        if position == len(lines):
            return str(line)
        position += 1
    return ""


def _phase(expectation: Expectation, facts: _Facts) -> str:
    if expectation.pod:
        return str((next(iter(facts.pods.values())).get("status") or {}).get("phase") or "")
    conditions = ((facts.owner or {}).get("status") or {}).get("conditions") or []
    met = {str(condition.get("type")) for condition in conditions if condition.get("status") == "True"}
    if expectation.phase in met:
        return expectation.phase
    return ", ".join(sorted(met))


def _ends(expectation: Expectation, facts: _Facts) -> list[KubeObject]:
    """How instances of the container ended: the present and the last one of each pod."""
    ends = []
    for pod in facts.pods.values():
        status = _container_status(pod, expectation.container) or {}
        for key in ("state", "lastState"):
            end = (status.get(key) or {}).get("terminated")
            if end:
                ends.append(end)
    return ends


def _restarts(expectation: Expectation, facts: _Facts) -> int:
    return sum(
        int((_container_status(pod, expectation.container) or {}).get("restartCount") or 0)
        for pod in facts.pods.values()
    )


def _container_status(pod: KubeObject, container: str) -> KubeObject | None:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    for status in statuses:
        if isinstance(status, dict) and (not container or status.get("name") == container):
            return status
    return None


def _hopeless(expectation: Expectation, facts: _Facts) -> str:
    """Why waiting longer is of no use; empty while it may be."""
    for line in expectation.log:
        if line.absent and any(line.found_in(text) for text in facts.lines):
            return f"the log holds {line.absent!r}, which it must not"
    for name, pod in facts.pods.items():
        status = _container_status(pod, expectation.container) or {}
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _FINAL_WAITING:
            return f"pod/{name} waits: {waiting['reason']}: {waiting.get('message') or 'no message'}"
    if expectation.pod and facts.pods:
        pod = next(iter(facts.pods.values()))
        phase = str((pod.get("status") or {}).get("phase") or "")
        followed = [follow.ended for follow in facts.follows.values()]
        if phase in _TERMINAL_PHASES and all(followed) and (followed or not expectation.log):
            return f"pod/{expectation.pod} is over ({phase}) without {_missing(expectation, facts)}"
    conditions = ((facts.owner or {}).get("status") or {}).get("conditions") or []
    if expectation.job and expectation.phase != "Failed":
        for condition in conditions:
            if condition.get("type") == "Failed" and condition.get("status") == "True":
                return f"job/{expectation.job} failed: {condition.get('message') or condition.get('reason')}"
    return ""


def describe(name: str, pod: KubeObject) -> list[str]:
    """A pod's status in a few lines."""
    status = pod.get("status") or {}
    node = (pod.get("spec") or {}).get("nodeName") or "no node"
    lines = [f"  pod/{name}: {status.get('phase') or 'no phase'} on {node}"]
    lines += [
        f"    {condition.get('type')} is False: {condition['message']}"
        for condition in status.get("conditions") or []
        if condition.get("status") == "False" and condition.get("message")
    ]
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        for key in ("state", "lastState"):
            for what, detail in (container.get(key) or {}).items():
                words = [str(detail[item]) for item in ("reason", "message") if detail.get(item)]
                code = f" (exit code {detail['exitCode']})" if "exitCode" in detail else ""
                said = f": {', '.join(words)}" if words else ""
                lines.append(f"    {container.get('name')} {key} {what}{code}{said}")
    return lines


def _events(kube: Kube, namespace: str, pod: str) -> list[str]:
    try:
        answer = kube.get(
            api_path("events", namespace=namespace),
            timeout_seconds=5.0,
            fieldSelector=f"involvedObject.kind=Pod,involvedObject.name={pod}",
        )
    except ApiError:
        return []
    items = answer.get("items") or []
    items.sort(key=lambda item: str(item.get("lastTimestamp") or item.get("eventTime") or ""))
    return [f"{item.get('type')} {item.get('reason')}: {item.get('message')}" for item in items[-10:]]
