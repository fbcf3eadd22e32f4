"""A collection of the API server, reflected to those who act on it: listed, then watched, for as long as it takes.

The one loop for the approver, the ports of Services, the plugin's observer and the benchmarks. It holds no objects;
what is done with them is the caller's. It blocks, so each runs in a thread of its own.

Whenever it cannot know what it missed, it lists again: when the server no longer has the version to go on from, or
refuses the watch for any other reason, as an API server does that was set up again at the same address. A connection
that broke off loses nothing: the watch goes on from the last version that came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from wasilet_common.backoff import RetryBackoff

from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, KubeObject

GONE = 410
WATCH_SECONDS = 240
"""A watch is opened again after this long: a connection that died unseen is noticed."""

IDLE_MARGIN_SECONDS = 30.0
RETRY_FIRST_SECONDS = 0.1
RETRY_LAST_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Reflector:
    """One collection of one API server."""

    kube: Kube
    path: str
    hangup: Hangup
    """Ends it."""

    listed: Callable[[list[KubeObject]], None]
    """Receives all objects there are, at first and whenever changes may have been missed: what is not among them has
    gone."""

    changed: Callable[[str, KubeObject], None]
    """Receives each change after that: ``ADDED``, ``MODIFIED`` or ``DELETED``, and the object."""

    failed: Callable[[ApiError], None]
    """Receives why the API server gave no answer or refused; once while the reason stays the same."""

    query: Mapping[str, str] = field(default_factory=dict)
    """Selectors."""

    version: str = ""
    """A resourceVersion of a time when the collection was empty: saves the first list."""

    recovered: Callable[[], None] = lambda: None
    """Called when it watches again after that."""

    def run(self) -> None:
        """Until the hangup."""
        backoff = RetryBackoff(initial=RETRY_FIRST_SECONDS, maximum=RETRY_LAST_SECONDS)
        version, reported = self.version, ""
        while not self.hangup.done:
            try:
                version = version or self._list()
                with self._watch(version) as events:
                    if reported:
                        reported = ""
                        self.recovered()
                    for event in events:
                        version = self._learn(event)
                        backoff.reset()
            except ApiError as error:
                version = "" if error.code else version
                if self.hangup.wait(0.0):
                    return
                if error.code != GONE and error.message != reported:
                    reported = error.message
                    self.failed(error)
                self.hangup.wait(backoff.next())

    def _list(self) -> str:
        """The version to watch from."""
        answer = self.kube.request("GET", self.path, query=self.query)
        self.listed(answer.get("items") or [])
        return str((answer.get("metadata") or {}).get("resourceVersion") or "")

    def _watch(self, version: str) -> AbstractContextManager[Iterator[KubeObject]]:
        return self.kube.watch(
            self.path,
            self.hangup,
            timeout_seconds=WATCH_SECONDS,
            idle_seconds=WATCH_SECONDS + IDLE_MARGIN_SECONDS,
            **self.query,
            resourceVersion=version,
        )

    def _learn(self, event: KubeObject) -> str:
        """Hand over a change; the version to go on from. Raises ApiError for an event that ends the watch."""
        kind, obj = str(event.get("type")), event.get("object") or {}
        if kind == "ERROR":
            raise ApiError(str(obj.get("message") or "the watch failed"), code=int(obj.get("code") or GONE))
        if kind != "BOOKMARK":
            self.changed(kind, obj)
        return str((obj.get("metadata") or {}).get("resourceVersion") or "")
