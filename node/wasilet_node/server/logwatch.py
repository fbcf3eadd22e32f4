"""Wakes those who follow container logs: one inotify instance for all of them, and one timer.

A follower waits for two things. New text comes by inotify on the log's folder, at once, however many follow. That the
container ended is known to the pod manager, in memory; one timer asks for all followers. Hundreds of followers with
timers and descriptors of their own would cost more than the containers they watch. Without inotify (the instances of a
user are limited to 128) the timer wakes everyone, which keeps the delay below 100 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
FORCED_CHECK_SECONDS = 1.0
"""A follower looks at its file at least this often, as kubelet does, should an event ever be lost."""

_IN_MODIFY = 0x2
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_Q_OVERFLOW = 0x4000
_IN_ONLYDIR = 0x0100_0000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 64 * 1024


class Waiter:
    """One follower's alarm clock."""

    def __init__(self, ended: Callable[[], bool], forced_check_seconds: float = FORCED_CHECK_SECONDS) -> None:
        self._ended = ended
        self._forced_check_seconds = forced_check_seconds
        self._event = asyncio.Event()
        self.ended = False
        """The container ended: what the file holds now is all there will be."""

    def wake(self) -> None:
        """There may be something new."""
        self._event.set()

    def check(self) -> None:
        """Ask whether the container ended, and wake if so."""
        if not self.ended and self._ended():
            self.ended = True
            self._event.set()

    async def wait(self) -> None:
        """Until there may be new text, or the container ended; at most FORCED_CHECK_SECONDS."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._forced_check_seconds):
                await self._event.wait()
        self._event.clear()


class LogWatcher:
    """Shared by all followers of one server; needs a running loop only once someone follows."""

    def __init__(
        self,
        *,
        inotify: Callable[[], Inotify] | None = None,
        forced_check_seconds: float = FORCED_CHECK_SECONDS,
    ) -> None:
        """``inotify`` opens it. Raises nothing: without it logs are polled."""
        self._new_inotify = inotify or Inotify
        self._forced_check_seconds = forced_check_seconds
        self._inotify: Inotify | None = None
        self._polling = False
        self._waiters: dict[Path, set[Waiter]] = {}
        self._watches: dict[Path, int] = {}
        self._folders: dict[int, Path] = {}
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def follow(self, directory: Path, *, ended: Callable[[], bool]) -> AsyncIterator[Waiter]:
        """A waiter for changes in a folder of logs. ``ended`` must be cheap: it is called ten times a second."""
        waiter = Waiter(ended, self._forced_check_seconds)
        self._open()
        self._waiters.setdefault(directory, set()).add(waiter)
        self._watch(directory)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        try:
            yield waiter
        finally:
            waiters = self._waiters[directory]
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[directory]
                self._forget(directory)

    def close(self) -> None:
        """Release inotify and the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.descriptor)
            self._inotify.close()
            self._inotify = None
        self._watches.clear()
        self._folders.clear()

    def _open(self) -> None:
        if self._inotify is not None or self._polling:
            return
        try:
            self._inotify = self._new_inotify()
        except OSError as error:
            self._polling = True
            logger.warning("inotify is not to be had (%s): logs are followed by polling", error)
            return
        asyncio.get_running_loop().add_reader(self._inotify.descriptor, self._readable)

    def _watch(self, directory: Path) -> None:
        if self._inotify is None or directory in self._watches:
            return
        try:
            watch = self._inotify.add(directory)
        except OSError as error:
            logger.debug("cannot watch %s: %s", directory, error)
            return
        self._watches[directory] = watch
        self._folders[watch] = directory

    def _forget(self, directory: Path) -> None:
        watch = self._watches.pop(directory, None)
        if watch is not None and self._inotify is not None:
            self._folders.pop(watch, None)
            self._inotify.remove(watch)

    def _readable(self) -> None:
        if self._inotify is None:
            return
        for watch in self._inotify.read():
            if watch == -1:
                self._wake_all()
            elif (directory := self._folders.get(watch)) is not None:
                for waiter in self._waiters.get(directory, ()):
                    waiter.wake()

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.wake()

    def _tick(self) -> None:
        self._timer = None
        if not self._waiters:
            return
        for directory, waiters in self._waiters.items():
            self._watch(directory)  # a folder that did not exist may by now
            unwatched = directory not in self._watches
            for waiter in waiters:
                waiter.check()
                if unwatched:
                    waiter.wake()
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)


class Inotify:
    """inotify(7) by way of libc, since Python has no binding of its own."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def add(self, directory: Path) -> int:
        """Watch a folder of logs; the number of the watch. Raises OSError."""
        mask = _IN_MODIFY | _IN_CREATE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_ONLYDIR
        return self._checked(
            self._libc.inotify_add_watch(self.descriptor, os.fsencode(directory), ctypes.c_uint32(mask))
        )

    def remove(self, watch: int) -> None:
        """End a watch."""
        self._libc.inotify_rm_watch(self.descriptor, watch)

    def read(self) -> set[int]:
        """The watches that saw something; -1: events were lost."""
        seen: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.descriptor, _READ_BYTES)
            offset = 0
            while offset < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size + length
                seen.add(-1 if mask & _IN_Q_OVERFLOW else watch)
        return seen

    def close(self) -> None:
        """End them all."""
        os.close(self.descriptor)

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result
