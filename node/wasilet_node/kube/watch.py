"""List, then watch, for ever: a stream that only ends when its task is cancelled.

A watch ends all the time: after the ``timeoutSeconds`` that is asked for, when the API server restarts, when a network
is cut. Each end is a reconnect from the last resource version (bookmarks keep that young); a new list is made only when
the server has forgotten the version (410). A read time-out just above the server's bookmark interval (one minute, plus
a quarter of jitter) notices a connection that went dead silently.

Several watches must not come back in step after an outage, hence jitter everywhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlencode

from wasilet_common.backoff import RetryBackoff

from wasilet_node.kube.base import (
    ApiStatusError,
    ApiUnavailableError,
    GoneError,
    KubeError,
    KubeObject,
    WatchEvent,
    as_object,
)
from wasilet_node.kube.errors import from_status

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger(__name__)

_MINIMUM_WATCH_SECONDS = 240
_MAXIMUM_WATCH_SECONDS = 300
_LIST_TIMEOUT_SECONDS = 30.0
_MAX_EVENT_BYTES = 16 * 1024 * 1024
_HEALTHY_AFTER_SECONDS = 5.0
_SAY_AGAIN_SECONDS = 60.0
_TOO_LARGE_RESOURCE_VERSION = 504
_CHANGES = frozenset({"ADDED", "MODIFIED", "DELETED"})


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a watch deals with what fails."""

    first_delay_seconds: float = 0.2
    longest_delay_seconds: float = 8.0
    read_timeout_seconds: float = 90.0
    """Just above the interval of the server's bookmarks: a connection that is silent for longer is dead."""


class Requests(Protocol):
    """What a watch needs of ``wasilet_node.kube.client.KubeClient``, which offers watches itself."""

    async def list(
        self,
        path: str,
        *,
        field_selector: str | None = None,
        label_selector: str | None = None,
        timeout_seconds: float = ...,
    ) -> KubeObject: ...

    def stream(
        self, path: str, *, read_timeout_seconds: float
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]: ...

    async def wait_back(self, *, timeout_seconds: float) -> bool: ...


class _Delay:
    """Back-off with full jitter on its upper half, and one log line a minute."""

    def __init__(self, client: Requests, what: str, pace: Pace) -> None:
        self._client = client
        self._what = what
        self._backoff = RetryBackoff(pace.first_delay_seconds, pace.longest_delay_seconds)
        self._said_at: float | None = None
        self._failed = False

    async def wait(self, error: Exception) -> None:
        self._failed = True
        now = time.monotonic()
        if self._said_at is None or now - self._said_at >= _SAY_AGAIN_SECONDS:
            self._said_at = now
            logger.warning("watching %s failed and will be tried again: %s", self._what, error)
        seconds = self._backoff.next() * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, not a secret
        if not isinstance(error, ApiUnavailableError):
            await asyncio.sleep(seconds)
        elif await self._client.wait_back(timeout_seconds=seconds):
            self._backoff.reset()

    def succeeded(self) -> None:
        if self._failed:
            logger.info("watching %s again", self._what)
        self._failed = False
        self._said_at = None
        self._backoff.reset()


async def watch(
    client: Requests,
    path: str,
    *,
    field_selector: str | None = None,
    label_selector: str | None = None,
    pace: Pace = Pace(),
) -> AsyncIterator[WatchEvent]:
    """See ``wasilet_node.kube.base.Kube.watch``. Never ends and never raises a KubeError."""
    delay = _Delay(client, path + (f" ({field_selector})" if field_selector else ""), pace)
    selectors = {"fieldSelector": field_selector, "labelSelector": label_selector}
    query = {name: value for name, value in selectors.items() if value}
    version = ""
    while True:
        try:
            if not version:
                listed = await client.list(
                    path,
                    field_selector=field_selector,
                    label_selector=label_selector,
                    timeout_seconds=_LIST_TIMEOUT_SECONDS,
                )
                delay.succeeded()
                for item in _items(listed):
                    yield WatchEvent(type="SYNC", object=item)
                yield WatchEvent(type="SYNCED", object={})
                version = str(listed.get("metadata", {}).get("resourceVersion") or "0")
            began = time.monotonic()
            async with aclosing(_events(client, path, query, version, pace.read_timeout_seconds)) as events:
                async for event in events:
                    if event.type == "ERROR":
                        raise from_status(event.object)
                    version = event.object.get("metadata", {}).get("resourceVersion") or version
                    delay.succeeded()
                    if event.type in _CHANGES:
                        yield event
            if time.monotonic() - began < _HEALTHY_AFTER_SECONDS:
                # A proxy or an overloaded server that ends each watch at once must not be hammered.
                await delay.wait(ApiUnavailableError("the watch ended as soon as it began"))
        except GoneError:
            logger.debug("the resource version of %s is too old; listing again", path)
            version = ""
        except KubeError as error:
            if isinstance(error, ApiStatusError) and error.code == _TOO_LARGE_RESOURCE_VERSION:
                # A restored or replaced etcd knows lower versions than this client.
                version = ""
            await delay.wait(error)


def _items(listed: KubeObject) -> list[KubeObject]:
    """The list's items, each with the kind and apiVersion that lists leave out."""
    kind = str(listed.get("kind") or "").removesuffix("List")
    api_version = listed.get("apiVersion")
    items: list[KubeObject] = listed.get("items") or []
    if kind and api_version:
        for item in items:
            item.setdefault("kind", kind)
            item.setdefault("apiVersion", api_version)
    return items


async def _events(
    client: Requests, path: str, query: dict[str, str], version: str, read_timeout_seconds: float
) -> AsyncGenerator[WatchEvent, None]:
    import aiohttp

    seconds = random.randint(_MINIMUM_WATCH_SECONDS, _MAXIMUM_WATCH_SECONDS)  # noqa: S311  # jitter, not a secret
    parameters = {
        **query,
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": version,
        "timeoutSeconds": str(seconds),
    }
    url = f"{path}?{urlencode(parameters)}"
    async with client.stream(url, read_timeout_seconds=read_timeout_seconds) as response:
        pending = bytearray()
        try:
            async for chunk in response.content.iter_any():
                pending += chunk
                if b"\n" in chunk:
                    *lines, rest = bytes(pending).split(b"\n")
                    pending = bytearray(rest)
                    for line in lines:
                        if line:
                            yield _decode(line)
                elif len(pending) > _MAX_EVENT_BYTES:
                    raise ApiUnavailableError(f"an event of more than {_MAX_EVENT_BYTES} bytes")
        except aiohttp.SocketTimeoutError:
            logger.debug("no word on the watch of %s for %g s; connecting again", path, read_timeout_seconds)
        except aiohttp.ClientPayloadError:
            logger.debug("the watch of %s was cut; connecting again", path)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiUnavailableError(f"the watch of {path} was cut: {error or type(error).__name__}") from error


def _decode(line: bytes) -> WatchEvent:
    try:
        event = json.loads(line)
        type_, found = event["type"], as_object(event["object"])
    except (ValueError, KeyError, TypeError) as error:
        raise ApiUnavailableError("the watch sent what is not an event") from error
    if found is None:
        raise ApiUnavailableError("the watch sent an event of what is not an object")
    return WatchEvent(type=type_, object=found)
