"""What the kinds of volumes have in common: the two shapes that a kind can have.

A *projecting* kind (configMap, secret, projected, downwardAPI) gives a payload that ``wasilet_node.volumes.atomic``
publishes into a folder of the pod, again at every refresh. A *placing* kind (emptyDir, hostPath, claims) gives the
place of a folder or file that guests share with others, once.

``fsGroup``, ``runAsUser`` and their relatives have no meaning for either: a module runs as the agent's user and sees no
owners and no permission bits, so nothing is chowned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wasilet_node.kube.references import References
from wasilet_node.volumes.atomic import FileProjection, Payload
from wasilet_node.volumes.base import Pod, VolumeError
from wasilet_node.volumes.host_threads import HostThreads
from wasilet_node.volumes.pod_dirs import PodDirs
from wasilet_node.volumes.tokens import Tokens

Source = Mapping[str, Any]
"""What stands under the kind's name in the pod's volume."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a volume is. ``path`` is trusted; what lies in it may not be."""

    path: Path
    read_only: bool = False
    is_file: bool = False
    """A hostPath that is a file: mounted alone."""

    unusable: str = ""
    """Why a module can never use it (a socket, a device), reported when a container mounts it."""

    in_memory: bool = False
    """Copies of its files must not reach a disk."""

    loose: bool = False
    """A memory volume with a size that the kernel does not hold, and that must be looked at often."""

    fixed: bool = False
    """Nothing is made in it, not even the folder of a subPath."""

    live: bool = False
    """Files are swapped as a whole by updates, so a single one is mounted as a copy."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every kind of volume works with."""

    references: References
    pod_dirs: PodDirs
    tokens: Tokens
    allocatable: Callable[[], Mapping[str, str]]
    """The node's allocatable resources, as quantities."""

    host_threads: HostThreads
    """Where paths of the machine are looked at."""


class Projecting(Protocol):
    """configMap, secret, projected, downwardAPI."""

    in_memory: bool

    def check(self, source: Source) -> str:
        """Why this node can never serve it; empty when it can."""

    async def payload(
        self, pod: Pod, source: Source, *, max_age_seconds: float, published: Callable[[str], bytes | None]
    ) -> Payload:
        """The files. ``published`` reads what is there now. Raises VolumeError, KubeError."""


class Placing(Protocol):
    """emptyDir, hostPath, persistentVolumeClaim, ephemeral."""

    def check(self, source: Source) -> str:
        """Why this node can never serve it; empty when it can."""

    async def place(self, pod: Pod, name: str, source: Source) -> Place:
        """Make it if it must be made, and say where it is. Raises VolumeError, KubeError, OSError."""


def is_optional(source: Source) -> bool:
    """``optional: true``."""
    return source.get("optional") is True


def default_mode(source: Source) -> int:
    """``defaultMode``; the API server fills it in, 0644 is its own default."""
    mode = source.get("defaultMode")
    return 0o644 if mode is None else int(mode)


def item_mode(item: Source, otherwise: int) -> int:
    """``mode`` of an item."""
    mode = item.get("mode")
    return otherwise if mode is None else int(mode)


def chosen_keys(source: Source, contents: Mapping[str, bytes], mode: int, *, missing: str) -> dict[str, FileProjection]:
    """The files of a ConfigMap or Secret: one per key, or the ``items`` that the volume names. Raises VolumeError with
    kubelet's text ``missing`` for an item whose key is not there, unless the source is optional."""
    items = source.get("items") or [{"key": key, "path": key} for key in contents]
    files: dict[str, FileProjection] = {}
    for item in items:
        if item["key"] in contents:
            files[item["path"]] = FileProjection(contents[item["key"]], item_mode(item, mode))
        elif not is_optional(source):
            raise VolumeError(f"{missing}: {item['key']}")
    return files
