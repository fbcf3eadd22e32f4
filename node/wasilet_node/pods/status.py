"""The one place that computes a ``v1.PodStatus``: a pure function of spec, instances, probes and the status before.

It follows ``generateAPIPodStatus``, ``convertToAPIContainerStatuses`` and ``getPhase`` of kubelet 1.34. Two rules stand
above the rest: Succeeded and Failed are final, and a pod does not become either while one of its containers may still
run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod, Role
from wasilet_common.time_format import rfc3339

from wasilet_node.pods import conditions, messages
from wasilet_node.pods.nodeinfo import NodeInfo
from wasilet_node.pods.resources import ANNOTATION_RESOURCES, pod_status, qos_class
from wasilet_node.pods.results import ProbeResults
from wasilet_node.pods.sandboxes import RESTARTING_MESSAGE, RESTARTING_REASON
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus

PodStatus = dict[str, Any]
ID_PREFIX = "wasmtime://"
UNKNOWN_MESSAGE = "The container could not be located when the pod was terminated"


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why a container does not run, kept from the last attempt to start it."""

    reason: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An end that the node itself has put to a pod: rejected, evicted, past its deadline."""

    reason: str
    message: str
    disruption: str = ""
    """The reason of a DisruptionTarget condition to add; empty: none."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a status is computed from."""

    pod: Pod
    old: Mapping[str, Any]
    """The status before: the last one computed, or the API server's."""

    instances: Mapping[str, Sequence[ContainerStatus]]
    """Newest first, by container name."""

    probes: ProbeResults
    node: NodeInfo
    now: str
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    message_of: Callable[[ContainerStatus], str] = lambda instance: instance.message
    """The message of an exited instance: the runtime's, then the termination message."""

    sandbox_ready: bool = False
    """Volumes are set up; what the condition PodReadyToStartContainers says."""

    former: Collection[str] = ()
    """Containers whose newest instance ran in a sandbox before the present one: each has its turn again."""

    reset: Collection[str] = ()
    """Containers that have to begin again because one that ended restarts them all."""

    restarting_all: bool = False
    """A container has ended in such a way, and not all others have been stopped yet."""

    resize: Sequence[dict[str, Any]] = ()
    """Conditions of a resize, as ``wasilet_node.pods.resize`` has them."""

    terminal: bool = False
    """Nothing of the pod runs, and nothing will be started again."""

    terminated: bool = False
    """As ``terminal``, and the pod must now get a final phase even if its containers never ran."""

    verdict: Verdict | None = None
    pod_addresses: Sequence[str] | None = None
    """The pod's own; empty: it has none yet. None: it shares the node's."""


def compute(facts: Facts) -> PodStatus:
    """The whole status. Fields that the node does not own are carried over from ``old``."""
    pod, old = facts.pod, facts.old
    init = [_container_status(facts, container, role) for role, container in _listed(pod, Role.INIT, Role.SIDECAR)]
    regular = [_container_status(facts, container, role) for role, container in _listed(pod, Role.REGULAR)]
    ephemeral = [_container_status(facts, container, role) for role, container in _listed(pod, Role.EPHEMERAL)]
    regular.sort(key=_name_of)
    ephemeral.sort(key=_name_of)
    if facts.terminated:
        _terminate_the_missing(pod, init, regular)
    by_name = {status["name"]: status for status in (*init, *regular)}
    status: PodStatus = {k: v for k, v in old.items() if k in _FOREIGN_FIELDS}
    phase, reason, message = _phase(facts, by_name)
    status["phase"] = phase
    if reason:
        status["reason"] = reason
    if message:
        status["message"] = message
    generation = pod["metadata"].get("generation")
    if generation:
        status["observedGeneration"] = generation
    status["qosClass"] = old.get("qosClass") or qos_class(pod)
    status["startTime"] = old.get("startTime") or facts.now
    _set_addresses(status, facts)
    _set_pod_resources(status, pod)
    limit = messages.bytes_per_container(pod)
    for field_name, statuses in (
        ("initContainerStatuses", init),
        ("containerStatuses", regular),
        ("ephemeralContainerStatuses", ephemeral),
    ):
        if statuses:
            status[field_name] = [messages.cut(each, limit) for each in statuses]
    old_conditions: list[dict[str, Any]] = list(old.get("conditions") or ())
    foreign = [condition for condition in old_conditions if condition["type"] not in conditions.OWNED]
    if facts.verdict is not None and facts.verdict.disruption and phase in pod_fields.TERMINAL_PHASES:
        foreign = [condition for condition in foreign if condition["type"] != "DisruptionTarget"]
        added = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": facts.verdict.disruption,
            "message": facts.verdict.message,
        }
        foreign += conditions.with_transition_times([added], old_conditions, facts.now)
    owned = conditions.owned_conditions(
        pod,
        by_name,
        phase,
        sandbox_ready=facts.sandbox_ready and not facts.terminated,
        foreign=foreign,
        old=old_conditions,
    )
    owned += conditions.all_containers_restarting(pod, phase, restarting=facts.restarting_all)
    if phase not in pod_fields.TERMINAL_PHASES:
        owned += facts.resize
    status["conditions"] = foreign + conditions.with_transition_times(owned, old_conditions, facts.now)
    return status


