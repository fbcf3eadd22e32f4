"""emptyDir volumes: a folder of the pod's, on disk or in memory, which lives as long as the pod.

``sizeLimit`` is not a quota on disk: what is there is measured (``VolumeManager.usage``), and the pod is evicted
(``wasilet_node.pods.eviction``), as kubelet does it. In memory the kernel holds the size where this process may mount
(``wasilet_node.volumes.sized_memory``); else it is measured twice a second.
"""

from __future__ import annotations

from wasilet_common import quantity

from wasilet_node.volumes.base import Pod
from wasilet_node.volumes.kinds import Place, Shared, Source
from wasilet_node.volumes.pod_dirs import checked_name, make_private
from wasilet_node.volumes.sized_memory import hold_size


class EmptyDirs:
    """A folder that starts empty."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:
        """Media other than disk and memory are huge pages, which modules cannot use."""
        medium = source.get("medium") or ""
        return "" if medium in {"", "Memory"} else f"emptyDir medium {medium} is not supported by this node"

    async def place(self, pod: Pod, name: str, source: Source) -> Place:
        """See ``Placing``."""
        uid = pod["metadata"]["uid"]
        in_memory = source.get("medium") == "Memory"
        pod_dirs = self._shared.pod_dirs
        root = pod_dirs.memory_pod(uid) if in_memory else pod_dirs.pod(uid)
        folder = make_private(root / "volumes" / checked_name(name))
        limit = int(quantity.value(source.get("sizeLimit") or "0"))
        if in_memory and limit > 0 and pod_dirs.memory_root() is not None:
            return Place(path=folder, in_memory=True, loose=not hold_size(folder, limit))
        return Place(path=folder, in_memory=in_memory, loose=in_memory and limit > 0)
