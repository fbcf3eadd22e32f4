"""Resizing a pod in place (KEP-1287, and KEP-5419 for what belongs to the pod as a whole).

A change of resources is *wanted* by the spec, then *accepted* by the node or left pending, then *made* for the
instances that run. What is accepted counts against the node and is what containers start with; what is made is written
on the instance itself, by the supervisor, so that an agent that starts again knows it.

As kubelet of 1.36 and later: what does not fit is Deferred, also where it never will; what this node cannot do is
Infeasible. Unlike kubelet, which asks again every three minutes in an order of priorities, a deferred resize is asked
for again every ten seconds, and the first to ask is served.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod
from wasilet_common.quantity import QuantityError

from wasilet_node.pods import resources
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.runtime.protocol import (
    ContainerStatus,
    ResizeError,
    Resources,
    RuntimeUnavailableError,
    UnknownContainerError,
)

PENDING, IN_PROGRESS = "PodResizePending", "PodResizeInProgress"
RETRY_SECONDS = 10.0
"""Until a resize that was deferred, or that failed, is tried again."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one container is held to, in bytes and thousandths of a core. None: nothing."""

    memory_limit: int | None
    memory_request: int | None
    cpu_limit: int | None
    cpu_request: int | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A running instance that is not held to what was accepted. ``restart``: its policy asks for a restart."""

    container: Container
    instance: ContainerStatus
    restart: bool


def held(pod: Pod, container: Container) -> Held:
    """What the spec asks for. Raises QuantityError."""
    return Held(
        memory_limit=resources.enforced_limit(pod, container, "memory"),
        memory_request=resources.request(container, "memory"),
        cpu_limit=resources.enforced_limit(pod, container, "cpu"),
        cpu_request=resources.request(container, "cpu"),
    )


def _made(instance: ContainerStatus) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The resources of the container and of its pod that an instance is held to; None: it does not say."""
    own = instance.annotations.get(resources.ANNOTATION_RESOURCES)
    if own is None:
        return None
    return json.loads(own), json.loads(instance.annotations.get(resources.ANNOTATION_POD_RESOURCES) or "{}")


