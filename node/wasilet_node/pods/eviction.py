"""Evicting pods when the node runs short of memory or disk: one at a time, and only one whose end would help.

Whether the node runs short is the node status's business; here it is decided who goes. The order is kubelet's: pods
that use more than they asked for first, then low priority, then by how much they exceed their request. A pod that uses
nothing of what is short is never evicted, since its end would free nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wasilet_node.pods import resources, spec
from wasilet_node.pods.nodeinfo import Pressure
from wasilet_node.pods.spec import Pod
from wasilet_node.pods.status import Verdict

MINIMUM_BYTES = 1024 * 1024
MINIMUM_INODES = 1000
INODES = "inodes"
_SYSTEM_CRITICAL_PRIORITY = 2_000_000_000
_UNITS = (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10))


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the containers of a pod use of the resource that is short: bytes, or inodes."""

    pod: Pod
    by_container: Mapping[str, int]
    elsewhere: int = 0
    """Not any container's own: volumes on the node's disk, and what instances before the last one left."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_container.values()) + self.elsewhere


def is_critical(pod: Pod) -> bool:
    """kubelet's ``IsCriticalPod``: such a pod is never evicted, whatever it does."""
    return int(pod["spec"].get("priority") or 0) >= _SYSTEM_CRITICAL_PRIORITY


def rank(usages: Iterable[Usage], resource: str) -> list[Usage]:
    """Who goes first stands first; pods that must not or need not go are left out."""

    def requested(usage: Usage) -> int:
        if resource == INODES:
            return 0  # nobody can ask for any
        asked = resources.pod_requests(usage.pod)
        return asked.memory if resource == "memory" else asked.ephemeral_storage

    def order(usage: Usage) -> tuple[bool, int, int]:
        over = usage.total - requested(usage)
        return (over <= 0, int(usage.pod["spec"].get("priority") or 0), -over)

    minimum = MINIMUM_INODES if resource == INODES else MINIMUM_BYTES
    candidates = [usage for usage in usages if usage.total >= minimum and not is_critical(usage.pod)]
    return sorted(candidates, key=order)


def verdict(usage: Usage, pressure: Pressure) -> Verdict:
    """kubelet's words for an eviction."""
    quantity = str if pressure.resource == INODES else _quantity
    message = (
        f"The node was low on resource: {pressure.resource}. "
        f"Threshold quantity: {quantity(pressure.threshold_bytes)}, available: {quantity(pressure.available_bytes)}. "
    )
    for name, used in usage.by_container.items() if pressure.resource != INODES else ():
        found = spec.find_container(usage.pod, name)
        asked = resources.request(found[1], pressure.resource) if found else None
        if used > (asked or 0):
            message += (
                f"Container {name} was using {_quantity(used)}, request is {_quantity(asked or 0)}, "
                f"has larger consumption of {pressure.resource}. "
            )
    return Verdict(reason="Evicted", message=message, disruption="TerminationByKubelet")


def _quantity(number: int) -> str:
    for suffix, unit in _UNITS:
        if number and number % unit == 0:
            return f"{number // unit}{suffix}"
    return f"{-(-number // 1024)}Ki" if number >= 1024 else str(number)
