"""downwardAPI volumes: labels, annotations, names and resources of the pod as files, updated as labels change."""

from __future__ import annotations

from collections.abc import Callable

from wasilet_node.kube import fields
from wasilet_node.volumes.atomic import FileProjection, Payload
from wasilet_node.volumes.base import Pod, VolumeError
from wasilet_node.volumes.kinds import Shared, Source, default_mode, item_mode


class DownwardApi:
    """The pod's own fields as files."""

    in_memory = False

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """Every downwardAPI volume can be served."""
        return ""

    def read(self, pod: Pod, source: Source, *, mode: int) -> dict[str, FileProjection]:
        """The files of a volume or a projection. Raises VolumeError that names every field that failed."""
        payload: dict[str, FileProjection] = {}
        errors: list[str] = []
        for item in source.get("items") or []:
            text = ""
            try:
                if reference := item.get("fieldRef"):
                    text = fields.metadata_field(pod, str(reference.get("fieldPath", "")))
                elif reference := item.get("resourceFieldRef"):
                    text = fields.resource_field(pod, reference, self._shared.allocatable())
            except fields.FieldError as error:
                errors.append(str(error))
            payload[item["path"]] = FileProjection(text.encode(), item_mode(item, mode))
        if errors:
            raise VolumeError(aggregate(errors))
        return payload

    async def payload(
        self,
        pod: Pod,
        source: Source,
        *,
        max_age_seconds: float,  # noqa: ARG002 - the interface of kinds
        published: Callable[[str], bytes | None],  # noqa: ARG002 - the interface of kinds
    ) -> Payload:
        """See ``Projecting``."""
        return self.read(pod, source, mode=default_mode(source))


def aggregate(messages: list[str]) -> str:
    """Several messages as one, as apimachinery's ``errors.NewAggregate`` prints them."""
    unique = list(dict.fromkeys(messages))
    return unique[0] if len(unique) == 1 else f"[{', '.join(unique)}]"
