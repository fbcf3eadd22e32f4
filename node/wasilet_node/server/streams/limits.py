"""How many streams one pod may have open, and how fast new ones may begin.

By pod and not by user: the API server calls with its own certificate for all who use it, so a node cannot tell them
apart. Refused ones get ``429 Too Many Requests``, which kubectl shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from wasilet_node.server.streams.turns import Allowance

MAX_OPEN = 64
OPENED_PER_SECOND = 20.0
OPENED_AT_ONCE = 100
_MAX_REMEMBERED = 1024


class StreamLimits:
    """Of one server."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._rates: dict[str, Allowance] = {}

    @contextmanager
    def stream(self, pod_uid: str) -> Iterator[None]:
        """One stream of a pod, while the block runs. Raises HTTPTooManyRequests."""
        if len(self._rates) > _MAX_REMEMBERED:
            # Of pods that have no stream open; one of them that was just at its limit begins with a full allowance.
            self._rates = {uid: rate for uid, rate in self._rates.items() if uid in self._open}
        rate = self._rates.setdefault(pod_uid, Allowance(per_second=OPENED_PER_SECOND, at_once=OPENED_AT_ONCE))
        if self._open.get(pod_uid, 0) >= MAX_OPEN:
            raise web.HTTPTooManyRequests(text=f"{MAX_OPEN} streams of this pod are open already: end one first")
        if (wait := rate.wait_seconds()) > 0:
            raise web.HTTPTooManyRequests(
                text=f"streams of this pod are opened too fast: at most {OPENED_PER_SECOND:g} per second",
                headers={"Retry-After": str(max(1, round(wait)))},
            )
        rate.spend()
        self._open[pod_uid] = self._open.get(pod_uid, 0) + 1
        try:
            yield
        finally:
            self._open[pod_uid] -= 1
            if not self._open[pod_uid]:
                del self._open[pod_uid]
