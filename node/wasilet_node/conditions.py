"""The Node's conditions: Ready, and the three pressures that are kept true to the machine.

Thresholds: memory as kubelet's default (100 MiB left). For the disk kubelet says 10 % free and 5 % of the inodes, which
on a developer's large and nearly full disk means a node that never takes a pod (kind therefore switches the check
off); here it is 10 % or 5 GiB, whichever is less, so that only a disk that truly ends is reported. Process ids: 5 %.

A pressure is reported at once and taken back only when it has been gone for a while, as kubelet does
(eviction-pressure-transition-period), because each change is a taint that moves pods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wasilet_node.machine import Levels
from wasilet_node.pods.nodeinfo import Pressure

MEMORY_THRESHOLD_BYTES = 100 * 1024 * 1024
_DISK_SHARE = 0.10
_DISK_THRESHOLD_BYTES = 5 * 1024**3
_INODE_SHARE = 0.05
_INODE_THRESHOLD = 50_000
_PID_SHARE = 0.05
_HOLD_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One condition without its times."""

    type: str
    status: str
    reason: str
    message: str


def disk_threshold_bytes(disk_bytes: int) -> int:
    """Below this the disk counts as full."""
    return min(int(disk_bytes * _DISK_SHARE), _DISK_THRESHOLD_BYTES)


def pressures(levels: Levels) -> tuple[Pressure, ...]:
    """What runs short right now, for eviction and admission of pods."""
    found = []
    if levels.memory_available_bytes < MEMORY_THRESHOLD_BYTES:
        found.append(
            Pressure(
                resource="memory",
                threshold_bytes=MEMORY_THRESHOLD_BYTES,
                available_bytes=levels.memory_available_bytes,
            )
        )
    threshold = disk_threshold_bytes(levels.disk_bytes)
    if levels.disk_available_bytes < threshold:
        found.append(
            Pressure(
                resource="ephemeral-storage", threshold_bytes=threshold, available_bytes=levels.disk_available_bytes
            )
        )
    if levels.inodes and levels.inodes_free < (fewest := _inode_threshold(levels)):
        found.append(Pressure(resource="inodes", threshold_bytes=fewest, available_bytes=levels.inodes_free))
    return tuple(found)


def _inode_threshold(levels: Levels) -> int:
    """File systems without a fixed number of inodes report none at all, and are never short of them."""
    return int(min(levels.inodes * _INODE_SHARE, _INODE_THRESHOLD))


class Conditions:
    """Judges levels; remembers when each pressure was last seen."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock``: monotonic seconds."""
        self._clock = clock
        self._last_seen: dict[str, float] = {}

    def judge(self, levels: Levels, problem: str | None) -> list[Verdict]:
        """``problem``: why the node can't run pods; None: it can. Reasons and messages are kubelet's."""
        short = {pressure.resource for pressure in pressures(levels)}
        memory = self._held("memory", now_true="memory" in short)
        disk = self._held("disk", now_true=bool(short & {"ephemeral-storage", "inodes"}))
        pid = self._held("pid", now_true=levels.pids_free < levels.pids * _PID_SHARE)
        return [
            _verdict("MemoryPressure", "InsufficientMemory", "SufficientMemory", "memory available", is_true=memory),
            _disk_verdict(is_true=disk),
            _verdict("PIDPressure", "InsufficientPID", "SufficientPID", "PID available", is_true=pid),
            Verdict(
                type="Ready", status="True", reason="KubeletReady", message="kubelet is posting ready status"
            )
            if problem is None
            else Verdict(type="Ready", status="False", reason="KubeletNotReady", message=problem),
        ]  # fmt: skip

    def _held(self, name: str, *, now_true: bool) -> bool:
        now = self._clock()
        if now_true:
            self._last_seen[name] = now
            return True
        seen = self._last_seen.get(name)
        return seen is not None and now - seen < _HOLD_SECONDS


def network_verdict(absent: str | None) -> Verdict:
    """Of a node that was told to have a pod network; ``absent``: why it has none. Never True: that is a taint, and
    pods do run here, in the machine's network."""
    if absent is None:
        return Verdict(
            type="NetworkUnavailable", status="False", reason="PodNetworkReady", message="pods have a network"
        )
    message = f"pods share the machine's network: {absent}"
    return Verdict(type="NetworkUnavailable", status="False", reason="NoPodNetwork", message=message)


def with_times(verdicts: list[Verdict], current: list[dict[str, Any]], now: str) -> list[dict[str, Any]]:
    """Conditions as Node.status has them; ``current``: those on the server, whose transition times are kept."""
    known = {condition.get("type"): condition for condition in current}
    result = []
    for verdict in verdicts:
        before = known.get(verdict.type, {})
        unchanged = before.get("status") == verdict.status
        result.append(
            {
                "type": verdict.type,
                "status": verdict.status,
                "reason": verdict.reason,
                "message": verdict.message,
                "lastHeartbeatTime": now,
                "lastTransitionTime": (before.get("lastTransitionTime") if unchanged else None) or now,
            }
        )
    return result


def _verdict(type_: str, bad: str, good: str, what: str, *, is_true: bool) -> Verdict:
    if is_true:
        return Verdict(type=type_, status="True", reason=f"KubeletHas{bad}", message=f"kubelet has insufficient {what}")
    return Verdict(type=type_, status="False", reason=f"KubeletHas{good}", message=f"kubelet has sufficient {what}")


def _disk_verdict(*, is_true: bool) -> Verdict:
    if is_true:
        return Verdict(
            type="DiskPressure", status="True", reason="KubeletHasDiskPressure", message="kubelet has disk pressure"
        )
    return Verdict(
        type="DiskPressure", status="False", reason="KubeletHasNoDiskPressure", message="kubelet has no disk pressure"
    )
