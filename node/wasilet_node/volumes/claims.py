"""persistentVolumeClaim and generic ephemeral volumes, on local and hostPath PersistentVolumes.

The scheduler has checked node affinity, the controller manager has bound the claim; the node reads claim and volume by
name and looks that they belong together, with kubelet's messages. Everything that needs a driver is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from wasilet_node.kube.base import KubeError, KubeObject
from wasilet_node.volumes.base import Pod, VolumeError
from wasilet_node.volumes.host_path import locate_in_thread
from wasilet_node.volumes.host_threads import HostThreads
from wasilet_node.volumes.kinds import Place, Shared, Source

_PROTECTION = "kubernetes.io/pvc-protection"


class Claims:
    """A claim that the pod names."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """What stands behind a claim is known only after reading it."""
        return ""

    async def place(self, pod: Pod, name: str, source: Source) -> Place:  # noqa: ARG002 - the interface of kinds
        """See ``Placing``."""
        return await self.resolve(
            pod, str(source.get("claimName", "")), read_only=source.get("readOnly") is True, owned=False
        )

    async def resolve(self, pod: Pod, claim_name: str, *, read_only: bool, owned: bool) -> Place:
        """From a claim to the place of its volume; ``owned``: the claim must belong to the pod."""
        metadata = pod["metadata"]
        namespace, uid = metadata["namespace"], metadata["uid"]
        references = self._shared.references
        where = f"error processing PVC {namespace}/{claim_name}"
        try:
            claim = await references.persistent_volume_claim(namespace, claim_name, pod_uid=uid)
        except KubeError as error:
            raise VolumeError(f"{where}: failed to fetch PVC from API server: {error}") from error
        if problem := _claim_problem(claim):
            raise VolumeError(f"{where}: {problem}")
        if owned and not _is_controlled_by(claim, uid):
            raise VolumeError(
                f"PVC {namespace}/{claim_name} was not created for pod {namespace}/{metadata['name']} "
                "(pod is not owner)"
            )
        volume_name = str(claim["spec"]["volumeName"])
        try:
            volume = await references.persistent_volume(volume_name, pod_uid=uid)
        except KubeError as error:
            raise VolumeError(f"{where}: failed to fetch PV {volume_name} from API server: {error}") from error
        if problem := _volume_problem(volume, str(claim["metadata"].get("uid", ""))):
            raise VolumeError(f"{where}: {problem}")
        return await _place(self._shared.host_threads, volume, read_only=read_only)


class EphemeralClaims:
    """A claim that the controller manager makes for the pod, named ``<pod>-<volume>``."""

    def __init__(self, shared: Shared) -> None:
        self._claims = Claims(shared)

    def check(self, source: Source) -> str:  # noqa: ARG002 - the interface of kinds
        """As for claims."""
        return ""

    async def place(self, pod: Pod, name: str, source: Source) -> Place:  # noqa: ARG002 - the interface of kinds
        """See ``Placing``."""
        return await self._claims.resolve(pod, f"{pod['metadata']['name']}-{name}", read_only=False, owned=True)


def _claim_problem(claim: KubeObject) -> str:
    metadata, spec = claim.get("metadata", {}), claim.get("spec", {})
    if metadata.get("deletionTimestamp") and _PROTECTION not in (metadata.get("finalizers") or []):
        return "PVC is being deleted"
    if claim.get("status", {}).get("phase") != "Bound":
        return "PVC is not bound"
    if not spec.get("volumeName"):
        return "PVC has empty pvc.Spec.VolumeName"
    return ""


def _volume_problem(volume: KubeObject, claim_uid: str) -> str:
    name, spec = volume.get("metadata", {}).get("name", ""), volume.get("spec", {})
    reference = spec.get("claimRef")
    if not reference:
        return f"found PV object {name} but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"
    if reference.get("uid") != claim_uid:
        return (
            f"found PV object {name} but its pv.Spec.ClaimRef.UID {reference.get('uid', '')} "
            f"does not point to claim.UID {claim_uid}"
        )
    mode = spec.get("volumeMode") or "Filesystem"
    if mode != "Filesystem":
        return f"PersistentVolume {name} has volumeMode {mode}, which a WASI module cannot use"
    return ""


def _is_controlled_by(claim: KubeObject, pod_uid: str) -> bool:
    owners = claim.get("metadata", {}).get("ownerReferences") or []
    return any(owner.get("controller") and owner.get("uid") == pod_uid for owner in owners)


async def _place(threads: HostThreads, volume: KubeObject, *, read_only: bool) -> Place:
    name, spec = volume["metadata"]["name"], volume["spec"]
    if local := spec.get("local"):
        path = str(local.get("path", ""))
        try:
            place = await locate_in_thread(threads, Path(path), "Directory", read_only=read_only)
        except VolumeError as error:
            raise VolumeError(
                f'PersistentVolume {name}: path "{path}" does not exist or is no folder: {error}'
            ) from error
        return place
    if host := spec.get("hostPath"):
        return await locate_in_thread(
            threads, Path(str(host.get("path", ""))), str(host.get("type") or ""), read_only=read_only
        )
    known = {"capacity", "accessModes", "claimRef", "nodeAffinity", "mountOptions", "storageClassName", "volumeMode"}
    known |= {"persistentVolumeReclaimPolicy", "volumeAttributesClassName"}
    kinds = ", ".join(sorted(spec.keys() - known)) or "no source"
    raise VolumeError(f"PersistentVolume {name} is of kind {kinds}; this node serves local and hostPath volumes only")
