"""What goes on in a namespace, kept by watches: pods, events, and the logs of the containers that someone asked for.

One thread per watch and one per followed log; each only reads, writes down and wakes those who wait. Nothing is
polled, so an assertion learns of a line as soon as it has come over the wire, and a second one on the same pod costs no
request at all. The pytest plugin, ``invoke ui`` and ``invoke report`` look at clusters through this.

Times: what is seen to happen is stamped with this machine's clock; of what had happened before, the API server reports
only whole seconds. Log lines carry the node's own time stamps. All are seconds since the epoch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from wasilet_common.pod_fields import TERMINAL_PHASES
from wasilet_common.time_format import parse_rfc3339

from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.reflector import Reflector
from wasilet.testing.log_follow import InstanceLog, LogFollower
from wasilet.testing.log_spool import LogSpool, LogTail
from wasilet.testing.pod_status import container_statuses, instances_of, phase_of

_R = TypeVar("_R")


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
    from_birth: bool = False
    """Whether it has been seen since it was created."""

    @property
    def phase(self) -> str:
        """``status.phase``."""
        return phase_of(self.object)

    def first_line_at(self) -> float | None:
        """When its first line was written; None when no one knows: of a container that was started again, the logs of
        the instances before the last two are gone."""
        if self.unread_instances():
            return None
        return min((log.first_at for log in self.logs.values() if log.first_at), default=None)

    def unread_instances(self, container: str = "") -> int:
        """How many instances there were (of one container, or of all that are followed) whose logs were not read, and
        are gone by now."""
        read: dict[str, int] = {}
        for log in self.logs.values():
            read[log.container] = read.get(log.container, 0) + 1
        missing = 0
        for entry in self.containers():
            name = str(entry.get("name"))
            if name in read and container in {"", name}:
                missing += max(0, int(entry.get("restartCount") or 0) + 1 - read[name])
        return missing

    def containers(self) -> list[KubeObject]:
        """The statuses of all containers, those that ran first being first."""
        return container_statuses(self.object)


class Observer:
    """Watches one namespace (or all: ``""``) until it is closed. Attributes are read under :attr:`changed`."""

    def __init__(
        self,
        kube: Kube,
        namespace: str = "",
        *,
        pods: Mapping[str, str] | None = None,
        events: bool = False,
        follow: bool = False,
        whole_logs: bool = False,
        version: str = "",
    ) -> None:
        """``pods``: selectors, as the API server takes them. ``events``: watch them too. ``follow``: read every log.
        ``whole_logs``: keep all lines of logs, and lose no instance of a container that is started again; else the end
        of each log is enough. ``version``: a resourceVersion from before anything was in the namespace, which saves the
        first list."""
        self.kube = kube
        self.namespace = namespace
        self.changed = threading.Condition()
        self.revision = 0
        """Counts up with all that changes."""

        self.pods: dict[str, PodView] = {}
        """By uid; deleted ones stay, and are marked."""

        self.events: dict[str, KubeObject] = {}
        self.error = ""
        """Why the API server could not be asked, while it cannot."""

        self.listed = bool(version)
        """Whether what there was at the beginning is known."""

        self.owners: dict[tuple[str, str], KubeObject] = {}
        """By plural and name: see :meth:`watch_owner`."""

        self._follow = follow
        self._whole_logs = whole_logs
        self._began = time.time()
        self._hangup = Hangup()
        self._threads: list[threading.Thread] = []
        self._owners_watched: set[tuple[str, str]] = set()
        self._watch("pods", self._pod, query=pods, version=version, listed=self._pods_listed)
        if events:
            self._watch("events", self._event, version=version)

    def __enter__(self) -> Self:
        """So that :meth:`close` is not forgotten."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, timeout_seconds: float = 5.0) -> None:
        """End the watches and the followed logs; what was seen stays."""
        self._hangup.end()
        self._notify()
        with self.changed:
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
        """A pod that the caller has just created: known at once, before the watch reports it."""
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

    def watch_owner(self, plural: str, group: str, name: str) -> None:
        """Keep the object that owns pods in :attr:`owners`, as long as it is there."""
        key = (plural, name)
        with self.changed:
            if key in self._owners_watched:
                return
            self._owners_watched.add(key)

        def learn(kind: str, obj: KubeObject) -> None:
            if kind == "DELETED":
                self.owners.pop(key, None)
            else:
                self.owners[key] = obj

        def listed(items: list[KubeObject]) -> None:
            if not items:
                self.owners.pop(key, None)

        self._watch(plural, learn, group=group, query={"fieldSelector": f"metadata.name={name}"}, listed=listed)

    # --- the watches -----------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        with self.changed:
            self.revision += 1
            self.changed.notify_all()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name=f"observe {self.namespace}")
        self._threads.append(thread)
        thread.start()

    def _watch(
        self,
        plural: str,
        learn: Callable[[str, KubeObject], None],
        *,
        group: str = "",
        query: Mapping[str, str] | None = None,
        version: str = "",
        listed: Callable[[list[KubeObject]], None] = lambda _: None,
    ) -> None:
        def all_listed(items: list[KubeObject]) -> None:
            with self._learning():
                for item in items:
                    learn("ADDED", item)
                listed(items)

        def changed(kind: str, obj: KubeObject) -> None:
            with self._learning():
                learn(kind, obj)

        reflector = Reflector(
            kube=self.kube,
            path=api_path(plural, group=group, namespace=self.namespace),
            hangup=self._hangup,
            listed=all_listed,
            changed=changed,
            failed=lambda error: self._set_error(error.message),
            recovered=lambda: self._set_error(""),
            query=dict(query or {}),
            version=version,
        )
        self._start(reflector.run)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        with self.changed:
            yield
            self.error = ""
        self._notify()

    def _pods_listed(self, items: list[KubeObject]) -> None:
        there = {item["metadata"]["uid"] for item in items}
        for view in self.pods.values():
            if view.uid not in there and not view.deleted:
                self._gone(view)
        self.listed = True

    def _set_error(self, message: str) -> None:
        self.error = message
        self._notify()

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
        elif view.followed or self._follow or (self._whole_logs and _is_restarted(view)):
            # The log of an instance is gone once the one after it has ended.
            view.followed = True
            self._follow_instances(view)

    def _gone(self, view: PodView) -> None:
        view.deleted = True
        view.marks.setdefault("deleted", time.time())

    def _mark_progress(self, view: PodView) -> None:
        now = time.time()
        status, spec = view.object.get("status") or {}, view.object.get("spec") or {}
        created = seconds_of(view.object["metadata"].get("creationTimestamp")) or now
        # A time stamp of the API server is cut to the second: an older one is all there is, a recent one the test's.
        old = created < self._began - 1.0
        view.from_birth = view.from_birth or not old
        view.marks.setdefault("created", created if old else now)
        conditions = {str(c.get("type")): c for c in status.get("conditions") or [] if c.get("status") == "True"}
        states = [entry.get(key) or {} for entry in view.containers() for key in ("lastState", "state")]
        starts = [(state.get(kind) or {}).get("startedAt") for state in states for kind in ("running", "terminated")]
        ends = [(state.get("terminated") or {}).get("finishedAt") for state in states]
        happened = {
            "scheduled": (bool(spec.get("nodeName")), [_since(conditions, "PodScheduled")]),
            "started": (any(starts), starts),
            "ready": ("Ready" in conditions, [_since(conditions, "Ready")]),
            "finished": (view.phase in TERMINAL_PHASES, ends),
        }
        for what, (has, stamps) in happened.items():
            if has and what not in view.marks:
                times = [seconds for stamp in stamps if (seconds := seconds_of(stamp))]
                told = (max(times) if what == "finished" else min(times)) if times else now
                view.marks[what] = told if old and told < self._began - 1.0 else now

    # --- logs ------------------------------------------------------------------------------------------------------

    def _follow_instances(self, view: PodView) -> None:
        for status in view.containers():
            for instance, _ in instances_of(status):
                if instance not in view.logs and not self.closed:
                    kept = LogSpool() if self._whole_logs else LogTail()
                    log = InstanceLog(container=str(status["name"]), instance=instance, kept=kept)
                    view.logs[instance] = log
                    follower = LogFollower(
                        self.kube,
                        self._hangup,
                        self.changed,
                        self._notify,
                        log=log,
                        pod=lambda: None if view.deleted else view.object,
                    )
                    self._start(follower.run)


def _is_restarted(view: PodView) -> bool:
    return view.from_birth and any(int(entry.get("restartCount") or 0) for entry in view.containers())


def _since(conditions: dict[str, KubeObject], kind: str) -> Any:
    return (conditions.get(kind) or {}).get("lastTransitionTime")


def seconds_of(stamp: Any) -> float:
    """An RFC 3339 time stamp in seconds since the epoch; 0.0 when it is none."""
    return (parse_rfc3339(stamp) if isinstance(stamp, str) else None) or 0.0


def event_time(event: KubeObject) -> float:
    """When an event last happened."""
    series = event.get("series") or {}
    for stamp in (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")):
        if at := seconds_of(stamp):
            return at
    return seconds_of(event["metadata"].get("creationTimestamp"))
