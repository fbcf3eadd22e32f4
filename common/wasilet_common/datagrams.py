"""Datagrams passed on between clients and the places they ask: a connected socket per flow, nothing read or changed.

UDP has no end, so a flow ends when nothing passed for a while, or when a side reports that no one listens there. A
connected socket takes nothing but what its other end sends, so no third machine's answer reaches a client.

A client that has all the flows it may have loses its longest unused one to the next, unless that was in use a moment
ago: who asks much in turn goes on, and who floods is held to so many new flows per moment. When all places are taken,
the client with the most gives one to those who have fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

IDLE_SECONDS = 60.0
DNS_IDLE_SECONDS = 10.0
"""Twice as long as resolvers wait for an answer. Such flows are many, each for one question."""

DNS_PORT = 53
MAX_BYTES = 65536
"""No datagram of IPv4 is larger."""

AT_ONCE = 16
"""How many datagrams of one socket are passed on before other sockets have their turn."""

Send = Callable[[bytes], object]
"""Raises OSError."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many flows there may be at a time."""

    flows: int = 1024
    per_client: int = 256
    in_use_seconds: float = 2.0
    """For so long after a datagram a flow is not given up for another of its client: an answer may be on its way."""

    unasked_seconds: float = 600.0
    """A client that sent nothing for so long is gone, whatever still comes for it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """The sockets of one flow, which are closed at its end."""

    client: str
    far: socket.socket
    """Connected to the place that is asked."""

    near: socket.socket | None = None
    """Connected to the client; None: what the client sends comes by :meth:`Flows.send`."""

    answer: Send
    """To the client."""

    idle_seconds: float = IDLE_SECONDS
    refused: Callable[[], object] = lambda: None
    """Called when no one listens at the far end, before this flow ends."""


class Flows:
    """All flows of a process, or of a listener. Of one event loop."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._flows: dict[Hashable, Flow] = {}
        self._timers: dict[Hashable, asyncio.TimerHandle] = {}
        self._used_at: dict[str, OrderedDict[Hashable, float]] = {}
        """Of each client, the longest unused one first."""

        self._asked_at: dict[Hashable, float] = {}

    def __len__(self) -> int:
        """How many there are now."""
        return len(self._flows)

    def make_room(self, client: str) -> bool:
        """Whether this client may have one more; another flow may end for it."""
        own = len(self._used_at.get(client, ()))
        if own < self._limits.per_client:
            if len(self._flows) < self._limits.flows:
                return True
            most = max(self._used_at, key=lambda each: len(self._used_at[each]))
            if len(self._used_at[most]) > own + 1:
                self._end(next(iter(self._used_at[most])))
                return True
        return self._end_unused(client)

    def add(self, key: Hashable, flow: Flow) -> None:
        """Pass on from now on what its sockets take in."""
        loop = asyncio.get_running_loop()
        self._flows[key] = flow
        self._use(key, flow)
        self._asked_at[key] = loop.time()
        self._timers[key] = loop.call_later(flow.idle_seconds, self._look_at, key)
        loop.add_reader(flow.far, self._far_readable, key)
        if flow.near is not None:
            loop.add_reader(flow.near, self._near_readable, key)

    def send(self, key: Hashable, data: bytes) -> bool:
        """To the far end of a flow; False: there is none of that key."""
        flow = self._flows.get(key)
        if flow is None:
            return False
        self._to_far_end(key, flow, data)
        return True

    def close(self) -> None:
        """End all. Idempotent."""
        for key in list(self._flows):
            self._end(key)

    def _far_readable(self, key: Hashable) -> None:
        flow = self._flows[key]
        for _ in range(AT_ONCE):
            try:
                data = flow.far.recv(MAX_BYTES)
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    self._refuse(key, flow)
                return
            self._use(key, flow)
            try:
                flow.answer(data)
            except ConnectionRefusedError:
                self._end(key)
                return
            except OSError:
                continue  # lost, as datagrams may be: there is no room, or it is too large for the way

    def _near_readable(self, key: Hashable) -> None:
        flow = self._flows[key]
        if flow.near is None:
            return
        for _ in range(AT_ONCE):
            try:
                data = flow.near.recv(MAX_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the client listens no longer, or is gone
                self._end(key)
                return
            if not self._to_far_end(key, flow, data):
                return

    def _to_far_end(self, key: Hashable, flow: Flow, data: bytes) -> bool:
        """False: it ended by that."""
        self._use(key, flow)
        self._asked_at[key] = asyncio.get_running_loop().time()
        try:
            flow.far.send(data)
        except ConnectionRefusedError:
            self._refuse(key, flow)
            return False
        except OSError:
            return True  # lost, as datagrams may be
        return True

    def _use(self, key: Hashable, flow: Flow) -> None:
        used_at = self._used_at.setdefault(flow.client, OrderedDict())
        used_at[key] = asyncio.get_running_loop().time()
        used_at.move_to_end(key)

    def _end_unused(self, client: str) -> bool:
        """The longest unused flow of a client, if it is not in use."""
        for key, used_at in self._used_at.get(client, {}).items():
            if asyncio.get_running_loop().time() - used_at < self._limits.in_use_seconds:
                return False
            self._end(key)
            return True
        return False

    def _refuse(self, key: Hashable, flow: Flow) -> None:
        with contextlib.suppress(OSError):
            flow.refused()
        self._end(key)

    def _look_at(self, key: Hashable) -> None:
        loop, flow = asyncio.get_running_loop(), self._flows[key]
        left = (
            min(self._used_at[flow.client][key] + flow.idle_seconds, self._asked_at[key] + self._limits.unasked_seconds)
            - loop.time()
        )
        if left > 0:
            self._timers[key] = loop.call_later(left, self._look_at, key)
        else:
            self._end(key)

    def _end(self, key: Hashable) -> None:
        flow = self._flows.pop(key)
        self._timers.pop(key).cancel()
        del self._asked_at[key]
        del self._used_at[flow.client][key]
        if not self._used_at[flow.client]:
            del self._used_at[flow.client]
        for each in (flow.far, flow.near):
            if each is not None:
                asyncio.get_running_loop().remove_reader(each)
                each.close()


def idle_seconds(port: int) -> float:
    """How long a flow to that port may be silent."""
    return DNS_IDLE_SECONDS if port == DNS_PORT else IDLE_SECONDS
