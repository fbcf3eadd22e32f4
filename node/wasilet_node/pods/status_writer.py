"""Sends a pod's status to the API server: only what changed, one request in flight, the newest wins.

A patch is the difference between the status that the server last showed and the one that was computed, as a strategic
merge patch on ``/status`` with the pod's uid as a precondition (kubelet's ``statusutil.PatchPodStatus``). Conditions of
others never appear in it. What the server answered is remembered beside what was sent: a value that the server writes
in another form would otherwise be patched again and again.

A status that will be out of date in a moment ("being created") is held back (``status_pace``): one request per pod
instead of three is what a burst of pods is limited by. So is a change of nothing but the observed generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.backoff import RetryBackoff
from wasilet_common.pod_fields import Pod

from wasilet_node.kube.base import (
    ApiStatusError,
    ConflictError,
    ForbiddenError,
    Kube,
    KubeError,
    KubeObject,
    NotFoundError,
    TooManyRequestsError,
)
from wasilet_node.pods.conditions import OWNED, TRANSIENT
from wasilet_node.pods.status_pace import StatusPace

logger = logging.getLogger(__name__)

_REPLACED_LISTS = ("hostIPs", "podIPs")
_NOT_OURS = "no relationship found between node"
"""The node authorizer's message on a pod that is not on this node; also on one that is gone, before 404."""

_KEPT = frozenset({"conditions", "nominatedNodeName", "resize", "resourceClaimStatuses", "extendedResourceClaimStatus"})
_GENERATION = "observedGeneration"


_TERMINAL = frozenset({"Succeeded", "Failed"})
_CHANGED_BY_EVERY_WRITE = frozenset({"resourceVersion", "managedFields"})


def _of_others(status: Mapping[str, Any]) -> list[Any]:
    """What of a status is no kubelet's to write."""
    foreign = [each for each in status.get("conditions") or () if each["type"] not in OWNED]
    return [foreign, *(status.get(name) for name in sorted(_KEPT - {"conditions"}))]