class Resizes:
    """Belongs to one pod's worker."""

    def __init__(self, dependencies: PodDependencies, pod: Pod, running: Iterable[ContainerStatus]) -> None:
        """``running``: what an agent before this one has left."""
        self._dependencies = dependencies
        self._accepted = _wanted(pod)
        self._pod_level: Mapping[str, Any] = pod["spec"].get("resources") or {}
        self._restore(pod, running)
        self._pending: tuple[str, str] | None = None
        self._progress: tuple[str, str] | None = None
        self._generation = 0
        self._failed_at = float("-inf")
        self._of: tuple[Pod, Pod] | None = None

    def _restore(self, pod: Pod, running: Iterable[ContainerStatus]) -> None:
        status = pod.get("status") or {}
        if any(condition["type"] == PENDING for condition in status.get("conditions") or ()):
            for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
                if each["name"] in self._accepted and "resources" in each:
                    self._accepted[each["name"]] = each["resources"]
        for instance in running:
            if instance.container_name in self._accepted and (made := _made(instance)) is not None:
                self._accepted[instance.container_name] = made[0]
                if resources.ANNOTATION_POD_RESOURCES in instance.annotations:
                    self._pod_level = made[1]

    def accepted(self, pod: Pod) -> Pod:
        """The pod with the resources that the node has accepted: what it is run and counted by."""
        if self._of is None or self._of[0] is not pod:
            self._of = (pod, self._apply(pod) if self._differs(pod) else pod)
        return self._of[1]

    def _differs(self, pod: Pod) -> bool:
        return _wanted(pod) != self._accepted or (pod["spec"].get("resources") or {}) != self._pod_level

    def _apply(self, pod: Pod) -> Pod:
        changed = {**pod["spec"]}
        for field in ("initContainers", "containers"):
            if field in changed:
                changed[field] = [{**each, "resources": self._accepted[each["name"]]} for each in changed[field]]
        if self._pod_level or "resources" in changed:
            changed["resources"] = self._pod_level
        return {**pod, "spec": changed}

    # ---- deciding

    def consider(self, pod: Pod, running: Mapping[str, ContainerStatus]) -> bool:
        """Accept what the spec wants, or say why not. True: it was accepted just now."""
        if not self._differs(pod):
            self._pending = None
            return False
        try:
            if all(self._is_same(pod, container) for _, container in pod_fields.every_container(pod)):
                self._accept(pod)  # written in another way, or nothing that is held to
                return True
            problem = self._infeasible(pod, running)
            reason, message = ("Infeasible", problem) if problem else ("Deferred", self._dependencies.room(pod))
        except QuantityError as error:
            reason, message = "Infeasible", str(error)
        except RuntimeUnavailableError:
            return False
        if message:
            self._leave(pod, reason, message)
            return False
        self._accept(pod)
        self._progress = ("", "")
        self._failed_at = float("-inf")
        self._event(pod, "Normal", "ResizeStarted", "Pod resize started")
        return True

    def _is_same(self, pod: Pod, container: Container) -> bool:
        before = self.accepted(pod)
        found = pod_fields.find_container(before, container["name"])
        return found is None or held(before, found[1]) == held(pod, container)

    def _accept(self, pod: Pod) -> None:
        self._accepted = _wanted(pod)
        self._pod_level = pod["spec"].get("resources") or {}
        self._of = None
        self._pending = None
        self._generation = pod["metadata"].get("generation") or 0

    def _leave(self, pod: Pod, reason: str, message: str) -> None:
        if self._pending != (reason, message):
            self._event(pod, "Warning", f"Resize{reason}", f"Pod resize {reason}", error=message)
        self._pending = (reason, message)

    def _infeasible(self, pod: Pod, running: Mapping[str, ContainerStatus]) -> str:
        """Why this node cannot do it to what runs; empty: it can. Raises RuntimeUnavailableError."""
        capabilities = self._dependencies.runtime.capabilities
        for change in self._changes(pod, running):
            made, wanted = self._held_now(change.instance, change.container), held(pod, change.container)
            if change.restart or made is None:
                continue
            name = change.container["name"]
            if made.memory_limit != wanted.memory_limit:
                if not capabilities.memory_cgroup:
                    return f"container {name}: this node has no control groups to move memory limits by"
                if made.memory_limit is None or wanted.memory_limit is None:
                    return f"container {name}: a memory limit comes and goes only when the container starts"
            if made.cpu_limit != wanted.cpu_limit and (not capabilities.cpu_limits or wanted.cpu_limit is None):
                return f"container {name}: this node has no control groups to move cpu limits by"
        return ""

    # ---- doing

    def changes(self, pod: Pod, running: Mapping[str, ContainerStatus], now: float) -> list[Change]:
        """What there is to do, decreases first, so that what one gives up another may take. Also finds that all is
        done."""
        found = self._changes(self.accepted(pod), running)
        if not found:
            if self._progress is not None:
                self._progress = None
                self._event(pod, "Normal", "ResizeCompleted", "Pod resize completed")
            return []
        self._progress = self._progress or ("", "")
        return found if now >= self._failed_at + RETRY_SECONDS else []

    def retry_in(self, now: float) -> float | None:
        """Seconds until something that could not be done is to be looked at again."""
        if self._progress is not None and self._progress[0]:
            return max(0.0, self._failed_at + RETRY_SECONDS - now)
        return RETRY_SECONDS if self._pending is not None and self._pending[0] == "Deferred" else None

    def _changes(self, pod: Pod, running: Mapping[str, ContainerStatus]) -> list[Change]:
        found: list[tuple[bool, Change]] = []
        for _, container in pod_fields.every_container(pod):
            instance = running.get(container["name"])
            made = self._held_now(instance, container) if instance is not None else None
            wanted = held(pod, container)
            if instance is None or made is None or made == wanted:
                continue
            change = Change(container=container, instance=instance, restart=_restarts(container, made, wanted))
            found.append(((wanted.memory_limit or 0) > (made.memory_limit or 0), change))
        return [change for _, change in sorted(found, key=lambda pair: pair[0])]

    @staticmethod
    def _held_now(instance: ContainerStatus, container: Container) -> Held | None:
        made = _made(instance)
        if made is None:
            return None
        return held({"spec": {"resources": made[1]}}, {**container, "resources": made[0]})

    async def make(self, pod: Pod, change: Change, now: float) -> ContainerStatus | None:
        """Move the limits of one instance. None: they could not be moved, which conditions and an event report."""
        accepted = self.accepted(pod)
        wanted = held(accepted, change.container)
        try:
            return await self._dependencies.runtime.resize(
                change.instance.id,
                Resources(
                    memory_limit_bytes=wanted.memory_limit,
                    cpu_limit_millicores=wanted.cpu_limit,
                    cpu_request_millicores=wanted.cpu_request,
                ),
                annotations=resources.held_to(accepted, change.container),
            )
        except UnknownContainerError:
            return None  # it has just ended
        except (ResizeError, RuntimeUnavailableError) as error:
            self._failed_at = now
            if self._progress != ("Error", str(error)):
                self._event(accepted, "Warning", "ResizeError", "Pod resize error", error=str(error))
            self._progress = ("Error", str(error))
            return None

    # ---- telling

    def conditions(self, pod: Pod) -> list[dict[str, Any]]:
        """PodResizePending and PodResizeInProgress, as far as there is something to say."""
        found: list[dict[str, Any]] = []
        generation = pod["metadata"].get("generation") or 0
        for type_, what, observed in (
            (PENDING, self._pending, generation),
            (IN_PROGRESS, self._progress, self._generation or generation),
        ):
            if what is None:
                continue
            condition: dict[str, Any] = {"type": type_, "status": "True"}
            condition |= {name: text for name, text in zip(("reason", "message"), what, strict=True) if text}
            if observed:
                condition["observedGeneration"] = observed
            found.append(condition)
        return found

    def _event(self, pod: Pod, type_: str, reason: str, text: str, *, error: str = "") -> None:
        self._dependencies.events.event(pod, type_, reason, f"{text}: {summary(pod, error)}")


