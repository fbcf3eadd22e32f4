"""What of a security context holds for a guest that has no user: a pod cannot ask for root and for not being it.

kubelet's ``verifyRunAsNonRoot`` (pkg/kubelet/kuberuntime/security_context_others.go), but for a user that only the
image names: a module runs as none, so every image keeps ``runAsNonRoot`` where the pod names no user.
"""

from __future__ import annotations

from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.volumes.base import ContainerConfigError


def refuse_root(pod: Pod, container: Container) -> None:
    """Raises ContainerConfigError, with the kubelet's message, for the user 0 where ``runAsNonRoot`` holds."""
    if _effective(pod, container, "runAsNonRoot") is True and _effective(pod, container, "runAsUser") == 0:
        raise ContainerConfigError(
            f'container\'s runAsUser breaks non-root policy (pod: "{pod_fields.format_pod(pod)}", '
            f"container: {container['name']})"
        )


def _effective(pod: Pod, container: Container, field: str) -> Any:
    """A container's own field stands above its pod's."""
    own = (container.get("securityContext") or {}).get(field)
    return own if own is not None else (pod["spec"].get("securityContext") or {}).get(field)
