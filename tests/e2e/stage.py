"""A cluster as end-to-end tests see it: what is in it now, kept by watches, and waits that name what did not come.

Two threads watch all pods and all events of the cluster; each change wakes all who wait, so nothing polls but
what has no watch here (logs, other kinds of objects).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials
from wasilet.kube.resources import Resources

POLL_SECONDS = 0.2
SERVICE_ACCOUNT_SECONDS = 60.0

Probe = Callable[[], Sequence[str]]
"""What is still missing, one line each; empty when the wait is over."""


class Stage:
    """The watched state of one cluster. Close it."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._changed = threading.Condition()
        self._pods: dict[str, dict[str, KubeObject]] = defaultdict(dict)
        self._events: dict[str, dict[str, KubeObject]] = defaultdict(dict)
        self._hangup = Hangup()
        self._threads = [
            threading.Thread(target=self._watch, args=(kind, keep), name=f"watch {kind}", daemon=True)
            for kind, keep in (("pods", self._pods), ("events", self._events))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the watches."""
        self._hangup.end()
        for thread in self._threads:
            thread.join(15)

    @contextlib.contextmanager
    def kube(self) -> Iterator[Kube]:
        """A client of one's own: one connection serves one thread at a time."""
        kube = Kube(self._credentials)
        try:
            yield kube
        finally:
            kube.close()

    # --- what is there ---------------------------------------------------------------------------------------------

    def pod(self, namespace: str, name: str) -> KubeObject | None:
        """The pod as last seen."""
        with self._changed:
            return self._pods[namespace].get(name)

    def pods(self, namespace: str) -> list[KubeObject]:
        """All pods of a namespace."""
        with self._changed:
            return list(self._pods[namespace].values())

    def events(self, namespace: str, name: str = "") -> list[KubeObject]:
        """Events of a namespace, or of one object in it, oldest first."""
        with self._changed:
            found = [e for e in self._events[namespace].values() if name in ("", e["involvedObject"].get("name"))]
        return sorted(found, key=lambda e: int(e["metadata"]["resourceVersion"]))

    def wait(self, probe: Probe, *, within: float, what: str = "", poll: float = 5.0) -> None:
        """Until ``probe`` misses nothing. It is asked after every change in the cluster, and every ``poll`` seconds.
        Raises AssertionError that names what is still missing."""
        deadline = time.monotonic() + within
        while True:
            missing = probe()
            if not missing:
                return
            left = deadline - time.monotonic()
            assert left > 0, f"{what + ': ' if what else ''}not within {within:g} s: " + "; ".join(missing)
            with self._changed:
                self._changed.wait(min(left, poll))

    # --- namespaces ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def namespace(self, prefix: str, *, pod_security: str = "") -> Iterator[str]:
        """A separate namespace, deleted afterwards without waiting for it. ``pod_security``: its level, where that is
        not the cluster's default."""
        name = f"{prefix[:50].rstrip('-')}-{secrets.token_hex(3)}"
        with self.kube() as kube:
            kube.create("/api/v1/namespaces", namespace_object(name, pod_security=pod_security))
        try:
            yield name
        finally:
            # The pods first: the namespace controller takes its time, and a failing probe writes events until then.
            body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 1}
            for path in (api_path("pods", namespace=name), api_path("namespaces", name)):
                with contextlib.suppress(ApiError), self.kube() as kube:
                    kube.request("DELETE", path, body=body)

    def create(self, kube: Kube, namespace: str, obj: KubeObject) -> KubeObject:
        """Create an object; a pod waits until the namespace has its ServiceAccount."""
        path = Resources(kube, namespace).collection(obj)
        deadline = time.monotonic() + SERVICE_ACCOUNT_SECONDS
        while True:
            try:
                return kube.create(path, obj)
            except ApiError as error:
                early = error.code == 403 and "serviceaccount" in str(error).lower() and "not found" in str(error)
                if not early or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    # --- watching --------------------------------------------------------------------------------------------------

    def _watch(self, kind: str, keep: dict[str, dict[str, KubeObject]]) -> None:
        path = f"/api/v1/{kind}"
        while not self._hangup.done:
            with contextlib.suppress(ApiError), self.kube() as kube:
                listed = kube.get(path)
                with self._changed:
                    keep.clear()
                    for item in listed.get("items") or []:
                        keep[item["metadata"]["namespace"]][item["metadata"]["name"]] = item
                    self._changed.notify_all()
                version = {"resourceVersion": str(listed["metadata"]["resourceVersion"])}
                with kube.watch(path, self._hangup, timeout_seconds=3600, idle_seconds=3700.0, **version) as changes:
                    for change in changes:
                        if not self._learn(change, keep):
                            break
            time.sleep(0.2)

    def _learn(self, change: Mapping[str, Any], keep: dict[str, dict[str, KubeObject]]) -> bool:
        if change["type"] == "BOOKMARK":
            return True
        if change["type"] == "ERROR":
            return False
        metadata = change["object"]["metadata"]
        with self._changed:
            if change["type"] == "DELETED":
                keep[metadata["namespace"]].pop(metadata["name"], None)
            else:
                keep[metadata["namespace"]][metadata["name"]] = change["object"]
            self._changed.notify_all()
        return True


def namespace_object(name: str, *, pod_security: str = "") -> KubeObject:
    """A namespace, with a PodSecurity level if one is given."""
    labels = {"labels": {"pod-security.kubernetes.io/enforce": pod_security}} if pod_security else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, **labels}}


def phase(pod: KubeObject | None) -> str:
    """The phase; empty for a pod that is not there."""
    return str(((pod or {}).get("status") or {}).get("phase") or "")


def is_ready(pod: KubeObject) -> bool:
    """Whether the condition Ready is true."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
