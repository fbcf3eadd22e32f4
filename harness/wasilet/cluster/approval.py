"""``invoke approve``: the approver's rules applied by hand, for workshops that show the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wasilet.cluster.approver import approve, consider
from wasilet.cluster.approver_rules import SIGNER, is_open, requesting_node
from wasilet.errors import UsageError
from wasilet.kube.client import CSRS, Kube, KubeObject


@dataclass(frozen=True, kw_only=True)
class PendingRequest:
    """An undecided serving certificate request."""

    name: str
    node: str
    right: bool
    """Whether the approver's rules allow it."""

    why: str


def pending(kube: Kube, policy_file: Path | None = None) -> list[PendingRequest]:
    """Every open request of the signer, judged. Raises ApiError, StateError."""
    answer = kube.get(CSRS, fieldSelector=f"spec.signerName={SIGNER}")
    return [_judged(kube, csr, policy_file) for csr in answer.get("items") or [] if is_open(csr)]


def approve_once(kube: Kube, name: str = "", policy_file: Path | None = None) -> list[PendingRequest]:
    """Approve one request by name, or every one that is right; returns what was approved. Raises UsageError when the
    named one is not there, is decided already, or is not right."""
    if not name:
        chosen = [request for request in pending(kube, policy_file) if request.right]
    else:
        csr = kube.find(f"{CSRS}/{name}")
        if csr is None:
            raise UsageError(f"there is no certificate signing request {name!r}", hint="`invoke approve` lists them")
        if not is_open(csr):
            raise UsageError(f"{name} is decided already, or not a serving certificate's")
        request = _judged(kube, csr, policy_file)
        if not request.right:
            raise UsageError(f"{name} is not approved: {request.why}")
        chosen = [request]
    for request in chosen:
        approve(kube, kube.get(f"{CSRS}/{request.name}"), request.why)
    return chosen


def _judged(kube: Kube, csr: KubeObject, policy_file: Path | None) -> PendingRequest:
    node = requesting_node(csr)
    verdict = consider(kube, csr, policy_file)
    return PendingRequest(
        name=str(csr["metadata"]["name"]),
        node=node or str(csr["spec"].get("username")),
        right=verdict.approve,
        why=verdict.why,
    )
