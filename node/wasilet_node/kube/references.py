"""Secrets, ConfigMaps, claims, tokens and services that pods name: the agent's one reader of them.

A node may read a Secret or ConfigMap only while a pod bound to it names it, one by name, so there is nothing to list.
How they are kept fresh was a choice between kubelet's two managers: a watch per object costs a connection each (1,000
pods with their own secrets are 1,000 connections), a timed re-read costs a request per minute and object and a request
a pod start. Here an object used by one pod is read on demand, and one that several pods share (``kube-root-ca.crt`` is
in all of them) is watched, up to a limit. So:

* a pod that starts never sees a state older than its start (or than the watch): a read begun before it asked is not
  shared with it, the next one is, by all that wait for it;
* at most one read of an object is in flight, and 1,000 pods that share an object cost a watch;
* an immutable object is read once;
* an object is forgotten with the last pod that names it, and so is its watch.

Right after a binding the node authorizer lags: 403 is retried at 5, 10, 20, 40 ms... for 1 s after a pod was first
seen, and reported then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from wasilet_common.backoff import RetryBackoff

from wasilet_node.kube.base import ApiStatusError, ForbiddenError, Kube, KubeError, KubeObject, NotFoundError
from wasilet_node.kube.pod_certificates import PodCertificates
from wasilet_node.kube.trust_bundles import TrustBundles

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.005
_LONGEST_RETRY_SECONDS = 0.32
_NOTHING: Mapping[str, KubeObject] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """How references are kept fresh."""

    lag_seconds: float = 1.0
    """How long after a pod was first seen a 403 (for tokens also a 404) may be the authorizer's lag."""

    ttl_seconds: float = 45.0
    """A refresh does not read an object again that was read less than this ago."""

    watch_from_users: int = 2
    """An object that this many pods use is watched."""

    max_watches: int = 32
    watch_retry_seconds: float = 30.0
    """A watch that ended with an error is not begun again before."""

    services_timeout_seconds: float = 10.0
    """How long a pod's start waits for the first list of services."""


class ServicesUnknownError(KubeError):
    """Services were not listed yet, so a pod's environment cannot be built; the message is kubelet's."""


@dataclass(frozen=True)
class _Key:
    resource: str
    namespace: str
    name: str

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{quote(self.namespace, safe='')}/{self.resource}/{quote(self.name, safe='')}"


@dataclass
class _Entry:
    key: _Key
    users: set[str] = field(default_factory=set)
    """Uids of the pods that asked for it."""

    object: KubeObject | None = None
    read_at: float = float("-inf")
    """When the read that gave ``object`` was begun."""

    reading: asyncio.Task[KubeObject] | None = None
    following: asyncio.Task[KubeObject] | None = None
    watch: asyncio.Task[None] | None = None
    watch_synced: bool = False
    watch_not_before: float = float("-inf")


