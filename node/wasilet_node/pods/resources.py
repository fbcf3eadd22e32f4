"""Quantities, what a pod asks of the node, and its QoS class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from wasilet_common import pod_fields, quantity
from wasilet_common.pod_fields import Container, Pod

ANNOTATION_RESOURCES = "wasilet.dev/resources"
"""On every instance: the resources that it is held to, which a change of the pod alters only once it is made."""

ANNOTATION_POD_RESOURCES = "wasilet.dev/pod-resources"
"""Beside it: those of the whole pod, which hold a container that has none of its own."""


def encoded(container: Container) -> str:
    """A container's resources, for ``ANNOTATION_RESOURCES``."""
    return json.dumps(container.get("resources") or {}, separators=(",", ":"), sort_keys=True)


def held_to(pod: Pod, container: Container) -> dict[str, str]:
    """Both annotations of an instance that is held to what the pod's spec states now."""
    return {ANNOTATION_RESOURCES: encoded(container), ANNOTATION_POD_RESOURCES: encoded(pod["spec"])}


def amount(name: str, text: Any) -> int:
    """As the scheduler counts: cpu in thousandths of a core, everything else in whole units, rounded up.

    Raises QuantityError.
    """
    return quantity.milli_value(text) if name == "cpu" else quantity.value(text)


@dataclass(frozen=True, slots=True)
class Requests:
    """What a pod takes of the node: thousandths of a core, and bytes."""

    cpu: int = 0
    memory: int = 0
    ephemeral_storage: int = 0

    def __add__(self, other: Requests) -> Requests:
        """Both together."""
        return Requests(
            self.cpu + other.cpu, self.memory + other.memory, self.ephemeral_storage + other.ephemeral_storage
        )

    def at_least(self, other: Requests) -> Requests:
        """The larger of each."""
        return Requests(
            max(self.cpu, other.cpu),
            max(self.memory, other.memory),
            max(self.ephemeral_storage, other.ephemeral_storage),
        )


def _requests(resources: Mapping[str, Any] | None) -> Requests:
    listed = (resources or {}).get("requests") or {}
    return Requests(*(amount(name, listed.get(name, 0)) for name in ("cpu", "memory", "ephemeral-storage")))


def pod_requests(pod: Pod) -> Requests:
    """What the scheduler reserved: the larger of running (regular containers and sidecars) and initializing (each
    init container with the sidecars before it), plus overhead; pod-level requests win for cpu and memory (KEP-2837).
    """
    running = Requests()
    for container in pod_fields.regular_containers(pod):
        running += _requests(container.get("resources"))
    sidecars = Requests()
    peak = Requests()
    for container in pod_fields.init_containers(pod):
        own = _requests(container.get("resources"))
        if pod_fields.is_sidecar(container):
            sidecars += own
            peak = peak.at_least(sidecars)
        else:
            peak = peak.at_least(sidecars + own)
    total = (running + sidecars).at_least(peak)
    pod_level = (pod["spec"].get("resources") or {}).get("requests") or {}
    total = Requests(
        amount("cpu", pod_level["cpu"]) if "cpu" in pod_level else total.cpu,
        amount("memory", pod_level["memory"]) if "memory" in pod_level else total.memory,
        total.ephemeral_storage,
    )
    return total + _requests({"requests": pod["spec"].get("overhead") or {}})


def limit(container: Container, name: str) -> int | None:
    """A container's limit in thousandths of a core or bytes; None: unlimited."""
    text = limit_text(container, name)
    return None if text is None else amount(name, text) or None


def request(container: Container, name: str) -> int | None:
    """A container's request, as ``limit``."""
    value = ((container.get("resources") or {}).get("requests") or {}).get(name)
    if value is None:
        return None
    return amount(name, value) or None


def pod_limit(pod: Pod, name: str) -> str | None:
    """The limits of all containers together, as a quantity; None: no container has one."""
    return _pod_total(pod, "limits", name)


