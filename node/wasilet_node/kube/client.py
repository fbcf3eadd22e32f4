"""The API server's client: plain JSON, a limit to every wait, and one identity that can be exchanged while in use.

A renewed client certificate needs new connections, since TLS proves it in the handshake only. So an identity is a
*generation*: ``set_credentials`` puts a new one in place, and the old one is closed when its last request (a watch may
last minutes) has ended. Nothing in flight is dropped.

What a caller sees of a flaky server: a request that met a stale connection is sent once more, 429 and any answer with
``Retry-After`` are waited for, both within the caller's own time-out; everything else is raised. The one retry may
repeat a POST that was served: what the agent creates has a fixed name (409), or does no harm twice (reviews, CSRs).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from wasilet_node.kube.base import (
    ApiUnavailableError,
    GoneError,
    KubeObject,
    TooManyRequestsError,
    WatchEvent,
    as_object,
)
from wasilet_node.kube.errors import from_response, seconds_of
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.kube.turns import Turns
from wasilet_node.kube.watch import Pace, watch

if TYPE_CHECKING:
    import aiohttp

    from wasilet_node.kube.transport import Transport

logger = logging.getLogger(__name__)

_CONNECTIONS = 64
_CONNECT_TIMEOUT_SECONDS = 5.0
_MAX_ERROR_BYTES = 64 * 1024
_LIST_PAGE = 500


class _Generation:
    """One identity's connections. Watches have their own pool: they must never starve a status patch."""

    def __init__(self, calls: Transport, watches: Transport) -> None:
        self.calls = calls
        self.watches = watches
        self.in_flight = 0
        self.retired = False

    async def close(self) -> None:
        await self.calls.close()
        await self.watches.close()


