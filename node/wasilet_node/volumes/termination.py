"""Termination messages: where an instance writes its own, and how the agent reads it afterwards.

Each instance has its own file, so that an old message is never reported for a new one. Where the path lies in a
volume that the container mounts, the message is a file of that volume; then what was there at the start is remembered,
and an unchanged file is no message (and a user's file is never cleared).

Where to look follows from the container, or is written into the instance's folder before the start, so that an agent
that starts again, after the container has ended, still finds the message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from wasilet_node.runtime.safe_path import open_root, opened, read_tail, walk
from wasilet_node.volumes.base import Container

MAX_BYTES = 4096
FOLDER = "termination"
"""In the instance's folder: where the file is unless a record says otherwise."""

_RECORD = "termination.json"
_DEFAULT_PATH = "/dev/termination-log"


def message_path(container: Container) -> str:
    """``terminationMessagePath``, absolute and clean; empty when it names no file."""
    path = container.get("terminationMessagePath", _DEFAULT_PATH)
    if not path or "\0" in path:
        return ""
    clean = "/" + posixpath.normpath("/" + str(path)).lstrip("/")
    return "" if clean == "/" else clean


def _identity(root: Path, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """What changes when someone writes; None when there is no such file."""
    with contextlib.suppress(OSError), opened(open_root(root)) as root_fd, opened(walk(root_fd, names)) as fd:
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return None


@dataclass(frozen=True, kw_only=True)
class Message:
    """The place of a message: ``names`` below ``root`` (None: not known yet)."""

    guest: str
    root: Path | None = None
    names: tuple[str, ...] = ()
    before: tuple[int, ...] | None = None

    @classmethod
    def at(cls, guest: str, root: Path, names: tuple[str, ...]) -> Message:
        """A file of a volume, as it is now."""
        return cls(guest=guest, root=root, names=names, before=_identity(root, names))

    def in_folder(self, folder: Path) -> Message:
        """A file in a folder of the instance's own."""
        return dataclasses.replace(self, root=folder, names=(posixpath.basename(self.guest),))

    def record(self, instance: Path) -> None:
        """Remember this in the instance's folder, all or nothing; what was remembered before for the same instance
        stays, as it may have begun to write. Raises OSError."""
        target = instance / _RECORD
        if self.root == instance / FOLDER or target.exists():
            return
        making = instance / f"{_RECORD}.making-{os.urandom(4).hex()}"
        body = {"root": str(self.root), "names": list(self.names), "before": self.before}
        making.write_text(json.dumps(body))
        making.rename(target)


def _recorded(instance: Path, container: Container) -> Message:
    try:
        record = json.loads((instance / _RECORD).read_text())
    except FileNotFoundError:
        guest = message_path(container)
        return Message(guest=guest, root=instance / FOLDER, names=(posixpath.basename(guest),))
    before = record["before"]
    return Message(
        guest="",
        root=Path(record["root"]),
        names=tuple(record["names"]),
        before=None if before is None else tuple(before),
    )


def read_message(instance: Path, container: Container) -> str:
    """The last 4096 bytes of what the instance wrote; empty when it wrote nothing. As text it may be longer, where
    bytes that are not UTF-8 are replaced.

    Source of the limit and of reading the end: kubelet's ``getTerminationMessage``.
    """
    try:
        message = _recorded(instance, container)
        if (
            message.root is None
            or not message.names[-1]
            or (message.before and message.before == _identity(message.root, message.names))
        ):
            return ""
        with opened(open_root(message.root)) as root_fd:
            return read_tail(root_fd, message.names, MAX_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its record is damaged"
        return f"Error on reading termination log: {reason}"
