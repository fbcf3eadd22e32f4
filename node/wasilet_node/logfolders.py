"""Where the log of each container lies: the one place that knows the names of the folders.

``<root>/pods/<namespace>_<name>_<uid>/<container>/<attempt>.log``, as kubelet has them and log collectors expect them.
A namespace may have 63 characters and a name 253, together more than the 255 bytes of a file name on Linux: then the
pod's name is cut, and a hash of it follows. The uid is always whole, because clean-up finds the
owner of a folder by it.
"""

from __future__ import annotations

from pathlib import Path

from wasilet_common.file_names import MAX_BYTES, shortened


def pods_root(log_root: Path) -> Path:
    """The folder that holds one folder per pod."""
    return log_root / "pods"


def pod_folder(log_root: Path, *, namespace: str, name: str, uid: str) -> Path:
    """The folder that holds one folder per container of this pod."""
    return pods_root(log_root) / _folder_name(namespace, name, uid)


def uid_of(folder_name: str) -> str:
    """The pod uid in a folder's name; none of its three parts can hold an underscore."""
    return folder_name.rpartition("_")[2]


def _folder_name(namespace: str, name: str, uid: str) -> str:
    left = MAX_BYTES - len(f"{namespace}__{uid}".encode())
    return f"{namespace}_{shortened(name, left)}_{uid}"
