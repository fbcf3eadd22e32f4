"""A pod's containers by its status, and as text for people. Pure, but for the events that are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from wasilet.errors import ApiError
from wasilet.kube.client import Kube, KubeObject, api_path

FINAL_WAITING = frozenset({"InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff"})
"""Waiting reasons that nothing but a change of the manifest, or of the registry, will end."""

SHOWN_EVENTS = 15
EVENTS_SECONDS = 5.0


def phase_of(pod: KubeObject) -> str:
    """``status.phase``."""
    return str((pod.get("status") or {}).get("phase") or "")


def container_statuses(pod: KubeObject) -> list[KubeObject]:
    """Of all containers, those that ran first being first."""
    status = pod.get("status") or {}
    found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return [entry for entry in found if isinstance(entry, dict)]


def main_status(pod: KubeObject, container: str = "") -> KubeObject | None:
    """Of the container of that name, else of the first regular one."""
    if container:
        return next((entry for entry in container_statuses(pod) if entry.get("name") == container), None)
    regular = (pod.get("status") or {}).get("containerStatuses") or []
    return next((entry for entry in regular if isinstance(entry, dict)), None)


def ends_of(entry: KubeObject) -> list[KubeObject]:
    """How the present and the last instance of a container ended, those that have."""
    return [end for key in ("state", "lastState") if (end := (entry.get(key) or {}).get("terminated"))]


def instances_of(entry: KubeObject) -> Iterator[tuple[str, bool]]:
    """Identity of each instance of a container whose log there is, and whether it is the previous one."""
    last = (entry.get("lastState") or {}).get("terminated")
    if last is not None and last.get("containerID"):
        yield str(last["containerID"]), True
    state = entry.get("state") or {}
    now = state.get("running") if state.get("running") is not None else state.get("terminated")
    if now is not None:
        # The running state carries no container id of its own: the status does.
        instance = str(now.get("containerID") or entry.get("containerID") or "")
        if instance:
            yield instance, False


def is_running(entry: KubeObject, instance: str) -> bool:
    """Whether that instance runs."""
    state = entry.get("state") or {}
    return state.get("running") is not None and str(entry.get("containerID") or "") == instance


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
    for container in container_statuses(pod):
        for key in ("state", "lastState"):
            for what, detail in (container.get(key) or {}).items():
                words = [str(detail[item]) for item in ("reason", "message") if detail.get(item)]
                code = f" (exit code {detail['exitCode']})" if "exitCode" in detail else ""
                said = f": {', '.join(words)}" if words else ""
                lines.append(f"    {container.get('name')} {key} {what}{code}{said}")
    return lines


def event_order(event: KubeObject) -> int:
    """To sort events by: the order in which they were written. Their times are of whole seconds in most cases, of
    microseconds in others, and so put the scheduler's after the kubelet's."""
    version = str((event.get("metadata") or {}).get("resourceVersion") or "")
    return int(version) if version.isdecimal() else 0


def events_of(kube: Kube, namespace: str, uid: str) -> list[str]:
    """``Type Reason: message`` of a pod's events, oldest first; never raises."""
    try:
        answer = kube.get(
            api_path("events", namespace=namespace),
            timeout_seconds=EVENTS_SECONDS,
            fieldSelector=f"involvedObject.uid={uid}",
        )
    except ApiError as error:
        return [f"cannot be read: {error}"]
    events = sorted(answer.get("items") or [], key=event_order)
    return [
        f"{event.get('type')} {event.get('reason')}: {event.get('message')}"
        + (f" (x{event['count']})" if (event.get("count") or 1) > 1 else "")
        for event in events[-SHOWN_EVENTS:]
    ]
