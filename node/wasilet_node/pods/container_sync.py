"""What runs of one pod, compared with what its spec asks for: what is to be done next, and the doing of it.

:meth:`ContainerSync.decide` looks at everything again and answers with one job at most; the worker runs it in a task of
its own and asks again afterwards, so a job may fail or be cancelled at any point.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from wasilet_common import pod_fields
from wasilet_common.backoff import RetryBackoff
from wasilet_common.cri_log import layout
from wasilet_common.pod_fields import Container, Pod, Role

from wasilet_node.kube import fields
from wasilet_node.network.errors import NetworkError
from wasilet_node.pods import sandboxes, termination
from wasilet_node.pods.concurrency import side_by_side
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.instances import Instances
from wasilet_node.pods.plan import Kill, KillReason, Plan, make_plan
from wasilet_node.pods.refresher import Refresher
from wasilet_node.pods.renewal import Renewal
from wasilet_node.pods.resize import Change, Resizes
from wasilet_node.pods.results import ProbeResults
from wasilet_node.pods.start_attempts import StartAttempts
from wasilet_node.pods.status import Waiting
from wasilet_node.pods.status_pace import FIRST_SECONDS
from wasilet_node.pods.termination import Grace
from wasilet_node.pods.termination_message import TerminationMessages
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, RuntimeUnavailableError
from wasilet_node.volumes.base import ContainerConfigError, VolumeError, VolumeRefusedError

logger = logging.getLogger(__name__)

Job = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the worker does next."""

    end: bool = False
    """The pod is at its end."""

    job: Job | None = None
    again_in: float | None = None
    """Seconds until it has to be looked at again, whatever happens; None: when something happens."""


class Jobs(Protocol):
    """The worker, as far as its jobs need it."""

    def wake(self) -> None:
        """Look again at once."""

    def put_off(self, retry: RetryBackoff | None = None) -> None:
        """No job for a while: by this back-off, or by that of jobs that fail."""

    async def publish_status(self) -> None:
        """Have the API server know the status, within a second or so."""


