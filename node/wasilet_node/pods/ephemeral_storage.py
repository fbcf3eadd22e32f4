"""The limits on what a pod writes to the node's own disk: of an emptyDir, of all containers together, of one container.

None of them is a quota (an ordinary user has none to set), so they are kept as kubelet keeps them: what is there is
measured now and then, and a pod over a limit is evicted. Order, messages and what counts are those of kubelet's
``localStorageEviction``: a container uses its logs and its root file system; the pod uses those and what
``IsLocalEphemeralVolume`` names, emptyDirs on disk and configMaps.

The pod brought it on itself, so it is no disruption: a Job's ``podFailurePolicy`` must not retry it for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wasilet_common import pod_fields, quantity
from wasilet_common.pod_fields import Pod

from wasilet_node.pods import resources
from wasilet_node.pods.status import Verdict

RESOURCE = "ephemeral-storage"


@dataclass(frozen=True, kw_only=True)
class StorageUsage:
    """Bytes on disk, by name. ``volumes`` may hold more than counts here."""

    containers: Mapping[str, int] = field(default_factory=dict)
    volumes: Mapping[str, int] = field(default_factory=dict)

    def of_pod(self, pod: Pod) -> int:
        """What counts against the limits of all containers together."""
        counted = [
            volume["name"]
            for volume in pod["spec"].get("volumes") or ()
            if "configMap" in volume or ("emptyDir" in volume and not (volume["emptyDir"] or {}).get("medium"))
        ]
        return sum(self.containers.values()) + sum(self.volumes.get(name, 0) for name in counted)


def is_limited(pod: Pod) -> bool:
    """Whether anything has to be measured."""
    return resources.pod_limit(pod, RESOURCE) is not None or any(
        (volume.get("emptyDir") or {}).get("sizeLimit") for volume in pod["spec"].get("volumes") or ()
    )


def exceeded(pod: Pod, usage: StorageUsage) -> Verdict | None:
    """The first limit that the pod is over."""
    message = _empty_dir_over(pod, usage) or _pod_over(pod, usage) or _container_over(pod, usage)
    return Verdict(reason="Evicted", message=message) if message else None


def _empty_dir_over(pod: Pod, usage: StorageUsage) -> str:
    for volume in pod["spec"].get("volumes") or ():
        limit = (volume.get("emptyDir") or {}).get("sizeLimit")
        if limit is not None and 0 < quantity.value(limit) < usage.volumes.get(volume["name"], 0):
            return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
    return ""


def _pod_over(pod: Pod, usage: StorageUsage) -> str:
    limit = resources.pod_limit(pod, RESOURCE)
    if limit is None or usage.of_pod(pod) <= quantity.value(limit):
        return ""
    return f"Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "


def _container_over(pod: Pod, usage: StorageUsage) -> str:
    sidecars = [container for container in pod_fields.init_containers(pod) if pod_fields.is_sidecar(container)]
    for container in (*pod_fields.regular_containers(pod), *sidecars):
        limit = resources.limit(container, RESOURCE)
        if limit is not None and usage.containers.get(container["name"], 0) > limit:
            text = resources.limit_text(container, RESOURCE)
            return f'Container {container["name"]} exceeded its local ephemeral storage limit "{text}". '
    return ""
