"""What is known of the instances of one pod's containers, from any source and in any order.

Events of the runtime, answers to a start or a stop, and whole lists report the same instances, late, twice or not at
all. Knowledge only grows: an instance goes from created to running to exited and never back, one that a list lacks has
ended in an unknown way, and a list that was asked for before an instance was seen says nothing about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from wasilet_node.pods import recovery
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus

_ORDER = {ContainerState.CREATED: 0, ContainerState.RUNNING: 1, ContainerState.EXITED: 2}
_KEPT = 2
"""The newest instance and the one before it, whose log ``kubectl logs --previous`` shows."""


class Instances:
    """Belongs to one pod's worker; needs a running loop."""

    def __init__(
        self,
        known: dict[str, list[ContainerStatus]],
        *,
        changed: Callable[[], None],
        ended: Callable[[ContainerStatus, bool], None],
    ) -> None:
        """``known``: by container, newest first. ``changed`` is called at every news. ``ended`` is called for every
        instance that is reported to have ended, and whether it is its container's newest; it may be called again."""
        self.by_container = known
        self._changed = changed
        self._ended = ended
        self._seen_at: dict[str, float] = {}
        for instance in self:
            self._note(instance)

    def __iter__(self) -> Iterator[ContainerStatus]:
        """All of them."""
        return (instance for known in list(self.by_container.values()) for instance in list(known))

    def of(self, container: str) -> Sequence[ContainerStatus]:
        """Those of one container, newest first."""
        return tuple(self.by_container.get(container, ()))

    def latest(self) -> dict[str, ContainerStatus]:
        """The newest instance of each container."""
        return {name: known[0] for name, known in self.by_container.items() if known}

    def live(self) -> dict[str, ContainerStatus]:
        """The instances that have not ended, by container. A container never has two."""
        return {name: i for name, i in self.latest().items() if i.state is not ContainerState.EXITED}

    def running(self) -> dict[str, ContainerStatus]:
        """The instances that run, by container."""
        return {name: i for name, i in self.latest().items() if i.state is ContainerState.RUNNING}

    def observe(self, instance: ContainerStatus) -> None:
        """The runtime's report on one instance."""
        known = self.by_container.setdefault(instance.container_name, [])
        for i, before in enumerate(known):
            if before.id == instance.id:
                if _ORDER[instance.state] < _ORDER[before.state]:
                    return
                known[i] = recovery.with_start_of(instance, before.started_at_ns)
                break
        else:
            known.append(instance)
            known.sort(key=lambda each: (each.attempt, each.created_at_ns), reverse=True)
        self._note(instance)

    def started(self, instance: ContainerStatus) -> None:
        """The answer to a start: lists that were asked for until now may lack it."""
        self._seen_at[instance.id] = asyncio.get_running_loop().time()
        self.observe(instance)

    def relisted(self, alive: Mapping[str, ContainerStatus], *, asked_at: float) -> None:
        """A whole list of the runtime, asked for at ``asked_at`` (monotonic): instances it lacks are lost."""
        known = list(self)
        for instance in known:
            listed = alive.get(instance.id)
            if listed is not None:
                if listed.state is not instance.state:
                    self.observe(listed)
                elif listed.inherited and not instance.inherited:
                    # The rest of what is known is at least as good as the record of one that came later.
                    self.observe(replace(instance, inherited=True))
            elif instance.state is not ContainerState.EXITED and self._seen_at.get(instance.id, 0.0) < asked_at:
                self.observe(replace(recovery.unknown_end(instance), inherited=True))
        known_ids = {instance.id for instance in known}
        for container_id, listed in alive.items():
            if container_id not in known_ids and listed.state is not ContainerState.EXITED:
                self.observe(listed)

    def assume_dead(self, instance: ContainerStatus) -> None:
        """It was stopped, so it does not run, even if the runtime could not report how it ended."""
        for known in self.of(instance.container_name):
            if known.id == instance.id and known.state is not ContainerState.EXITED:
                self.observe(recovery.unknown_end(known))

    def outdated(self, container: str) -> ContainerStatus | None:
        """The oldest one, if there are more than need be kept."""
        known = self.of(container)
        return known[-1] if len(known) > _KEPT else None

    def forget(self, instance: ContainerStatus) -> None:
        """Nothing of it is left."""
        name = instance.container_name
        self.by_container[name] = [known for known in self.of(name) if known.id != instance.id]
        self._seen_at.pop(instance.id, None)

    def _note(self, instance: ContainerStatus) -> None:
        self._seen_at.setdefault(instance.id, asyncio.get_running_loop().time())
        if instance.state is ContainerState.EXITED:
            newest = self.by_container.get(instance.container_name, [instance])[0].id == instance.id
            self._ended(instance, newest)
        self._changed()
