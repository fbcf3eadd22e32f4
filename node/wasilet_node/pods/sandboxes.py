"""A pod's sandbox: what its containers have in common and lose together, and how a pod begins anew without it.

Elsewhere a sandbox is a process that the kubelet can look for. Here it is the supervisors' keeping: a pod has its
sandbox for as long as none of the supervisors that ran its containers has gone, by a ``shutdown``, a restart of the
machine, or a crash. Each instance carries the sandbox's id, so that an agent that starts again knows it, and so that an
instance that was started a moment after the loss is still known to belong to what is lost.

kubelet's ``computePodActions`` begins a pod anew when its sandbox has changed: init containers first, sidecars in their
order. A pod that would start nothing then is at its end instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from wasilet_node.pods import spec
from wasilet_node.pods.spec import Pod
from wasilet_node.runtime.protocol import ContainerStatus

ANNOTATION_SANDBOX = "wasilet.dev/sandbox"
"""On every instance: the id of the sandbox that it was started in."""

CHANGED_REASON = "SandboxChanged"
CHANGED_MESSAGE = "Pod sandbox changed, it will be killed and re-created."
"""kubelet's event."""


class PodSandbox:
    """The present sandbox of one pod; belongs to the pod's worker."""

    def __init__(self, instances: Iterable[ContainerStatus]) -> None:
        """``instances``: what is known of the pod when its worker begins."""
        newest = max(instances, key=lambda instance: instance.created_at_ns, default=None)
        self.id = _new_id() if newest is None else _sandbox_of(newest)

    def holds(self, instance: ContainerStatus) -> bool:
        """It was started in this sandbox, and not in one before."""
        return _sandbox_of(instance) == self.id

    def is_lost(self, instances: Iterable[ContainerStatus]) -> bool:
        """A supervisor that ran a container of it is gone."""
        return any(instance.inherited and self.holds(instance) for instance in instances)

    def replace(self) -> None:
        """What is started from now on is in a new one."""
        self.id = _new_id()


def begins_anew(pod: Pod, latest: Mapping[str, ContainerStatus]) -> bool:
    """Whether a pod that has lost its sandbox gets another. ``latest`` maps names to newest instances.

    Not under ``Never``: what was lost has failed. And not when initialization was over and no regular container has to
    run once more.
    """
    if pod["spec"].get("restartPolicy") == "Never":
        return not latest
    instances = {container["name"]: latest.get(container["name"]) for container in spec.regular_containers(pod)}
    if not any(instances.values()):
        return True
    return any(
        instance is None or instance.exit_code is None or spec.should_restart(container, pod, instance.exit_code)
        for container in spec.regular_containers(pod)
        for instance in [instances[container["name"]]]
    )


def _sandbox_of(instance: ContainerStatus) -> str:
    return instance.annotations.get(ANNOTATION_SANDBOX, "")


def _new_id() -> str:
    return secrets.token_hex(8)
