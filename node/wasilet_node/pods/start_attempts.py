"""Attempts to start the containers of one pod: back-off, why a container waits, and postStart."""

from __future__ import annotations

import logging
import random

from wasilet_common import pod_fields
from wasilet_common.backoff import CrashLoopBackoff, NotBefore, RetryBackoff, crash_loop_seconds
from wasilet_common.pod_fields import Container, Pod
from wasilet_common.time_format import NANOSECONDS, go_duration

from wasilet_node.pods import hooks, resources
from wasilet_node.pods.container_start import ContainerStartError, Late, start_container
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.status import Waiting
from wasilet_node.runtime.protocol import ContainerStatus, RuntimeUnavailableError

logger = logging.getLogger(__name__)

_IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"})
_RUNTIME_RETRY_SECONDS = 1.0
_COMPILE_RETRY_SECONDS = 60.0


class StartAttempts:
    """Belongs to one pod's worker."""

    def __init__(self, dependencies: PodDependencies, *, late: Late) -> None:
        """``late``: see ``start_container``."""
        self._dependencies = dependencies
        self._late = late
        self.waiting: dict[str, Waiting] = {}
        """By container: why the last attempt came to nothing. Cleared by the next that works."""

        self.unsure = False
        """The runtime went away during a start: whether the instance runs must be asked before another is tried."""

        self._cpu_limit_told = False
        self._crash_loop = CrashLoopBackoff()
        self._retry_at: dict[str, tuple[str, NotBefore]] = {}
        """With the image that was tried: another one is tried at once."""

        self._config_retry: dict[str, RetryBackoff] = {}
        self._image_retry: dict[str, RetryBackoff] = {}
        self._failed_starts: dict[str, int] = {}
        self._told: dict[str, str] = {}

    # ---- back-off

    def seed_back_off(self, container: Container, instance: ContainerStatus) -> None:
        """An ended instance of before a restart of the agent: its attempt says how often it has crashed."""
        self._crash_loop.seed(
            _key(container), restarts=instance.attempt, started_at=instance.started_at_ns / NANOSECONDS
        )

    def backoff_remaining(self, container: Container, instance: ContainerStatus, now: float) -> float:
        """Seconds until an ended container may run again."""
        return self._crash_loop.remaining(_key(container), finished_at=instance.finished_at_ns / NANOSECONDS, now=now)

    def note_back_off(self, pod: Pod, name: str, instance: ContainerStatus) -> None:
        """The container waits after a crash: report it in the status, and once in an event."""
        found = pod_fields.find_container(pod, name)
        if found is None or self._told.get(name) == instance.id:
            return
        self._told[name] = instance.id
        delay = go_duration(self._crash_loop.delay(_key(found[1])))
        self.waiting[name] = Waiting(
            reason="CrashLoopBackOff",
            message=f"back-off {delay} restarting failed container={name} pod={pod_fields.format_pod(pod)}",
        )
        self._dependencies.events.event(
            pod,
            "Warning",
            "BackOff",
            f"Back-off restarting failed container {name} in pod {pod_fields.format_pod(pod)}",
            field_path=pod_fields.field_path(pod, name),
        )

    def retry_in(self, pod: Pod, name: str, now: float) -> float:
        """Seconds until a container that could not be started is tried again."""
        found = pod_fields.find_container(pod, name)
        image, not_before = self._retry_at.get(name, ("", NotBefore()))
        if found is None or image == found[1].get("image", ""):
            return not_before.left(now)
        self._forget_delays(name)
        return 0.0

    # ---- starting

    async def start(
        self, pod: Pod, container: Container, latest: ContainerStatus | None, *, sandbox: str, fresh: bool
    ) -> ContainerStatus | None:
        """One attempt. None: it failed; ``waiting`` says why and ``retry_in`` when. ``fresh``: nothing has crashed, so
        no back-off is counted."""
        name = container["name"]
        now = self._dependencies.wall_clock()
        attempt = latest.attempt + 1 if latest is not None else 0
        try:
            started = await start_container(
                self._dependencies, pod, container, attempt=attempt, sandbox=sandbox, late=self._late
            )
        except ContainerStartError as error:
            self.unsure = self.unsure or error.at_once
            self.waiting[name] = Waiting(reason=error.reason, message=error.message)
            not_before = NotBefore(since=self._dependencies.wall_clock(), seconds=self._delay(name, error))
            self._retry_at[name] = (container.get("image", ""), not_before)
            return None
        if latest is not None and not fresh:
            self._crash_loop.next(_key(container), finished_at=latest.finished_at_ns / NANOSECONDS, now=now)
        self.waiting.pop(name, None)
        self._told.pop(name, None)
        self._forget_delays(name)
        self._report_cpu_limit(pod, container)
        return started

    def _forget_delays(self, name: str) -> None:
        for state in (self._config_retry, self._image_retry, self._retry_at, self._failed_starts):
            state.pop(name, None)

    def _report_cpu_limit(self, pod: Pod, container: Container) -> None:
        """Once per pod: its cpu limit is not kept, because this machine lets the agent make no cgroup."""
        limit = resources.enforced_limit_text(pod, container, "cpu")
        if limit is None or self._cpu_limit_told:
            return
        try:
            capabilities = self._dependencies.runtime.capabilities
        except RuntimeUnavailableError:
            return
        if not capabilities.cpu_limits:
            self._cpu_limit_told = True
            self._dependencies.events.event(
                pod,
                "Warning",
                "CPULimitNotEnforced",
                f"The cpu limit of {limit} is not enforced: the node may not make a cgroup for the container",
                field_path=pod_fields.field_path(pod, container["name"]),
            )

    def _delay(self, name: str, error: ContainerStartError) -> float:
        timing = self._dependencies.timing
        if error.at_once:
            return _RUNTIME_RETRY_SECONDS
        if error.counts:
            failures = self._failed_starts[name] = self._failed_starts.get(name, 0) + 1
            return crash_loop_seconds(failures)
        if error.reason in _IMAGE_REASONS:
            # How long a registry is left alone is the image store's business; this is only how often it is asked. The
            # first time soon, so that a failed pull is seen as what it then is, a back-off; then ever more rarely, as
            # each question costs two events and most of them are within that back-off.
            retry = self._image_retry.setdefault(
                name, RetryBackoff(initial=timing.image_retry / 2, maximum=timing.image_retry * 6)
            )
            return retry.next() * random.uniform(1.0, 1.3)  # noqa: S311 - spreads load
        if error.reason == "CreateContainerError":
            # A module that does not compile will not do so in a moment either, and trying costs a core.
            return _COMPILE_RETRY_SECONDS
        retry = self._config_retry.setdefault(
            name, RetryBackoff(initial=timing.config_retry_first, maximum=timing.config_retry_max)
        )
        return retry.next()

    async def post_start(self, pod: Pod, container: Container, instance: ContainerStatus) -> bool:
        """Run the postStart hook, if there is one. False: it failed, and the container is to be stopped."""
        hook = (container.get("lifecycle") or {}).get("postStart")
        if hook is None:
            return True
        try:
            await hooks.run_hook(
                self._dependencies.runtime,
                pod,
                container,
                instance.id,
                hook,
                networks=self._dependencies.networks,
                timeout_seconds=hooks.POST_START_TIMEOUT_SECONDS,
            )
        except hooks.HookError as error:
            path = pod_fields.field_path(pod, container["name"])
            self._dependencies.events.event(
                pod, "Warning", "FailedPostStartHook", "PostStartHook failed", field_path=path
            )
            self.waiting[container["name"]] = Waiting(reason="PostStartHookError", message=str(error))
            return False
        return True


def _key(container: Container) -> str:
    return f"{container['name']} {container.get('image', '')}"
