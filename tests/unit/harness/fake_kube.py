"""The API server of the harness' unit tests, in memory: objects by path, watches of them, and logs.

It is the harness' own client with its transport replaced: a test's request goes through the client's verbs, and
arrives here as method, path and body. What a test did not foresee fails by its path.
"""

from __future__ import annotations

import base64
import copy
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials

APPLY = "application/apply-patch+yaml"
LONGEST_WATCH_SECONDS = 0.5
"""No watch lasts longer here, whatever is asked for, so that one that nothing hangs up ends with its test."""

_COLLECTION = re.compile(r"/(api/v1|apis/[^/]+/[^/]+)(/namespaces/[^/]+)?/[a-z]+")


class FakeKube(Kube):
    """One cluster. Attributes are written by tests under no lock, before or between what the harness asks."""

    def __init__(self, server: str = "https://fake") -> None:
        super().__init__(Credentials(server=server))
        self.objects: dict[str, KubeObject] = {}
        self.requests: list[tuple[str, str, Any]] = []
        """What was asked to change anything: method, path, body."""

        self.refusals: dict[str, ApiError] = {}
        """By method and path, as ``POST /api/v1/nodes``, or by method alone."""

        self.unanswered = 0
        """How many of the next requests are not answered."""

        self.stuck: set[str] = set()
        """Paths of objects that do not go when they are deleted."""

        self.history: list[tuple[str, KubeObject]] = []
        """All changes: the path of the object's collection, and the event."""

        self.logs: dict[str, list[str]] = {}
        """By a pod's name; of the instance before, by ``<name> previous``."""

        self.log_queries: list[dict[str, str]] = []
        self.changed = threading.Condition()

    # --- what tests do ---------------------------------------------------------------------------------------------

    def put(self, path: str, body: KubeObject, *, manager: str = "kubectl") -> KubeObject:
        """An object as it is now, made by ``manager``."""
        with self.changed:
            old = self.objects.get(path)
            made = copy.deepcopy(body)
            version = str(len(self.history) + 1)
            made["metadata"] = {"uid": f"uid-{version}", **made["metadata"]} | {
                "name": unquote(path.rpartition("/")[2]),
                "resourceVersion": version,
                "managedFields": [{"manager": manager}],
            }
            self.objects[path] = made
            self._record("MODIFIED" if old else "ADDED", path, made)
            return made

    def show(self, collection: str, obj: KubeObject) -> None:
        """An object of a collection as it is now."""
        self.put(f"{collection}/{obj['metadata']['name']}", obj)

    def remove(self, path: str) -> None:
        """It is gone."""
        with self.changed:
            self._record("DELETED", path, self.objects.pop(path))

    def _record(self, kind: str, path: str, obj: KubeObject) -> None:
        event: KubeObject = {"type": kind, "object": copy.deepcopy(obj)}
        event["object"]["metadata"]["resourceVersion"] = str(len(self.history) + 1)
        self.history.append((path.rpartition("/")[0], event))
        self.changed.notify_all()

    # --- what the harness asks -------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        path, _, dry_run = path.partition("?")
        if self.unanswered:
            self.unanswered -= 1
            raise ApiError("no answer")
        if refusal := self.refusals.get(f"{method} {path}") or self.refusals.get(method):
            raise refusal
        if method == "GET":
            return self._read(path, query or {})
        assert not dry_run, "a dry run has no answer but a refusal here"
        self.requests.append((method, path, body))
        manager = (query or {}).get("fieldManager", "kubectl")
        match method, content_type:
            case "POST", _:
                return self._create(path, body, manager)
            case "PUT", _:
                return self._replace(path, body)
            case "PATCH", kind if kind == APPLY:
                return self.put(path, body, manager=manager)
            case "DELETE", _:
                return self._delete(path, body or {})
        raise AssertionError(f"unforeseen: {method} {path} ({content_type})")

    def _read(self, path: str, query: Mapping[str, str]) -> KubeObject:
        with self.changed:
            if path in self.objects:
                return self.objects[path]
            if not _COLLECTION.fullmatch(path):
                raise ApiError("not found", code=404)
            items = [obj for name, obj in self.objects.items() if _lies_in(name.rpartition("/")[0], path)]
            chosen = [obj for obj in items if is_chosen(obj, query)]
            return {"items": chosen, "metadata": {"resourceVersion": str(len(self.history))}}

    def _create(self, path: str, body: KubeObject, manager: str) -> KubeObject:
        name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{len(self.requests)}"
        own = f"{path}/{quote(name, safe='')}"
        if own in self.objects:
            raise ApiError("exists", code=409)
        data = {key: base64.b64encode(text.encode()).decode() for key, text in body.get("stringData", {}).items()}
        return self.put(own, body | ({"data": data} if data else {}), manager=manager)

    def _replace(self, path: str, body: KubeObject) -> KubeObject:
        """An object, or by a subresource (``.../approval``) its status."""
        if path in self.objects:
            return self.put(path, body)
        owner = path.rpartition("/")[0]
        if owner not in self.objects:
            raise ApiError("not found", code=404)
        return self.put(owner, self.objects[owner] | {"status": body["status"]})

    def _delete(self, path: str, options: KubeObject) -> KubeObject:
        if path not in self.objects:
            raise ApiError("not found", code=404)
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted and self.objects[path]["metadata"]["uid"] != wanted:
            raise ApiError("the UID in the precondition does not match", code=409)
        if path not in self.stuck:
            self.remove(path)
        return {}

    @contextmanager
    def watch(
        self,
        path: str,
        hangup: Hangup | None = None,
        /,
        *,
        timeout_seconds: int = 300,
        idle_seconds: float = 330.0,
        **query: str,
    ) -> Iterator[Iterator[KubeObject]]:
        deadline = time.monotonic() + min(timeout_seconds, LONGEST_WATCH_SECONDS)

        def events() -> Iterator[KubeObject]:
            place = int(query["resourceVersion"])
            while time.monotonic() < deadline and not (hangup and hangup.done):
                with self.changed:
                    if place == len(self.history):
                        self.changed.wait(0.02)
                        continue
                    collection, event = self.history[place]
                    place += 1
                if _lies_in(collection, path) and is_chosen(event["object"], query):
                    yield event

        yield events()

    @contextmanager
    def chunks(
        self, path: str, hangup: Hangup | None = None, /, *, idle_seconds: float = 330.0, **query: str
    ) -> Iterator[Iterator[bytes]]:
        self._read(path.removesuffix("/log"), {})
        self.log_queries.append({"path": path, **query})
        key = path.split("/")[-2] + (" previous" if query.get("previous") else "")
        yield iter([f"{line}\n".encode() for line in self.logs.get(key, [])])


def pods_of(namespace: str) -> str:
    """The collection."""
    return api_path("pods", namespace=namespace)


def jobs_of(namespace: str) -> str:
    """The collection."""
    return api_path("jobs", group="batch", namespace=namespace)


def _lies_in(collection: str, path: str) -> bool:
    """Whether ``path`` lists a collection: its own path, or the one of all namespaces."""
    return path in {collection, re.sub("/namespaces/[^/]+", "", collection, count=1)}


def is_chosen(obj: KubeObject, query: Mapping[str, str]) -> bool:
    """Whether selectors of the form ``a=b`` take an object."""
    key, _, value = query.get("fieldSelector", "").partition("=")
    if key and str(_field(obj, key)) != value:
        return False
    label, _, wanted = query.get("labelSelector", "").partition("=")
    return not label or obj["metadata"].get("labels", {}).get(label) == wanted


def _field(obj: KubeObject, dotted: str) -> Any:
    found: Any = obj
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
