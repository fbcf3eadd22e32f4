"""Whether a pod that was bound to this node may run here, with kubelet's reasons and messages.

What the scheduler has checked is checked again, because a pod may be bound by ``spec.nodeName`` or while the node
changed: capacity, node selector and affinity, host ports, and NoExecute taints (NoSchedule is the scheduler's alone).
What kubelet would refuse is refused: the pod becomes Failed.

A pod that can never run on this node (an unsupported kind of volume, Windows) is another matter. Where its controller
would put a new pod in its place, Failed starts a loop: ReplicaSets replace failed pods at once and for ever, DaemonSets
with a back-off. So such a pod is *held*: Pending, its containers waiting with ``CreateContainerConfigError`` and the
reason, one event, and nothing that repeats. That is also what becomes of DaemonSet pods meant for Linux (kube-proxy, a
CNI) which tolerate every taint: those whose node selector asks for Linux are never bound here, since the node's labels
say otherwise; for the rest the image has the wrong architecture, which leaves one pod per node in ImagePullBackOff,
tried every five minutes, instead of a stream of failed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod
from wasilet_common.quantity import QuantityError

from wasilet_node.pods import resources
from wasilet_node.pods.nodeinfo import NodeInfo
from wasilet_node.pods.resources import Requests
from wasilet_node.pods.status import Verdict, Waiting
from wasilet_node.volumes.base import VolumeRefusedError, Volumes

_SYSTEM_CRITICAL_PRIORITY = 2_000_000_000
_REPLACING_CONTROLLERS = frozenset({"DaemonSet", "ReplicaSet", "ReplicationController", "StatefulSet"})

_SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        *(f"net.ipv4.ip_{name}" for name in ("local_port_range", "local_reserved_ports", "unprivileged_port_start")),
        "net.ipv4.ping_group_range",
        *(f"net.ipv4.tcp_{name}" for name in ("fin_timeout", "rmem", "syncookies", "wmem")),
        *(f"net.ipv4.tcp_keepalive_{name}" for name in ("intvl", "probes", "time")),
    }
)
"""kubelet's own list. A module sees no kernel parameter, so these are admitted and change nothing."""

_SYSCTL_SEPARATORS = str.maketrans("./", "/.")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """At most one of the two is set; neither: admitted."""

    verdict: Verdict | None = None
    hold: Waiting | None = None


ADMITTED = Refusal()


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A pod that already counts against the node."""

    pod: Pod
    requests: Requests


def never(pod: Pod, *, volumes: Volumes) -> Refusal:
    """What no change of the node will repair. No I/O."""
    os_name = (pod["spec"].get("os") or {}).get("name", "")
    if os_name not in ("", "linux"):
        return _never(pod, "PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS")
    if problem := _forbidden_sysctl(pod):
        return _never(pod, "SysctlForbidden", f"forbidden sysctl: {problem}")
    try:
        volumes.check(pod)
    except VolumeRefusedError as error:
        return _never(pod, "UnsupportedVolume", str(error))
    return ADMITTED


def _forbidden_sysctl(pod: Pod) -> str:
    """kubelet's wording for the first sysctl that it would not allow; empty for none."""
    for sysctl in (pod["spec"].get("securityContext") or {}).get("sysctls") or ():
        name = str(sysctl["name"])
        if "/" in name.partition(".")[0]:
            name = name.translate(_SYSCTL_SEPARATORS)
        if name not in _SAFE_SYSCTLS:
            return f'"{name}" not allowlisted'
        for field, namespace in (("hostNetwork", "Net"), ("hostIPC", "IPC")):
            if pod["spec"].get(field) and name.startswith("net." if namespace == "Net" else "kernel.shm"):
                return f'"{name}" not allowed with host {namespace} enabled'
    return ""


def admit(pod: Pod, *, node: NodeInfo, neighbours: Iterable[Neighbour]) -> Refusal:
    """Check a new pod against the node as it is and the pods that are on it."""
    others = list(neighbours)
    try:
        under_pressure = _pressure(pod, node)
        short = lacking(resources.pod_requests(pod), others, node.allocatable)
    except QuantityError as error:
        return Refusal(verdict=Verdict(reason="UnexpectedAdmissionError", message=str(error)))
    if under_pressure is not None:
        return Refusal(verdict=under_pressure)
    if short is not None:
        return Refusal(verdict=short)
    if not _matches_node(pod, node):
        return _predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector")
    if pod["spec"].get("nodeName", node.name) != node.name:
        return _predicate("NodeName", "node(s) didn't match the requested node name")
    # Hardly any pod has host ports, and looking at all neighbours of every new pod is what a burst would be slowed by.
    wanted = list(_host_ports(pod))
    taken = {port for other in others for port in _host_ports(other.pod)} if wanted else set()
    if any(_conflicts(port, taken) for port in wanted):
        return _predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports")
    tolerations = pod["spec"].get("tolerations") or ()
    no_execute = (taint for taint in node.taints if taint.get("effect") == "NoExecute")
    if any(not any(_tolerates(each, taint) for each in tolerations) for taint in no_execute):
        return _predicate("TaintToleration", "node(s) had taints that the pod didn't tolerate")
    return ADMITTED


