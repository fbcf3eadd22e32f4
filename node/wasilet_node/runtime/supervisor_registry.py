"""Where supervisors register themselves, so that agents, the harness and their successors find them.

``<data>/supervisor.json`` names the current supervisor, ``<data>/supervisors/<pid>.json`` every one that may still keep
containers (after an upgrade there are two). A pointer is believed only while its pid runs since its start time.

Sockets lie beside the pointers; only a file system without sockets (some shared folders) sends them to a private folder
in XDG_RUNTIME_DIR or /tmp.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wasilet_common.files import write_private

from wasilet_node.runtime import linux, unix_sockets

POINTER_NAME = "supervisor.json"
FOLDER_NAME = "supervisors"
BACKLOG = 1024
"""A connection an exec: the probes of all pods may come at one moment, and a full queue refuses at once (EAGAIN)."""


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """A supervisor."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat."""

    socket: str
    protocol_version: int
    build: str
    """``wasilet_node.runtime.engine.engine_key``: which precompiled files it can load."""

    secret: str = field(default="", repr=False)
    """What a client sends in its hello, to show that it can read this file."""

    cgroups: tuple[str, ...] = ()
    """Groups to remove when it is gone."""

    def alive(self) -> bool:
        """Whether that very process runs."""
        return linux.start_time(self.pid) == self.start_time


def read_pointer(path: Path) -> Pointer | None:
    """The pointer in a file; None: there is none that can be read."""
    try:
        data = json.loads(path.read_bytes())
        return Pointer(
            pid=int(data["pid"]),
            start_time=int(data["start_time"]),
            socket=str(data["socket"]),
            protocol_version=int(data["protocol_version"]),
            build=str(data.get("build", "")),
            secret=str(data.get("secret", "")),
            cgroups=tuple(str(path) for path in data.get("cgroups", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_pointer(data: Path, pointer: Pointer, *, current: bool = True) -> None:
    """Publish a supervisor, as the ``current`` one or one that only keeps what it has. Raises OSError."""
    body = json.dumps(asdict(pointer)).encode()
    write_private(data / FOLDER_NAME / f"{pointer.pid}.json", body)
    if current:
        write_private(data / POINTER_NAME, body)


def is_announced(data: Path, pointer: Pointer) -> bool:
    """Whether others can find a supervisor and reach it."""
    return Path(pointer.socket).is_socket() and read_pointer(data / FOLDER_NAME / f"{pointer.pid}.json") is not None


def pointers(data: Path) -> Iterator[tuple[Path, Pointer]]:
    """Every pointer, of living supervisors and of dead ones."""
    folder = data / FOLDER_NAME
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.glob("*.json")):
            pointer = read_pointer(path)
            if pointer is not None:
                yield path, pointer


def current(data: Path) -> Pointer | None:
    """The living supervisor that takes new containers."""
    pointer = read_pointer(data / POINTER_NAME)
    return pointer if pointer is not None and pointer.alive() else None


def withdraw(data: Path, pointer: Pointer) -> None:
    """Remove the pointers and the socket of a supervisor; idempotent."""
    with contextlib.suppress(OSError):
        Path(pointer.socket).unlink()
    with contextlib.suppress(OSError):
        (data / FOLDER_NAME / f"{pointer.pid}.json").unlink()
    named = read_pointer(data / POINTER_NAME)
    if named is not None and (named.pid, named.start_time) == (pointer.pid, pointer.start_time):
        with contextlib.suppress(OSError):
            (data / POINTER_NAME).unlink()


def listen(data: Path) -> tuple[socket.socket, Path]:
    """A listening socket of this process, mode 0600 in a folder of mode 0700. Raises OSError."""
    folder = data / FOLDER_NAME
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _bind(folder)
    except OSError:
        given = os.environ.get("XDG_RUNTIME_DIR", "")
        # Its specification says to ignore a relative one.
        base = given if given.startswith("/") else "/tmp"  # noqa: S108 - mkdtemp makes a private folder in it
        return _bind(Path(tempfile.mkdtemp(prefix="wasilet-", dir=base)))


def _bind(folder: Path) -> tuple[socket.socket, Path]:
    path = folder / f"{os.getpid()}.sock"
    return unix_sockets.listen(path, BACKLOG), path
