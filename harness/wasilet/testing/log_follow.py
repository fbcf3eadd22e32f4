"""Reads the log of one container instance to its end, whatever happens to the connection on the way.

A log that was not read whole says nothing about what is not in it, so an end is believed only when the pod's status
shows that the instance is over. A connection that breaks off, or that a restarting agent ends while the container runs
on, is opened again: the log is read from its beginning, and what is known already is passed over. When that cannot be
done, the log says why in ``lost``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from wasilet_common.backoff import RetryBackoff

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.testing.log_spool import LogLine, LogSpool, LogTail, SpoolError, line_of
from wasilet.testing.pod_status import container_statuses, instances_of, is_running

IDLE_SECONDS = 3600.0
RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 2.0
REFUSALS = 4
"""A log that the API server refused so often in a row is lost; an API server or node that is away is waited for."""

STATUS_SECONDS = 1.0
"""A log may end this much before the status of its container reports it."""

LAST_LINE_SECONDS = 5.0


@dataclass
class InstanceLog:
    """The log of one instance of a container: a container that is started again has another."""

    container: str
    instance: str
    kept: LogSpool | LogTail = field(default_factory=LogSpool)
    opened: bool = False
    """Whether the node has begun to send it: from then on it is read to its end even if the pod is deleted."""

    ended: bool = False
    """Whether no further line can come."""

    error: str = ""
    """Why it cannot be read at this moment."""

    lost: str = ""
    """Why lines of it are missing for good; empty while none is."""

    @property
    def count(self) -> int:
        """How many lines have been read."""
        return self.kept.count

    def tail(self, count: int) -> list[LogLine]:
        """The last lines."""
        return self.kept.tail(count)

    @property
    def spool(self) -> LogSpool:
        """All its lines. Raises TypeError where only the end is kept: nothing can be judged by that."""
        if isinstance(self.kept, LogSpool):
            return self.kept
        raise TypeError("an observer that was not asked for whole logs keeps their ends only")

    @property
    def first_at(self) -> float:
        """When the first line was written; 0.0 while there is none, or when the node did not report it."""
        first = self.kept.first
        return 0.0 if first is None else line_of(first).at


class _OtherLogError(Exception):
    """What the node sends now does not begin as what it sent before."""


class LogFollower:
    """One log being read, in its own thread."""

    def __init__(
        self,
        kube: Kube,
        hangup: Hangup,
        changed: threading.Condition,
        tell: Callable[[], None],
        *,
        log: InstanceLog,
        pod: Callable[[], KubeObject | None],
    ) -> None:
        """``changed`` guards what is known of pods; ``tell``: something is new. ``pod``: as last seen, None once it is
        deleted."""
        self._kube = kube
        self._hangup = hangup
        self._changed = changed
        self._notify = tell
        self._log = log
        self._pod = pod
        self._unfinished = bytearray()

    def run(self) -> None:
        """Until the log has ended, is lost, or the hangup comes."""
        backoff = RetryBackoff(initial=RETRY_SECONDS, maximum=MAX_RETRY_SECONDS)
        refused, came_to_an_end = 0, False
        try:
            pod, previous = self._place()
            while pod is not None and previous is not None and not self._closed():
                known = self._log.count
                try:
                    self._read(pod, previous=previous)
                    refused, came_to_an_end = 0, True
                    if self._is_over():
                        break
                except ApiError as error:
                    if self._closed():
                        return
                    self._set_error(error.message)
                    refused = refused + 1 if error.code and 400 <= error.code < 500 and error.code != 429 else 0
                    if error.code == 404 or refused == REFUSALS:
                        break
                    came_to_an_end = False
                if self._log.count > known:
                    backoff.reset()
                self._hangup.wait(backoff.next())
                pod, previous = self._place()
            if came_to_an_end:
                self._finish()
            elif not self._closed():
                self._log.lost = self._log.error or "the pod or the container instance was gone before it was read"
        except SpoolError as error:
            self._log.lost = str(error)
        except _OtherLogError:
            self._log.lost = "the node no longer has its beginning"
        finally:
            with self._changed:
                self._log.ended = True
            self._notify()

    def _closed(self) -> bool:
        return self._hangup.done

    def _place(self) -> tuple[KubeObject | None, bool | None]:
        """The pod, and whether the instance is the previous one of its container; None: not there any more."""
        with self._changed:
            pod = self._pod()
            entry = self._entry(pod)
            return pod, dict(instances_of(entry)).get(self._log.instance) if entry else None

    def _entry(self, pod: KubeObject | None) -> KubeObject | None:
        statuses = container_statuses(pod) if pod else []
        return next((entry for entry in statuses if entry.get("name") == self._log.container), None)

    def _read(self, pod: KubeObject, *, previous: bool) -> None:
        query = {"container": self._log.container, "follow": "true", "timestamps": "true"}
        if previous:
            query["previous"] = "true"
        to_skip = self._log.count
        first = self._log.kept.first if to_skip else None
        self._unfinished = bytearray()
        with self._kube.chunks(_log_path(pod), self._hangup, idle_seconds=IDLE_SECONDS, **query) as chunks:
            self._log.opened, self._log.error = True, ""
            self._notify()
            for chunk in chunks:
                self._unfinished += chunk
                if b"\n" not in chunk:
                    continue
                end = self._unfinished.rfind(b"\n") + 1
                data, self._unfinished = bytes(self._unfinished[:end]), self._unfinished[end:]
                if first is not None:
                    if data[: data.find(b"\n")] != first:
                        raise _OtherLogError
                    first = None
                if to_skip:
                    data, to_skip = _without_lines(data, to_skip)
                if data:
                    self._log.kept.append(data)
                    self._notify()
        if to_skip:
            raise _OtherLogError

    def _is_over(self) -> bool:
        """Whether the instance has ended; its status may come a moment after its log's end."""

        def over() -> bool:
            entry = self._entry(self._pod())
            return self._hangup.done or entry is None or not is_running(entry, self._log.instance)

        with self._changed:
            return self._changed.wait_for(over, STATUS_SECONDS)

    def _finish(self) -> None:
        if self._unfinished:
            self._log.kept.append(bytes(self._unfinished) + b"\n")

    def _set_error(self, message: str) -> None:
        self._log.error = message
        self._notify()


def last_written(kube: Kube, pod: KubeObject, container: str) -> bytes:
    """The last line of a container's log with its time by the node's clock; empty while there is none. Raises
    ApiError."""
    query = {"container": container, "tailLines": "1", "timestamps": "true"}
    with kube.chunks(_log_path(pod), idle_seconds=LAST_LINE_SECONDS, **query) as chunks:
        data = b"".join(chunks)
    return data.rstrip(b"\n").rpartition(b"\n")[2]


def _log_path(pod: KubeObject) -> str:
    metadata = pod["metadata"]
    return api_path("pods", str(metadata["name"]), namespace=str(metadata.get("namespace") or ""), sub="log")


def _without_lines(data: bytes, lines: int) -> tuple[bytes, int]:
    """The data without so many lines at its beginning, and how many more are to go."""
    there = data.count(b"\n")
    if there <= lines:
        return b"", lines - there
    place = 0
    for _ in range(lines):
        place = data.index(b"\n", place) + 1
    return data[place:], 0