def rejected(pod: Pod, verdict: Verdict, now: str) -> PodStatus:
    """The status of a pod that admission refused: Failed, and nothing about containers, as kubelet's ``rejectPod``."""
    old = pod.get("status") or {}
    status = {k: v for k, v in old.items() if k not in ("phase", "reason", "message")}
    status |= {
        "phase": "Failed",
        "reason": verdict.reason,
        "message": f"Pod was rejected: {verdict.message}",
        "startTime": old.get("startTime") or now,
        "qosClass": old.get("qosClass") or qos_class(pod),
    }
    if pod["metadata"].get("generation"):
        status["observedGeneration"] = pod["metadata"]["generation"]
    return status


def rebased(computed: Mapping[str, Any], api: Mapping[str, Any]) -> PodStatus:
    """A computed status with what belongs to others as the API server has it now."""
    status = {k: v for k, v in computed.items() if k not in _FOREIGN_FIELDS}
    status |= {k: v for k, v in api.items() if k in _FOREIGN_FIELDS}
    mine = [c for c in computed.get("conditions") or () if c["type"] in conditions.OWNED]
    others = [c for c in api.get("conditions") or () if c["type"] not in conditions.OWNED]
    if not any(c["type"] == "DisruptionTarget" for c in others):
        others += [c for c in computed.get("conditions") or () if c["type"] == "DisruptionTarget"]
    status["conditions"] = others + mine
    return status


_FOREIGN_FIELDS = frozenset({"nominatedNodeName", "resize", "resourceClaimStatuses", "extendedResourceClaimStatus"})


def _set_pod_resources(status: PodStatus, pod: Pod) -> None:
    """Of the pod as a whole (KEP-5419; API servers before 1.36 drop both)."""
    whole = pod_status(pod)
    if whole:
        status["resources"] = whole
    if whole.get("requests"):
        status["allocatedResources"] = whole["requests"]


def _name_of(status: Mapping[str, Any]) -> str:
    return str(status["name"])


def _listed(pod: Pod, *roles: Role) -> list[tuple[Role, Container]]:
    return [(role, container) for role, container in pod_fields.every_container(pod) if role in roles]


def _set_addresses(status: PodStatus, facts: Facts) -> None:
    addresses = facts.node.addresses
    old = facts.old
    if addresses:
        status["hostIP"] = addresses[0]
        status["hostIPs"] = [{"ip": address} for address in addresses]
    elif "hostIP" in old:
        status["hostIP"], status["hostIPs"] = old["hostIP"], old.get("hostIPs", [])
    own = addresses if facts.pod_addresses is None else facts.pod_addresses
    over = facts.terminal or facts.terminated
    if own and facts.sandbox_ready and not over:
        status["podIP"] = own[0]
        status["podIPs"] = [{"ip": address} for address in own]
    elif "podIP" in old:
        status["podIP"], status["podIPs"] = old["podIP"], old.get("podIPs", [])


def _container_status(facts: Facts, container: Container, role: Role) -> dict[str, Any]:
    name = container["name"]
    instances = facts.instances.get(name) or ()
    latest = instances[0] if instances else None
    status: dict[str, Any] = {
        "name": name,
        "state": {},
        "lastState": _last_state(facts, instances, role),
        "ready": False,
        "restartCount": latest.attempt if latest else 0,
        "image": (latest.image if latest else "") or container.get("image", ""),
        "imageID": latest.image_id if latest else "",
    }
    if latest is not None:
        status["containerID"] = ID_PREFIX + latest.id
    status["state"] = _state(facts, latest)
    waiting = facts.waiting.get(name)
    if waiting is None and name in facts.reset:
        waiting = Waiting(reason=RESTARTING_REASON, message=RESTARTING_MESSAGE)
    if waiting is not None and _may_run_again(facts, container, latest, role):
        if "terminated" in status["state"]:
            status["lastState"] = status["state"]
        status["state"] = {"waiting": _waiting(waiting)}
    _set_started_and_ready(facts, status, container, latest, role)
    _set_resources(status, container, latest)
    return status


def _may_run_again(facts: Facts, container: Container, latest: ContainerStatus | None, role: Role) -> bool:
    """Only then is a container that does not run *waiting*; else it has ended."""
    if latest is None:
        return True
    if latest.state is not ContainerState.EXITED or pod_fields.is_deleted(facts.pod) or facts.terminated:
        return False
    name = container["name"]
    if role is Role.SIDECAR or name in facts.reset or (role is Role.INIT and name in facts.former):
        return True
    code = 137 if latest.exit_code is None else latest.exit_code
    if role is Role.EPHEMERAL or (role is Role.INIT and code == 0):
        return False
    return pod_fields.should_restart(container, facts.pod, code)


