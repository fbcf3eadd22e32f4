"""Objects of any kind in a cluster: which path is an object's, made, replaced and removed, but never taken from others.

What this creates is marked by its field manager, which the API server records in ``metadata.managedFields``: manifests
stay as they are printed, and an object that someone else made is neither replaced nor removed, but named.

Pods and Jobs cannot be changed once they exist, and a demo wants a fresh run: they are deleted and made again. All else
is applied on the server's side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from wasilet.errors import ApiError, UsageError, WaitTimeoutError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.manifest_file import manifest_errors
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

        What has a ``generateName`` is created each time, and what was made from it before is deleted.

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
        existing = [self._existing(obj) for obj in objects]
        for obj, found in zip(objects, existing, strict=True):
            if any(not is_ours(old) for old in found):
                name = object_name(obj)
                raise UsageError(
                    f"{name} exists in namespace {self.namespace}, and something else made it",
                    hint=f"kubectl delete {name} -n {self.namespace}; or choose another --namespace",
                )
        replaced = [old for obj, found in zip(objects, existing, strict=True) for old in found if _is_made_again(obj)]
        for old in replaced:
            self._delete(old)
        for old in replaced:
            self._wait_gone(old, timeout_seconds)
        return [self._put(obj, found) for obj, found in zip(objects, existing, strict=True)]

    def _existing(self, obj: KubeObject) -> list[KubeObject]:
        """The object of that name; with ``generateName``, those that this made from it before."""
        # An object inside a list does not say what it is.
        identity = {"apiVersion": obj["apiVersion"], "kind": obj["kind"]}
        if is_named(obj):
            old = self.kube.find(self.path(obj))
            return [identity | old] if old is not None else []
        items = self.kube.get(self.collection(obj)).get("items") or []
        prefix = obj["metadata"]["generateName"]
        return [identity | item for item in items if item["metadata"].get("generateName") == prefix and is_ours(item)]

    def _put(self, obj: KubeObject, found: list[KubeObject]) -> str:
        query = {"fieldManager": FIELD_MANAGER}
        with manifest_errors(obj):
            if _is_made_again(obj):
                answer = self.kube.request("POST", self.collection(obj), body=obj, query=query)
                done = "replaced" if found else "created"
            else:
                answer = self.kube.request(
                    "PATCH",
                    self.path(obj),
                    body=obj,
                    query=query | {"force": "true"},
                    content_type="application/apply-patch+yaml",
                )
                done = "applied" if found else "created"
        return f"{object_name(obj if is_named(obj) else {'kind': obj['kind'], **answer})} {done}"

    def remove(self, objects: Sequence[KubeObject], *, timeout_seconds: float = DELETE_TIMEOUT_SECONDS) -> list[str]:
        """Delete those of ``objects`` that this made, and wait until they are gone; their names."""
        ours = [old for obj in reversed(objects) for old in self._existing(obj) if is_ours(old)]
        for old in ours:
            self._delete(old)
        for old in ours:
            self._wait_gone(old, timeout_seconds)
        return [object_name(old) for old in ours]

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

    def _delete(self, old: KubeObject) -> None:
        """With the object's uid as precondition: what took its name meanwhile is left alone."""
        body: KubeObject = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": str(old["metadata"]["uid"])},
            # A Job is gone only after its pods: the next one's log must not be mixed with those pods'.
            "propagationPolicy": "Foreground" if old["kind"] == "Job" else "Background",
        }
        if old["kind"] == "Pod":
            body["gracePeriodSeconds"] = 1
        try:
            self.kube.request("DELETE", self.path(old), body=body)
        except ApiError as error:
            if error.code not in {404, 409}:
                raise

    def _wait_gone(self, old: KubeObject, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        uid = old["metadata"]["uid"]
        while True:
            check_cancelled()
            current = self.kube.find(self.path(old))
            if current is None or current["metadata"]["uid"] != uid:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                finalizers = ", ".join(current["metadata"].get("finalizers") or []) or "none"
                raise WaitTimeoutError(
                    f"{object_name(old)} is not gone after {timeout_seconds:g} s (finalizers: {finalizers})",
                    hint=f"see kubectl describe {object_name(old)} -n {self.namespace}",
                )
            # From the version just read on: a deletion in between is among the events, not lost.
            query = {
                "fieldSelector": f"metadata.name={old['metadata']['name']}",
                "resourceVersion": str(current["metadata"]["resourceVersion"]),
            }
            try:
                seconds = max(1, min(5, int(left)))
                with self.kube.watch(
                    self.collection(old), timeout_seconds=seconds, idle_seconds=seconds + 5.0, **query
                ) as events:
                    for event in events:
                        if event.get("type") == "DELETED" and event["object"]["metadata"]["uid"] == uid:
                            return
                        if event.get("type") == "ERROR":
                            break
            except ApiError as error:
                if error.code != 410:
                    raise


def is_named(obj: KubeObject) -> bool:
    """Whether the manifest names it; else the API server makes a name from ``generateName``."""
    return bool(obj["metadata"].get("name"))


def _is_made_again(obj: KubeObject) -> bool:
    """Whether it is created each time, what was there before being deleted."""
    return obj["kind"] in _REPLACED or not is_named(obj)


def object_name(obj: KubeObject) -> str:
    """``pod/x``: as kubectl takes it."""
    metadata = obj["metadata"]
    return f"{str(obj['kind']).lower()}/{metadata.get('name') or metadata['generateName']}"


def is_ours(obj: KubeObject) -> bool:
    """Whether this module made it: its field manager is recorded."""
    managers = obj["metadata"].get("managedFields") or []
    return any(entry.get("manager") == FIELD_MANAGER for entry in managers)


def node_is_ready(node: KubeObject) -> bool:
    """Its Ready condition."""
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
