"""A small epoll loop: asyncio's would be megabytes in every forked sandbox, and its threads would break the fork.

Level-triggered, one bounded piece of work a ready descriptor and turn, requests before output: so a module that floods
its pipe slows neither requests nor its neighbours.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR


@dataclass
class Watch:
    """One registered descriptor."""

    fd: int
    callback: Callable[[int], object]
    mask: int
    urgent: bool
    active: bool = True


class Timer:
    """A call at a time; ``cancel`` is idempotent."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call."""
        self._callback = None

    def fire(self) -> None:
        """Call, unless cancelled."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    """Runs callbacks until ``stop``."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watches: dict[int, Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._running = True

    def watch(self, fd: int, callback: Callable[[int], object], *, mask: int = READ, urgent: bool = False) -> Watch:
        """Call ``callback(events)`` whenever ``fd`` is ready; ``urgent`` ones are served first."""
        watch = Watch(fd, callback, mask, urgent)
        self._epoll.register(fd, mask)  # raises OSError where the kernel has no memory for it
        self._watches[fd] = watch
        return watch

    def change(self, watch: Watch, mask: int) -> None:
        """Wait for other events; 0 waits for errors and hang-ups only."""
        if watch.active and watch.mask != mask:
            self._epoll.modify(watch.fd, mask)
            watch.mask = mask

    def unwatch(self, watch: Watch) -> None:
        """Always before the descriptor is closed: a child may hold a copy of it for a moment, and epoll would go on
        reporting a description that is still open."""
        if watch.active:
            watch.active = False
            del self._watches[watch.fd]
            self._epoll.unregister(watch.fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, after ``seconds``."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """End ``run`` after this turn."""
        self._running = False

    def run(self) -> None:
        """Serve until ``stop``. A callback that raises is logged: it must not take the other containers with it."""
        while self._running:
            self._turn()

    def close(self) -> None:
        """Free the epoll descriptor."""
        self._epoll.close()

    def _turn(self) -> None:
        timeout = -1.0
        if self._timers:
            timeout = max(self._timers[0][0] - time.monotonic(), 0.0)
        ready = [(self._watches.get(fd), events) for fd, events in self._epoll.poll(timeout)]
        ready.sort(key=lambda item: item[0] is None or not item[0].urgent)
        for watch, events in ready:
            if watch is not None and watch.active and events & (watch.mask | GONE):
                self._guard(watch.callback, events)
        while self._timers and self._timers[0][0] <= time.monotonic():
            _, _, timer = heapq.heappop(self._timers)
            self._guard_timer(timer)

    @staticmethod
    def _guard(callback: Callable[[int], object], events: int) -> None:
        try:
            callback(events)
        except Exception:
            logger.exception("a callback failed")

    @staticmethod
    def _guard_timer(timer: Timer) -> None:
        try:
            timer.fire()
        except Exception:
            logger.exception("a timer failed")
