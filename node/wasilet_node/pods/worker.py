"""One pod: the task that brings what runs to what the spec asks for, and the status to what runs.

A worker is level-triggered. Whatever happens (a watch event, an exit, a probe, a timer) only wakes it; it then looks at
everything anew, computes the status, and decides. It never waits itself: work that takes time is one job at a time in
a task of its own (sync, end or finish), so that a deletion is seen while an image is pulled.

Stages go one way::

    ACTIVE ──(deleted, removed, evicted, past its deadline, all done)──> ENDING ──(all stopped)──> ENDED
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from wasilet_common.time_format import NANOSECONDS, parse_rfc3339, rfc3339

from wasilet_node.kube import fields
from wasilet_node.kube.base import KubeError, NotFoundError
from wasilet_node.network.errors import NetworkError
from wasilet_node.pods import log_layout, recovery, resources, sandboxes, spec, termination
from wasilet_node.pods import status as status_of
from wasilet_node.pods.backoff import NotBefore, RetryBackoff
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.instances import Instances
from wasilet_node.pods.plan import Kill, KillReason, Plan, has_ever_started, make_plan
from wasilet_node.pods.probes import PodProbes
from wasilet_node.pods.refresher import Refresher
from wasilet_node.pods.renewal import Renewal
from wasilet_node.pods.resize import Change, Resizes
from wasilet_node.pods.resources import Requests
from wasilet_node.pods.results import ProbeResults
from wasilet_node.pods.spec import Container, Pod, Role
from wasilet_node.pods.start_attempts import Starter
from wasilet_node.pods.status import Facts, Verdict, Waiting
from wasilet_node.pods.status_writer import StatusPatcher
from wasilet_node.pods.termination import Grace
from wasilet_node.pods.termination_message import LastWords
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, RuntimeUnavailableError
from wasilet_node.volumes.base import ContainerConfigError, VolumeError, VolumeRefusedError

logger = logging.getLogger(__name__)

DEADLINE = Verdict(reason="DeadlineExceeded", message="Pod was active on the node longer than the specified deadline")


_TOLD_FIRST_SECONDS = 1.0
"""How long a restart of all containers waits until its condition is in the API server."""


class Stage(IntEnum):
    """How far a pod has come."""

    ACTIVE = 0
    ENDING = 1
    ENDED = 2


class PodWorker:
    """Everything the node knows of one pod (one uid)."""

    def __init__(
        self,
        services: PodDependencies,
        pod: Pod,
        *,
        instances: Iterable[ContainerStatus] = (),
        rejected: Verdict | None = None,
        held: Waiting | None = None,
    ) -> None:
        """``rejected``: admission's refusal, which makes the pod Failed. ``held``: the pod can never run here but is
        kept waiting, because its controller would replace a failed one for ever."""
        self.services = services
        self.pod = pod
        self.uid = spec.uid(pod)
        self.stage = Stage.ACTIVE
        self.verdict = rejected
        self.results = ProbeResults()
        self.removed = False
        self.status: Mapping[str, Any] = pod.get("status") or {}
        self._rejected = rejected is not None
        self._held = held
        self._wake = asyncio.Event()
        self._patcher = StatusPatcher(services.kube, pod, on_gone=self.remove)
        self._probes = PodProbes(
            pod,
            runtime=services.runtime,
            networks=services.networks,
            events=services.events,
            results=self.results,
            changed=self._wake.set,
            observe=services.observe_probe,
        )
        self._starter = Starter(services, late=self.observe)
        self._refresher = Refresher(services)
        self._last_words = LastWords(services, changed=self._wake.set)
        self._job: asyncio.Task[None] | None = None
        self._volumes_ready = False
        self._volume_retry = RetryBackoff(initial=services.timing.config_retry_first)
        self._job_retry = RetryBackoff()
        self._not_before = NotBefore()
        self._grace: Grace | None = None
        self._stopped = False
        self._finished = False
        self.instances = Instances(
            recovery.instances_of(pod, instances),
            changed=self._wake.set,
            ended=lambda instance, newest: self._last_words.note(self.pod, instance, newest=newest),
        )
        self._renewal = Renewal(services, self.instances)
        self._resizes = Resizes(services, pod, self.instances.running().values())
        self._counted: tuple[Pod, Requests] | None = None
        if not self._renewal.is_lost():
            for name, latest in self.latest().items():
                found = spec.find_container(pod, name)
                if found is not None:
                    self._starter.seed_back_off(found[1], latest)

    # ---- what the manager tells

    def update(self, pod: Pod, *, listed: bool = False) -> None:
        """A newer state of the pod from the watch; ``listed``: from a whole list."""
        if not self._patcher.observed(pod, listed=listed):
            return
        before, self.pod = self.pod, pod
        if any(before["metadata"].get(k) != pod["metadata"].get(k) for k in ("labels", "annotations")):
            self._refresher.at_once()
        if spec.is_deleted(pod) and self._grace is not None:
            self._grace.shorten(spec.grace_seconds(pod))
        self._wake.set()

    def remove(self) -> None:
        """The API server no longer has the pod."""
        self.removed = True
        self._patcher.stop()
        if self._grace is not None and self.pod["metadata"].get("deletionGracePeriodSeconds") == 0:
            self._grace.shorten(0)
        self._wake.set()

    def observe(self, instance: ContainerStatus) -> None:
        """The runtime's word on one instance."""
        self.instances.observe(instance)

    def relisted(self, alive: Mapping[str, ContainerStatus], *, asked_at: float) -> None:
        """See ``Instances.relisted``."""
        self.instances.relisted(alive, asked_at=asked_at)

    def end(self, verdict: Verdict, *, grace_seconds: float) -> None:
        """Evict: stop the pod and make it Failed for this reason."""
        if self.stage is Stage.ACTIVE and self.verdict is None:
            self.verdict = verdict
            self._begin_to_end(min(grace_seconds, spec.grace_seconds(self.pod)))
            self._wake.set()

    # ---- what others ask

    @property
    def holds_resources(self) -> bool:
        """It counts against the node's capacity: it may run, or something of it still does."""
        return not (self._rejected or self._stopped or (spec.is_terminal(self.pod) and not self.instances.live()))

    def requests(self) -> Requests:
        """What counts against the node: of what has been accepted. Raises QuantityError."""
        accepted = self._resizes.accepted(self.pod)
        if self._counted is None or self._counted[0] is not accepted:
            self._counted = (accepted, resources.pod_requests(accepted))
        return self._counted[1]

    def pod_with_status(self) -> Pod:
        """The spec with the latest status, sent or not."""
        return {**self.pod, "status": self.status}

    def latest(self) -> dict[str, ContainerStatus]:
        """The newest instance of each container."""
        return self.instances.latest()

    # ---- the task

    async def run(self) -> None:
        """Until the pod is gone from the API server and the node. Cancelling it leaves its containers running."""
        try:
            while not (self._finished and self.removed):
                self._wake.clear()
                try:
                    delay = self._step()
                except Exception:
                    logger.exception("pod %s", spec.format_pod(self.pod))
                    delay = 5.0
                try:
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._probes.close()
            if self._grace is not None:
                self._grace.close()
            if self._job is not None:
                self._job.cancel()
                await asyncio.wait({self._job})
            await self._last_words.close()
            await self._refresher.close()
            await self._patcher.close()

    def _step(self) -> float | None:
        """Look at everything, start what is to be done, publish. Returns when to look again, in seconds."""
        now = self.services.wall_clock()
        delays: list[float] = []
        if self.stage is Stage.ACTIVE:
            self._decide_the_end(now, delays)
        if self.stage is Stage.ACTIVE:
            self._probes.sync(self.pod, self.instances.running())
            if self._held is None:
                self._sync(now, delays)
        if self.stage is Stage.ENDING and self._job is None:
            self._spawn(self._end(), now, delays)
        gone = spec.is_deleted(self.pod) or self.removed
        if gone and self.stage is Stage.ENDED and self._job is None and not self._finished:
            self._spawn(self._finish(), now, delays)
        self._publish()
        return max(0.001, min(delays)) if delays else None

    def _spawn(self, job: Any, now: float, delays: list[float]) -> None:
        """Begin a job, unless the last one failed a moment ago."""
        if (left := self._not_before.left(now)) > 0:
            job.close()
            delays.append(left)
            return
        self._job = asyncio.create_task(job, name=f"pod {spec.format_pod(self.pod)}")
        self._job.add_done_callback(self._job_ended)

    def _put_off(self, retry: RetryBackoff) -> None:
        self._not_before = NotBefore(self.services.wall_clock(), retry.next())

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        self._job = None
        self._wake.set()
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("pod %s: a job failed", spec.format_pod(self.pod), exc_info=error)
            self._put_off(self._job_retry)
        elif self._not_before.left(self.services.wall_clock()) <= 0:
            self._job_retry.reset()

    # ---- the end

    def _decide_the_end(self, now: float, delays: list[float]) -> None:
        if self.removed or spec.is_deleted(self.pod):
            self._begin_to_end(spec.grace_seconds(self.pod))
        elif self._rejected or spec.is_terminal(self.pod):
            self._begin_to_end(0)
        elif (limit := self.pod["spec"].get("activeDeadlineSeconds")) is not None:
            started = parse_rfc3339(self.status.get("startTime"))
            left = float(limit) - (now - started) if started is not None else float(limit)
            if left <= 0:
                self.services.events.event(self.pod, "Normal", DEADLINE.reason, DEADLINE.message)
                self.verdict = DEADLINE
                self._begin_to_end(spec.grace_seconds(self.pod))
            else:
                delays.append(left)

    def _begin_to_end(self, grace_seconds: float) -> None:
        if self.stage is not Stage.ACTIVE:
            return
        self.stage = Stage.ENDING
        self._grace = Grace(grace_seconds)
        self._probes.end_with_pod()
        self._not_before = NotBefore()
        if self._job is not None:
            self._job.cancel()

    async def _end(self) -> None:
        """Stop what runs, then take the volumes down. Comes back here after a failure; every step may be repeated."""
        grace = self._grace or Grace(0)
        live = self.instances.live()
        if live:
            try:
                await termination.stop_pod(self.services, self.pod, live, grace=grace, observe=self.observe)
            except* RuntimeUnavailableError as errors:
                message = f"error killing pod: {errors.exceptions[0]}"
                self.services.events.event(self.pod, "Warning", "FailedKillPod", message)
                raise
            for instance in live.values():
                self.instances.assume_dead(instance)
        grace.close()
        await self._last_words.settle()
        await self._refresher.close()
        self._stopped = True
        self._probes.close()
        self._publish()
        await self.services.volumes.teardown(self.uid)
        await self.services.networks.detach(self.uid)
        self.services.references.release(self.uid)
        self.stage = Stage.ENDED

    async def _finish(self) -> None:
        """The final status, the deletion in the API server, then records and logs."""
        if not self.removed:
            self._publish()
            await self._patcher.flush()
        if not self.removed:
            try:
                await self.services.kube.delete(spec.path(self.pod), grace_period_seconds=0, uid=self.uid)
            except NotFoundError:
                self.removed = True
            except KubeError as error:
                logger.warning("deletion of %s: %s", spec.format_pod(self.pod), error)
                self._put_off(self._job_retry)
                return
        # From here on the pod may still be seen (a finalizer keeps it), but nothing of it is left on the node.
        for instance in self.instances:
            # What only the status knows has no record here, and its id is whatever somebody wrote there.
            if instance.log_path:
                await self.services.runtime.remove(instance.id)
        self.services.references.release(self.uid)
        await asyncio.to_thread(log_layout.remove_folder, log_layout.pod_folder(self.services.paths, self.pod))
        self._finished = True

    # ---- running

    def _sync(self, now: float, delays: list[float]) -> None:
        latest = self.latest()
        if self._renewal.is_lost():
            if not sandboxes.begins_anew(self.pod, latest):
                self._begin_to_end(spec.grace_seconds(self.pod))
            elif self._job is None:
                self._spawn(self._begin_anew(), now, delays)
            return
        if self._restart_all_is_due(now, delays):
            return
        restarts = self._resize(now, delays)
        plan = make_plan(
            self.pod,
            latest,
            self.results,
            lambda c, i: self._starter.backoff_remaining(c, i, now),
            former=self._renewal.former(),
            reset=self._renewal.reset(self.pod),
        )
        killed = {kill.container for kill in plan.kill}
        plan.kill += [kill for kill in restarts if kill.container not in killed]
        if plan.finished and self._job is None:
            self._begin_to_end(spec.grace_seconds(self.pod))
            return
        for wait in plan.waiting:
            delays.append(wait.seconds)
            self._starter.note_back_off(self.pod, wait.container, latest[wait.container])
        begin = []
        for name in plan.start:
            left = self._starter.retry_in(self.pod, name, now)
            if left > 0:
                delays.append(left)
            else:
                begin.append(name)
        if self._job is None and (begin or plan.kill or not self._volumes_ready):
            plan.start = begin
            self._spawn(self._carry_out(plan), now, delays)
        if self._volumes_ready and self._job is None:
            again = self._refresher.check(self._resizes.accepted(self.pod), now)
            if again is not None:
                delays.append(again)

    def _resize(self, now: float, delays: list[float]) -> list[Kill]:
        """Decide on a resize and begin to make it; what it restarts is for the plan."""
        if self._resizes.consider(self.pod, self.instances.running()):
            self._refresher.at_once()
        restarts: list[Kill] = []
        moves: list[Change] = []
        for change in self._resizes.changes(self.pod, self.instances.running(), now):
            name = change.container["name"]
            if change.restart:
                message = f"Container {name} resize requires restart"
                kill = Kill(
                    container=name,
                    container_id=change.instance.id,
                    reason=KillReason.RESIZE,
                    message=message,
                    restart=True,
                )
                restarts.append(kill)
            else:
                moves.append(change)
        if moves and self._job is None:
            self._spawn(self._move_limits(moves), now, delays)
        if (again := self._resizes.retry_in(now)) is not None:
            delays.append(again)
        return restarts

    async def _move_limits(self, moves: list[Change]) -> None:
        for change in moves:
            moved = await self._resizes.make(self.pod, change, self.services.wall_clock())
            if moved is not None:
                self.observe(moved)

    def _restart_all_is_due(self, now: float, delays: list[float]) -> bool:
        """A container has ended in a way that restarts them all. False: none has, or it is in back-off, which an init
        container's successors wait for too."""
        latest = self.latest()
        source = self._renewal.restarts_all(self.pod)
        found = spec.find_container(self.pod, source) if source else None
        if found is None:
            return False
        left = self._starter.backoff_remaining(found[1], latest[source], now)
        if left > 0:
            delays.append(left)
            self._starter.note_back_off(self.pod, source, latest[source])
            return found[0] is not Role.REGULAR
        if self._job is None:
            self._spawn(self._restart_all(), now, delays)
        return True

    async def _restart_all(self) -> None:
        """Clients are told first, as kubelet does, but an API server that is away does not hold the restart up."""
        await self._last_words.settle()
        self._publish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TOLD_FIRST_SECONDS):
                await self._patcher.flush()
        await self._renewal.restart_all(self.pod)

    async def _begin_anew(self) -> None:
        await self._renewal.replace_sandbox(self.pod)
        self._volumes_ready = False

    async def _carry_out(self, plan: Plan) -> None:
        fresh = set()
        for kill in plan.kill:
            found = spec.find_container(self.pod, kill.container)
            instance = self.latest().get(kill.container)
            if found is None or instance is None or instance.id != kill.container_id:
                continue
            grace_seconds = termination.kill_grace(self.pod, found[1], kill.reason)
            await self._kill(found[1], instance, message=kill.message, grace_seconds=grace_seconds)
            if kill.restart:
                fresh.add(kill.container)
        if not self._volumes_ready and not await self._set_up():
            return
        for name in (*fresh, *plan.start):
            await self._start(name, fresh=name in fresh)

    async def _set_up(self) -> bool:
        """What all containers have in common, as a sandbox elsewhere: the host's name, and the volumes."""
        try:
            fields.process_hostname(self.pod)
            await self.services.volumes.setup(self._resizes.accepted(self.pod))
            await self.services.networks.attach(self.pod)
        except (fields.FieldError, NetworkError) as error:
            message = f"Failed to create pod sandbox: {error}"
            self.services.events.event(self.pod, "Warning", "FailedCreatePodSandBox", message)
            self._put_off(self._volume_retry)
            return False
        except VolumeRefusedError as error:
            self._held = Waiting(reason="CreateContainerConfigError", message=str(error))
            self._wake.set()
            return False
        except (VolumeError, ContainerConfigError) as error:
            self.services.events.event(self.pod, "Warning", "FailedMount", str(error))
            self._put_off(self._volume_retry)
            return False
        self._volumes_ready = True
        self._volume_retry.reset()
        self._refresher.set_up()
        self._wake.set()
        return True

    async def _start(self, name: str, *, fresh: bool = False) -> None:
        pod = self._resizes.accepted(self.pod)
        found = spec.find_container(pod, name)
        if found is None:
            return
        role, container = found
        latest = self.latest().get(name)
        if latest is not None and latest.state is not ContainerState.EXITED:
            return
        if self._starter.unsure and not await self._ask_runtime():
            return
        await self._last_words.settle()
        fresh = fresh or (latest is not None and not self._renewal.has_crashed(role, container, latest))
        started = await self._starter.start(pod, container, latest, sandbox=self._renewal.label, fresh=fresh)
        if started is None:
            self._wake.set()
            return
        self.instances.started(started)
        await self._forget_older(container["name"])
        if not await self._starter.post_start(self.pod, container, started):
            grace_seconds = spec.grace_seconds(self.pod)
            await self._kill(container, started, message="FailedPostStartHook", grace_seconds=grace_seconds)

    async def _kill(
        self, container: Container, instance: ContainerStatus, *, message: str, grace_seconds: float
    ) -> None:
        """End one container while its pod goes on."""
        grace = Grace(grace_seconds)
        try:
            stopped = await termination.kill_container(
                self.services, self.pod, container, instance, message=message, grace=grace
            )
        finally:
            grace.close()
        if stopped is not None:
            self.observe(stopped)
        self.instances.assume_dead(instance)

    async def _ask_runtime(self) -> bool:
        """After a start whose outcome is not known. False: still not known, or the instance was found; look again."""
        try:
            listed = await self.services.runtime.list()
        except RuntimeUnavailableError:
            self._put_off(self._job_retry)
            return False
        known = {instance.id for instance in self.instances}
        found = [i for i in listed if i.pod_uid == self.uid and i.id not in known]
        for instance in found:
            self.observe(instance)
        self._starter.unsure = False
        return not found

    async def _forget_older(self, name: str) -> None:
        """Keep the newest instance and the one before it."""
        while (old := self.instances.outdated(name)) is not None:
            try:
                if old.log_path:
                    await self.services.runtime.remove(old.id)
            except RuntimeUnavailableError as error:
                logger.info("the record of %s is left to the next restart: %s", old.id, error)
                return
            await asyncio.to_thread(log_layout.remove_attempt, self.services.paths, self.pod, name, old.attempt)
            self.instances.forget(old)
            self._last_words.forget(old.id)

    # ---- what is told

    def _publish(self) -> None:
        """Compute the status and have it sent; one that only says "being created" may wait for what comes next."""
        now = rfc3339(int(self.services.wall_clock() * NANOSECONDS))
        if self._rejected and self.verdict is not None:
            if not spec.is_terminal(self.pod):
                self.status = status_of.rejected(self.pod, self.verdict, now)
                self._patcher.submit(self.status)
            return
        waiting = dict(self._starter.waiting)
        if self._held is not None:
            waiting = {container["name"]: self._held for _role, container in spec.every_container(self.pod)}
        self.status = status_of.compute(
            Facts(
                pod=self._resizes.accepted(self.pod),
                old=self._old_status(),
                instances=self.instances.by_container,
                probes=self.results,
                node=self.services.node(),
                now=now,
                waiting=waiting,
                message_of=self._last_words.of,
                sandbox_ready=self._volumes_ready or bool(self.instances.live()),
                former=self._renewal.former(),
                reset=self._renewal.reset(self.pod),
                resize=self._resizes.conditions(self.pod),
                restarting_all=bool(self._renewal.restarts_all(self.pod)),
                terminal=self._stopped,
                terminated=self._stopped,
                verdict=self.verdict,
                pod_addresses=self._pod_addresses(),
            )
        )
        if self.stage is Stage.ENDING and not self._stopped and not self.instances.live():
            # The last container has just ended: the final status follows at once, and one patch says it all.
            return
        if self._last_words.pending:
            return
        begun = has_ever_started(self.pod, self.latest()) or bool(waiting)
        self._patcher.submit(self.status, urgent=begun or self.stage is not Stage.ACTIVE)

    def _pod_addresses(self) -> tuple[str, ...] | None:
        networks = self.services.networks
        own = networks.addresses(self.pod)
        return None if own is None and networks.shares_machine(self.pod) else own or ()

    def _old_status(self) -> Mapping[str, Any]:
        """The last computed status, with everybody else's conditions as the API server has them now."""
        api = self.pod.get("status") or {}
        if not self.status or self.status is api:
            return api
        return status_of.rebased(self.status, api)
