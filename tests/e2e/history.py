"""All that the API server ever said of the pods of a namespace, judged as it comes: what may never happen.

Faults are injected into a cluster while pods come and go; whatever is lost in between, no client of the API may see a
status go backwards. What is judged, for each uid:

- the phase only goes Pending, Running, Succeeded or Failed, and the last two are final;
- ``restartCount`` never falls, and a count names one container: another id under the same count ran twice;
- an id that has ended never runs again, and its exit code does not change;
- an end is not before its start, and no start changes afterwards;
- a pod that is not Running is not Ready.

Restarts that the spec rules out (``restartPolicy: Never``) are violations too. How often a guest really ran only the
guest can tell: see ``tests.e2e.churn``.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials

RETRY_SECONDS = 0.2
_ORDER = {"": 0, "Pending": 0, "Running": 1, "Succeeded": 2, "Failed": 2}


@dataclass
class Life:
    """What is known of one pod."""

    name: str
    seen: list[tuple[float, str]] = field(default_factory=list)
    """When (monotonic seconds) each phase was first seen."""

    phase: str = ""
    ready: bool = False
    deleted_at: float | None = None
    restarts: dict[str, int] = field(default_factory=dict)
    instances: dict[tuple[str, int], str] = field(default_factory=dict)
    """By container and restart count: the id."""

    started: dict[str, str] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    """By id: when it started, and its exit code once it has ended."""

    def at(self, phase: str) -> float | None:
        """When that phase was first seen."""
        return next((moment for moment, what in self.seen if what == phase), None)


class History:
    """Watches one namespace until it is closed; ``violations`` grows, it is hoped, never."""

    def __init__(self, credentials: Credentials, namespace: str) -> None:
        self._kube = Kube(credentials)
        self._path = api_path("pods", namespace=namespace)
        self._hangup = Hangup()
        self.changed = threading.Condition()
        self.lives: dict[str, Life] = {}
        """By uid; those of deleted pods stay."""

        self.violations: list[str] = []
        self.phases: dict[str, int] = defaultdict(int)
        """How many pods that are still there have each phase."""

        self._thread = threading.Thread(target=self._watch, name=f"history {namespace}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch; what was seen stays."""
        self._hangup.end()
        with self.changed:
            self.changed.notify_all()
        self._thread.join(5)
        self._kube.close()

    def wait(self, over: Callable[[History], bool], *, within: float, what: str) -> float:
        """Until ``over(self)``, asked after each change; the seconds it took. Raises AssertionError."""
        began = time.monotonic()
        with self.changed:
            while not over(self):
                left = within - (time.monotonic() - began)
                assert left > 0, f"{what}: not within {within:g} s; phases are {dict(self.phases)}"
                self.changed.wait(min(left, 1.0))
        return time.monotonic() - began

    def present(self) -> int:
        """Pods that are still there."""
        return sum(life.deleted_at is None for life in self.lives.values())

    def count(self, *phases: str) -> int:
        """Pods, deleted ones too, that have ever had one of these phases."""
        return sum(any(life.at(phase) is not None for phase in phases) for life in self.lives.values())

    def ready(self) -> int:
        """Pods that are there and Ready."""
        return sum(life.ready and life.deleted_at is None for life in self.lives.values())

    # --- learning --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        version = ""
        while not self._hangup.done:
            try:
                if not version:
                    version = self._list()
                query = {"resourceVersion": version}
                with self._kube.watch(
                    self._path, self._hangup, timeout_seconds=60, idle_seconds=70.0, **query
                ) as events:
                    for event in events:
                        if event["type"] == "ERROR":
                            version = ""
                            break
                        version = str(event["object"]["metadata"]["resourceVersion"])
                        if event["type"] != "BOOKMARK":
                            self._learn(event["object"], gone=event["type"] == "DELETED")
            except ApiError:
                version = ""
                time.sleep(RETRY_SECONDS)

    def _list(self) -> str:
        listed = self._kube.get(self._path)
        there = {item["metadata"]["uid"] for item in listed.get("items") or []}
        for item in listed.get("items") or []:
            self._learn(item, gone=False)
        with self.changed:
            for uid, life in self.lives.items():
                if uid not in there and life.deleted_at is None:
                    self._gone(life)
            self.changed.notify_all()
        return str(listed["metadata"]["resourceVersion"])

    def _gone(self, life: Life) -> None:
        life.deleted_at = time.monotonic()
        self.phases[life.phase] -= 1

    def _learn(self, pod: KubeObject, *, gone: bool) -> None:
        uid, status = str(pod["metadata"]["uid"]), pod.get("status") or {}
        with self.changed:
            life = self.lives.get(uid)
            if life is None:
                life = self.lives[uid] = Life(str(pod["metadata"]["name"]))
                self.phases[""] += 1
            if life.deleted_at is None:
                self._judge(life, pod, status)
                if gone:
                    self._gone(life)
            self.changed.notify_all()

    def _judge(self, life: Life, pod: KubeObject, status: Mapping[str, Any]) -> None:
        phase = str(status.get("phase") or "")
        if _ORDER[phase] < _ORDER[life.phase] or (_ORDER[life.phase] == 2 and phase != life.phase):
            self._wrong(life, f"phase {life.phase} became {phase}")
        if phase != life.phase:
            self.phases[life.phase] -= 1
            self.phases[phase] += 1
            life.phase = phase
            life.seen.append((time.monotonic(), phase))
        conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
        life.ready = conditions.get("Ready") == "True"
        if life.ready and phase != "Running":
            self._wrong(life, f"it is Ready while {phase}")
        never = pod["spec"].get("restartPolicy") == "Never"
        for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
            self._judge_container(life, container, never=never)

    def _judge_container(self, life: Life, container: Mapping[str, Any], *, never: bool) -> None:
        name, count = str(container["name"]), int(container["restartCount"])
        if count < life.restarts.get(name, 0):
            self._wrong(life, f"restartCount of {name} fell from {life.restarts[name]} to {count}")
        if count and never:
            self._wrong(life, f"{name} was restarted, against restartPolicy Never")
        life.restarts[name] = count
        if container_id := str(container.get("containerID") or ""):
            other = life.instances.setdefault((name, count), container_id)
            if other != container_id:
                self._wrong(life, f"{name} with restartCount {count} was {other} and is {container_id}")
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            self._judge_state(life, name, container_id, state)

    def _judge_state(self, life: Life, name: str, container_id: str, state: Mapping[str, Any]) -> None:
        if running := state.get("running"):
            if container_id in life.ended:
                self._wrong(life, f"{name} {container_id} had ended and runs again")
            self._note_start(life, name, container_id, running.get("startedAt"))
        if ended := state.get("terminated"):
            ended_id = str(ended.get("containerID") or "")
            if not ended_id:
                return
            code = int(ended["exitCode"])
            if life.ended.setdefault(ended_id, code) != code:
                self._wrong(life, f"{name} {ended_id} exited with {life.ended[ended_id]}, then with {code}")
            self._note_start(life, name, ended_id, ended.get("startedAt"))
            if ended.get("startedAt") and str(ended.get("finishedAt") or "") < str(ended["startedAt"]):
                self._wrong(life, f"{name} ended {ended.get('finishedAt')}, before it started {ended['startedAt']}")

    def _note_start(self, life: Life, name: str, container_id: str, started: Any) -> None:
        if started and life.started.setdefault(container_id, str(started)) != str(started):
            self._wrong(life, f"{name} {container_id} started {life.started[container_id]}, then {started}")

    def _wrong(self, life: Life, what: str) -> None:
        line = f"{life.name}: {what}"
        if line not in self.violations:
            self.violations.append(line)