class ContainerSync:
    """Belongs to one pod's worker, which keeps ``pod`` up to date."""

    def __init__(
        self,
        dependencies: PodDependencies,
        pod: Pod,
        *,
        instances: Instances,
        results: ProbeResults,
        messages: TerminationMessages,
        jobs: Jobs,
        held: Waiting | None = None,
    ) -> None:
        """``held``: see ``PodWorker``."""
        self.pod = pod
        self.held = held
        self.volumes_ready = False
        self.renewal = Renewal(dependencies, instances)
        self.resizes = Resizes(dependencies, pod, instances.running().values())
        self.attempts = StartAttempts(dependencies, late=instances.observe)
        self.refresher = Refresher(dependencies)
        self._dependencies = dependencies
        self._instances = instances
        self._results = results
        self._messages = messages
        self._jobs = jobs
        self._volume_retry = RetryBackoff(initial=dependencies.timing.config_retry_first)

    def seed_back_off(self) -> None:
        """From what ended before a restart of the agent."""
        if self.renewal.is_lost():
            return
        for name, latest in self._instances.latest().items():
            found = pod_fields.find_container(self.pod, name)
            if found is not None:
                self.attempts.seed_back_off(found[1], latest)

    # ---- deciding

    def decide(self, now: float, *, busy: bool, put_off_seconds: float) -> Decision:
        """``busy``: a job runs. ``put_off_seconds``: how long none begins, because the last one has just failed."""
        latest = self._instances.latest()
        free = not busy and put_off_seconds <= 0
        if self.renewal.is_lost():
            if not sandboxes.begins_again(self.pod, latest):
                return Decision(end=True)
            return _begin(self._renew_sandbox, busy=busy, put_off_seconds=put_off_seconds)
        source = self.renewal.restarts_all(self.pod)
        found = pod_fields.find_container(self.pod, source) if source else None
        left = self.attempts.backoff_remaining(found[1], latest[source], now) if found is not None else 0.0
        if found is not None and left <= 0:
            return _begin(self._restart_all, busy=busy, put_off_seconds=put_off_seconds)
        delays: list[float | None] = []
        if found is not None:
            # In back-off, which an init container's successors wait for too.
            self.attempts.note_back_off(self.pod, source, latest[source])
            if found[0] is not Role.REGULAR:
                return Decision(again_in=left)
            delays.append(left)
        restarts, moves = self._resize(now)
        delays.append(self.resizes.retry_in(now))
        plan = self._plan(now, restarts)
        job: Job | None = None
        if moves and not busy:
            if free:
                job = partial(self._move_limits, moves)
                busy = True
            else:
                delays.append(put_off_seconds)
        if plan.finished and not busy:
            return Decision(end=True)
        delays += self._waits(plan, now)
        if not busy and (plan.start or plan.kill or not self.volumes_ready):
            if free:
                job = partial(self._carry_out, plan)
                busy = True
            else:
                delays.append(put_off_seconds)
        if self.volumes_ready and not busy:
            delays.append(self.refresher.check(self.resizes.accepted(self.pod), now))
        return Decision(job=job, again_in=soonest(*delays))

    def _plan(self, now: float, restarts: list[Kill]) -> Plan:
        plan = make_plan(
            self.pod,
            self._instances.latest(),
            self._results,
            lambda c, i: self.attempts.backoff_remaining(c, i, now),
            former=self.renewal.former(),
            reset=self.renewal.reset(self.pod),
        )
        killed = {kill.container for kill in plan.kill}
        plan.kill += [kill for kill in restarts if kill.container not in killed]
        return plan

    def _waits(self, plan: Plan, now: float) -> list[float]:
        """Takes what may not start yet out of the plan; when each of them may."""
        latest = self._instances.latest()
        waits = []
        for wait in plan.waiting:
            waits.append(wait.seconds)
            self.attempts.note_back_off(self.pod, wait.container, latest[wait.container])
        left = {name: self.attempts.retry_in(self.pod, name, now) for name in plan.start}
        plan.start = [name for name in plan.start if left[name] <= 0]
        return waits + [seconds for seconds in left.values() if seconds > 0]

    def _resize(self, now: float) -> tuple[list[Kill], list[Change]]:
        """Decide on a resize: what it restarts, and the limits that are moved."""
        if self.resizes.consider(self.pod, self._instances.running()):
            self.refresher.at_once()
        changes = list(self.resizes.changes(self.pod, self._instances.running(), now))
        restarts = [
            Kill(
                container=change.container["name"],
                container_id=change.instance.id,
                reason=KillReason.RESIZE,
                message=f"Container {change.container['name']} resize requires restart",
                restart=True,
            )
            for change in changes
            if change.restart
        ]
        return restarts, [change for change in changes if not change.restart]

    # ---- jobs

    async def _move_limits(self, moves: list[Change]) -> None:
        for change in moves:
            moved = await self.resizes.make(self.pod, change, self._dependencies.wall_clock())
            if moved is not None:
                self._instances.observe(moved)

    async def _restart_all(self) -> None:
        """Clients are told first, as kubelet does, but an API server that is away does not hold the restart up."""
        await self._messages.settle()
        await self._jobs.publish_status()
        await self.renewal.restart_all(self.pod)

    async def _renew_sandbox(self) -> None:
        await self.renewal.replace_sandbox(self.pod)
        self.volumes_ready = False

    async def _carry_out(self, plan: Plan) -> None:
        with self._dependencies.under_way.one():
            await self._kill_and_start(plan)

    async def _kill_and_start(self, plan: Plan) -> None:
        fresh = set()
        for kill in plan.kill:
            found = pod_fields.find_container(self.pod, kill.container)
            instance = self._instances.latest().get(kill.container)
            if found is None or instance is None or instance.id != kill.container_id:
                continue
            grace_seconds = termination.kill_grace(self.pod, found[1], kill.reason)
            await self._kill(found[1], instance, message=kill.message, grace_seconds=grace_seconds)
            if kill.restart:
                fresh.add(kill.container)
        if not self.volumes_ready and not await self._set_up():
            return
        # In time for the first status of a pod whose image is being pulled; most containers start sooner than this.
        shown = asyncio.get_running_loop().call_later(FIRST_SECONDS / 2, self._jobs.wake)
        try:
            for name in (*fresh, *plan.start):
                await self._start(name, fresh=name in fresh)
        finally:
            shown.cancel()

    async def _set_up(self) -> bool:
        """What all containers have in common, as a sandbox elsewhere: the host's name, and the volumes."""
        try:
            fields.process_hostname(self.pod)
            await side_by_side(
                self._dependencies.volumes.setup(self.resizes.accepted(self.pod)),
                self._dependencies.networks.attach(self.pod, None),
            )
        except (fields.FieldError, NetworkError) as error:
            message = f"Failed to create pod sandbox: {error}"
            self._dependencies.events.event(self.pod, "Warning", "FailedCreatePodSandBox", message)
            self._jobs.put_off(self._volume_retry)
            return False
        except VolumeRefusedError as error:
            self.held = Waiting(reason="CreateContainerConfigError", message=str(error))
            self._jobs.wake()
            return False
        except (VolumeError, ContainerConfigError) as error:
            self._dependencies.events.event(self.pod, "Warning", "FailedMount", str(error))
            self._jobs.put_off(self._volume_retry)
            return False
        self.volumes_ready = True
        self._volume_retry.reset()
        self.refresher.set_up()
        return True

    async def _start(self, name: str, *, fresh: bool = False) -> None:
        pod = self.resizes.accepted(self.pod)
        found = pod_fields.find_container(pod, name)
        if found is None:
            return
        role, container = found
        latest = self._instances.latest().get(name)
        if latest is not None and latest.state is not ContainerState.EXITED:
            return
        if self.attempts.unsure and not await self._ask_runtime():
            return
        await self._messages.settle()
        fresh = fresh or (latest is not None and not self.renewal.has_crashed(role, container, latest))
        started = await self.attempts.start(pod, container, latest, sandbox=self.renewal.label, fresh=fresh)
        if started is None:
            self._jobs.wake()
            return
        self._instances.started(started)
        await self._forget_older(container["name"])
        if not await self.attempts.post_start(self.pod, container, started):
            grace_seconds = pod_fields.grace_seconds(self.pod)
            await self._kill(container, started, message="FailedPostStartHook", grace_seconds=grace_seconds)

    async def _kill(
        self, container: Container, instance: ContainerStatus, *, message: str, grace_seconds: float
    ) -> None:
        """End one container while its pod goes on."""
        grace = Grace(grace_seconds)
        try:
            stopped = await termination.kill_container(
                self._dependencies, self.pod, container, instance, message=message, grace=grace
            )
        finally:
            grace.close()
        if stopped is not None:
            self._instances.observe(stopped)
        self._instances.assume_dead(instance)

    async def _ask_runtime(self) -> bool:
        """After a start whose outcome is not known. False: still not known, or the instance was found; look again."""
        try:
            listed = await self._dependencies.runtime.list()
        except RuntimeUnavailableError:
            self._jobs.put_off()
            return False
        known = {instance.id for instance in self._instances}
        found = [i for i in listed if i.pod_uid == pod_fields.uid(self.pod) and i.id not in known]
        for instance in found:
            self._instances.observe(instance)
        self.attempts.unsure = False
        return not found

    async def _forget_older(self, name: str) -> None:
        """Keep the newest instance and the one before it."""
        while (old := self._instances.outdated(name)) is not None:
            try:
                if old.log_path:
                    await self._dependencies.runtime.remove(old.id)
            except RuntimeUnavailableError as error:
                logger.info("the record of %s is left to the next restart: %s", old.id, error)
                return
            folder = layout.folder_of_pod(self._dependencies.paths.logs, self.pod) / name
            await asyncio.to_thread(layout.remove_attempt, folder, old.attempt)
            self._instances.forget(old)
            self._messages.forget(old.id)


def soonest(*delays: float | None) -> float | None:
    """The shortest of them; None: there is none."""
    return min((delay for delay in delays if delay is not None), default=None)


def _begin(job: Job, *, busy: bool, put_off_seconds: float) -> Decision:
    if busy:
        return Decision()
    return Decision(again_in=put_off_seconds) if put_off_seconds > 0 else Decision(job=job)
