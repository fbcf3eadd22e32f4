"""What a guest reads: the supervisor's end of a sandbox's stdin pipe, written without ever blocking.

A container's pipe may have several writers, one for each attached client; their pieces go in whole and in order. A
guest that does not read fills its pipe, and then its writers wait for their answers. That bounds what is held here: one
piece for each writer that is connected, and at most one of a writer that has left.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from wasilet_node.runtime.loop import WRITE, Loop, Watch
from wasilet_node.runtime.process import SandboxProcess

_WRITE_BYTES = 65536


@dataclass(eq=False)
class _Piece:
    writer: object
    data: memoryview
    done: Callable[[], None]


class GuestInput:
    """Belongs to one sandbox; ``end`` must be called when that has ended."""

    def __init__(self, loop: Loop, process: SandboxProcess) -> None:
        self._loop = loop
        self._process = process
        self._pieces: deque[_Piece] = deque()
        self._watch: Watch | None = None
        self._closing = False

    @property
    def open(self) -> bool:
        """Whether the guest can still be given something."""
        return self._process.stdin >= 0 and not self._closing

    def write(self, writer: object, data: bytes, done: Callable[[], None]) -> None:
        """``done`` is called when the pipe has taken ``data``, or nothing can be written any more."""
        if self.open:
            self._pieces.append(_Piece(writer, memoryview(data), done))
            self._flush()
        else:
            done()

    def close(self) -> None:
        """End of file once everything before it was taken; idempotent."""
        self._closing = True
        self._flush()

    def leave(self, writer: object) -> None:
        """A writer has gone: what the pipe has not taken of it is dropped, unless the end of file waits behind it."""
        if not self._closing:
            self._pieces = deque(piece for piece in self._pieces if piece.writer is not writer)
            self._flush()

    def end(self) -> None:
        """The guest is gone: nothing is written, and no one waits."""
        self._closing = True
        self._give_up()
        self._process.close_stdin()

    def _flush(self) -> None:
        while self._pieces and self._process.stdin >= 0:
            piece = self._pieces[0]
            try:
                written = os.write(self._process.stdin, piece.data[:_WRITE_BYTES]) if piece.data else 0
            except BlockingIOError:
                if self._watch is None:
                    self._watch = self._loop.watch(self._process.stdin, lambda _events: self._flush(), mask=WRITE)
                return
            except OSError:
                # The guest has closed its end: it will read nothing more.
                self.end()
                return
            piece.data = piece.data[written:]
            if not piece.data:
                self._pieces.popleft()
                piece.done()
        self._end_watch()
        if self._closing:
            self._process.close_stdin()

    def _give_up(self) -> None:
        self._end_watch()
        pieces, self._pieces = self._pieces, deque()
        for piece in pieces:
            piece.done()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._loop.unwatch(self._watch)
            self._watch = None
