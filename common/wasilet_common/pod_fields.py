"""Plain reads of a pod's decoded JSON: what every module asks of a spec or a status, asked in one place.

Pods stay ``dict[str, Any]``, as the API server sent them, so nothing is lost between the watch and ``/pods``; these
functions hold the defaults that the Go types would have filled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

Pod = dict[str, Any]
Container = dict[str, Any]

TERMINAL_PHASES = frozenset({"Succeeded", "Failed"})
RESTART_ALL = "RestartAllContainers"
"""A container rule's action (KEP-5532)."""


class Role(StrEnum):
    """Which list of the spec a container stands in; sidecars are init containers with restartPolicy Always."""

    INIT = "init"
    SIDECAR = "sidecar"
    REGULAR = "regular"
    EPHEMERAL = "ephemeral"


def uid(pod: Pod) -> str:
    """``metadata.uid``."""
    return str(pod["metadata"]["uid"])


def namespace(pod: Pod) -> str:
    """``metadata.namespace``."""
    return str(pod["metadata"].get("namespace", "default"))


def name(pod: Pod) -> str:
    """``metadata.name``."""
    return str(pod["metadata"]["name"])


def key(pod: Pod) -> tuple[str, str]:
    """``(namespace, name)``."""
    return namespace(pod), name(pod)


def path(pod: Pod) -> str:
    """The pod's API path."""
    return f"/api/v1/namespaces/{namespace(pod)}/pods/{name(pod)}"


def format_pod(pod: Pod) -> str:
    """``name_namespace(uid)``, the form in kubelet's back-off messages."""
    return f"{name(pod)}_{namespace(pod)}({uid(pod)})"


def is_deleted(pod: Pod) -> bool:
    """Someone asked for the pod's deletion."""
    return pod["metadata"].get("deletionTimestamp") is not None


def phase(pod: Pod) -> str:
    """``status.phase`` as the API server knows it; ``Pending`` when empty."""
    return str((pod.get("status") or {}).get("phase") or "Pending")


def is_terminal(pod: Pod) -> bool:
    """Succeeded or Failed: final, whatever happens next."""
    return phase(pod) in TERMINAL_PHASES


def is_sidecar(container: Container) -> bool:
    """True for a restartable init container (only meaningful for entries of ``initContainers``)."""
    return container.get("restartPolicy") == "Always"


def init_containers(pod: Pod) -> list[Container]:
    """``spec.initContainers``, sidecars included."""
    return list(pod["spec"].get("initContainers") or ())


def regular_containers(pod: Pod) -> list[Container]:
    """``spec.containers``."""
    return list(pod["spec"].get("containers") or ())


def ephemeral_containers(pod: Pod) -> list[Container]:
    """``spec.ephemeralContainers``, which ``kubectl debug`` adds to a running pod."""
    return list(pod["spec"].get("ephemeralContainers") or ())


def every_container(pod: Pod) -> Iterator[tuple[Role, Container]]:
    """All containers with their role: init (in order), regular, ephemeral."""
    for container in init_containers(pod):
        yield (Role.SIDECAR if is_sidecar(container) else Role.INIT), container
    for container in regular_containers(pod):
        yield Role.REGULAR, container
    for container in ephemeral_containers(pod):
        yield Role.EPHEMERAL, container


def find_container(pod: Pod, container_name: str) -> tuple[Role, Container] | None:
    """The container of that name, or None."""
    for role, container in every_container(pod):
        if container["name"] == container_name:
            return role, container
    return None


def container_status(pod: Pod, container_name: str) -> dict[str, Any] | None:
    """The status entry of a container, whichever list it is in; None: it has none yet."""
    for listed in ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"):
        for status in (pod.get("status") or {}).get(listed) or ():
            if status.get("name") == container_name:
                return dict(status)
    return None


def field_path(pod: Pod, container_name: str) -> str:
    """An event's ``fieldPath``: ``spec.containers{name}`` and its like; empty for a name the pod does not have."""
    found = find_container(pod, container_name)
    if found is None:
        return ""
    role, _ = found
    if role in (Role.INIT, Role.SIDECAR):
        return f"spec.initContainers{{{container_name}}}"
    if role is Role.EPHEMERAL:
        return f"spec.ephemeralContainers{{{container_name}}}"
    return f"spec.containers{{{container_name}}}"


def should_restart(container: Container, pod: Pod, exit_code: int) -> bool:
    """Whether an exited container runs again: KEP-5307's container rules first, then the pod's ``restartPolicy``.

    Not for sidecars, which always do, nor for ephemeral containers, which never do.
    """
    own = container.get("restartPolicy")
    if own is not None and exit_action(container, exit_code) in {"Restart", RESTART_ALL}:
        return True
    policy = own or pod["spec"].get("restartPolicy") or "Always"
    if policy == "Never":
        return False
    return policy != "OnFailure" or exit_code != 0


def exit_action(container: Container, exit_code: int) -> str:
    """The action of the first of the container's ``restartPolicyRules`` that an exit code matches; empty: none does."""
    for rule in container.get("restartPolicyRules") or ():
        codes = rule.get("exitCodes") or {}
        listed = exit_code in (codes.get("values") or ())
        if (codes.get("operator") == "In" and listed) or (codes.get("operator") == "NotIn" and not listed):
            return str(rule.get("action") or "")
    return ""


def may_restart_all(pod: Pod) -> bool:
    """A container has a rule by which its end restarts all of the pod's containers."""
    return any(
        rule.get("action") == RESTART_ALL
        for container in (*init_containers(pod), *regular_containers(pod))
        for rule in container.get("restartPolicyRules") or ()
    )


def grace_seconds(pod: Pod) -> float:
    """How long termination may take: the deletion's own grace where there is one, else the spec's."""
    asked = pod["metadata"].get("deletionGracePeriodSeconds")
    if asked is None:
        asked = pod["spec"].get("terminationGracePeriodSeconds")
    return float(30 if asked is None else asked)


def resolve_port(value: Any, container: Container) -> int:
    """An IntOrString port: a number, a number in a string, or the name of one of the container's ports.

    Raises ValueError with a message that names the port.
    """
    if isinstance(value, int):
        number = value
    else:
        text = str(value)
        for port in container.get("ports") or ():
            if port.get("name") == text:
                number = int(port["containerPort"])
                break
        else:
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"container {container['name']} has no port named {text!r}")
            number = int(text)
    if not 0 < number < 65536:
        raise ValueError(f"invalid port number: {value}")
    return number
