"""An API server in memory for those who read logs: pods with their watch, and logs that grow, end and break off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup
from wasilet.testing.test_namespace import TestNamespace

from tests.unit.harness.fake_kube import FakeKube, jobs_of, pods_of

START_NS = 1_800_000_000 * 1_000_000_000
NAMESPACE = "ns"
PODS = pods_of(NAMESPACE)


def stamped(text: str, ns: int) -> bytes:
    """A line as a node sends it."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction:09}Z {text}\n".encode()


def _without_end(_: int) -> None:
    """No connection breaks off."""


class Log:
    """What one container instance wrote so far."""

    def __init__(self) -> None:
        self.data = b""
        self.over = False
        self.reads = 0
        self.gate: Callable[[int], int | None] = _without_end
        """Given the number of the reading (from 0), how many bytes come before it breaks off; None: all."""

        self.clean_break = False
        """Whether a connection that breaks off looks like one that ended."""

        self.held = threading.Event()
        self.held.set()
        """Not set: what follows the first kilobyte does not come yet."""


class LogApi(FakeKube):
    """Of whose pods the logs grow, end and break off; by the container instance that wrote them."""

    def __init__(self) -> None:
        super().__init__("https://memory")
        self.written: dict[str, Log] = {}
        self.clock = START_NS
        self.tail_asked = threading.Event()
        self.refuse: ApiError | None = None
        """What a log request is answered with."""

    # --- what tests do ---------------------------------------------------------------------------------------------

    def write(self, instance: str, *texts: str, at_ns: int | None = None) -> None:
        lines = []
        for text in texts:
            self.clock += 1_000_000
            lines.append(stamped(text, self.clock if at_ns is None else at_ns))
        data = b"".join(lines)
        with self.changed:
            self.written.setdefault(instance, Log()).data += data
            self.changed.notify_all()

    def end(self, instance: str) -> None:
        with self.changed:
            self.written.setdefault(instance, Log()).over = True
            self.changed.notify_all()

    def pod(
        self, name: str, phase: str, *containers: dict[str, Any], job: str = "", created: str = ""
    ) -> dict[str, Any]:
        """Show a pod as it is now."""
        metadata: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "uid": f"uid-{name}"}
        metadata["creationTimestamp"] = created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if job:
            metadata["ownerReferences"] = [{"kind": "Job", "name": job}]
            metadata["labels"] = {"batch.kubernetes.io/job-name": job}
        obj = {
            "metadata": metadata,
            "spec": {"nodeName": "n"},
            "status": {"phase": phase, "containerStatuses": list(containers)},
        }
        self.show(PODS, obj)
        return obj

    def job(self, name: str, **conditions: str) -> None:
        """Show a Job; its conditions by type, each with a message."""
        met = [{"type": kind, "status": "True", "message": message} for kind, message in conditions.items()]
        self.show(jobs_of(NAMESPACE), {"metadata": {"name": name, "uid": name}, "status": {"conditions": met}})

    def remove_pod(self, name: str) -> None:
        self.remove(f"{PODS}/{name}")

    # --- what the harness asks -------------------------------------------------------------------------------------

    @contextmanager
    def chunks(
        self, path: str, hangup: Hangup | None = None, /, *, idle_seconds: float = 330.0, **query: str
    ) -> Iterator[Iterator[bytes]]:
        with self.changed:
            obj = self.objects.get(path.removesuffix("/log"))
            if self.refuse is not None:
                raise self.refuse
            if obj is None:
                raise ApiError("not found", code=404)
            status = next(s for s in obj["status"]["containerStatuses"] if s["name"] == query["container"])
            if query.get("previous"):
                instance, running = status["lastState"]["terminated"]["containerID"], False
            else:
                instance, running = status["containerID"], "running" in status["state"]
            log = self.written.setdefault(instance, Log())
            read, log.reads = log.reads, log.reads + ("tailLines" not in query)
            limit = log.gate(read)
        if "tailLines" in query:
            self.tail_asked.set()
            yield iter([log.data.rstrip(b"\n").rpartition(b"\n")[2] + b"\n"])
            return

        def pieces() -> Iterator[bytes]:
            place = 0
            while hangup is None or not hangup.done:
                if place >= 1024 and not log.held.is_set():
                    log.held.wait(0.02)
                    continue
                with self.changed:
                    if place == len(log.data):
                        if log.over or not running:
                            return
                        self.changed.wait(0.02)
                        continue
                    piece = log.data[place : place + (1024 if not log.held.is_set() else 65536)]
                if limit is not None and place + len(piece) > limit:
                    yield piece[: limit - place]
                    if log.clean_break:
                        return
                    raise ApiError("the API server gave no answer: it broke off")
                place += len(piece)
                yield piece

        yield pieces()


def running(instance: str, *, name: str = "main", restarts: int = 0, last: str = "") -> dict[str, Any]:
    """The status of a container that runs; ``last``: the instance before."""
    status: dict[str, Any] = {"name": name, "containerID": instance, "restartCount": restarts, "state": {"running": {}}}
    if last:
        status["lastState"] = {"terminated": {"containerID": last, "exitCode": 1, "reason": "Error"}}
    return status


def terminated(
    instance: str, *, name: str = "main", restarts: int = 0, code: int = 0, last: str = ""
) -> dict[str, Any]:
    """The status of a container that is over."""
    status = running(instance, name=name, restarts=restarts, last=last)
    status["state"] = {"terminated": {"containerID": instance, "exitCode": code, "reason": "Completed"}}
    return status


@contextmanager
def scene_on(api: LogApi, *, within_seconds: float = 20.0) -> Iterator[TestNamespace]:
    """A test's namespace as the plugin sees it."""
    cluster: Any = SimpleNamespace(kube=api, has_other_nodes=False)
    scene = TestNamespace(cluster, NAMESPACE, within_seconds=within_seconds)
    scene.observer.wait(lambda: True if scene.observer.listed else None, within_seconds=5)
    try:
        yield scene
    finally:
        scene.close()
