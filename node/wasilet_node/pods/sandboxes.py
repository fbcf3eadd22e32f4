"""A pod's sandbox: what its containers have in common and lose together, and how a pod begins again without it.

Elsewhere a sandbox is a process that the kubelet can look for. Here it is the supervisors' keeping: a pod has its
sandbox for as long as none of the supervisors that ran its containers has gone, by a ``shutdown``, a restart of the
machine, or a crash. Each instance carries the sandbox's id, so that an agent that starts again knows it, and so that an
instance that was started a moment after the loss is still known to belong to what is lost.

kubelet's ``computePodActions`` begins a pod again when its sandbox has changed: init containers first, sidecars in
their order. A pod that would start nothing then is at its end instead.

Within one sandbox a pod may begin again too, when a container ends with a code for which a rule of its says
``RestartAllContainers`` (KEP-5532). Each such beginning is a round of the sandbox, and instances carry its number.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod

from wasilet_node.runtime.protocol import ContainerState, ContainerStatus

ANNOTATION_SANDBOX = "wasilet.dev/sandbox"
"""On every instance: the sandbox that it was started in, and the round, as ``<id>.<round>``."""

CHANGED_REASON = "SandboxChanged"
CHANGED_MESSAGE = "Pod sandbox changed, it will be killed and re-created."
"""kubelet's event."""

RESTARTING_REASON = "RestartingAllContainers"
"""kubelet's reason of a container that was ended only because another one restarts the whole pod."""

RESTARTING_MESSAGE = "The container is removed because RestartAllContainers in place"


class PodSandbox:
    """The present sandbox of one pod; belongs to the pod's worker."""

    def __init__(self, instances: Iterable[ContainerStatus]) -> None:
        """``instances``: what is known of the pod when its worker begins."""
        known = list(instances)
        # Not by time alone: after a restart a machine without its own clock may be behind what it knew before.
        newest = max(known, key=lambda instance: (not instance.inherited, instance.created_at_ns), default=None)
        self._id = secrets.token_hex(8) if newest is None else _sandbox_of(newest)[0]
        self._round = max((_sandbox_of(each)[1] for each in known if self.holds(each)), default=0)

    @property
    def label(self) -> str:
        """For the annotation of an instance that is started now."""
        return f"{self._id}.{self._round}"

    def holds(self, instance: ContainerStatus) -> bool:
        """It was started in this sandbox, and not in one before."""
        return _sandbox_of(instance)[0] == self._id

    def is_present(self, instance: ContainerStatus) -> bool:
        """It was started in this sandbox and in the present round."""
        return _sandbox_of(instance) == (self._id, self._round)

    def is_lost(self, instances: Iterable[ContainerStatus]) -> bool:
        """A supervisor that ran a container of it is gone."""
        return any(instance.inherited and self.holds(instance) for instance in instances)

    def replace(self) -> None:
        """What is started from now on is in a new one."""
        self._id, self._round = secrets.token_hex(8), 0

    def next_round(self) -> None:
        """What is started from now on begins the pod again."""
        self._round += 1


def begins_again(pod: Pod, latest: Mapping[str, ContainerStatus]) -> bool:
    """Whether a pod that has lost its sandbox gets another. ``latest`` maps names to newest instances.

    Not under ``Never``: what was lost has failed. And not when initialization was over and no regular container has to
    run once more.
    """
    if pod["spec"].get("restartPolicy") == "Never":
        return not latest
    instances = {container["name"]: latest.get(container["name"]) for container in pod_fields.regular_containers(pod)}
    if not any(instances.values()):
        return True
    return any(
        instance is None or instance.exit_code is None or pod_fields.should_restart(container, pod, instance.exit_code)
        for container in pod_fields.regular_containers(pod)
        for instance in [instances[container["name"]]]
    )


def restarts_all(pod: Pod, latest: Mapping[str, ContainerStatus], sandbox: PodSandbox) -> str:
    """The container whose end restarts the whole pod; empty: there is none."""
    for container in (*pod_fields.init_containers(pod), *pod_fields.regular_containers(pod)):
        instance = latest.get(container["name"])
        if (
            instance is not None
            and instance.state is ContainerState.EXITED
            and instance.exit_code is not None
            and sandbox.is_present(instance)
            and pod_fields.exit_action(container, instance.exit_code) == pod_fields.RESTART_ALL
        ):
            return str(container["name"])
    return ""


def _sandbox_of(instance: ContainerStatus) -> tuple[str, int]:
    sandbox, _, number = instance.annotations.get(ANNOTATION_SANDBOX, "").partition(".")
    return sandbox, int(number) if number.isdecimal() else 0
