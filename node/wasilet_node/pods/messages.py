"""How long the messages of a pod's ended containers may be: kubelet's ``normalizeStatus``.

A pod's status is one object of the API server, so all its termination messages together have 12 KiB, which its
containers share evenly, and none has more than 4 KiB. The cut comes last: what replaces bytes that are not UTF-8 is
longer than these, and a trap's text comes before what the guest wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod

MAX_POD_BYTES = 12 * 1024
MAX_CONTAINER_BYTES = 4 * 1024


def bytes_per_container(pod: Pod) -> int:
    """What one message may have. Ephemeral containers count, init containers too."""
    return min(MAX_CONTAINER_BYTES, MAX_POD_BYTES // max(1, sum(1 for _ in pod_fields.every_container(pod))))


def cut(status: dict[str, Any], limit: int) -> dict[str, Any]:
    """A container's status whose messages of ends have at most ``limit`` bytes; their beginnings stay."""
    return status | {field: _cut_state(status[field], limit) for field in ("state", "lastState") if field in status}


def _cut_state(state: Mapping[str, Any], limit: int) -> Mapping[str, Any]:
    terminated = state.get("terminated")
    data = str((terminated or {}).get("message") or "").encode(errors="replace")
    if terminated is None or len(data) <= limit:
        return state
    return {**state, "terminated": {**terminated, "message": data[:limit].decode(errors="ignore")}}