def summary(pod: Pod, error: str = "") -> str:
    """What kubelet's events of resizes say: the resources of all containers as JSON."""
    document: dict[str, Any] = {}
    for field in ("initContainers", "containers"):
        listed = [
            {"name": each["name"], "resources": _sorted(each.get("resources") or {})}
            for each in pod["spec"].get(field) or ()
        ]
        if listed:
            document[field] = listed
    document["generation"] = pod["metadata"].get("generation") or 0
    if error:
        document["error"] = error
    return json.dumps(document, separators=(",", ":"))


def _sorted(found: Mapping[str, Any]) -> dict[str, Any]:
    return {field: dict(sorted(found[field].items())) for field in ("limits", "requests") if found.get(field)}


def _wanted(pod: Pod) -> dict[str, dict[str, Any]]:
    containers = (*pod_fields.init_containers(pod), *pod_fields.regular_containers(pod))
    return {each["name"]: each.get("resources") or {} for each in containers}


def _restarts(container: Container, made: Held, wanted: Held) -> bool:
    """Whether the container's ``resizePolicy`` asks for a restart; without one it does not."""
    moved = {
        "cpu": (made.cpu_limit, made.cpu_request) != (wanted.cpu_limit, wanted.cpu_request),
        "memory": (made.memory_limit, made.memory_request) != (wanted.memory_limit, wanted.memory_request),
    }
    return any(
        moved.get(policy.get("resourceName"), False) and policy.get("restartPolicy") == "RestartContainer"
        for policy in container.get("resizePolicy") or ()
    )
