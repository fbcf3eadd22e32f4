"""Pods by the hundred for load and fault tests, and how often each of their guests really ran.

A guest's first act is to append one byte to a file of its own, named after its pod's uid, in a folder of the machine.
So the size of that file is the number of runs, whatever the node believes.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wasilet.errors import ApiError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials

CREATE_SECONDS = 60.0
RETRY_SECONDS = 0.25


def counting_pod(
    name: str, image: str, runs: Path, script: str, *, node: str = "", spec: Mapping[str, Any] | None = None
) -> KubeObject:
    """A pod that leaves a byte in ``runs``, then does what ``script`` (of the toolbox guest) says. ``node``: it is
    bound at once, without the scheduler."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "churn"}},
        "spec": {
            "restartPolicy": "Never",
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            **({"nodeName": node} if node else {}),
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "args": [f"append /runs/$(POD_UID) x; {script}"],
                    "env": [{"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}],
                    "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
                }
            ],
            "volumes": [{"name": "runs", "hostPath": {"path": str(runs), "type": "Directory"}}],
            **(spec or {}),
        },
    }


def run_counts(runs: Path) -> dict[str, int]:
    """Runs by pod uid."""
    return {file.name: file.stat().st_size for file in runs.iterdir()}


class Creator:
    """Creates and deletes pods from several threads, through whatever happens to the API server."""

    def __init__(self, credentials: Credentials, namespace: str, *, threads: int = 4) -> None:
        self._clients: queue.SimpleQueue[Kube] = queue.SimpleQueue()
        for _ in range(threads):
            self._clients.put(Kube(credentials))
        self._namespace = namespace
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="create")

    def close(self) -> None:
        """End its threads and connections."""
        self._pool.shutdown(cancel_futures=True)
        while not self._clients.empty():
            self._clients.get().close()

    def create(self, pods: Iterable[KubeObject]) -> list[str]:
        """Create them all; their uids."""
        return list(self._pool.map(self._create, pods))

    def delete(self, names: Iterable[str], *, grace: int | None = None) -> None:
        """Delete them all; without waiting until they are gone."""
        list(self._pool.map(lambda name: self._delete(name, grace), names))

    def _create(self, pod: KubeObject) -> str:
        path = api_path("pods", namespace=self._namespace)
        return str(self._insist(lambda kube: _created(kube, path, pod))["metadata"]["uid"])

    def _delete(self, name: str, grace: int | None) -> None:
        path = api_path("pods", name, namespace=self._namespace)
        query = {} if grace is None else {"gracePeriodSeconds": str(grace)}
        self._insist(lambda kube: {"deleted": kube.delete(path, **query)})

    def _insist(self, request: Any) -> KubeObject:
        deadline = time.monotonic() + CREATE_SECONDS
        while True:
            kube = self._clients.get()
            try:
                answer: KubeObject = request(kube)
                return answer
            except ApiError as error:
                refused = error.code is not None and 400 <= error.code < 500 and error.code not in {403, 409, 429}
                if refused or time.monotonic() > deadline:
                    raise
            finally:
                self._clients.put(kube)
            time.sleep(RETRY_SECONDS)


def _created(kube: Kube, path: str, pod: KubeObject) -> KubeObject:
    try:
        return kube.create(path, pod)
    except ApiError as error:
        if error.code == 409:  # an answer that was lost with its server
            found = kube.find(f"{path}/{pod['metadata']['name']}")
            if found is not None:
                return found
        raise


class Churn:
    """Goes on creating short pods, some of which are deleted while they run, until it is told to end."""

    def __init__(
        self, creator: Creator, image: str, runs: Path, *, node: str = "", per_second: float = 10.0, prefix: str = "c"
    ) -> None:
        self._creator = creator
        self._image, self._runs, self._node = image, runs, node
        self._pause = 1.0 / per_second
        self._prefix = prefix
        self._over = threading.Event()
        self.errors: list[str] = []
        self.uids: dict[str, str] = {}
        """Of all that were created: name by uid."""

        self.deleted: set[str] = set()
        """Names of those that were deleted early."""

        self._thread = threading.Thread(target=self._go_on, name="churn", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more pods. Raises AssertionError when one could not be created."""
        self._over.set()
        self._thread.join(CREATE_SECONDS * 2)
        assert not self.errors, self.errors

    def _go_on(self) -> None:
        names: Iterator[str] = (f"{self._prefix}-{number}" for number in itertools.count())
        for number, name in enumerate(names):
            if self._over.wait(self._pause):
                return
            # Some end at once, some run a while, and every fifth is deleted, the one before it, while it may run.
            script = ("say done", "sleep 0.5; say done", "sleep 2; say done", "exit 3", "sleep 20")[number % 5]
            try:
                pod = counting_pod(name, self._image, self._runs, script, node=self._node)
                self.uids[self._creator.create([pod])[0]] = name
                if number % 5 == 4:
                    self.deleted.add(name)
                    self._creator.delete([name])
            except ApiError as error:
                self.errors.append(f"{name}: {error}")
