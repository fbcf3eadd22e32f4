"""emptyDir volumes: a folder of the pod's, on disk or in memory, which lives as long as the pod.

``sizeLimit`` is not a quota (there is no mount to put one on): what is there is measured (``VolumeManager.usage``), and
the pod is evicted (``wasilet_node.pods.evictor``), as kubelet does it.
"""

from __future__ import annotations

from wasilet_node.volumes.base import Pod
from wasilet_node.volumes.kinds import Place, Shared, Source
from wasilet_node.volumes.pod_dirs import checked_name, make_private


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
        areas = self._shared.areas
        root = areas.memory_pod(uid) if in_memory else areas.pod(uid)
        return Place(path=make_private(root / "volumes" / checked_name(name)), in_memory=in_memory)