def _pressure(pod: Pod, node: NodeInfo) -> Verdict | None:
    """kubelet's eviction manager at admission: with too little memory only pods that reserved some, with too little
    disk none; critical pods always."""
    if int(pod["spec"].get("priority") or 0) >= _SYSTEM_CRITICAL_PRIORITY:
        return None
    for pressure in node.pressures:
        if pressure.resource == "memory" and (
            resources.qos_class(pod) != "BestEffort" or _tolerates_memory_pressure(pod)
        ):
            continue
        condition = "MemoryPressure" if pressure.resource == "memory" else "DiskPressure"
        return Verdict(reason="Evicted", message=f"The node had condition: [{condition}]. ")
    return None


def _tolerates_memory_pressure(pod: Pod) -> bool:
    return any(
        toleration.get("key", "") in ("", "node.kubernetes.io/memory-pressure")
        and (toleration.get("operator") == "Exists" or not toleration.get("value"))
        and toleration.get("effect", "") in ("", "NoSchedule")
        for toleration in pod["spec"].get("tolerations") or ()
    )


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, str]) -> bool:
    """As ``ToleratesTaint``: what a toleration leaves empty matches everything."""
    if (toleration.get("effect") or taint.get("effect")) != taint.get("effect"):
        return False
    if (toleration.get("key") or taint.get("key")) != taint.get("key"):
        return False
    if toleration.get("operator") == "Exists":
        return True
    equal = (toleration.get("value") or "") == (taint.get("value") or "")
    return toleration.get("operator") in (None, "", "Equal") and equal


def _never(pod: Pod, reason: str, message: str) -> Refusal:
    for owner in pod["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") in _REPLACING_CONTROLLERS:
            return Refusal(hold=Waiting(reason="CreateContainerConfigError", message=message))
    return Refusal(verdict=Verdict(reason=reason, message=message))


def _predicate(name: str, description: str) -> Refusal:
    return Refusal(verdict=Verdict(reason=name, message=f"Predicate {name} failed: {description}"))


def lacking(wanted: Requests, others: list[Neighbour], allocatable: Mapping[str, str]) -> Verdict | None:
    """What the node has too little of beside the pods that are on it. Raises QuantityError."""
    checks: list[tuple[str, int, Callable[[Requests], int]]] = [
        ("pods", 1, lambda _: 1),
        ("cpu", wanted.cpu, lambda each: each.cpu),
        ("memory", wanted.memory, lambda each: each.memory),
        ("ephemeral-storage", wanted.ephemeral_storage, lambda each: each.ephemeral_storage),
    ]
    for name, requested, amount in checks:
        if name not in allocatable or requested == 0:
            continue
        in_use = sum(amount(other.requests) for other in others)
        capacity = resources.amount(name, allocatable[name])
        if requested > capacity - in_use:
            return Verdict(
                reason=f"OutOf{name}",
                message=f"Node didn't have enough resource: {name}, requested: {requested}, used: {in_use}, "
                f"capacity: {capacity}",
            )
    return None


HostPort = tuple[str, str, int]


def _host_ports(pod: Pod) -> Iterable[HostPort]:
    """``(address, protocol, port)`` of containers and sidecars."""
    for role, container in pod_fields.every_container(pod):
        if role in (pod_fields.Role.REGULAR, pod_fields.Role.SIDECAR):
            for port in container.get("ports") or ():
                if port.get("hostPort"):
                    yield port.get("hostIP") or "0.0.0.0", port.get("protocol") or "TCP", int(port["hostPort"])  # noqa: S104


def _conflicts(port: HostPort, taken: set[HostPort]) -> bool:
    address, protocol, number = port
    everywhere = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    return any(
        (protocol, number) == (other_protocol, other_number)
        and (address == other or address in everywhere or other in everywhere)
        for other, other_protocol, other_number in taken
    )


def _matches_node(pod: Pod, node: NodeInfo) -> bool:
    """nodeSelector, and the required terms of node affinity (one term of several must match)."""
    if not node.labels:
        return True
    selector = pod["spec"].get("nodeSelector") or {}
    if any(node.labels.get(key) != value for key, value in selector.items()):
        return False
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(_matches_term(term, node) for term in required.get("nodeSelectorTerms") or ())


def _matches_term(term: Mapping[str, Any], node: NodeInfo) -> bool:
    expressions = term.get("matchExpressions") or ()
    fields = term.get("matchFields") or ()
    if not expressions and not fields:
        return False
    return all(_matches(each, node.labels) for each in expressions) and all(
        _matches(each, {"metadata.name": node.name}) for each in fields
    )


def _matches(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement["key"])
    values = list(requirement.get("values") or ())
    match requirement.get("operator"):
        case "In":
            return value is not None and value in values
        case "NotIn":
            return value is None or value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            try:
                mine, theirs = int(value or ""), int(values[0])
            except (ValueError, IndexError):
                return False
            return mine > theirs if operator == "Gt" else mine < theirs
        case _:
            return False
