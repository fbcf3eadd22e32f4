"""What is known of containers whose runtime record is lost: only what the API server's status holds.

After a restart the agent learns of its containers from the runtime. Where a record is missing (the data folder was
emptied) the status in the API server is the memory that is left: a container that ended stays ended, one that ran has
ended in an unknown way (137, ``ContainerStatusUnknown``), and neither runs a second time unless its restart policy says
so. Nothing of such a pod's sandbox is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod
from wasilet_common.time_format import NANOSECONDS, parse_rfc3339

from wasilet_node.pods.status import ID_PREFIX
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus

LOST_MESSAGE = "The container could not be located when the pod was deleted.  The container used to be Running"
_UNKNOWN: Mapping[str, Any] = MappingProxyType(
    {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": LOST_MESSAGE}
)


def instances_of(pod: Pod, known: Iterable[ContainerStatus]) -> dict[str, list[ContainerStatus]]:
    """The instances of each container, newest first: those of the runtime, and those that only the status knows."""
    found: dict[str, list[ContainerStatus]] = {}
    for instance in known:
        found.setdefault(instance.container_name, []).append(_as_told(pod, instance))
    for status in _statuses(pod):
        lost = _from_status(pod, status, {instance.id for instance in found.get(status["name"], ())})
        newest = max((instance.attempt for instance in found.get(status["name"], ())), default=-1)
        if lost is not None and lost.attempt > newest:
            found.setdefault(status["name"], []).append(lost)
    for instances in found.values():
        instances.sort(key=lambda instance: (instance.attempt, instance.created_at_ns), reverse=True)
    return found


def unknown_end(instance: ContainerStatus) -> ContainerStatus:
    """The runtime has lost an instance that was running."""
    return _exited(instance, _UNKNOWN, started_at_ns=instance.started_at_ns)


def known_message(pod: Pod, container_id: str) -> str | None:
    """The message that the status already has for an ended instance; None: it knows nothing of it."""
    terminated = _told_end(pod, container_id)
    return None if terminated is None else str(terminated.get("message", ""))


def with_start_of(instance: ContainerStatus, started_at_ns: int) -> ContainerStatus:
    """With the start that was known before, if there was one: a supervisor that takes the records of a dead one over
    knows only when the container was created."""
    if not started_at_ns or instance.reason != _UNKNOWN["reason"] or instance.started_at_ns == started_at_ns:
        return instance
    return replace(instance, started_at_ns=started_at_ns)


def _as_told(pod: Pod, instance: ContainerStatus) -> ContainerStatus:
    """An end that the runtime has forgotten (its record was not on disk when the power went), as reported before."""
    if instance.reason != _UNKNOWN["reason"]:
        return instance
    if (terminated := _told_end(pod, instance.id)) is not None:
        return _exited(instance, terminated, started_at_ns=instance.started_at_ns)
    for status in _statuses(pod):
        running = (status.get("state") or {}).get("running")
        if running and status.get("containerID") == ID_PREFIX + instance.id:
            return with_start_of(instance, _nanoseconds(running.get("startedAt")))
    return instance


def _told_end(pod: Pod, container_id: str) -> Mapping[str, Any] | None:
    for status in _statuses(pod):
        for state in (status.get("state") or {}, status.get("lastState") or {}):
            terminated: Mapping[str, Any] | None = state.get("terminated")
            if terminated and terminated.get("containerID") == ID_PREFIX + container_id:
                return terminated
    return None


def _statuses(pod: Pod) -> Sequence[dict[str, Any]]:
    status = pod.get("status") or {}
    return [
        entry
        for field in ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")
        for entry in status.get(field) or ()
    ]


def _from_status(pod: Pod, status: Mapping[str, Any], known: set[str]) -> ContainerStatus | None:
    state = status.get("state") or {}
    terminated = state.get("terminated") or (state.get("waiting") and (status.get("lastState") or {}).get("terminated"))
    running = state.get("running")
    full_id = str((terminated or {}).get("containerID") or status.get("containerID") or "")
    container_id = full_id.removeprefix(ID_PREFIX)
    if container_id in known or (not terminated and not running):
        return None
    like = ContainerStatus(
        id=container_id,
        pod_uid=pod_fields.uid(pod),
        pod_namespace=pod_fields.namespace(pod),
        pod_name=pod_fields.name(pod),
        container_name=status["name"],
        attempt=int(status.get("restartCount") or 0),
        image=str(status.get("image", "")),
        image_id=str(status.get("imageID", "")),
        log_path="",
        state=ContainerState.EXITED,
        inherited=True,
    )
    return _exited(like, terminated or _UNKNOWN, started_at_ns=_nanoseconds((running or {}).get("startedAt")))


def _exited(like: ContainerStatus, terminated: Mapping[str, Any], *, started_at_ns: int) -> ContainerStatus:
    return replace(
        like,
        state=ContainerState.EXITED,
        pid=None,
        started_at_ns=_nanoseconds(terminated.get("startedAt")) or started_at_ns,
        finished_at_ns=_nanoseconds(terminated.get("finishedAt")),
        exit_code=int(terminated.get("exitCode") or 0),
        signal=terminated.get("signal"),
        reason=str(terminated.get("reason") or ""),
        message=str(terminated.get("message") or ""),
    )


def _nanoseconds(text: str | None) -> int:
    seconds = parse_rfc3339(text)
    return int(seconds * NANOSECONDS) if seconds else 0