def pod_status(pod: Pod) -> dict[str, dict[str, str]]:
    """What a pod has as a whole, for ``status.resources`` (KEP-5419): the pod's own where it has some, else its
    containers' together."""
    found: dict[str, dict[str, str]] = {}
    for field in ("requests", "limits"):
        own = (pod["spec"].get("resources") or {}).get(field) or {}
        names = {"cpu", "memory", *own} | {
            name
            for container in (*pod_fields.regular_containers(pod), *pod_fields.init_containers(pod))
            for name in (container.get("resources") or {}).get(field) or {}
        }
        totals = {name: str(own[name]) if name in own else _pod_total(pod, field, name) for name in sorted(names)}
        if listed := {name: total for name, total in totals.items() if total is not None}:
            found[field] = listed
    return found


def _pod_total(pod: Pod, field: str, name: str) -> str | None:
    """``PodRequests`` and ``PodLimits`` of k8s.io/component-helpers, but for what the pod itself states: the larger of
    running and initializing, plus overhead."""
    running = _total(name, *(_text(each, field, name) for each in pod_fields.regular_containers(pod)))
    sidecars: str | None = None
    peak: str | None = None
    for container in pod_fields.init_containers(pod):
        own = _text(container, field, name)
        if pod_fields.is_sidecar(container):
            sidecars = _total(name, sidecars, own)
            own = sidecars
        else:
            own = _total(name, own, sidecars)
        peak = _larger(peak, own)
    total = _larger(_total(name, running, sidecars), peak)
    return total if total is None else _total(name, total, (pod["spec"].get("overhead") or {}).get(name))


def enforced_limit(pod: Pod, container: Container, name: str) -> int | None:
    """What one container is held to, as ``limit``: its own limit of cpu or memory, else the pod's (KEP-2837)."""
    text = enforced_limit_text(pod, container, name)
    return None if text is None else amount(name, text) or None


def enforced_limit_text(pod: Pod, container: Container, name: str) -> str | None:
    """``enforced_limit`` as it is written."""
    for resources in (container.get("resources"), pod["spec"].get("resources")):
        text = ((resources or {}).get("limits") or {}).get(name)
        if text is not None and amount(name, text):
            return str(text)
    return None


def limit_text(container: Container, name: str) -> str | None:
    """A container's limit as it is written."""
    return _text(container, "limits", name)


def _text(container: Container, field: str, name: str) -> str | None:
    value = ((container.get("resources") or {}).get(field) or {}).get(name)
    return None if value is None else str(value)


def _total(name: str, *texts: str | None) -> str | None:
    """Written as the first that is not zero, as ``Quantity.Add`` has it."""
    present = [text for text in texts if text is not None]
    if not present:
        return None
    like = next((text for text in present if quantity.parse(text)), present[0])
    total = sum(amount(name, text) for text in present)
    if name == "cpu" and total % 1000:
        return f"{total}m"
    return quantity.canonical(total // 1000 if name == "cpu" else total, like=like)


def _larger(first: str | None, second: str | None) -> str | None:
    if first is None or second is None:
        return second if first is None else first
    return second if quantity.parse(second) > quantity.parse(first) else first


def _compute_lists(pod: Pod) -> Iterable[Mapping[str, Any]]:
    whole = pod["spec"].get("resources") or {}
    if whole.get("requests") or whole.get("limits"):
        yield whole
        return
    for container in (*pod_fields.regular_containers(pod), *pod_fields.init_containers(pod)):
        yield container.get("resources") or {}


def qos_class(pod: Pod) -> str:
    """Guaranteed, Burstable or BestEffort, as ``ComputePodQOS``: only cpu and memory count."""
    requests: dict[str, Fraction] = {}
    limits: dict[str, Fraction] = {}
    guaranteed = True
    for resources in _compute_lists(pod):
        for total, listed in ((requests, resources.get("requests")), (limits, resources.get("limits"))):
            for name in ("cpu", "memory"):
                value = quantity.parse((listed or {}).get(name, 0))
                if value > 0:
                    total[name] = total.get(name, Fraction(0)) + value
        listed_limits = resources.get("limits") or {}
        if any(quantity.parse(listed_limits.get(name, 0)) <= 0 for name in ("cpu", "memory")):
            guaranteed = False
    if not requests and not limits:
        return "BestEffort"
    return "Guaranteed" if guaranteed and requests == limits else "Burstable"