class KubeClient:
    """``wasilet_node.kube.base.Kube`` over HTTPS. Make it inside a running event loop; ``close`` it there too."""

    def __init__(
        self,
        cluster: Cluster,
        credentials: Credentials,
        *,
        user_agent: str,
        watch_pace: Pace | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Raises ValueError when a certificate cannot be loaded."""
        self._watch_pace = watch_pace or Pace()
        self._cluster = cluster
        self._user_agent = user_agent
        self._generation = self._make(credentials)
        self._closing: set[asyncio.Task[None]] = set()
        self._away = False
        self._back = asyncio.Event()
        self._statuses = 0
        self._turns = turns or Turns()

    @property
    def writes_statuses(self) -> bool:
        """Whether a status is on its way to the server now."""
        return self._statuses > 0

    @property
    def cluster(self) -> Cluster:
        """The API server that is spoken to."""
        return self._cluster

    def set_credentials(self, credentials: Credentials, *, cluster: Cluster | None = None) -> None:
        """Use another identity (and server, when it moved) from the next request on.

        Requests in flight end as they began. Raises ValueError when a certificate cannot be loaded; then nothing
        changed.
        """
        if cluster is not None:
            self._cluster = cluster
        old, self._generation = self._generation, self._make(credentials)
        old.retired = True
        self._close_if_unused(old)

    async def close(self) -> None:
        """Close all connections. Requests in flight fail."""
        self._generation.retired = True
        await self._generation.close()
        if self._closing:
            await asyncio.wait(self._closing, timeout=1.0)

    async def wait_back(self, *, timeout_seconds: float) -> bool:
        """Sleep, but only until some call was answered again after one was not: then True.

        The lease is tried each second while the API server is away, so watches need not wait out their back-off.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._back.wait()
        except TimeoutError:
            return False
        return True

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> KubeObject:
        """GET one object."""
        return await self._call("GET", path, timeout_seconds=timeout_seconds)

    async def list(
        self,
        path: str,
        *,
        field_selector: str | None = None,
        label_selector: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        """GET a list, in pages, joined. ``timeout_seconds`` is for each page.

        A continue token that expired between two pages begins the list again, at most three times.
        """
        for attempt in range(4):
            try:
                return await self._list_once(path, field_selector, label_selector, timeout_seconds)
            except GoneError:
                if attempt == 3:
                    raise
        raise AssertionError("unreachable")

    async def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        """POST an object to a collection (or a review, a TokenRequest)."""
        return await self._call("POST", path, body=body, timeout_seconds=timeout_seconds)

    async def replace(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        """PUT an object."""
        return await self._call("PUT", path, body=body, timeout_seconds=timeout_seconds)

    async def patch(
        self,
        path: str,
        body: KubeObject,
        *,
        content_type: str = "application/strategic-merge-patch+json",
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        """PATCH an object."""
        status = path.endswith("/status")
        self._statuses += status
        try:
            return await self._call(
                "PATCH", path, body=body, content_type=content_type, timeout_seconds=timeout_seconds
            )
        finally:
            self._statuses -= status

    async def delete(
        self,
        path: str,
        *,
        grace_period_seconds: int | None = None,
        uid: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KubeObject:
        """DELETE an object, with a precondition on its uid where one is given."""
        options: KubeObject = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_period_seconds is not None:
            options["gracePeriodSeconds"] = grace_period_seconds
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        return await self._call("DELETE", path, body=options, timeout_seconds=timeout_seconds)

    def watch(
        self, path: str, *, field_selector: str | None = None, label_selector: str | None = None
    ) -> AsyncIterator[WatchEvent]:
        """See ``wasilet_node.kube.base.Kube.watch``."""
        return watch(self, path, field_selector=field_selector, label_selector=label_selector, pace=self._watch_pace)

    @asynccontextmanager
    async def stream(self, path: str, *, read_timeout_seconds: float) -> AsyncIterator[aiohttp.ClientResponse]:
        """A GET whose body is read as it comes; fails when nothing comes for ``read_timeout_seconds``.

        Raises the KubeError of an answer that is no success; what fails while the body is read is the caller's.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, connect=_CONNECT_TIMEOUT_SECONDS, sock_connect=_CONNECT_TIMEOUT_SECONDS,
            sock_read=read_timeout_seconds,
        )  # fmt: skip
        async with self._use() as generation:
            try:
                response = await generation.watches.request("GET", path, timeout=timeout)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise _unavailable(self._cluster, "WATCH", path, error) from error
            try:
                if response.status != 200:
                    body = await response.content.read(_MAX_ERROR_BYTES)
                    raise from_response(response.status, body, retry_after=response.headers.get("Retry-After"))
                yield response
            finally:
                # Closed, not released: what is left of a watch can't be read to its end.
                response.close()

    async def _list_once(
        self, path: str, field_selector: str | None, label_selector: str | None, timeout_seconds: float
    ) -> KubeObject:
        query: dict[str, str | int] = {"limit": _LIST_PAGE}
        if field_selector:
            query["fieldSelector"] = field_selector
        if label_selector:
            query["labelSelector"] = label_selector
        whole: KubeObject | None = None
        while True:
            page = await self._call("GET", f"{path}?{urlencode(query)}", timeout_seconds=timeout_seconds)
            if not page["kind"].endswith("List") or "items" not in page:
                raise ApiUnavailableError(f"GET {path}: the answer is not a list")
            page["items"] = page["items"] or []
            if not all(isinstance(each, dict) for each in page["items"]):
                raise ApiUnavailableError(f"GET {path}: the answer is not a list of objects")
            if whole is None:
                whole = page
            else:
                whole["items"] += page["items"]
            token = page.get("metadata", {}).get("continue")
            if not token:
                whole["metadata"] = page.get("metadata", {})
                return whole
            query["continue"] = token

    async def _call(
        self,
        method: str,
        path: str,
        *,
        timeout_seconds: float,
        body: Any | None = None,
        content_type: str = "application/json",
    ) -> KubeObject:
        import aiohttp

        deadline = time.monotonic() + timeout_seconds
        retried = False
        while True:
            try:
                async with self._turns.one():
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        where = f"{method} {self._cluster.server}{path}"
                        raise ApiUnavailableError(f"{where}: no answer in {timeout_seconds:g} s")
                    status, data, retry_after = await self._send(method, path, remaining, body, content_type)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                if retried or not _was_stale(error):
                    self._away = True
                    raise _unavailable(self._cluster, method, path, error) from error
                retried = True
                continue
            if self._away:
                self._away = False
                self._back.set()
                self._back = asyncio.Event()
            if 200 <= status < 300:
                return _decode(data, method, path)
            failure = from_response(status, data, retry_after=retry_after)
            pause = seconds_of(retry_after)
            if isinstance(failure, TooManyRequestsError):
                pause = failure.retry_after_seconds
            if pause is None or status < 429 or time.monotonic() + pause >= deadline:
                raise failure
            await asyncio.sleep(pause * random.uniform(1.0, 1.2))  # noqa: S311  # jitter, not a secret

    async def _send(
        self, method: str, path: str, timeout_seconds: float, body: Any | None, content_type: str
    ) -> tuple[int, bytes, str | None]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=timeout_seconds, sock_connect=min(timeout_seconds, _CONNECT_TIMEOUT_SECONDS)
        )
        async with self._use() as generation:
            response = await generation.calls.request(
                method, path, timeout=timeout, body=body, content_type=content_type
            )
            try:
                return response.status, await response.read(), response.headers.get("Retry-After")
            finally:
                response.release()

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[_Generation]:
        generation = self._generation
        generation.in_flight += 1
        try:
            yield generation
        finally:
            generation.in_flight -= 1
            self._close_if_unused(generation)

    def _close_if_unused(self, generation: _Generation) -> None:
        if generation.retired and generation.in_flight == 0:
            task = asyncio.get_running_loop().create_task(generation.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _make(self, credentials: Credentials) -> _Generation:
        from wasilet_node.kube.transport import Transport

        return _Generation(
            Transport(self._cluster, credentials, limit=_CONNECTIONS, user_agent=self._user_agent),
            Transport(self._cluster, credentials, limit=0, user_agent=self._user_agent),
        )


VERSION_PATH = "/version"


def _decode(data: bytes, method: str, path: str) -> KubeObject:
    try:
        decoded = json.loads(data)
    except ValueError as error:
        raise ApiUnavailableError(f"{method} {path}: the answer is not JSON") from error
    # What a proxy or a half-started server says with a 200 is no answer: an empty object, taken for an empty list,
    # would be the end of every pod.
    found = as_object(decoded)
    if found is None and path == VERSION_PATH and isinstance(decoded, dict) and "minor" in decoded:
        return decoded  # the one answer that has no kind
    if found is None:
        raise ApiUnavailableError(f"{method} {path}: the answer is not an object of Kubernetes")
    return found


def _was_stale(error: BaseException) -> bool:
    """Whether a kept-alive connection turned out to be closed, as after a restart of the API server."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    return isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionResetError)


def _unavailable(cluster: Cluster, method: str, path: str, error: BaseException) -> ApiUnavailableError:
    text = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return ApiUnavailableError(f"{method} {cluster.server}{path}: {text}")
