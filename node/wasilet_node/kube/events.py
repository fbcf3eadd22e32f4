"""core/v1 Events, as every kubelet user knows them from ``kubectl describe``.

Events are for people, so they may be lost but must never hurt: ``event`` only puts into a bounded queue, a few
tasks write (one after another for one object, so that its Events stay in order), behind the statuses that are being
written at the time, and what cannot be written is dropped with a log line. At a normal end what waits is written. A
single writer falls behind by minutes when a busy API server takes 0.1 s for each and pods come in bursts.

The three rules that keep a crash loop from filling etcd are those of client-go's correlator
(tools/record/events_cache.go), with its numbers:

- the same text again: the first Event's ``count`` and ``lastTimestamp`` are patched;
- ten different texts of one reason within ten minutes: the rest is one Event, ``(combined from similar events): ...``;
- 25 Events in a burst about one object, then one in five minutes (a token bucket for each object and type).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from wasilet_common.time_format import rfc3339_of

from wasilet_node.kube.base import (
    ApiStatusError,
    ApiUnavailableError,
    ConflictError,
    Kube,
    KubeError,
    KubeObject,
    NotFoundError,
)

logger = logging.getLogger(__name__)

COMPONENT = "kubelet"

_QUEUE_LENGTH = 5000
"""The starts of 1,500 pods at once: some 5 MB. More is dropped, and reported."""

_CACHE_ENTRIES = 4096
_AGGREGATE_AFTER = 10
_AGGREGATE_WINDOW_SECONDS = 600.0
_SPAM_BURST = 25
_SPAM_REFILL_PER_SECOND = 1 / 300
_BEHIND_SECONDS = 2.0
_LOOK_SECONDS = 0.02
_PARALLEL_WRITES = 4
_MAX_MESSAGE_CHARACTERS = 1024
_MAX_NAME_CHARACTERS = 253 - 17
_ATTEMPTS = 12
_SAY_AGAIN_SECONDS = 60.0

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a recorder writes."""

    writes_per_second: float = 50.0
    """kubelet's eventRecordQPS: a burst of pods must not have its status patches wait behind its Events."""

    write_burst: int = 100
    retry_seconds: float = 10.0
    """Between attempts while the API server is away."""


class _Cache(Generic[_Value]):
    """The last ``_CACHE_ENTRIES`` used."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, ...], _Value] = OrderedDict()

    def get(self, key: tuple[str, ...], make: Callable[[], _Value]) -> _Value:
        value = self._entries.get(key)
        if value is None:
            value = self._entries[key] = make()
            if len(self._entries) > _CACHE_ENTRIES:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
        return value


class _Bucket:
    """A token bucket on the monotonic clock."""

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._tokens = burst
        self._at = now

    def wait_seconds(self, now: float) -> float:
        """How long until a token is there; 0 where one is."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_second)
        self._at = now
        return max(0.0, (1 - self._tokens) / self._per_second)

    def take(self, now: float) -> bool:
        if self.wait_seconds(now) > 0:
            return False
        self._tokens -= 1
        return True


@dataclass
class _Similar:
    """The texts seen of one object and reason."""

    messages: set[str] = field(default_factory=set)
    last: float = 0.0


@dataclass
class _Observed:
    """One Event on the server."""

    count: int = 0
    name: str = ""
    first_timestamp: str = ""


@dataclass(frozen=True)
class _Said:
    """What ``event`` was called with, and when."""

    involved: dict[str, str]
    type: str
    reason: str
    message: str
    at: datetime
    since: float
    """``at``, on the recorder's clock."""


