"""A pod that begins again: which containers have to, what counts as a crash, and stopping what is left of it.

What a sandbox is, and when a pod begins again, is in ``wasilet_node.pods.sandboxes``.
"""

from __future__ import annotations

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod, Role

from wasilet_node.pods import sandboxes, termination
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.instances import Instances
from wasilet_node.pods.sandboxes import PodSandbox
from wasilet_node.pods.termination import Grace
from wasilet_node.runtime.protocol import ContainerStatus


class Renewal:
    """Belongs to one pod's worker."""

    def __init__(self, dependencies: PodDependencies, instances: Instances) -> None:
        self._dependencies = dependencies
        self._instances = instances
        self._sandbox = PodSandbox(instances)

    @property
    def label(self) -> str:
        """For the instance that is started now."""
        return self._sandbox.label

    def is_lost(self) -> bool:
        """The present sandbox is gone."""
        return self._sandbox.is_lost(self._instances)

    def former(self) -> frozenset[str]:
        """The containers whose newest instance ran in a sandbox before the present one."""
        return frozenset(
            name for name, instance in self._instances.latest().items() if not self._sandbox.holds(instance)
        )

    def reset(self, pod: Pod) -> frozenset[str]:
        """The containers that have to begin again in the present sandbox. Ephemeral ones are left as they are."""
        once = _ephemeral(pod)
        return frozenset(
            name
            for name, instance in self._instances.latest().items()
            if name not in once and self._sandbox.holds(instance) and not self._sandbox.is_present(instance)
        )

    def restarts_all(self, pod: Pod) -> str:
        """The container whose end restarts the whole pod; empty: there is none."""
        return sandboxes.restarts_all(pod, self._instances.latest(), self._sandbox)

    def has_crashed(self, role: Role, container: Container, ended: ContainerStatus) -> bool:
        """Whether an end counts for the back-off: not that of an init container of a sandbox that is gone, and when all
        containers restart, only that of the one that made them."""
        if self._sandbox.is_present(ended):
            return True
        if self._sandbox.holds(ended):
            return (
                ended.exit_code is not None
                and pod_fields.exit_action(container, ended.exit_code) == pod_fields.RESTART_ALL
            )
        return role is Role.REGULAR

    async def replace_sandbox(self, pod: Pod) -> None:
        """The sandbox is gone: stop what is left of the pod, and have it begin in another. May be repeated."""
        self._dependencies.events.event(pod, "Normal", sandboxes.CHANGED_REASON, sandboxes.CHANGED_MESSAGE)
        await self._stop(pod, self._instances.live(), grace_seconds=pod_fields.grace_seconds(pod))
        self._sandbox.replace()

    async def restart_all(self, pod: Pod) -> None:
        """Stop all containers but ephemeral ones, without grace; then they begin again. May be repeated."""
        once = _ephemeral(pod)
        live = {name: instance for name, instance in self._instances.live().items() if name not in once}
        await self._stop(pod, live, grace_seconds=0)
        self._sandbox.next_round()

    async def _stop(self, pod: Pod, live: dict[str, ContainerStatus], *, grace_seconds: float) -> None:
        if not live:
            return
        grace = Grace(grace_seconds)
        try:
            await termination.stop_pod(self._dependencies, pod, live, grace=grace, observe=self._instances.observe)
        finally:
            grace.close()
        for instance in live.values():
            self._instances.assume_dead(instance)


def _ephemeral(pod: Pod) -> set[str]:
    return {str(container["name"]) for container in pod_fields.ephemeral_containers(pod)}