def _state(facts: Facts, latest: ContainerStatus | None) -> dict[str, Any]:
    if latest is None:
        return {"waiting": {"reason": _default_waiting(facts.pod)}}
    if latest.state is ContainerState.RUNNING:
        return {"running": {"startedAt": rfc3339(latest.started_at_ns)}}
    if latest.state is ContainerState.CREATED:
        return {"waiting": {"reason": "ContainerCreating"}}
    return {"terminated": _terminated(facts, latest)}


def _default_waiting(pod: Pod) -> str:
    """PodInitializing for all containers of a pod that has init containers, as kubelet reports it."""
    return "PodInitializing" if pod_fields.init_containers(pod) else "ContainerCreating"


def _waiting(waiting: Waiting) -> dict[str, str]:
    return {"reason": waiting.reason, **({"message": waiting.message} if waiting.message else {})}


def _terminated(facts: Facts, instance: ContainerStatus) -> dict[str, Any]:
    terminated: dict[str, Any] = {"exitCode": 137 if instance.exit_code is None else instance.exit_code}
    if instance.signal:
        terminated["signal"] = instance.signal
    terminated["reason"] = instance.reason or ("Completed" if terminated["exitCode"] == 0 else "Error")
    message = facts.message_of(instance)
    if message:
        terminated["message"] = message
    # A time that is not known stays unsaid: the epoch would be a lie that tools compute ages from.
    if instance.started_at_ns:
        terminated["startedAt"] = rfc3339(instance.started_at_ns)
    if instance.finished_at_ns:
        terminated["finishedAt"] = rfc3339(instance.finished_at_ns)
    terminated["containerID"] = ID_PREFIX + instance.id
    return terminated


def _last_state(facts: Facts, instances: Sequence[ContainerStatus], role: Role) -> dict[str, Any]:
    if len(instances) > 1:
        return {"terminated": _terminated(facts, instances[1])}
    if not instances:
        return {}
    # Only one instance is known: what came before it is known to the API server at best.
    field_name = {
        Role.REGULAR: "containerStatuses",
        Role.EPHEMERAL: "ephemeralContainerStatuses",
    }.get(role, "initContainerStatuses")
    current = ID_PREFIX + instances[0].id
    for status in facts.old.get(field_name) or ():
        if status["name"] != instances[0].container_name:
            continue
        for state in (status.get("state") or {}, status.get("lastState") or {}):
            terminated = state.get("terminated")
            if terminated and terminated.get("containerID") != current:
                return {"terminated": terminated}
    return {}


def _set_started_and_ready(
    facts: Facts, status: dict[str, Any], container: Container, latest: ContainerStatus | None, role: Role
) -> None:
    if role is Role.EPHEMERAL:
        return
    running = latest if latest is not None and latest.state is ContainerState.RUNNING else None
    started = running is not None and facts.probes.started(running.id, has_probe="startupProbe" in container)
    status["started"] = started
    if role is Role.INIT:
        terminated = status["state"].get("terminated")
        status["ready"] = terminated is not None and terminated["exitCode"] == 0
    elif running is not None and started:
        status["ready"] = facts.probes.ready(running.id, has_probe="readinessProbe" in container)


def _set_resources(status: dict[str, Any], container: Container, latest: ContainerStatus | None) -> None:
    if latest is not None:
        resources = container.get("resources") or {}
        if latest.state is ContainerState.RUNNING:
            held_to = latest.annotations.get(ANNOTATION_RESOURCES)
            status["resources"] = json.loads(held_to) if held_to else resources
        else:
            status["resources"] = resources
        if resources.get("requests"):
            status["allocatedResources"] = resources["requests"]
    mounts = []
    for mount in container.get("volumeMounts") or ():
        mounted = {"name": mount["name"], "mountPath": mount["mountPath"]}
        if mount.get("readOnly"):
            asked = mount.get("recursiveReadOnly") in ("Enabled", "IfPossible")
            # Nothing below a read-only preopen can be written, so a container that asks for it has it.
            mounted |= {"readOnly": True, "recursiveReadOnly": "Enabled" if asked else "Disabled"}
        mounts.append(mounted)
    if mounts:
        status["volumeMounts"] = mounts


