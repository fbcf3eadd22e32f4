"""What the pod machinery knows of its own Node: a snapshot that the composition root hands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """A resource that runs short, with the figures that kubelet's eviction message names: bytes, or inodes."""

    resource: str
    """``memory``, ``ephemeral-storage`` or ``inodes``."""

    threshold_bytes: int
    available_bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """The Node as of now. ``addresses``: its InternalIPs, the primary one first."""

    name: str
    addresses: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, str] = field(default_factory=dict)
    """Quantities: ``cpu``, ``memory``, ``ephemeral-storage``, ``pods``. A missing one is not checked."""

    pressures: tuple[Pressure, ...] = ()
    taints: tuple[Mapping[str, str], ...] = ()
    """``spec.taints``, as the API server has them."""


NodeSource = Callable[[], NodeInfo]
