"""One pod: the task that brings what runs to what the spec asks for, and the status to what runs.

A worker is level-triggered. Whatever happens (a watch event, an exit, a probe, a timer) only wakes it; it then looks at
everything again, computes the status, and decides. It never waits itself: work that takes time is one job at a time in
its own task (sync, end or finish), so that a deletion is seen while an image is pulled.

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

from wasilet_common import pod_fields
from wasilet_common.backoff import NotBefore, RetryBackoff
from wasilet_common.cri_log import layout
from wasilet_common.pod_fields import Pod
from wasilet_common.time_format import NANOSECONDS, parse_rfc3339, rfc3339

from wasilet_node.kube.base import KubeError, NotFoundError
from wasilet_node.pods import recovery, resources, termination
from wasilet_node.pods import status as status_of
from wasilet_node.pods.concurrency import side_by_side
from wasilet_node.pods.container_sync import ContainerSync, Job, soonest
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.instances import Instances
from wasilet_node.pods.plan import has_ever_started
from wasilet_node.pods.probes import PodProbes
from wasilet_node.pods.resources import Requests
from wasilet_node.pods.results import ProbeResults
from wasilet_node.pods.status import Facts, Verdict, Waiting
from wasilet_node.pods.status_writer import StatusWriter
from wasilet_node.pods.termination import Grace
from wasilet_node.pods.termination_message import TerminationMessages
from wasilet_node.runtime.protocol import ContainerStatus, RuntimeUnavailableError

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
        dependencies: PodDependencies,
        pod: Pod,
        *,
        instances: Iterable[ContainerStatus] = (),
        rejected: Verdict | None = None,
        held: Waiting | None = None,
    ) -> None:
        """``rejected``: admission's refusal, which makes the pod Failed. ``held``: the pod can never run here but is
        kept waiting, because its controller would replace a failed one for ever."""
        self.dependencies = dependencies
        self.pod = pod
        self.uid = pod_fields.uid(pod)
        self.stage = Stage.ACTIVE
        self.verdict = rejected
        self.results = ProbeResults()
        self.removed = False
        self.status: Mapping[str, Any] = pod.get("status") or {}
        self._rejected = rejected is not None
        self._wake = asyncio.Event()
        self._status_writer = StatusWriter(dependencies.kube, pod, on_gone=self.remove, pace=dependencies.status_pace)
        self._probes = PodProbes(
            pod,
            runtime=dependencies.runtime,
            networks=dependencies.networks,
            events=dependencies.events,
            results=self.results,
            changed=self._wake.set,
            observe=dependencies.observe_probe,
        )
        self._messages = TerminationMessages(dependencies, changed=self._wake.set)
        self._job: asyncio.Task[None] | None = None
        self._job_retry = RetryBackoff()
        self._not_before = NotBefore()
        self._grace: Grace | None = None
        self._stopped = False
        self._finished = False
        self.instances = Instances(
            recovery.instances_of(pod, instances),
            changed=self._wake.set,
            ended=lambda instance, newest: self._messages.note(self.pod, instance, newest=newest),
        )
        self._containers = ContainerSync(
            dependencies,
            pod,
            instances=self.instances,
            results=self.results,
            messages=self._messages,
            jobs=self,
            held=held,
        )
        self._counted: tuple[Mapping[str, Any], Requests] | None = None
        self._containers.seed_back_off()

    # ---- what the manager reports

    def update(self, pod: Pod, *, listed: bool = False) -> None:
        """A newer state of the pod from the watch; ``listed``: from a whole list."""
        if not self._status_writer.observed(pod, listed=listed):
            return
        before = self.pod
        same_spec = pod["spec"] == before["spec"]
        if same_spec:
            # Each change of the status brings the whole pod again: one spec is kept, and what was made of it counts on.
            pod = {**pod, "spec": before["spec"]}
        self.pod = pod
        self._containers.pod = pod
        if any(before["metadata"].get(k) != pod["metadata"].get(k) for k in ("labels", "annotations")):
            self._containers.refresher.at_once()
        if pod_fields.is_deleted(pod) and self._grace is not None:
            self._grace.shorten(pod_fields.grace_seconds(pod))
        if listed or not same_spec or not self._status_writer.is_echo(before, pod):
            self._wake.set()

    def remove(self) -> None:
        """The API server no longer has the pod."""
        self.removed = True
        self._status_writer.stop()
        if self._grace is not None and self.pod["metadata"].get("deletionGracePeriodSeconds") == 0:
            self._grace.shorten(0)
        self._wake.set()

    def observe(self, instance: ContainerStatus) -> None:
        """The runtime's report on one instance."""
        self.instances.observe(instance)

    def relisted(self, alive: Mapping[str, ContainerStatus], *, asked_at: float) -> None:
        """See ``Instances.relisted``."""
        self.instances.relisted(alive, asked_at=asked_at)

    def end(self, verdict: Verdict, *, grace_seconds: float) -> None:
        """Evict: stop the pod and make it Failed for this reason."""
        if self.stage is Stage.ACTIVE and self.verdict is None:
            self.verdict = verdict
            self._begin_to_end(min(grace_seconds, pod_fields.grace_seconds(self.pod)))
            self._wake.set()

    # ---- what others ask

    @property
    def holds_resources(self) -> bool:
        """It counts against the node's capacity: it may run, or something of it still does."""
        return not (self._rejected or self._stopped or (pod_fields.is_terminal(self.pod) and not self.instances.live()))

    def requests(self) -> Requests:
        """What counts against the node: of what has been accepted. Raises QuantityError."""
        accepted = self._containers.resizes.accepted(self.pod)
        if self._counted is None or self._counted[0] is not accepted["spec"]:
            self._counted = (accepted["spec"], resources.pod_requests(accepted))
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
                    logger.exception("pod %s", pod_fields.format_pod(self.pod))
                    delay = 5.0
                try:
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                # A container that came up and the job that started it are two wake-ups, and one look.
                await asyncio.sleep(0)
        finally:
            self._probes.close()
            if self._grace is not None:
                self._grace.close()
            if self._job is not None:
                self._job.cancel()
                await asyncio.wait({self._job})
            await self._messages.close()
            await self._containers.refresher.close()
            await self._status_writer.close()

    def _step(self) -> float | None:
        """Look at everything, start what is to be done, publish. Returns when to look again, in seconds."""
        now = self.dependencies.wall_clock()
        delay: float | None = None
        if self.stage is Stage.ACTIVE:
            delay = self._decide_the_end(now)
        if self.stage is Stage.ACTIVE:
            delay = soonest(delay, self._sync(now))
        if self.stage is Stage.ENDING and self._job is None:
            delay = soonest(delay, self._spawn(self._end, now))
        gone = pod_fields.is_deleted(self.pod) or self.removed
        if gone and self.stage is Stage.ENDED and self._job is None and not self._finished:
            delay = soonest(delay, self._spawn(self._finish, now))
        self._publish()
        return max(0.001, delay) if delay is not None else None

    def _sync(self, now: float) -> float | None:
        self._probes.sync(self.pod, self.instances.running())
        if self._containers.held is not None:
            return None
        decision = self._containers.decide(now, busy=self._job is not None, put_off_seconds=self._not_before.left(now))
        if decision.end:
            self._begin_to_end(pod_fields.grace_seconds(self.pod))
            return None
        delay = self._spawn(decision.job, now) if decision.job is not None else None
        return soonest(decision.again_in, delay)

    def _spawn(self, job: Job, now: float) -> float | None:
        """Begin a job, unless the last one failed a moment ago: then in how many seconds."""
        if (left := self._not_before.left(now)) > 0:
            return left
        self._job = asyncio.create_task(job(), name=f"pod {pod_fields.format_pod(self.pod)}")
        self._job.add_done_callback(self._job_ended)
        return None

    # ---- what jobs ask

    def wake(self) -> None:
        """Look again at once."""
        self._wake.set()

    def put_off(self, retry: RetryBackoff | None = None) -> None:
        """No job for a while: by this back-off, or by that of jobs that fail."""
        self._not_before = NotBefore(self.dependencies.wall_clock(), (retry or self._job_retry).next())

    async def publish_status(self) -> None:
        """Have the API server know the status, within a second or so."""
        self._publish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TOLD_FIRST_SECONDS):
                await self._status_writer.flush()

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        self._job = None
        self._wake.set()
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("pod %s: a job failed", pod_fields.format_pod(self.pod), exc_info=error)
            self.put_off()
        elif self._not_before.left(self.dependencies.wall_clock()) <= 0:
            self._job_retry.reset()

    # ---- the end

    def _decide_the_end(self, now: float) -> float | None:
        """Begin to end, where something asks for it; else the seconds until the deadline."""
        if self.removed or pod_fields.is_deleted(self.pod):
            self._begin_to_end(pod_fields.grace_seconds(self.pod))
        elif self._rejected or pod_fields.is_terminal(self.pod):
            self._begin_to_end(0)
        elif (limit := self.pod["spec"].get("activeDeadlineSeconds")) is not None:
            started = parse_rfc3339(self.status.get("startTime"))
            left = float(limit) - (now - started) if started is not None else float(limit)
            if left <= 0:
                self.dependencies.events.event(self.pod, "Normal", DEADLINE.reason, DEADLINE.message)
                self.verdict = DEADLINE
                self._begin_to_end(pod_fields.grace_seconds(self.pod))
            else:
                return left
        return None

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
        with self.dependencies.under_way.one():
            await self._stop_and_take_down()

    async def _stop_and_take_down(self) -> None:
        """Stop what runs, then take the volumes down. Comes back here after a failure; every step may be repeated."""
        grace = self._grace or Grace(0)
        live = self.instances.live()
        if live:
            try:
                await termination.stop_pod(self.dependencies, self.pod, live, grace=grace, observe=self.observe)
            except* RuntimeUnavailableError as errors:
                message = f"error killing pod: {errors.exceptions[0]}"
                self.dependencies.events.event(self.pod, "Warning", "FailedKillPod", message)
                raise
            for instance in live.values():
                self.instances.assume_dead(instance)
        grace.close()
        await self._messages.settle()
        await self._containers.refresher.close()
        self._stopped = True
        self._probes.close()
        self._publish()
        await side_by_side(self.dependencies.volumes.teardown(self.uid), self.dependencies.networks.detach(self.uid))
        self.dependencies.references.release(self.uid)
        self.stage = Stage.ENDED

    async def _finish(self) -> None:
        with self.dependencies.under_way.one():
            await self._report_and_remove()

    async def _report_and_remove(self) -> None:
        """The final status, the deletion in the API server, then records and logs."""
        if not self.removed:
            self._publish()
            await self._status_writer.flush()
        if not self.removed:
            try:
                await self.dependencies.kube.delete(pod_fields.path(self.pod), grace_period_seconds=0, uid=self.uid)
            except NotFoundError:
                self.removed = True
            except KubeError as error:
                logger.warning("deletion of %s: %s", pod_fields.format_pod(self.pod), error)
                self.put_off()
                return
        # From here on the pod may still be seen (a finalizer keeps it), but nothing of it is left on the node.
        for instance in self.instances:
            # What only the status knows has no record here, and its id is whatever someone wrote there.
            if instance.log_path:
                await self.dependencies.runtime.remove(instance.id)
        self.dependencies.references.release(self.uid)
        await asyncio.to_thread(layout.remove_folder, layout.folder_of_pod(self.dependencies.paths.logs, self.pod))
        self._finished = True

    # ---- what is reported

    def _publish(self) -> None:
        """Compute the status and have it sent; one that only says "being created" may wait for what comes next."""
        now = rfc3339(int(self.dependencies.wall_clock() * NANOSECONDS))
        if self._rejected and self.verdict is not None:
            if not pod_fields.is_terminal(self.pod):
                self.status = status_of.rejected(self.pod, self.verdict, now)
                self._status_writer.submit(self.status)
            return
        waiting = dict(self._containers.attempts.waiting)
        if self._containers.held is not None:
            waiting = {
                container["name"]: self._containers.held for _role, container in pod_fields.every_container(self.pod)
            }
        self.status = status_of.compute(
            Facts(
                pod=self._containers.resizes.accepted(self.pod),
                old=self._old_status(),
                instances=self.instances.by_container,
                probes=self.results,
                node=self.dependencies.node(),
                now=now,
                waiting=waiting,
                message_of=self._messages.of,
                sandbox_ready=self._containers.volumes_ready or bool(self.instances.live()),
                former=self._containers.renewal.former(),
                reset=self._containers.renewal.reset(self.pod),
                resize=self._containers.resizes.conditions(self.pod),
                restarting_all=bool(self._containers.renewal.restarts_all(self.pod)),
                terminal=self._stopped,
                terminated=self._stopped,
                verdict=self.verdict,
                pod_addresses=self._pod_addresses(),
            )
        )
        if self.stage is Stage.ENDING and not self._stopped and not self.instances.live():
            # The last container has just ended: the final status follows at once, and one patch says it all.
            return
        if self._messages.pending:
            return
        begun = has_ever_started(self.pod, self.latest()) or bool(waiting)
        self._status_writer.submit(self.status, urgent=begun or self.stage is not Stage.ACTIVE)

    def _pod_addresses(self) -> tuple[str, ...] | None:
        networks = self.dependencies.networks
        # A network is claimed beside the volumes, but belongs to a pod once these are there.
        begun = self._containers.volumes_ready or any(True for _ in self.instances)
        own = networks.addresses(self.pod) if begun or self.stage is not Stage.ACTIVE else None
        return None if own is None and networks.shares_machine(self.pod) else own or ()

    def _old_status(self) -> Mapping[str, Any]:
        """The last computed status, with everyone else's conditions as the API server has them now."""
        api = self.pod.get("status") or {}
        if not self.status or self.status is api:
            return api
        return status_of.rebased(self.status, api)