class References:
    """One object per node. Nothing is read before a pod asks; ``start`` begins the watch of services."""

    def __init__(
        self,
        kube: Kube,
        *,
        settings: ReferenceSettings = ReferenceSettings(),
        clock: Callable[[], float] = time.monotonic,
        node: Callable[[], tuple[str, str | None]] = lambda: ("", None),
        pod_certificates: PodCertificates | None = None,
    ) -> None:
        """``node``: the Node's name and uid. ``pod_certificates``: by default of that Node."""
        self._kube = kube
        self._settings = settings
        self._clock = clock
        self._entries: dict[_Key, _Entry] = {}
        self._pods: dict[str, tuple[float, set[_Key]]] = {}
        self._watches = 0
        self._services: dict[str, dict[str, KubeObject]] = {}
        self._services_synced = asyncio.Event()
        self._services_task: asyncio.Task[None] | None = None
        self.trust_bundles = TrustBundles(kube, clock=clock)
        self.pod_certificates = pod_certificates or PodCertificates(kube, node=node)

    def start(self) -> None:
        """Begin the watch of services; needs a running event loop."""
        if self._services_task is None:
            self._services_task = asyncio.create_task(self._watch_services(), name="watch services")

    async def close(self) -> None:
        """End every task."""
        tasks: list[asyncio.Task[Any]] = [self._services_task] if self._services_task else []
        self._services_task = None
        for entry in self._entries.values():
            tasks += [task for task in (entry.watch, entry.reading, entry.following) if task is not None]
        self._entries.clear()
        self._pods.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self.trust_bundles.close(), return_exceptions=True)

    # ---- Secrets and ConfigMaps

    async def secret(self, namespace: str, name: str, *, pod_uid: str, max_age_seconds: float = 0.0) -> KubeObject:
        """The Secret, ``data`` in base64 as the API has it. Do not change it: it is shared.

        ``max_age_seconds`` above 0 accepts a state read that long ago (for periodic refreshes); 0 asks for one no older
        than this call. Raises NotFoundError (``secret "x" not found``, kubelet's text) and other KubeErrors.
        """
        return await self._object(_Key("secrets", namespace, name), pod_uid, max_age_seconds)

    async def config_map(self, namespace: str, name: str, *, pod_uid: str, max_age_seconds: float = 0.0) -> KubeObject:
        """The ConfigMap; as ``secret``."""
        return await self._object(_Key("configmaps", namespace, name), pod_uid, max_age_seconds)

    @property
    def refresh_age_seconds(self) -> float:
        """The ``max_age_seconds`` that periodic refreshes should pass."""
        return self._settings.ttl_seconds

    def release(self, pod_uid: str) -> None:
        """The pod is gone: forget it, and what only it used. Idempotent."""
        self.pod_certificates.release(pod_uid)
        _, keys = self._pods.pop(pod_uid, (0.0, set()))
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                continue
            entry.users.discard(pod_uid)
            if not entry.users:
                del self._entries[key]
                if entry.watch is not None:
                    entry.watch.cancel()

    async def _object(self, key: _Key, pod_uid: str, max_age_seconds: float) -> KubeObject:
        now = self._clock()
        _, keys = self._pods.setdefault(pod_uid, (now, set()))
        entry = self._entries.setdefault(key, _Entry(key))
        keys.add(key)
        entry.users.add(pod_uid)
        self._consider_watch(entry)
        if entry.watch_synced:
            if entry.object is None:
                raise _not_found(key)
            return entry.object
        if entry.object is not None and (_immutable(entry.object) or now - entry.read_at < max_age_seconds):
            return entry.object
        return await asyncio.shield(self._next_read(entry, pod_uid))

    def _next_read(self, entry: _Entry, pod_uid: str) -> asyncio.Task[KubeObject]:
        """A read that has not begun yet when this is called; all that ask meanwhile share it."""
        if entry.reading is None:
            entry.reading = self._spawn_read(entry, pod_uid, None)
            return entry.reading
        if entry.following is None:
            entry.following = self._spawn_read(entry, pod_uid, entry.reading)
        return entry.following

    def _spawn_read(
        self, entry: _Entry, pod_uid: str, after: asyncio.Task[KubeObject] | None
    ) -> asyncio.Task[KubeObject]:
        async def run() -> KubeObject:
            try:
                if after is not None:
                    await asyncio.wait([after])
                    entry.reading, entry.following = task, None
                return await self._read(entry, pod_uid)
            finally:
                if entry.reading is task:
                    entry.reading = None

        task = asyncio.create_task(run(), name=f"read {entry.key.resource}")
        # The caller may have gone (its pod was deleted): a failure that no one awaits is not an event-loop error.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _read(self, entry: _Entry, pod_uid: str) -> KubeObject:
        begun = self._clock()
        try:
            found = await self._through_lag(lambda: self._kube.get(entry.key.path), pod_uid, ForbiddenError)
        except NotFoundError:
            if not entry.watch_synced:
                entry.object = None
            raise _not_found(entry.key) from None
        # A watch that synced meanwhile knows at least as much, and nothing would ever correct an older state.
        if not entry.watch_synced:
            entry.object, entry.read_at = found, begun
        return found

    async def _through_lag(
        self, call: Callable[[], Awaitable[KubeObject]], pod_uid: str, *lagging: type[ApiStatusError]
    ) -> KubeObject:
        since = self._pods.get(pod_uid, (self._clock(), None))[0]
        retry = RetryBackoff(_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS)
        while True:
            try:
                return await call()
            except lagging:
                left = since + self._settings.lag_seconds - self._clock()
                if left <= 0:
                    raise
            await asyncio.sleep(min(retry.next(), left))

    # ---- watches of shared objects

    def _consider_watch(self, entry: _Entry) -> None:
        if (
            entry.watch is not None
            or len(entry.users) < self._settings.watch_from_users
            or self._watches >= self._settings.max_watches
            or self._clock() < entry.watch_not_before
            or (entry.object is not None and _immutable(entry.object))
        ):
            return
        self._watches += 1
        entry.watch = asyncio.create_task(self._watch(entry), name=f"watch {entry.key.resource}")
        entry.watch.add_done_callback(lambda _: self._watch_ended(entry))

    def _watch_ended(self, entry: _Entry) -> None:
        self._watches -= 1
        entry.watch, entry.watch_synced = None, False

    async def _watch(self, entry: _Entry) -> None:
        path = entry.key.path.rpartition("/")[0]
        seen = False
        stream = self._kube.watch(path, field_selector=f"metadata.name={entry.key.name}")
        try:
            async for event in stream:
                match event.type:
                    case "SYNC" | "ADDED" | "MODIFIED":
                        entry.object, entry.read_at = event.object, self._clock()
                        seen = seen or event.type == "SYNC"
                    case "SYNCED":
                        if not seen:
                            entry.object = None
                        entry.watch_synced, seen = True, False
                    case "DELETED":
                        entry.object = None
                if entry.object is not None and _immutable(entry.object) and entry.watch_synced:
                    return
        except KubeError as error:
            logger.info(
                "the watch of %s %s/%s ended: %s", entry.key.resource, entry.key.namespace, entry.key.name, error
            )
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        entry.watch_not_before = self._clock() + self._settings.watch_retry_seconds

    # ---- services

    async def services(self, namespace: str) -> Sequence[KubeObject]:
        """Services whose variables a pod of ``namespace`` may get: that namespace's, and ``default/kubernetes``.

        Waits for the first list; raises ServicesUnknownError when that takes too long.
        """
        if not self._services_synced.is_set():
            try:
                async with asyncio.timeout(self._settings.services_timeout_seconds):
                    await self._services_synced.wait()
            except TimeoutError:
                raise ServicesUnknownError(
                    "services have not yet been read at least once, cannot construct envvars"
                ) from None
        found = list(self._services.get(namespace, _NOTHING).values())
        if namespace != "default" and (master := self._services.get("default", _NOTHING).get("kubernetes")):
            found.append(master)
        return found

    async def _watch_services(self) -> None:
        while True:
            listed: dict[str, dict[str, KubeObject]] = {}
            listing = True
            try:
                async for event in self._kube.watch("/api/v1/services"):
                    metadata = event.object.get("metadata", {})
                    namespace, name = metadata.get("namespace", ""), metadata.get("name", "")
                    match event.type:
                        case "SYNC":
                            if not listing:
                                listed, listing = {}, True
                            listed.setdefault(namespace, {})[name] = event.object
                        case "SYNCED":
                            # A list without a single service has no SYNC before it.
                            self._services = listed if listing else {}
                            listing = False
                            self._services_synced.set()
                        case "ADDED" | "MODIFIED":
                            self._services.setdefault(namespace, {})[name] = event.object
                        case "DELETED":
                            self._services.get(namespace, {}).pop(name, None)
                            if not self._services.get(namespace, _NOTHING):
                                self._services.pop(namespace, None)
            except KubeError as error:
                logger.warning("the watch of services ended and begins again: %s", error)
            await asyncio.sleep(1.0)

    # ---- what is read once

    async def persistent_volume_claim(self, namespace: str, name: str, *, pod_uid: str) -> KubeObject:
        """Raises KubeError."""
        self._pods.setdefault(pod_uid, (self._clock(), set()))
        path = _Key("persistentvolumeclaims", namespace, name).path
        return await self._through_lag(lambda: self._kube.get(path), pod_uid, ForbiddenError)

    async def persistent_volume(self, name: str, *, pod_uid: str) -> KubeObject:
        """Raises KubeError."""
        self._pods.setdefault(pod_uid, (self._clock(), set()))
        path = f"/api/v1/persistentvolumes/{quote(name, safe='')}"
        return await self._through_lag(lambda: self._kube.get(path), pod_uid, ForbiddenError)

    async def service_account_token(
        self,
        namespace: str,
        service_account: str,
        *,
        pod_name: str,
        pod_uid: str,
        audiences: Sequence[str] = (),
        expiration_seconds: int | None = None,
    ) -> KubeObject:
        """The ``status`` of a TokenRequest bound to the pod: ``token`` and ``expirationTimestamp``. No audience means
        the API server's own. A 404 can be the lag of NodeRestriction's pod cache, so it is retried too.
        Raises KubeError."""
        self._pods.setdefault(pod_uid, (self._clock(), set()))
        spec: KubeObject = {
            "audiences": list(audiences),
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod_name, "uid": pod_uid},
        }
        if expiration_seconds is not None:
            spec["expirationSeconds"] = expiration_seconds
        body: KubeObject = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"{_Key('serviceaccounts', namespace, service_account).path}/token"
        answer = await self._through_lag(lambda: self._kube.create(path, body), pod_uid, ForbiddenError, NotFoundError)
        status = answer.get("status", {})
        return dict(status)


def _immutable(found: KubeObject) -> bool:
    return found.get("immutable") is True


def _not_found(key: _Key) -> NotFoundError:
    # The plural of the API's own answer would read `configmaps "x" not found`; kubelet's caches say it in the singular.
    kind = key.resource.removesuffix("s")
    return NotFoundError(404, "NotFound", f'{kind} "{key.name}" not found', details={"name": key.name, "kind": kind})
