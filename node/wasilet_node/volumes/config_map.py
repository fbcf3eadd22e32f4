"""configMap volumes."""

from __future__ import annotations

import base64
from collections.abc import Callable

from wasilet_node.kube.base import KubeObject, NotFoundError
from wasilet_node.volumes.atomic import FileProjection, Payload
from wasilet_node.volumes.base import Pod
from wasilet_node.volumes.kinds import Shared, Source, chosen_keys, default_mode, is_optional


def project(source: Source, config_map: KubeObject, mode: int) -> dict[str, FileProjection]:
    """``data`` and ``binaryData``, all or the ``items`` named. Raises VolumeError with kubelet's text."""
    contents = {key: str(text).encode() for key, text in (config_map.get("data") or {}).items()}
    for key, encoded in (config_map.get("binaryData") or {}).items():
        contents.setdefault(key, base64.b64decode(encoded))
    return chosen_keys(source, contents, mode, missing="configmap references non-existent config key")


class ConfigMaps:
    """A ConfigMap's keys as files."""

    in_memory = False

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """Every configMap can be served."""
        return ""

    async def read(self, pod: Pod, source: Source, *, max_age_seconds: float, mode: int) -> dict[str, FileProjection]:
        """The files of a volume's or a projection's configMap."""
        metadata = pod["metadata"]
        try:
            found = await self._shared.references.config_map(
                metadata["namespace"],
                str(source.get("name", "")),
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
