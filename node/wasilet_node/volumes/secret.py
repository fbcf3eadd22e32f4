"""secret volumes: in memory where there is a tmpfs, and readable by the agent's user alone.

``defaultMode`` keeps its owner bits only. A module cannot see permission bits, and no one but its own user has business
with the files, so 0644 (the default) becomes 0600.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace

from wasilet_node.kube.base import KubeObject, NotFoundError
from wasilet_node.volumes.atomic import FileProjection, Payload
from wasilet_node.volumes.base import Pod
from wasilet_node.volumes.kinds import Shared, Source, chosen_keys, default_mode, is_optional

_OWNER_BITS = 0o700


def project(source: Source, secret: KubeObject, mode: int) -> dict[str, FileProjection]:
    """``data``, all or the ``items`` named. Raises VolumeError with kubelet's text."""
    contents = {key: base64.b64decode(encoded) for key, encoded in (secret.get("data") or {}).items()}
    files = chosen_keys(source, contents, mode, missing="references non-existent secret key")
    return {path: replace(file, mode=file.mode & _OWNER_BITS) for path, file in files.items()}


class Secrets:
    """A Secret's keys as files."""

    in_memory = True

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """Every secret can be served."""
        return ""

    async def read(self, pod: Pod, source: Source, *, max_age_seconds: float, mode: int) -> dict[str, FileProjection]:
        """The files of a volume's secret (``secretName``) or a projection's (``name``)."""
        metadata = pod["metadata"]
        try:
            found = await self._shared.references.secret(
                metadata["namespace"],
                str(source.get("secretName") or source.get("name") or ""),
                pod_uid=metadata["uid"],
                max_age_seconds=max_age_seconds,
            )
        except NotFoundError:
            if not is_optional(source):
                raise
            found = {}
        return project(source, found, mode)

    async def payload(
        self,
        pod: Pod,
        source: Source,
        *,
        max_age_seconds: float,
        published: Callable[[str], bytes | None],  # noqa: ARG002 - the interface of kinds
    ) -> Payload:
        """See ``Projecting``."""
        return await self.read(pod, source, max_age_seconds=max_age_seconds, mode=default_mode(source))
