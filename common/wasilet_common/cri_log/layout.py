"""Where the log of each container lies: the one place that knows the names of the folders and files.

``<root>/pods/<namespace>_<name>_<uid>/<container>/<attempt>.log``, as kubelet has them and log collectors expect them.
A namespace may have 63 characters and a name 253, together more than the 255 bytes of a file name on Linux: then the
pod's name is cut, and a hash of it follows. The uid is always whole, because clean-up finds the
owner of a folder by it. A rotated file has a timestamp, which sorts, behind its name, and perhaps ``.gz``.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from wasilet_common import pod_fields
from wasilet_common.file_names import MAX_BYTES, shortened
from wasilet_common.pod_fields import Pod

logger = logging.getLogger(__name__)


def pods_root(log_root: Path) -> Path:
    """The folder that holds one folder per pod."""
    return log_root / "pods"


def pod_folder(log_root: Path, *, namespace: str, name: str, uid: str) -> Path:
    """The folder that holds one folder per container of this pod."""
    return pods_root(log_root) / _folder_name(namespace, name, uid)


def folder_of_pod(log_root: Path, pod: Pod) -> Path:
    """``pod_folder`` of a decoded pod."""
    return pod_folder(log_root, namespace=pod_fields.namespace(pod), name=pod_fields.name(pod), uid=pod_fields.uid(pod))


def attempt_file(container_folder: Path, attempt: int) -> Path:
    """The current log file of one instance; ``attempt`` counts a container's instances from 0."""
    return container_folder / f"{attempt}.log"


def log_file(log_root: Path, pod: Pod, container_name: str, attempt: int) -> Path:
    """The current log file of one instance of a pod's container."""
    return attempt_file(folder_of_pod(log_root, pod) / container_name, attempt)


def rotated_files(path: Path) -> list[Path]:
    """The rotated files of the log file ``path``, oldest first; none where the folder is gone. Raises OSError."""
    start = path.name + "."
    with contextlib.suppress(FileNotFoundError):
        return sorted(found for found in path.parent.iterdir() if found.name.startswith(start))
    return []


def remove_attempt(container_folder: Path, attempt: int) -> None:
    """Remove the log of one instance, rotated files included; idempotent."""
    path = attempt_file(container_folder, attempt)
    for file in (path, *rotated_files(path)):
        file.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a pod's logs; idempotent. ``rmtree`` follows no links."""

    def report(_function: object, path: str, error: BaseException | tuple[object, ...]) -> None:
        if not isinstance(error, tuple) or not isinstance(error[1], FileNotFoundError):
            logger.warning("cannot remove %s: %s", path, error)

    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, onerror=report)


def uid_of(folder_name: str) -> str:
    """The pod uid in a folder's name; none of its three parts can hold an underscore."""
    return folder_name.rpartition("_")[2]


def _folder_name(namespace: str, name: str, uid: str) -> str:
    left = MAX_BYTES - len(f"{namespace}__{uid}".encode())
    return f"{namespace}_{shortened(name, left)}_{uid}"
