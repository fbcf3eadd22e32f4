"""The interface of volumes, as the pod workers see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from wasilet_node.runtime.protocol import Mount
from wasilet_node.volumes.removal import Usage

Pod = dict[str, Any]
Container = dict[str, Any]


class VolumeError(Exception):
    """A volume cannot be set up now: event ``FailedMount`` with this message, retried with back-off."""


class VolumeRefusedError(Exception):
    """A volume can never work on this node (its kind is unsupported): the pod is refused by name."""


class ContainerConfigError(Exception):
    """Waiting reason ``CreateContainerConfigError`` with this message, retried; kubelet's own texts where it has
    one."""


class Volumes(Protocol):
    """One object per node, all pods."""

    def check(self, pod: Pod) -> None:
        """Admission: raises VolumeRefusedError naming the volume and its kind. No I/O."""

    async def setup(self, pod: Pod) -> None:
        """Make every volume that the pod's containers use, but for image volumes; idempotent. Raises VolumeError."""

    async def place_image(self, pod: Pod, volume: str, archive: Path, digest: str) -> None:
        """Unpack an image volume from an archive with this digest; idempotent. Raises VolumeError."""

    def mounts(
        self,
        pod: Pod,
        container: Container,
        environment: Mapping[str, str],
        *,
        attempt: int = 0,
        working_dir: str = "",
    ) -> Sequence[Mount]:
        """The preopens of one container: volumeMounts (subPath, subPathExpr expanded from ``environment``,
        readOnly), ``workingDir`` as ``.``, ``/etc/hosts``, the termination log folder, and the root file system.
        Raises ContainerConfigError.

        ``attempt`` is the instance's restart count: each instance gets its own termination file, so that an old
        message is never taken for a new one. ``working_dir`` is the image's, used when the container names none.
        Does file I/O, which a hanging hostPath can block for ever: call it through ``HostThreads``."""

    def termination_message(self, pod: Pod, container: Container, *, attempt: int = 0) -> str:
        """Up to the last 4096 bytes of the file at ``terminationMessagePath`` that instance ``attempt`` wrote, read
        beneath its root, no links followed."""

    async def read_file(self, pod: Pod, volume: str, path: str, *, limit_bytes: int) -> bytes | None:
        """A file of a volume that ``setup`` has made; links are followed within the volume. None: it does not exist.
        Raises ContainerConfigError, also for a longer one."""

    async def refresh(self, pod: Pod) -> None:
        """Bring configMap, secret, projected and downwardAPI volumes up to date by an atomic swap; rotate tokens."""

    async def teardown(self, pod_uid: str) -> None:
        """Remove all that ``setup`` made. Idempotent; never leaves the pod's folder, never follows links."""

    async def usage(self, pod: Pod) -> Mapping[str, Usage]:
        """What the volumes of a pod that lie on the node hold, by name."""

    def loose_pods(self) -> Sequence[str]:
        """Uids of the pods that :meth:`loose_usage` finds something of: most nodes have none, and it is asked twice a
        second."""

    async def loose_usage(self, pod: Pod) -> Mapping[str, Usage]:
        """As :meth:`usage`, of the memory volumes with a size that the kernel does not hold."""

    def instance_folder(self, pod: Pod, container: str, attempt: int) -> Path:
        """Where one instance's root file system lies."""

    async def orphans(self) -> Sequence[str]:
        """Uids that have a folder on disk, for clean-up after a restart."""