def _stripped(condition: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in condition.items() if v is not None and k != "lastProbeTime"}


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The strategic merge patch that turns ``old`` into ``new``, as far as a kubelet owns it; empty: nothing to do."""
    patch: dict[str, Any] = {}
    for name in (*new, *(name for name in old if name not in new)):
        if name in _KEPT or name in patch:
            continue
        if name not in new:
            patch[name] = None
        elif new[name] != old.get(name):
            patch[name] = [*new[name], {"$patch": "replace"}] if name in _REPLACED_LISTS else new[name]
    changed = _diff_conditions(old.get("conditions") or (), new.get("conditions") or ())
    if changed:
        patch["conditions"] = changed
    return patch


def _diff_conditions(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    before = {condition["type"]: _stripped(condition) for condition in old}
    changed: list[dict[str, Any]] = []
    for condition in new:
        type_ = condition["type"]
        # A DisruptionTarget of someone else is in both and equal; one that an eviction added is in ``new`` alone.
        if type_ not in OWNED and type_ != "DisruptionTarget":
            continue
        was, now = before.get(type_, {}), _stripped(condition)
        if was != now:
            # Entries are merged by type: what the new condition no longer has must be taken out by name.
            changed.append(now | {name: None for name in was if name not in now})
    kept = {condition["type"] for condition in new}
    changed += [{"$patch": "delete", "type": type_} for type_ in before if type_ in TRANSIENT and type_ not in kept]
    return changed


def _says_something(old: Mapping[str, Any], patch: Mapping[str, Any]) -> bool:
    """Whether a patch changes more than which generation was seen."""
    if any(name not in {_GENERATION, "conditions"} for name in patch):
        return True
    before = {condition["type"]: _stripped(condition) for condition in old.get("conditions") or ()}
    return any(
        "$patch" in condition
        or {**condition, _GENERATION: None} != {**before.get(condition["type"], {}), _GENERATION: None}
        for condition in patch.get("conditions") or ()
    )


class StatusWriter:
    """The status of one pod, on its way to the API server."""

    def __init__(self, kube: Kube, pod: Pod, *, on_gone: Callable[[], None], pace: StatusPace) -> None:
        """``on_gone`` is called when the server no longer has this pod (or has another of its name)."""
        self._pace = pace
        self._flushing = 0
        self._kube = kube
        self._path = pod_fields.path(pod)
        self._uid = pod_fields.uid(pod)
        self._on_gone = on_gone
        self._base: Mapping[str, Any] = pod.get("status") or {}
        self._version = str(pod["metadata"].get("resourceVersion", ""))
        self._desired: Mapping[str, Any] | None = None
        self._sent: Mapping[str, Any] | None = None
        self._echo: Mapping[str, Any] | None = None
        self._answered: tuple[tuple[Mapping[str, Any] | None, ...], dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._urgent = asyncio.Event()
        self.gone = False

    def observed(self, pod: Pod, *, listed: bool = False) -> bool:
        """The pod was seen; False when that is older than what the last patch was answered with.

        ``listed``: in a whole list, which counts even so: an etcd that was restored from a backup knows lower versions.
        """
        version = str(pod["metadata"].get("resourceVersion", ""))
        older = version.isdigit() and self._version.isdigit() and int(version) < int(self._version)
        if older and not listed:
            return False
        self._base, self._version = pod.get("status") or {}, version
        return True

    def submit(self, status: Mapping[str, Any], *, urgent: bool = True) -> None:
        """Have ``status`` reach the server; later calls replace earlier ones. Not ``urgent``: may wait, 5 s at most."""
        self._desired = status
        pending = self._pending()
        if urgent and _says_something(self._base, pending):
            self._urgent.set()
        if not self.gone and self._task is None and pending:
            self._task = asyncio.create_task(self._send(), name=f"status of {self._path}")
            self._task.add_done_callback(self._ended)

    async def flush(self) -> None:
        """Wait until the server has the newest status, or the pod is gone. Bounded only by the caller."""
        self._flushing += 1
        self._urgent.set()
        try:
            while not self.gone and self._pending():
                if self._task is None and self._desired is not None:
                    self.submit(self._desired)
                if self._task is None:
                    return
                await asyncio.wait({self._task})
        finally:
            self._flushing -= 1

    def is_echo(self, before: Pod, after: Pod) -> bool:
        """Whether a newer state of the pod, which was observed, only brings back the status that was sent: nothing else
        in it is news, and nothing of the status is left to send."""
        if self._desired is None or any(
            before["metadata"].get(name) != after["metadata"].get(name)
            for name in {*before["metadata"], *after["metadata"]} - _CHANGED_BY_EVERY_WRITE
        ):
            return False
        old, new = before.get("status") or {}, after.get("status") or {}
        if new.get("phase") in _TERMINAL and new.get("phase") != old.get("phase"):
            return False  # what ends with the pod waits for it
        return _of_others(old) == _of_others(new) and not self._pending()

    def stop(self) -> None:
        """The pod is gone, or the agent goes: drop what was not sent, also for those who wait in ``flush``."""
        self.gone = True
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """``stop``, and wait until it has."""
        self.stop()
        if self._task is not None:
            await asyncio.wait({self._task})

    def _pending(self) -> dict[str, Any]:
        """What the server lacks. Asked several times for each status, so the answer is kept while none of what it is
        made of is replaced; it is never changed in place."""
        made_of = (self._desired, self._base, self._sent, self._echo)
        if self._answered is None or any(new is not old for new, old in zip(made_of, self._answered[0], strict=True)):
            self._answered = (made_of, self._compared())
        return self._answered[1]

    def _compared(self) -> dict[str, Any]:
        if self._desired is None:
            return {}
        if self._desired == self._sent and self._echo is not None and not diff(self._base, self._echo):
            return {}
        return diff(self._base, self._desired)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.error("the status of %s could not be sent", self._path, exc_info=error)
        elif self._desired is not None:
            # What was submitted in this turn of the loop found a task that would not look again.
            self.submit(self._desired)

    async def _hold_back(self) -> None:
        if self._urgent.is_set() or self._flushing:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace.delay_seconds()):
                await self._urgent.wait()

    async def _send(self) -> None:
        retry = RetryBackoff(initial=0.1, maximum=10.0)
        await self._hold_back()
        while not self.gone and (patch := self._pending()):
            desired = self._desired
            self._urgent.clear()
            try:
                answer = await self._kube.patch(
                    f"{self._path}/status", {"metadata": {"uid": self._uid}, "status": patch}
                )
            except (NotFoundError, ConflictError) as error:
                # The precondition failed: another pod of that name, or an update that came between. And a pod is not
                # ended for one 404, which a proxy may have written.
                logger.debug("status of %s: %s", self._path, error)
                await self._look_again(retry)
            except TooManyRequestsError as error:
                await asyncio.sleep(max(error.retry_after_seconds, retry.next()))
            except KubeError as error:
                refused = isinstance(error, ApiStatusError) and error.code == 422
                logger.log(logging.ERROR if refused else logging.WARNING, "status of %s: %s", self._path, error)
                await asyncio.sleep(retry.next())
            else:
                if not self._is_it(answer):
                    logger.warning("status of %s: the answer is another object", self._path)
                    await asyncio.sleep(retry.next())
                    continue
                retry.reset()
                if self.observed(answer):
                    self._sent, self._echo = desired, answer.get("status") or {}
                if self._pending():
                    await self._hold_back()
        self._urgent.clear()

    async def _look_again(self, retry: RetryBackoff) -> None:
        await asyncio.sleep(retry.next())
        try:
            found = await self._kube.get(self._path)
        except NotFoundError:
            self._lost()
            return
        except KubeError as error:
            if isinstance(error, ForbiddenError) and _NOT_OURS in error.message:
                self._lost()
                return
            logger.warning("pod %s: %s", self._path, error)
            return
        if self._is_it(found):
            self.observed(found)
        elif found["metadata"].get("uid"):
            self._lost()

    def _is_it(self, found: KubeObject) -> bool:
        return bool(found["metadata"].get("uid") == self._uid)

    def _lost(self) -> None:
        self.gone = True
        self._on_gone()
