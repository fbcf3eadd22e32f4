"""What goes on in a namespace, kept by watches: pods, events, and the logs of the containers that somebody asked for.

One thread a watch and one a log that is followed; each only reads, writes down and wakes whoever waits. Nothing is
polled, so an assertion learns of a line as soon as it has come over the wire, and a second one on the same pod costs no
request at all. The pytest plugin, ``invoke ui`` and ``invoke report`` look at clusters through this.

Times: what is seen to happen is stamped with this machine's clock; of what had happened before, the API server tells
only whole seconds. Log lines carry the node's own time stamps. All are seconds since the epoch.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path

MAX_LINES = 50_000
"""Kept of each log; the oldest go first."""

WATCH_SECONDS = 240
RETRY_SECONDS = 0.5
GONE = 410
_R = TypeVar("_R")


@dataclass(frozen=True)
class LogLine:
    """One line of a container's log."""

    at: float
    """When it was written, by the node's clock; 0.0 when the node did not say."""

    text: str


@dataclass
class InstanceLog:
    """The log of one instance of a container: a container that is started again has another."""

    container: str
    instance: str
    lines: list[LogLine] = field(default_factory=list)
    first: int = 0
    """The number of the first line that is kept; more than 0 when older ones were dropped."""

    ended: bool = False
    error: str = ""


@dataclass
class PodView:
    """A pod, as it was last seen, and when it came so far."""

    namespace: str
    name: str
    uid: str
    object: KubeObject
    marks: dict[str, float] = field(default_factory=dict)
    """``created, scheduled, started, ready, finished, deleted``: what of it has happened, in seconds."""

    logs: dict[str, InstanceLog] = field(default_factory=dict)
    followed: bool = False
    deleted: bool = False

    @property
    def phase(self) -> str:
        """``status.phase``."""
        return str((self.object.get("status") or {}).get("phase") or "")

    def first_line_at(self) -> float | None:
        """When its first line was written; None when nobody knows: of a container that was started again, the logs of
        the instances before the last two are gone."""
        starts = {str(e.get("name")): int(e.get("restartCount") or 0) + 1 for e in self.containers()}
        read: dict[str, list[InstanceLog]] = {}
        for log in self.logs.values():
            read.setdefault(log.container, []).append(log)
        times = []
        for container, logs in read.items():
            written = [log.lines[0].at for log in logs if log.lines and log.lines[0].at]
            if len(logs) < starts.get(container, 1) or any(log.first for log in logs):
                return None
            times += written
        return min(times, default=None)

    def containers(self) -> list[KubeObject]:
        """The statuses of all containers, those that ran first being first."""
        status = self.object.get("status") or {}
        found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        return [entry for entry in found if isinstance(entry, dict)]