def _terminate_the_missing(pod: Pod, init: list[dict[str, Any]], regular: list[dict[str, Any]]) -> None:
    """A pod at its end has no container that waits or runs: what was never seen to end has ended unknown."""
    unknown = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": UNKNOWN_MESSAGE}}
    init_containers = pod_fields.init_containers(pod)
    initialized = not init_containers or any("terminated" in s["state"] or s["lastState"] for s in regular)
    if not initialized and not pod_fields.is_sidecar(init_containers[-1]):
        initialized = bool(init[-1]["ready"])
    if initialized:
        for status in regular:
            if "terminated" not in status["state"]:
                status["state"] = dict(unknown)
    seen = max(
        (i for i, status in enumerate(init) if "waiting" not in status["state"] or status["lastState"]), default=0
    )
    for status in init[: seen + 1]:
        if "terminated" not in status["state"]:
            status["state"] = dict(unknown)
    for status in (*init, *regular):
        status["started"] = False


@dataclass
class _Counts:
    running: int = 0
    waiting: int = 0
    stopped: int = 0
    stopped_for_good: int = 0
    succeeded: int = 0
    pending_init: int = 0
    pending_sidecars: int = 0
    init_failed_for_good: int = 0


def _ended(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The terminated state of a container that does not run: now, or before it began to wait."""
    state = status.get("state") or {}
    if "terminated" in state:
        return dict(state["terminated"])
    if "waiting" in state and (status.get("lastState") or {}).get("terminated"):
        return dict(status["lastState"]["terminated"])
    return None


def _is_reset(status: Mapping[str, Any]) -> bool:
    """It ended only because all containers restart."""
    return (status["state"].get("waiting") or {}).get("reason") == RESTARTING_REASON


def _count(pod: Pod, statuses: Mapping[str, Mapping[str, Any]]) -> _Counts:
    counts = _Counts()
    for container in pod_fields.init_containers(pod):
        status = statuses[container["name"]]
        ended = _ended(status)
        running = "running" in status["state"]
        if pod_fields.is_sidecar(container):
            if running:
                counts.running += 1
                counts.pending_sidecars += not status["started"]
            elif ended is None:
                counts.pending_sidecars += 1
                counts.waiting += 1
        elif running or ended is None or _is_reset(status):
            counts.pending_init += 1
        elif ended["exitCode"] != 0 and not pod_fields.should_restart(container, pod, ended["exitCode"]):
            counts.init_failed_for_good += 1
        elif ended["exitCode"] != 0:
            counts.pending_init += 1
    for container in pod_fields.regular_containers(pod):
        status = statuses[container["name"]]
        ended = _ended(status)
        if "running" in status["state"]:
            counts.running += 1
        elif ended is None:
            counts.waiting += 1
        else:
            counts.stopped += 1
            counts.stopped_for_good += not (
                _is_reset(status) or pod_fields.should_restart(container, pod, ended["exitCode"])
            )
            counts.succeeded += "terminated" in status["state"] and ended["exitCode"] == 0
    return counts


def get_phase(
    pod: Pod, statuses: Mapping[str, Mapping[str, Any]], *, terminal: bool, has_active_regular: bool = False
) -> str:
    """The phase that container statuses amount to, before finality and verdicts are considered."""
    counts = _count(pod, statuses)
    if counts.init_failed_for_good:
        return "Failed"
    if counts.pending_init or (counts.pending_sidecars and not has_active_regular) or counts.waiting:
        return "Pending"
    if counts.running:
        return "Running"
    if counts.stopped:
        if not terminal and counts.stopped != counts.stopped_for_good:
            return "Running"
        return "Succeeded" if counts.stopped == counts.succeeded else "Failed"
    return "Pending"


def _phase(facts: Facts, statuses: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, str]:
    old, api = facts.old, facts.pod.get("status") or {}
    for before in (old, api):
        if before.get("phase") in pod_fields.TERMINAL_PHASES:
            return before["phase"], before.get("reason", ""), before.get("message", "")
    running = any(i.state is ContainerState.RUNNING for known in facts.instances.values() for i in known[:1])
    regular = {container["name"] for container in pod_fields.regular_containers(facts.pod)}
    active = any(
        known[0].state is ContainerState.RUNNING for name, known in facts.instances.items() if name in regular and known
    )
    phase = get_phase(facts.pod, statuses, terminal=facts.terminal or facts.terminated, has_active_regular=active)
    if facts.verdict is not None or (facts.terminated and phase not in pod_fields.TERMINAL_PHASES):
        phase = "Failed"
    before = str(old.get("phase") or "Pending")
    if phase in pod_fields.TERMINAL_PHASES and (running or not (facts.terminal or facts.terminated)):
        # Final phases free the pod's resources for others: not before its last container is dead.
        phase = before
    if phase == before and phase not in pod_fields.TERMINAL_PHASES:
        reason, message = (str(old.get(name) or api.get(name) or "") for name in ("reason", "message"))
        return phase, reason, message
    if phase == "Failed" and facts.verdict is not None:
        return phase, facts.verdict.reason, facts.verdict.message
    return phase, "", ""
