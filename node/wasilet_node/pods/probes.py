"""Startup, readiness and liveness probes of one pod's running instances.

A probe is a timer on the event loop and, while it is under way, one task; between probes it costs nothing but its entry
in the loop's heap, so thousands of probed pods are no burden. Rules and messages are those of kubelet's prober: the
result moves only when a threshold is reached, readiness and liveness begin after startup has succeeded, liveness ends
at its first failure (the container is then restarted, and a new instance has a new probe).

After a restart of the agent a probe begins with what the API server's status states about the same instance, so that a
healthy pod does not turn unready meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod
from wasilet_common.time_format import NANOSECONDS

from wasilet_node.kube.base import EventRecorder
from wasilet_node.kube.expansion import expand, mapping_for
from wasilet_node.network.attachment import MachineNetwork, Networks
from wasilet_node.pods import grpc_health, handlers
from wasilet_node.pods.handlers import HandlerError, Outcome, Reach
from wasilet_node.pods.results import ProbeKind, ProbeResults, Result
from wasilet_node.runtime.protocol import ContainerStatus, Runtime, RuntimeUnavailableError

logger = logging.getLogger(__name__)

_ATTEMPTS_ON_ERROR = 3
_REATTACHED_SECONDS = 5.0
"""An instance that has run for longer than this when its probe begins was found, not started: spread the probes."""

_INITIAL = {
    ProbeKind.STARTUP: Result.UNKNOWN,
    ProbeKind.READINESS: Result.FAILURE,
    ProbeKind.LIVENESS: Result.SUCCESS,
}


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """One probe, for the metrics. An error of the probe itself is none, as in kubelet."""

    pod: Pod
    container: str
    kind: ProbeKind
    successful: bool
    duration_seconds: float


ProbeObserver = Callable[[ProbeReport], None]


def ignore(_report: ProbeReport) -> None:
    """No one wants to know."""


class PodProbes:
    """All probes of one pod. ``changed`` is called when a result moved, ``observe`` after every probe; both must be
    quick."""

    def __init__(
        self,
        pod: Pod,
        *,
        runtime: Runtime,
        events: EventRecorder,
        results: ProbeResults,
        changed: Callable[[], None],
        observe: ProbeObserver = ignore,
        networks: Networks | None = None,
        shortest_period_seconds: float = 1.0,
    ) -> None:
        self.observe = observe
        self.shortest_period_seconds = shortest_period_seconds
        self.pod = pod
        self.runtime = runtime
        self.networks = networks or MachineNetwork()
        self.events = events
        self.results = results
        self._changed = changed
        self._probes: dict[tuple[str, ProbeKind], _Probe] = {}
        self._ending = False

    def sync(self, pod: Pod, running: Mapping[str, ContainerStatus]) -> None:
        """Probe exactly these instances (by container name) from now on."""
        self.pod = pod
        wanted = {instance.id for instance in running.values()}
        for key in [key for key in self._probes if key[0] not in wanted]:
            self._probes.pop(key).close()
            self.results.forget(key[0])
        for _role, container in pod_fields.every_container(pod):
            instance = running.get(container["name"])
            if instance is None:
                continue
            for kind in ProbeKind:
                settings = container.get(kind.field)
                if settings is None or (instance.id, kind) in self._probes:
                    continue
                if self._ending and kind is not ProbeKind.READINESS:
                    continue
                self.results.by_instance[instance.id, kind] = self._first_result(instance, kind)
                probe = _Probe(self, container, instance, kind, settings)
                self._probes[instance.id, kind] = probe
                probe.begin()

    def end_with_pod(self) -> None:
        """The pod is being stopped: nothing may be restarted any more, readiness goes on until the end."""
        self._ending = True
        for (container_id, kind), probe in list(self._probes.items()):
            if kind is not ProbeKind.READINESS:
                probe.close()
                if self.results.get(container_id, kind) is Result.FAILURE:
                    self.results.by_instance[container_id, kind] = Result.SUCCESS

    def close(self) -> None:
        """Stop probing."""
        for probe in self._probes.values():
            probe.close()
        self._probes.clear()

    def set_result(self, container_id: str, kind: ProbeKind, result: Result) -> None:
        """A threshold was reached."""
        if self.results.get(container_id, kind) is result:
            return
        self.results.by_instance[container_id, kind] = result
        if kind is ProbeKind.STARTUP and result is Result.SUCCESS:
            for other in (ProbeKind.READINESS, ProbeKind.LIVENESS):
                waiting = self._probes.get((container_id, other))
                if waiting is not None:
                    waiting.begin()
        self._changed()

    def _first_result(self, instance: ContainerStatus, kind: ProbeKind) -> Result:
        status = self.pod.get("status") or {}
        for known in (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())):
            if str(known.get("containerID", "")).endswith(f"//{instance.id}"):
                held = known.get("started" if kind is ProbeKind.STARTUP else "ready")
                if held and kind is not ProbeKind.LIVENESS:
                    return Result.SUCCESS
        return _INITIAL[kind]


class _Probe:
    """One probe of one instance."""

    def __init__(
        self, pod: PodProbes, container: Container, instance: ContainerStatus, kind: ProbeKind, settings: dict[str, Any]
    ) -> None:
        self._pod = pod
        self._container = container
        self._instance = instance
        self._kind = kind
        self._settings = settings
        self._period = max(pod.shortest_period_seconds, float(settings.get("periodSeconds") or 10))
        self._timeout = max(1.0, float(settings.get("timeoutSeconds") or 1))
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._last: Result | None = None
        self._run_length = 0
        self._closed = False

    def begin(self) -> None:
        """Schedule the first probe, unless one is under way, or this one must wait for startup."""
        if self._closed or self._task is not None:
            return
        if self._kind is ProbeKind.STARTUP:
            if self._pod.results.get(self._instance.id, self._kind) is Result.SUCCESS:
                return
        elif not self._pod.results.started(self._instance.id, has_probe="startupProbe" in self._container):
            return
        age = max(0.0, time.time() - self._instance.started_at_ns / NANOSECONDS)
        delay = max(0.0, float(self._settings.get("initialDelaySeconds") or 0) - age)
        if age > _REATTACHED_SECONDS and "startupProbe" not in self._container:
            delay += random.random() * self._period  # noqa: S311 - spreads load, keeps no secret
        self._schedule(delay)

    def close(self) -> None:
        """No more probes; one that is under way is cancelled."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _schedule(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._task = asyncio.create_task(self._probe_once(), name=f"{self._kind.value} probe")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a %s probe of %s failed in the agent", self._kind, self._container["name"], exc_info=error)
            if not self._closed:
                self._schedule(self._period)

    async def _probe_once(self) -> None:
        begun = asyncio.get_running_loop().time()
        result = await self._outcome()
        if self._closed:
            return
        if result is not None:
            self._pod.observe(
                ProbeReport(
                    pod=self._pod.pod,
                    container=self._container["name"],
                    kind=self._kind,
                    successful=result is Result.SUCCESS,
                    duration_seconds=asyncio.get_running_loop().time() - begun,
                )
            )
        if result is not None and self._count(result):
            self._pod.set_result(self._instance.id, self._kind, result)
            if self._kind is ProbeKind.STARTUP or (self._kind is ProbeKind.LIVENESS and result is Result.FAILURE):
                self._closed = True
                return
        self._schedule(max(0.0, begun + self._period - asyncio.get_running_loop().time()))

    def _count(self, result: Result) -> bool:
        """True when as many equal results in a row as the threshold asks for have come."""
        self._run_length = self._run_length + 1 if result is self._last else 1
        self._last = result
        if result is Result.FAILURE:
            return self._run_length >= int(self._settings.get("failureThreshold") or 3)
        return self._run_length >= int(self._settings.get("successThreshold") or 1)

    async def _outcome(self) -> Result | None:
        """None: the probe itself could not be made, which says nothing about the container."""
        problem = ""
        for _ in range(_ATTEMPTS_ON_ERROR):
            try:
                outcome = await self._handle()
            except (HandlerError, RuntimeUnavailableError) as error:
                problem = str(error)
                continue
            if not outcome.ok:
                self._event("Unhealthy", f"{self._kind.value} probe failed: {outcome.output}")
                return Result.FAILURE
            if outcome.warning:
                self._event("ProbeWarning", f"{self._kind.value} probe warning: {outcome.output}")
            return Result.SUCCESS
        if not self._closed:
            self._event("Unhealthy", f"{self._kind.value} probe errored and resulted in unknown state: {problem}")
        return None

    async def _handle(self) -> Outcome:
        settings = self._settings
        if "exec" in settings:
            literals = {str(e["name"]): str(e.get("value") or "") for e in self._container.get("env") or ()}
            mapping = mapping_for(literals)
            command = [expand(str(word), mapping) for word in settings["exec"].get("command") or ()]
            return await handlers.run_command(
                self._pod.runtime, self._instance.id, command, timeout_seconds=self._timeout
            )
        if "httpGet" in settings:
            return await handlers.http_get(
                settings["httpGet"], self._container, reach=self._reach(), timeout_seconds=self._timeout
            )
        if "tcpSocket" in settings:
            return await handlers.tcp_connect(
                settings["tcpSocket"], self._container, reach=self._reach(), timeout_seconds=self._timeout
            )
        if "grpc" in settings:
            return await grpc_health.check(settings["grpc"], reach=self._reach(), timeout_seconds=self._timeout)
        raise HandlerError(
            f"missing probe handler for {pod_fields.format_pod(self._pod.pod)}:{self._container['name']}"
        )

    def _reach(self) -> Reach:
        return Reach.of(self._pod.networks, self._pod.pod)

    def _event(self, reason: str, message: str) -> None:
        pod = self._pod.pod
        self._pod.events.event(
            pod, "Warning", reason, message, field_path=pod_fields.field_path(pod, self._container["name"])
        )
