"""The pod conditions that a kubelet owns, with kubelet's reasons and messages (``pkg/kubelet/status/generate.go``).

``PodScheduled`` is written by the scheduler; a kubelet repeats it as True, which also serves pods that were bound by
``spec.nodeName``. All other types belong to someone else and are never touched, but for DisruptionTarget, which an
eviction adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod

Condition = dict[str, Any]
TRANSIENT = frozenset({"PodResizePending", "PodResizeInProgress"})
"""Those of a kubelet's that are there only while they are true."""

RESTARTING_ALL = "AllContainersRestarting"
"""Only of pods with a rule that restarts all containers (KEP-5532)."""

OWNED = TRANSIENT | {
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    RESTARTING_ALL,
}


def _condition(type_: str, *, status: bool, reason: str = "", message: str = "") -> Condition:
    condition: Condition = {"type": type_, "status": "True" if status else "False"}
    if reason:
        condition["reason"] = reason
    if message:
        condition["message"] = message
    return condition


def _go_list(names: Sequence[str]) -> str:
    return f"[{' '.join(names)}]"


def containers_ready(pod: Pod, statuses: Mapping[str, Mapping[str, Any]], phase: str) -> Condition:
    """ContainersReady: every regular container and sidecar is ready."""
    names = [c["name"] for c in pod_fields.init_containers(pod) if pod_fields.is_sidecar(c)]
    names += [c["name"] for c in pod_fields.regular_containers(pod)]
    unknown = [name for name in names if name not in statuses]
    unready = [name for name in names if name in statuses and not statuses[name].get("ready")]
    if phase == "Succeeded" and not unknown:
        return _condition("ContainersReady", status=False, reason="PodCompleted")
    if phase == "Failed":
        return _condition("ContainersReady", status=False, reason="PodFailed")
    messages = []
    if unknown:
        messages.append(f"containers with unknown status: {_go_list(unknown)}")
    if unready:
        messages.append(f"containers with unready status: {_go_list(unready)}")
    if messages:
        return _condition("ContainersReady", status=False, reason="ContainersNotReady", message=", ".join(messages))
    return _condition("ContainersReady", status=True)


def ready(pod: Pod, containers: Condition, conditions: Sequence[Mapping[str, Any]]) -> Condition:
    """Ready: ContainersReady and all readiness gates, whose conditions stand among ``conditions``."""
    if containers["status"] != "True":
        return {**containers, "type": "Ready"}
    by_type = {condition["type"]: condition for condition in conditions}
    messages = []
    for gate in pod["spec"].get("readinessGates") or ():
        type_ = gate["conditionType"]
        if type_ not in by_type:
            messages.append(f'corresponding condition of pod readiness gate "{type_}" does not exist.')
        elif by_type[type_].get("status") != "True":
            messages.append(
                f'the status of pod readiness gate "{type_}" is not "True", but {by_type[type_].get("status")}'
            )
    if messages:
        return _condition("Ready", status=False, reason="ReadinessGatesNotReady", message=", ".join(messages))
    return _condition("Ready", status=True)


def initialized(pod: Pod, statuses: Mapping[str, Mapping[str, Any]], phase: str, *, before: bool = False) -> Condition:
    """Initialized: all init containers have succeeded and all sidecars have started. ``before``: it was so once, and
    stays so when the pod begins again."""
    unknown: list[str] = []
    incomplete: list[str] = []
    for container in pod_fields.init_containers(pod):
        status = statuses.get(container["name"])
        if status is None:
            unknown.append(container["name"])
        elif not status.get("started" if pod_fields.is_sidecar(container) else "ready"):
            incomplete.append(container["name"])
    if phase == "Succeeded" and not unknown:
        return _condition("Initialized", status=True, reason="PodCompleted")
    for container in pod_fields.regular_containers(pod):
        state = (statuses.get(container["name"]) or {}).get("state") or {}
        if "running" in state or "terminated" in state:
            return _condition("Initialized", status=True)
    messages = []
    if unknown:
        messages.append(f"containers with unknown status: {_go_list(unknown)}")
    if incomplete:
        messages.append(f"containers with incomplete status: {_go_list(incomplete)}")
    if messages and not before:
        return _condition("Initialized", status=False, reason="ContainersNotInitialized", message=", ".join(messages))
    return _condition("Initialized", status=True)


def owned_conditions(
    pod: Pod,
    statuses: Mapping[str, Mapping[str, Any]],
    phase: str,
    *,
    sandbox_ready: bool,
    foreign: Sequence[Mapping[str, Any]],
    old: Sequence[Mapping[str, Any]] = (),
) -> list[Condition]:
    """The five conditions of a kubelet, without transition times. ``foreign``: everyone else's, for the gates;
    ``old``: all that the pod had."""
    was_initialized = any(each["type"] == "Initialized" and each.get("status") == "True" for each in old)
    containers = containers_ready(pod, statuses, phase)
    conditions = [
        _ready_to_start(phase, sandbox_ready=sandbox_ready),
        initialized(pod, statuses, phase, before=was_initialized),
        ready(pod, containers, foreign),
        containers,
        _condition("PodScheduled", status=True),
    ]
    generation = pod["metadata"].get("generation")
    if generation:
        for condition in conditions:
            condition["observedGeneration"] = generation
    return conditions


def _ready_to_start(phase: str, *, sandbox_ready: bool) -> Condition:
    """PodReadyToStartContainers; why not, in the words of kubelets from 1.37 on."""
    if sandbox_ready:
        return _condition("PodReadyToStartContainers", status=True)
    why = "pod sandbox is not ready" if phase in pod_fields.TERMINAL_PHASES else "no pod sandbox exists"
    return _condition("PodReadyToStartContainers", status=False, reason="PodSandboxNotReady", message=why)


def all_containers_restarting(pod: Pod, phase: str, *, restarting: bool) -> list[Condition]:
    """AllContainersRestarting, for pods that may: from the end that restarts them all until the others are stopped."""
    if not pod_fields.may_restart_all(pod):
        return []
    if phase in pod_fields.TERMINAL_PHASES:
        condition = _condition(
            RESTARTING_ALL, status=False, reason="PodCompleted" if phase == "Succeeded" else "PodFailed"
        )
    elif restarting:
        condition = _condition(
            RESTARTING_ALL,
            status=True,
            reason="RestartAllContainersStarted",
            message="container exited with restart policy rule",
        )
    else:
        condition = _condition(RESTARTING_ALL, status=False)
    if pod["metadata"].get("generation"):
        condition["observedGeneration"] = pod["metadata"]["generation"]
    return [condition]


def with_transition_times(
    conditions: Sequence[Condition], old: Sequence[Mapping[str, Any]], now: str
) -> list[Condition]:
    """``lastTransitionTime`` moves only when the status did."""
    by_type = {condition["type"]: condition for condition in old}
    timed = []
    for condition in conditions:
        before = by_type.get(condition["type"])
        same = before is not None and before.get("status") == condition["status"]
        since = (before or {}).get("lastTransitionTime") if same else None
        timed.append({**condition, "lastTransitionTime": since or now})
    return timed
