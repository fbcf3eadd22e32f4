"""Several logs as one: the lines of all containers, and of all their instances, in the order in which they were
written.

The order is that of the nodes' time stamps, not of arrival, so that an assertion says the same whenever it is asked.
A line that arrives late goes to its place: what was judged after it is judged again from the last checkpoint before it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from wasilet.testing.log_match import Judge, JudgeState
from wasilet.testing.log_spool import LogSpool, nanoseconds_of, text_of

CHECKPOINT_LINES = 4096
KEPT_CHECKPOINTS = 16
SHOWN_LINES = 20


class LogLines(Sequence[str]):
    """The lines of one log or several, read from where they are kept when they are asked for. Equal to a list or tuple
    with the same lines; ``list(lines)`` makes a list."""

    def __init__(self, parts: Sequence[LogSpool] = ()) -> None:
        self._parts = [(part, part.count) for part in parts]
        self._length = sum(count for _, count in self._parts)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return self._from(0, self._length)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            chosen = range(self._length)[index]
            if chosen.step != 1:
                return [self[number] for number in chosen]
            return list(self._from(chosen.start, max(chosen.start, chosen.stop)))
        return next(self._from(range(self._length)[index], self._length))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self._length <= SHOWN_LINES:
            return repr(list(self))
        return f"<{self._length} lines, the last is {self[-1]!r}>"

    def _from(self, start: int, stop: int) -> Iterator[str]:
        if len(self._parts) == 1:
            part, count = self._parts[0]
            yield from map(text_of, part.lines(start, min(stop, count)))
            return
        after = self._length - start
        skipped = 0
        parts = []
        for part, count in self._parts:
            # The last so many lines of all are among the last so many of each.
            first = max(0, count - after)
            skipped += first
            parts.append(_keyed(part, first, count))
        merged = (text_of(raw) for _, raw in heapq.merge(*parts, key=lambda keyed: keyed[0]))
        yield from itertools.islice(merged, start - skipped, stop - skipped)


def _keyed(part: LogSpool, first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Lines with when they were written. A clock that was set back changes no order within a log."""
    latest = 0
    for raw in part.lines(first, count):
        latest = max(latest, nanoseconds_of(raw))
        yield latest, raw


@dataclass(frozen=True)
class _Place:
    """How far a log has been read."""

    offset: int = 0
    lines: int = 0
    latest: int = 0
    """The greatest time stamp so far."""


@dataclass(frozen=True)
class _Checkpoint:
    latest: int
    places: dict[int, _Place]
    judged: JudgeState


@dataclass
class Reading:
    """Feeds a judge with logs that grow: each line once, in the order in which they were written."""

    judge: Judge
    _latest: int = 0
    _parts: dict[int, LogSpool] = field(default_factory=dict)
    _places: dict[int, _Place] = field(default_factory=dict)
    _checkpoints: list[_Checkpoint] = field(default_factory=list)

    def read(self, parts: Sequence[LogSpool]) -> None:
        """Judge what has come since the last time. ``parts``: those of the last time, and new ones."""
        for part in parts:
            self._parts.setdefault(id(part), part)
            self._places.setdefault(id(part), _Place())
        if not self._checkpoints:
            self._checkpoints.append(_Checkpoint(0, {}, self.judge.state()))
        fresh = [key for key, part in self._parts.items() if part.count > self._places[key].lines]
        if not fresh:
            return
        if len(self._parts) == 1:
            self._read_one(fresh[0])
            return
        first = min(self._first_new(key) for key in fresh)
        if first < self._latest:
            self._return_to(first)
        self._read_merged()

    def _first_new(self, key: int) -> int:
        place = self._places[key]
        block = self._parts[key].read(place.offset)
        return max(place.latest, nanoseconds_of(block[: block.find(b"\n")]))

    def _read_one(self, key: int) -> None:
        """Without a look at the times, but for where to return to when another log joins."""
        part = self._parts[key]
        while block := part.read(self._places[key].offset):
            lines = block.split(b"\n")[:-1]
            self.judge.feed(map(text_of, lines))
            place = self._places[key]
            self._latest = max(place.latest, nanoseconds_of(lines[-1]))
            self._places[key] = _Place(place.offset + len(block), place.lines + len(lines), self._latest)
            if place.lines // CHECKPOINT_LINES != self._places[key].lines // CHECKPOINT_LINES:
                self._keep_checkpoint()

    def _read_merged(self) -> None:
        streams = [self._stream(key) for key in self._parts]
        for number, (latest, key, raw) in enumerate(heapq.merge(*streams, key=lambda entry: entry[0]), 1):
            self.judge.feed((text_of(raw),))
            place = self._places[key]
            self._places[key] = _Place(place.offset + len(raw) + 1, place.lines + 1, latest)
            self._latest = latest
            if number % CHECKPOINT_LINES == 0:
                self._keep_checkpoint()

    def _stream(self, key: int) -> Iterator[tuple[int, int, bytes]]:
        place, part = self._places[key], self._parts[key]
        offset, latest = place.offset, place.latest
        while block := part.read(offset):
            offset += len(block)
            for raw in block.split(b"\n")[:-1]:
                latest = max(latest, nanoseconds_of(raw))
                yield latest, key, raw

    def _keep_checkpoint(self) -> None:
        self._checkpoints.append(_Checkpoint(self._latest, dict(self._places), self.judge.state()))
        if len(self._checkpoints) > KEPT_CHECKPOINTS:
            del self._checkpoints[1]  # the first is the beginning, to which one can always return

    def _return_to(self, first: int) -> None:
        """Forget what was judged of lines that were written after ``first``, and perhaps some more."""
        while self._checkpoints[-1].latest > first and len(self._checkpoints) > 1:
            self._checkpoints.pop()
        kept = self._checkpoints[-1]
        self._latest = kept.latest
        self._places = {key: kept.places.get(key, _Place()) for key in self._parts}
        self.judge.restore(kept.judged)
