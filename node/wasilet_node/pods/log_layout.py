"""A pod's log folders, and the tail of a container's log that stands in for a missing termination message."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from wasilet_node import logfolders
from wasilet_node.pods import spec
from wasilet_node.pods.spec import Pod
from wasilet_node.settings import NodePaths

logger = logging.getLogger(__name__)

MAX_TAIL_BYTES = 2048
MAX_TAIL_LINES = 80
_READ_BYTES = 64 * 1024


def pod_folder(paths: NodePaths, pod: Pod) -> Path:
    """The pod's own, which holds one folder per container."""
    return logfolders.pod_folder(paths.logs, namespace=spec.namespace(pod), name=spec.name(pod), uid=spec.uid(pod))


def log_path(paths: NodePaths, pod: Pod, container_name: str, attempt: int) -> Path:
    """The CRI log file of one instance."""
    return pod_folder(paths, pod) / container_name / f"{attempt}.log"


def tail(path: str | Path) -> str:
    """At most 2048 bytes and 80 lines of what the container wrote last (``FallbackToLogsOnError``); "" on any error."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ_BYTES))
            data = file.read(_READ_BYTES)
    except OSError:
        return ""
    lines = data.split(b"\n")
    if size > _READ_BYTES:
        del lines[0]
    text = b""
    taken = 0
    for line in reversed(lines):
        fields = line.split(b" ", 3)
        if len(fields) < 4:
            continue
        if taken == MAX_TAIL_LINES:
            break
        # ``P`` marks a piece of a line that goes on in the next record.
        text = fields[3] + (b"" if fields[2] == b"P" else b"\n") + text
        taken += 1
        if len(text) >= MAX_TAIL_BYTES:
            break
    return text[-MAX_TAIL_BYTES:].decode(errors="ignore")


def remove_attempt(paths: NodePaths, pod: Pod, container_name: str, attempt: int) -> None:
    """Remove the log of an instance older than the previous one, rotated pieces included."""
    folder = pod_folder(paths, pod) / container_name
    for file in folder.glob(f"{attempt}.log*"):
        file.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a pod's logs; idempotent. ``rmtree`` follows no links."""

    def report(_function: object, path: str, error: BaseException | tuple[object, ...]) -> None:
        if not isinstance(error, tuple) or not isinstance(error[1], FileNotFoundError):
            logger.warning("cannot remove %s: %s", path, error)

    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, onerror=report)
