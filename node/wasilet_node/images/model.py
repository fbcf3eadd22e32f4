"""What the rest of the agent knows of images."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from wasilet_common.oci.credentials import Credential

from wasilet_node.runtime.protocol import GuestKind


class PullPolicy(StrEnum):
    """``imagePullPolicy``; the default (Always for ``:latest``, else IfNotPresent) is set by API server admission."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A pulled and verified image."""

    reference: str
    """As the pod names it."""

    image_id: str
    """``<repository>@sha256:...``: goes into ``containerStatuses[].imageID``."""

    manifest_digest: str
    module_digest: str
    module_path: Path
    """The wasm binary in the store."""

    kind: GuestKind
    server: bool = False
    """A component that answers HTTP requests."""

    size_bytes: int
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    module_name: str = ""
    """The name of the entry module: the default argv[0]."""


class ImageError(Exception):
    """An image cannot be had. ``reason`` is the waiting reason: ErrImagePull, ImagePullBackOff, ErrImageNeverPull,
    InvalidImageName, ImageInspectError, CreateContainerError; the message is for status and event."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


EventSink = Callable[[str, str, str], Awaitable[None] | None]
"""``(type, reason, message)``: Normal/Warning, Pulling/Pulled/Failed/BackOff, text."""


class Images(Protocol):
    """Images as the pod workers see them."""

    async def ensure(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        """Have the image locally, verified. Events as kubelet's image manager emits them. Raises ImageError.

        Back-off (10 s doubling to 300 s) is kept here by pod uid and reference, as kubelet does, so that a new pod
        tries at once: within it ImagePullBackOff is raised without asking the registry.
        """

    async def ensure_files(
        self,
        reference: str,
        *,
        policy: PullPolicy,
        credentials: Sequence[Credential],
        event: EventSink,
        pod_uid: str = "",
    ) -> Image:
        """As ``ensure``, for an image volume: ``module_path`` is one archive of the image's files, and
        ``module_digest`` its digest. Raises ImageError."""

    async def compiled(self, image: Image, *, owner: str = "", event: EventSink | None = None) -> Path:
        """The precompiled file for this engine, made in a worker process when it is missing; of a large module
        ``event`` is told when that begins, of the caller that comes first. Raises ImageError
        (reason CreateContainerError) with the compiler's message."""

    async def list(self) -> Sequence[dict[str, object]]:
        """``node.status.images``: ``names`` and ``sizeBytes``, largest first, at most 50."""

    async def delete_unused(self) -> int:
        """Make room: the bytes that were freed."""

    def set_in_use(self, module_digests: frozenset[str]) -> None:
        """What running pods use, which garbage collection leaves alone."""
