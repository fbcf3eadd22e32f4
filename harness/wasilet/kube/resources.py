"""Objects of any kind in a cluster: which path is theirs, made, replaced and removed, but never taken from others.

What this creates is marked by its field manager, which the API server records in ``metadata.managedFields``: manifests
stay as they are printed, and an object that somebody else made is neither replaced nor removed, but named.

Pods and Jobs cannot be changed once they exist, and a demo wants a fresh run: they are deleted and made again. All else
is applied on the server's side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from wasilet.errors import ApiError, UsageError, WaitTimeoutError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.process import check_cancelled

FIELD_MANAGER = "wasilet"
DELETE_TIMEOUT_SECONDS = 60.0

_REPLACED = frozenset({"Pod", "Job"})
_WELL_KNOWN = {
    ("v1", "Pod"): ("pods", True),
    ("v1", "ConfigMap"): ("configmaps", True),
    ("v1", "Secret"): ("secrets", True),
    ("v1", "Service"): ("services", True),
    ("v1", "ServiceAccount"): ("serviceaccounts", True),
    ("v1", "PersistentVolumeClaim"): ("persistentvolumeclaims", True),
    ("v1", "Namespace"): ("namespaces", False),
    ("batch/v1", "Job"): ("jobs", True),
    ("apps/v1", "Deployment"): ("deployments", True),
}
"""Plural and whether it is namespaced; other kinds are asked of the server."""


@dataclass
class Resources:
    """The objects of one namespace of one cluster."""

    kube: Kube
    namespace: str
    _kinds: dict[tuple[str, str], tuple[str, bool]] = field(default_factory=lambda: dict(_WELL_KNOWN))

    def apply(self, objects: Sequence[KubeObject], *, timeout_seconds: float = DELETE_TIMEOUT_SECONDS) -> list[str]:
        """Make the cluster hold ``objects``; ``kind/name`` of each with what was done.

        Raises UsageError when one exists that another made (before anything is changed) or there is no such namespace,
        ApiError when the server refuses one, WaitTimeoutError when one that must be replaced does not go.
        """
        try:
            return self._apply(objects, timeout_seconds)
        except ApiError as error:
            if error.code == 404 and error.message == f'namespaces "{self.namespace}" not found':
                raise UsageError(
                    f"there is no namespace {self.namespace!r}", hint=f"kubectl create namespace {self.namespace}"
                ) from error
            raise

    def _apply(self, objects: Sequence[KubeObject], timeout_seconds: float) -> list[str]:
        existing = [self.kube.find(self.path(obj)) for obj in objects]
        for obj, old in zip(objects, existing, strict=True):
            if old is not None and not is_ours(old):
                name = object_name(obj)
                raise UsageError(
                    f"{name} exists in namespace {self.namespace}, and something else made it",
                    hint=f"kubectl delete {name} -n {self.namespace}; or choose another --namespace",
                )
        replaced = [
            (obj, old)
            for obj, old in zip(objects, existing, strict=True)
            if old is not None and obj["kind"] in _REPLACED
        ]
        for obj, old in replaced:
            self._delete(obj, str(old["metadata"]["uid"]))
        for obj, old in replaced:
            self._wait_gone(obj, old, timeout_seconds)
        done = []
        for obj, old in zip(objects, existing, strict=True):
            if obj["kind"] in _REPLACED:
                query = {"fieldManager": FIELD_MANAGER}
                self.kube.request("POST", self.collection(obj), body=obj, query=query)
                done.append(f"{object_name(obj)} {'replaced' if old is not None else 'created'}")
            else:
                self.kube.request(
                    "PATCH",
                    self.path(obj),
                    body=obj,
                    query={"fieldManager": FIELD_MANAGER, "force": "true"},
                    content_type="application/apply-patch+yaml",
                )
                done.append(f"{object_name(obj)} {'applied' if old is not None else 'created'}")
        return done

    def remove(self, objects: Sequence[KubeObject], *, timeout_seconds: float = DELETE_TIMEOUT_SECONDS) -> list[str]:
        """Delete those of ``objects`` that this made, and wait until they are gone; their names."""
        gone = []
        found = [(obj, self.kube.find(self.path(obj))) for obj in reversed(objects)]
        ours = [(obj, old) for obj, old in found if old is not None and is_ours(old)]
        for obj, old in ours:
            self._delete(obj, str(old["metadata"]["uid"]))
        for obj, old in ours:
            self._wait_gone(obj, old, timeout_seconds)
            gone.append(object_name(obj))
        return gone

    def path(self, obj: KubeObject) -> str:
        """The object's own path. Raises UsageError for a kind that the server does not know."""
        return f"{self.collection(obj)}/{obj['metadata']['name']}"

    def collection(self, obj: KubeObject) -> str:
        """The path of the collection it belongs to."""
        version, kind = str(obj["apiVersion"]), str(obj["kind"])
        plural, namespaced = self._kind(version, kind)
        group, _, short = version.rpartition("/")
        namespace = str(obj["metadata"].get("namespace") or self.namespace) if namespaced else ""
        return api_path(plural, group=group, version=short, namespace=namespace)

    def _kind(self, version: str, kind: str) -> tuple[str, bool]:
        if (version, kind) not in self._kinds:
            prefix = "/apis/" if "/" in version else "/api/"
            answer = self.kube.find(prefix + version)
            for entry in (answer or {}).get("resources") or []:
                if "/" not in str(entry.get("name")):
                    found = (str(entry["name"]), bool(entry.get("namespaced")))
                    self._kinds.setdefault((version, str(entry.get("kind"))), found)
        try:
            return self._kinds[version, kind]
        except KeyError:
            raise UsageError(f"this cluster knows no kind {kind} in {version}") from None

    def _delete(self, obj: KubeObject, uid: str) -> None:
        """With the object's uid as precondition: what took its name meanwhile is left alone."""
        body: KubeObject = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            # A Job is gone only after its pods: the next one's log must not be mixed with theirs.
            "propagationPolicy": "Foreground" if obj["kind"] == "Job" else "Background",
        }
        if obj["kind"] == "Pod":
            body["gracePeriodSeconds"] = 1
        try:
            self.kube.request("DELETE", self.path(obj), body=body)
        except ApiError as error:
            if error.code not in {404, 409}:
                raise

    def _wait_gone(self, obj: KubeObject, old: KubeObject, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        uid = old["metadata"]["uid"]
        while True:
            check_cancelled()
            current = self.kube.find(self.path(obj))
            if current is None or current["metadata"]["uid"] != uid:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                finalizers = ", ".join(current["metadata"].get("finalizers") or []) or "none"
                raise WaitTimeoutError(
                    f"{object_name(obj)} is not gone after {timeout_seconds:g} s (finalizers: {finalizers})",
                    hint=f"see kubectl describe {object_name(obj)} -n {self.namespace}",
                )
            # From the version just read on: a deletion in between is among the events, not lost.
            query = {
                "fieldSelector": f"metadata.name={obj['metadata']['name']}",
                "resourceVersion": str(current["metadata"]["resourceVersion"]),
            }
            try:
                seconds = max(1, min(5, int(left)))
                with self.kube.watch(
                    self.collection(obj), timeout_seconds=seconds, idle_seconds=seconds + 5.0, **query
                ) as events:
                    for event in events:
                        if event.get("type") == "DELETED" and event["object"]["metadata"]["uid"] == uid:
                            return
                        if event.get("type") == "ERROR":
                            break
            except ApiError as error:
                if error.code != 410:
                    raise


def object_name(obj: KubeObject) -> str:
    """``pod/x``: as kubectl takes it."""
    return f"{str(obj['kind']).lower()}/{obj['metadata']['name']}"


def is_ours(obj: KubeObject) -> bool:
    """Whether this module made it: its field manager is recorded."""
    managers = obj["metadata"].get("managedFields") or []
    return any(entry.get("manager") == FIELD_MANAGER for entry in managers)