class KubeEventRecorder:
    """``wasilet_node.kube.base.EventRecorder`` that writes to the API server while ``run`` runs."""

    def __init__(
        self,
        kube: Kube,
        *,
        host: str,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], bool] = lambda: False,
        pace: Pace = Pace(),
    ) -> None:
        """``host``: the node's name. ``clock``: monotonic seconds. ``busy``: whether statuses are being written, which
        Events then let go first, for 2 s at most: three Events per start cost more than the status that pods wait for.
        """
        self._busy = busy
        self._pace = pace
        self._hurry = asyncio.Event()
        self._kube = kube
        self._host = host
        self._clock = clock
        self._queue: asyncio.Queue[_Said] = asyncio.Queue(_QUEUE_LENGTH)
        self._similar: _Cache[_Similar] = _Cache()
        self._observed: _Cache[_Observed] = _Cache()
        self._spam: _Cache[_Bucket] = _Cache()
        self._writes = _Bucket(pace.write_burst, pace.writes_per_second, clock())
        self._dropped = 0
        self._dropped_said_at: float | None = None

    def event(self, obj: KubeObject, type_: str, reason: str, message: str, *, field_path: str = "") -> None:
        """See ``wasilet_node.kube.base.EventRecorder``."""
        metadata = obj.get("metadata") or {}
        involved = {
            "kind": str(obj.get("kind") or "Pod"),
            "apiVersion": str(obj.get("apiVersion") or "v1"),
            "name": str(metadata.get("name") or ""),
            "namespace": str(metadata.get("namespace") or ""),
            "uid": str(metadata.get("uid") or ""),
            "resourceVersion": str(metadata.get("resourceVersion") or ""),
            "fieldPath": field_path,
        }
        said = _Said(
            involved={key: value for key, value in involved.items() if value},
            type=type_,
            reason=reason,
            message=_shortened(message),
            at=datetime.now(UTC),
            since=self._clock(),
        )
        try:
            self._queue.put_nowait(said)
        except asyncio.QueueFull:
            self._drop("the queue is full")

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        slots = asyncio.Semaphore(_PARALLEL_WRITES)
        last: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                await slots.acquire()
                said = await self._queue.get()
                correlated = self._correlate(said)
                if correlated is None:
                    self._queue.task_done()
                    slots.release()
                    continue
                await self._wait_turn(said)
                subject = said.involved.get("uid", "")
                task = group.create_task(self._write_after(last.get(subject), said, *correlated))
                last[subject] = task

                def ended(task: asyncio.Task[None], subject: str = subject) -> None:
                    self._queue.task_done()
                    slots.release()
                    if last.get(subject) is task:
                        del last[subject]

                task.add_done_callback(ended)

    async def _wait_turn(self, said: _Said) -> None:
        """By the rate of writes, and behind statuses; neither at the end, when what is left has to be written."""
        wait = self._writes.wait_seconds(self._clock())
        if wait > 0:
            await self._pause(wait)
        while not self._hurry.is_set() and self._busy() and self._clock() - said.since < _BEHIND_SECONDS:
            await self._pause(_LOOK_SECONDS)
        self._writes.take(self._clock())

    async def _pause(self, seconds: float) -> None:
        """Shorter at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _write_after(
        self, before: asyncio.Task[None] | None, said: _Said, observed: _Observed, count: int, message: str
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            await self._write(said, observed, count, message)
        except Exception:
            logger.exception("an event (%s) was not written", said.reason)

    async def flush(self, *, timeout_seconds: float) -> None:
        """Write everything reported so far at once, and wait for it, but no longer than that. ``run`` must be
        running."""
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._queue.join()
        except TimeoutError:
            logger.warning("%d events were not written before the end", self._queue.qsize())
        finally:
            self._hurry.clear()

    def _drop(self, why: str) -> None:
        self._dropped += 1
        now = self._clock()
        if self._dropped_said_at is None or now - self._dropped_said_at >= _SAY_AGAIN_SECONDS:
            self._dropped_said_at = now
            logger.warning("%d events were dropped so far: %s", self._dropped, why)

    async def _write(self, said: _Said, observed: _Observed, count: int, message: str) -> None:
        for _ in range(_ATTEMPTS):
            try:
                await self._send(said, observed, count, message)
                return
            except ApiUnavailableError:
                if self._hurry.is_set():
                    break  # the API server ends too, as in `down`: nothing is waited for
                await self._pause(self._pace.retry_seconds)
            except ApiStatusError as error:
                # A namespace that ends refuses its own last events: no one will read them.
                level = logging.DEBUG if error.code in (403, 404) else logging.WARNING
                logger.log(level, "an event (%s) was refused: %s", said.reason, error)
                return
            except KubeError as error:
                logger.warning("an event (%s) was not written: %s", said.reason, error)
                return
        self._drop("the API server does not answer")

    def _correlate(self, said: _Said) -> tuple[_Observed, int, str] | None:
        """The Event to create (count 1) or to patch, with its count and text; None: filtered as spam."""
        now = self._clock()
        subject = tuple(said.involved.get(key, "") for key in ("kind", "apiVersion", "namespace", "name", "uid"))
        similar = self._similar.get((*subject, said.type, said.reason), _Similar)
        if now - similar.last > _AGGREGATE_WINDOW_SECONDS:
            similar.messages.clear()
        similar.last = now
        similar.messages.add(said.message)
        message = said.message
        key = (*subject, said.involved.get("fieldPath", ""), said.type, said.reason, said.message)
        if len(similar.messages) >= _AGGREGATE_AFTER:
            similar.messages.discard(next(iter(similar.messages - {said.message}), said.message))
            message = f"(combined from similar events): {said.message}"[:_MAX_MESSAGE_CHARACTERS]
            key = (*subject, said.type, said.reason)
        observed = self._observed.get(key, _Observed)
        observed.count += 1
        if not observed.name:
            stem = said.involved.get("name", "unknown")[:_MAX_NAME_CHARACTERS].rstrip("-.")
            observed.name = f"{stem}.{time.time_ns():x}"
            observed.first_timestamp = _text(said.at)
        bucket = self._spam.get((*subject, said.type), lambda: _Bucket(_SPAM_BURST, _SPAM_REFILL_PER_SECOND, now))
        return (observed, observed.count, message) if bucket.take(now) else None

    async def _send(self, said: _Said, observed: _Observed, count: int, message: str) -> None:
        namespace = said.involved.get("namespace") or "default"
        path = f"/api/v1/namespaces/{namespace}/events"
        if count > 1:
            patch: dict[str, Any] = {"count": count, "lastTimestamp": _text(said.at), "message": message}
            try:
                await self._kube.patch(f"{path}/{observed.name}", patch)
                return
            except NotFoundError:
                # Events live an hour; this one is gone, so it is recorded again, with its count.
                pass
        body: KubeObject = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": observed.name, "namespace": namespace},
            "involvedObject": said.involved,
            "type": said.type,
            "reason": said.reason,
            "message": message,
            "source": {"component": COMPONENT, "host": self._host},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._host,
            "firstTimestamp": observed.first_timestamp,
            "lastTimestamp": _text(said.at),
            "count": count,
        }
        try:
            await self._kube.create(path, body)
        except ConflictError:
            logger.debug("the event %s is there already", observed.name)


def _text(at: datetime) -> str:
    return rfc3339_of(at)


def _shortened(message: str) -> str:
    if len(message) <= _MAX_MESSAGE_CHARACTERS:
        return message
    return message[: _MAX_MESSAGE_CHARACTERS - 3] + "..."