class Observer:
    """Watches one namespace (or all: ``""``) until it is closed. Attributes are read under :attr:`changed`."""

    def __init__(
        self, kube: Kube, namespace: str = "", *, events: bool = False, follow: bool = False, version: str = ""
    ) -> None:
        """``events``: watch them too. ``follow``: read every log. ``version``: a resourceVersion from before anything
        was in the namespace, which saves the first list."""
        self._kube = kube
        self.namespace = namespace
        self.changed = threading.Condition()
        self.pods: dict[str, PodView] = {}
        """By uid; deleted ones stay, and are marked."""

        self.events: dict[str, KubeObject] = {}
        self.error = ""
        """Why the API server could not be asked, while it cannot."""

        self.listed = bool(version)
        """Whether what there was at the beginning is known."""

        self._follow = follow
        self._began = time.time()
        self._hangup = Hangup()
        self._threads: list[threading.Thread] = []
        self._start(self._watch, "pods", self._pod, version)
        if events:
            self._start(self._watch, "events", self._event, version)

    def __enter__(self) -> Self:
        """So that :meth:`close` is not forgotten."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, timeout_seconds: float = 5.0) -> None:
        """End the watches and the followed logs; what was seen stays."""
        self._hangup.end()
        with self.changed:
            self.changed.notify_all()
            threads = list(self._threads)
        deadline = time.monotonic() + timeout_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def closed(self) -> bool:
        """Whether nothing is watched any more."""
        return self._hangup.done

    # --- asking ----------------------------------------------------------------------------------------------------

    def find(self, name: str, *, uid: str = "", namespace: str = "") -> PodView | None:
        """The pod of that name: with that uid, or the one that is there now, or the last that was."""
        with self.changed:
            if uid:
                return self.pods.get(uid)
            wanted = namespace or self.namespace
            named = [p for p in self.pods.values() if p.name == name and p.namespace == wanted]
            return next((p for p in named if not p.deleted), named[-1] if named else None)

    def wait(self, look: Callable[[], _R | None], *, within_seconds: float) -> _R | None:
        """Call ``look`` after each change, until it returns something; None when the time is over."""
        deadline = time.monotonic() + within_seconds
        with self.changed:
            while True:
                found = look()
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or self.closed:
                    return None
                self.changed.wait(left)

    def mark(self, uid: str, what: str, at: float) -> None:
        """Write down a time that the caller knows better."""
        with self.changed:
            if uid in self.pods:
                self.pods[uid].marks[what] = at

    def add(self, pod: KubeObject, *, created_at: float) -> PodView:
        """A pod that the caller has just created: known at once, before the watch tells."""
        with self.changed:
            uid = str(pod["metadata"]["uid"])
            if uid not in self.pods:
                self._pod("ADDED", pod)
            # Else the watch was faster, and has it as new as this or newer.
            view = self.pods[uid]
            view.marks["created"] = created_at
            return view

    def follow(self, view: PodView) -> None:
        """Read the logs of all its containers, of instances to come as well."""
        with self.changed:
            if not view.followed:
                view.followed = True
                self._follow_instances(view)

    # --- the watches -----------------------------------------------------------------------------------------------

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name=f"observe {self.namespace}")
        self._threads.append(thread)
        thread.start()

    def _watch(self, plural: str, learn: Callable[[str, KubeObject], None], version: str) -> None:
        path = api_path(plural, namespace=self.namespace)
        while not self.closed:
            try:
                if not version:
                    version = self._list(path, plural, learn)
                query = {"resourceVersion": version}
                with self._kube.watch(
                    path, self._hangup, timeout_seconds=WATCH_SECONDS, idle_seconds=WATCH_SECONDS + 10.0, **query
                ) as events:
                    for event in events:
                        version = self._learn(event, learn)
                        if not version:
                            break
            except ApiError as error:
                version = "" if error.code == GONE else version
                if not self.closed:
                    self._say_error(error.message)
                    time.sleep(RETRY_SECONDS)

    def _list(self, path: str, plural: str, learn: Callable[[str, KubeObject], None]) -> str:
        answer = self._kube.get(path)
        items = answer.get("items") or []
        with self.changed:
            for item in items:
                learn("ADDED", item)
            if plural == "pods":
                there = {item["metadata"]["uid"] for item in items}
                for view in self.pods.values():
                    if view.uid not in there and not view.deleted:
                        self._gone(view)
                self.listed = True
            self.error = ""
            self.changed.notify_all()
        return str((answer.get("metadata") or {}).get("resourceVersion") or "")

    def _learn(self, event: KubeObject, learn: Callable[[str, KubeObject], None]) -> str:
        """The version to go on from; empty when the watch must begin anew."""
        kind, obj = str(event.get("type")), event.get("object") or {}
        if kind == "ERROR":
            return ""
        with self.changed:
            if kind != "BOOKMARK":
                learn(kind, obj)
            self.error = ""
            self.changed.notify_all()
        return str((obj.get("metadata") or {}).get("resourceVersion") or "")

    def _say_error(self, message: str) -> None:
        with self.changed:
            self.error = message
            self.changed.notify_all()

    def _event(self, kind: str, obj: KubeObject) -> None:
        if kind != "DELETED":
            self.events[str(obj["metadata"]["uid"])] = obj

    def _pod(self, kind: str, obj: KubeObject) -> None:
        metadata = obj["metadata"]
        uid = str(metadata["uid"])
        view = self.pods.get(uid)
        if view is None:
            view = PodView(str(metadata.get("namespace") or ""), str(metadata["name"]), uid, obj)
            self.pods[uid] = view
        else:
            view.object = obj
        self._mark_progress(view)
        if kind == "DELETED":
            self._gone(view)
        elif view.followed or self._follow:
            view.followed = True
            self._follow_instances(view)

    def _gone(self, view: PodView) -> None:
        view.deleted = True
        view.marks.setdefault("deleted", time.time())

    def _mark_progress(self, view: PodView) -> None:
        now = time.time()
        status, spec = view.object.get("status") or {}, view.object.get("spec") or {}
        created = seconds_of(view.object["metadata"].get("creationTimestamp")) or now
        # A time stamp of the API server is cut to the second: an older one is all there is, a recent one is our own.
        old = created < self._began - 1.0
        view.marks.setdefault("created", created if old else now)
        conditions = {str(c.get("type")): c for c in status.get("conditions") or [] if c.get("status") == "True"}
        states = [entry.get(key) or {} for entry in view.containers() for key in ("lastState", "state")]
        starts = [(state.get(kind) or {}).get("startedAt") for state in states for kind in ("running", "terminated")]
        ends = [(state.get("terminated") or {}).get("finishedAt") for state in states]
        happened = {
            "scheduled": (bool(spec.get("nodeName")), [_since(conditions, "PodScheduled")]),
            "started": (any(starts), starts),
            "ready": ("Ready" in conditions, [_since(conditions, "Ready")]),
            "finished": (view.phase in {"Succeeded", "Failed"}, ends),
        }
        for what, (has, stamps) in happened.items():
            if has and what not in view.marks:
                times = [seconds for stamp in stamps if (seconds := seconds_of(stamp))]
                told = (max(times) if what == "finished" else min(times)) if times else now
                view.marks[what] = told if old and told < self._began - 1.0 else now

    # --- logs ------------------------------------------------------------------------------------------------------

    def _follow_instances(self, view: PodView) -> None:
        for status in view.containers():
            for instance, previous in _instances(status):
                if instance not in view.logs and not self.closed:
                    log = InstanceLog(container=str(status["name"]), instance=instance)
                    view.logs[instance] = log
                    self._start(self._read_log, view, log, previous)

    def _read_log(self, view: PodView, log: InstanceLog, previous: bool) -> None:  # noqa: FBT001
        path = api_path("pods", view.name, namespace=view.namespace, sub="log")
        query = {"container": log.container, "follow": "true", "timestamps": "true"}
        if previous:
            query["previous"] = "true"
        try:
            with self._kube.stream(path, self._hangup, idle_seconds=3600.0, **query) as lines:
                self._keep(log, lines)
        except ApiError as error:
            log.error = "" if self.closed else error.message
        finally:
            with self.changed:
                log.ended = True
                self.changed.notify_all()

    def _keep(self, log: InstanceLog, lines: Iterator[str]) -> None:
        for text in lines:
            line = _stamped(text)
            with self.changed:
                log.lines.append(line)
                if len(log.lines) > MAX_LINES:
                    surplus = MAX_LINES // 10
                    del log.lines[:surplus]
                    log.first += surplus
                self.changed.notify_all()


def _since(conditions: dict[str, KubeObject], kind: str) -> Any:
    return (conditions.get(kind) or {}).get("lastTransitionTime")


def _instances(status: KubeObject) -> Iterator[tuple[str, bool]]:
    """Identity of each instance of a container whose log there is, and whether it is the previous one."""
    last = (status.get("lastState") or {}).get("terminated")
    if last is not None and last.get("containerID"):
        yield str(last["containerID"]), True
    state = status.get("state") or {}
    now = state.get("running") if state.get("running") is not None else state.get("terminated")
    if now is not None:
        # The running state carries no container id of its own: the status does.
        instance = str(now.get("containerID") or status.get("containerID") or "")
        if instance:
            yield instance, False


def _stamped(text: str) -> LogLine:
    stamp, separator, rest = text.partition(" ")
    at = seconds_of(stamp)
    return LogLine(at, rest) if at and separator else LogLine(0.0, text)


def seconds_of(stamp: Any) -> float:
    """An RFC 3339 time stamp in seconds since the epoch; 0.0 when it is none."""
    if not isinstance(stamp, str) or len(stamp) < 20 or stamp[10] != "T":
        return 0.0
    # Nanoseconds are more than fromisoformat of Python 3.11 reads, and more than a float holds.
    whole, dot, fraction = stamp.partition(".")
    digits = fraction.rstrip("Z0123456789+-:")
    if digits:
        return 0.0
    try:
        if not dot:
            return dt.datetime.fromisoformat(stamp).timestamp()
        zone = next((index for index, sign in enumerate(fraction) if sign in "Z+-"), len(fraction))
        base = dt.datetime.fromisoformat(whole + fraction[zone:]).timestamp()
        return base + float("0." + fraction[:zone])
    except ValueError:
        return 0.0


def event_time(event: KubeObject) -> float:
    """When an event last happened."""
    series = event.get("series") or {}
    for stamp in (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")):
        if at := seconds_of(stamp):
            return at
    return seconds_of(event["metadata"].get("creationTimestamp"))


def event_order(event: KubeObject) -> int:
    """To sort events by: the order in which they were written. Their times are of whole seconds in most cases, of
    microseconds in others, and so put the scheduler's after the kubelet's."""
    version = str(event["metadata"].get("resourceVersion") or "")
    return int(version) if version.isdecimal() else 0
