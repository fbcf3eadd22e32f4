"""Which containers of a pod to start and to kill: a pure function of spec, instances, probes and time.

It follows ``computePodActions`` and ``computeInitContainerActions`` of kubelet's kuberuntime. A pod counts as
initialized as soon as one of its regular containers has had an instance in the present sandbox
(``wasilet_node.pods.sandboxes``); then init containers do not run again. In a new sandbox everything begins with
the first of them, whatever has run before.

The executor is elsewhere (``wasilet_node.pods.worker``); nothing here does I/O, so every case is a row in a table
(``tests/unit/cases/pods/plan.yaml``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.pods.results import ProbeKind, ProbeResults
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus


class KillReason(StrEnum):
    """Why a single container is stopped while its pod goes on."""

    DEFINITION_CHANGED = "DefinitionChanged"
    LIVENESS_PROBE = "LivenessProbe"
    STARTUP_PROBE = "StartupProbe"
    RESIZE = "Resize"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Stop this instance; ``restart``: start the container again at once, whatever its restart policy is."""

    container: str
    container_id: str
    reason: KillReason
    message: str
    restart: bool = False


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The container may start again in ``seconds``: crash-loop back-off."""

    container: str
    seconds: float


@dataclass(kw_only=True)
class Plan:
    """``start`` and ``kill`` hold container names and kills in the order to do them."""

    start: list[str] = field(default_factory=list)
    kill: list[Kill] = field(default_factory=list)
    waiting: list[Wait] = field(default_factory=list)
    initialized: bool = False
    finished: bool = False
    """Nothing runs that must go on and nothing will start: stop the sidecars, the pod is at its end."""


BackoffRemaining = Callable[[Container, ContainerStatus], float]
"""Seconds that a container whose latest instance has exited must still wait; 0: none."""


def has_ever_started(pod: Pod, latest: Mapping[str, ContainerStatus]) -> bool:
    """A regular container has had an instance: initialization is over."""
    return any(container["name"] in latest for container in pod_fields.regular_containers(pod))


def make_plan(
    pod: Pod,
    latest: Mapping[str, ContainerStatus],
    probes: ProbeResults,
    backoff: BackoffRemaining,
    *,
    former: Collection[str] = (),
    reset: Collection[str] = (),
) -> Plan:
    """What to do next for a pod that is neither deleted nor stopped. ``latest`` maps names to newest instances.

    ``former`` are the containers whose newest instance ran in a sandbox before the present one, ``reset`` those that
    have to begin again in the present one, as if they had never run.
    """
    plan = Plan()
    known = {name: instance for name, instance in latest.items() if name not in reset}
    present = {name: instance for name, instance in known.items() if name not in former}
    # First, and while the pod is initialized too: a pod that hangs there is one that people want to look into.
    plan.start += [each["name"] for each in pod_fields.ephemeral_containers(pod) if each["name"] not in latest]
    plan.initialized = _plan_init_containers(plan, pod, present, probes, backoff)
    if plan.finished or not plan.initialized:
        return plan
    kept = 0
    for container in pod_fields.regular_containers(pod):
        instance = known.get(container["name"])
        if instance is None:
            plan.start.append(container["name"])
        elif instance.state is ContainerState.EXITED:
            if pod_fields.should_restart(container, pod, _exit_code(instance)):
                _start_or_wait(plan, container, instance, backoff)
        else:
            kill = _kill_of(container, instance, probes, restartable=_restartable(container, pod))
            if kill is None:
                kept += 1
            else:
                plan.kill.append(kill)
                # A killed container that will not come back still has to be waited for: the next plan sees it exited.
                kept += 1
    if kept == 0 and not _regular_pending(pod, plan):
        # Sidecars and ephemeral containers do not keep a pod alive.
        plan.start.clear()
        plan.waiting.clear()
        plan.finished = True
    return plan


def _regular_pending(pod: Pod, plan: Plan) -> bool:
    regular = {container["name"] for container in pod_fields.regular_containers(pod)}
    return any(name in regular for name in plan.start) or any(wait.container in regular for wait in plan.waiting)


def _plan_init_containers(
    plan: Plan, pod: Pod, latest: Mapping[str, ContainerStatus], probes: ProbeResults, backoff: BackoffRemaining
) -> bool:
    """Fills in init containers and sidecars; True when the regular containers may run.

    The frontier is the last init container that has an instance: those before it are done, and only their sidecars
    are kept alive; the frontier itself decides whether the next one starts.
    """
    containers = pod_fields.init_containers(pod)
    if not containers:
        return True
    frontier = max((i for i, container in enumerate(containers) if container["name"] in latest), default=-1)
    if has_ever_started(pod, latest):
        frontier = len(containers)
    for container in containers[: max(frontier, 0)]:
        if pod_fields.is_sidecar(container):
            _keep_sidecar(plan, container, latest.get(container["name"]), probes, backoff)
    if frontier == len(containers):
        return True
    if frontier < 0:
        plan.start.append(containers[0]["name"])
        return False
    current = containers[frontier]
    if not _frontier_done(plan, pod, current, latest[current["name"]], probes=probes, backoff=backoff):
        return False
    if frontier + 1 < len(containers):
        plan.start.append(containers[frontier + 1]["name"])
        return False
    return True


def _frontier_done(
    plan: Plan,
    pod: Pod,
    container: Container,
    instance: ContainerStatus,
    *,
    probes: ProbeResults,
    backoff: BackoffRemaining,
) -> bool:
    if pod_fields.is_sidecar(container):
        _keep_sidecar(plan, container, instance, probes, backoff)
        return instance.state is ContainerState.RUNNING and probes.started(
            instance.id, has_probe="startupProbe" in container
        )
    if instance.state is not ContainerState.EXITED:
        return False
    code = _exit_code(instance)
    if code == 0:
        return True
    if pod_fields.should_restart(container, pod, code):
        _start_or_wait(plan, container, instance, backoff)
    else:
        plan.start.clear()
        plan.waiting.clear()
        plan.finished = True
    return False


def _keep_sidecar(
    plan: Plan, container: Container, instance: ContainerStatus | None, probes: ProbeResults, backoff: BackoffRemaining
) -> None:
    if instance is None:
        plan.start.append(container["name"])
    elif instance.state is ContainerState.EXITED:
        _start_or_wait(plan, container, instance, backoff)
    else:
        kill = _kill_of(container, instance, probes, sidecar=True)
        if kill is not None:
            plan.kill.append(kill)


def _start_or_wait(plan: Plan, container: Container, instance: ContainerStatus, backoff: BackoffRemaining) -> None:
    seconds = backoff(container, instance)
    if seconds > 0:
        plan.waiting.append(Wait(container=container["name"], seconds=seconds))
    else:
        plan.start.append(container["name"])


def _restartable(container: Container, pod: Pod) -> bool:
    return bool((container.get("restartPolicy") or pod["spec"].get("restartPolicy")) != "Never")


def _kill_of(
    container: Container,
    instance: ContainerStatus,
    probes: ProbeResults,
    *,
    sidecar: bool = False,
    restartable: bool = True,
) -> Kill | None:
    name = container["name"]
    what = f"{'Init container' if sidecar else 'Container'} {name}"
    if instance.image and instance.image != container.get("image", ""):
        return Kill(
            container=name,
            container_id=instance.id,
            reason=KillReason.DEFINITION_CHANGED,
            message=f"{what} definition changed" + ("" if sidecar else ", will be restarted"),
            restart=True,
        )
    for kind, reason in (
        (ProbeKind.LIVENESS, KillReason.LIVENESS_PROBE),
        (ProbeKind.STARTUP, KillReason.STARTUP_PROBE),
    ):
        if probes.failed(instance.id, kind):
            return Kill(
                container=name,
                container_id=instance.id,
                reason=reason,
                message=f"{what} failed {kind.value.lower()} probe"
                + (", will be restarted" if restartable and not sidecar else ""),
            )
    return None


def _exit_code(instance: ContainerStatus) -> int:
    return 137 if instance.exit_code is None else instance.exit_code
