"""Which of two agents with the same node name a Node belongs to.

A bootstrap token lets an agent join under any name, so a second one, by mistake or on purpose, can come as a node that
is alive elsewhere; the two would then end each other's pods in turn. Each data folder therefore has its own id,
the Node carries it as an annotation, and a Node of another id is left alone while its lease is being renewed.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from pathlib import Path

from wasilet_common.files import write_private
from wasilet_common.time_format import parse_rfc3339

from wasilet_node.kube.base import Kube, KubeObject, NotFoundError

ANNOTATION = "wasilet.dev/instance"
_FILE = "instance-id"
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_DEFAULT_DURATION_SECONDS = 40
_LONGEST_WAIT_SECONDS = 120


def instance_id(data: Path) -> str:
    """The id of a data folder, made at its first use. Raises OSError."""
    path = data / _FILE
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        text = ""
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        text = secrets.token_hex(16)
        write_private(path, text.encode())
    return text


def is_foreign(node: KubeObject, own_id: str) -> bool:
    """Whether a Node says that it is another instance's."""
    annotations = (node.get("metadata") or {}).get("annotations") or {}
    return bool(annotations.get(ANNOTATION, own_id) != own_id)


async def is_alive(kube: Kube, node_name: str, *, look_seconds: float = 1.0) -> bool:
    """Whether someone renews a node's lease: it is looked at every ``look_seconds`` for as long as it is valid. Raises
    KubeError."""
    seen = await _lease(kube, node_name)
    if seen is None:
        return False
    renewed, duration_seconds = seen
    if _age_seconds(renewed) > duration_seconds:
        return False
    deadline = time.monotonic() + duration_seconds
    while time.monotonic() < deadline:
        await asyncio.sleep(look_seconds)
        now = await _lease(kube, node_name)
        if now is None:
            return False
        if now[0] != renewed:
            return True
    return False


async def _lease(kube: Kube, node_name: str) -> tuple[str, int] | None:
    try:
        lease = await kube.get(f"{_LEASES}/{node_name}")
    except NotFoundError:
        return None
    spec = lease.get("spec") or {}
    seconds = spec.get("leaseDurationSeconds") or _DEFAULT_DURATION_SECONDS
    return str(spec.get("renewTime") or ""), min(int(seconds), _LONGEST_WAIT_SECONDS)


def _age_seconds(renewed: str) -> float:
    """By this machine's clock; endless for a lease that was never renewed. A clock that differs costs a wait, or an
    agent that is refused a little later, by the next one's look."""
    at = parse_rfc3339(renewed)
    return float("inf") if at is None else time.time() - at
