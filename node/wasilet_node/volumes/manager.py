"""All volumes of all pods: ``wasilet_node.volumes.base.Volumes``.

On disk (and, for what must stay off it, in memory) a pod has::

    <pods>/<uid>/volumes/<volume>/                       emptyDir, configMap, downwardAPI; secret, projected in memory
    <pods>/<uid>/containers/<container>.<attempt>/       what one instance has for itself
        termination/  files-<n>/  copy-<n>/  cwd/  root/  tmp/  termination.json

Where a volume is was found out by ``setup`` and is kept in memory only: after a restart of the agent ``setup`` runs
again for every pod, finds the files, and repairs what is missing. A volume that was published before stays usable while
the API server does not answer, as it does in kubelet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wasilet_node.kube import fields
from wasilet_node.kube.base import KubeError
from wasilet_node.kube.references import References
from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import open_root, opened, read_whole, resolve
from wasilet_node.settings import NodePaths
from wasilet_node.volumes import atomic, hosts, image
from wasilet_node.volumes.base import Container, ContainerConfigError, Pod, VolumeError, VolumeRefusedError
from wasilet_node.volumes.claims import Claims, EphemeralClaims
from wasilet_node.volumes.config_map import ConfigMaps
from wasilet_node.volumes.downward_api import DownwardApi
from wasilet_node.volumes.empty_dir import EmptyDirs
from wasilet_node.volumes.host_path import HostPaths
from wasilet_node.volumes.host_threads import HostThreads
from wasilet_node.volumes.kinds import Place, Placing, Projecting, Shared, Source
from wasilet_node.volumes.mounts import Instance, plan_mounts
from wasilet_node.volumes.pod_dirs import PodDirs, checked_name, checked_uid, make_private
from wasilet_node.volumes.projected import Projected
from wasilet_node.volumes.removal import Usage, remove_tree, usage
from wasilet_node.volumes.secret import Secrets
from wasilet_node.volumes.sized_memory import unmount_volumes
from wasilet_node.volumes.termination import read_message
from wasilet_node.volumes.tokens import Tokens

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it, and checked
_THREADS = 4
_SLOW_THREADS = 2
"""For trees that guests made: removing or measuring a million files must not keep other pods from their volumes."""


@dataclass(frozen=True)
class _Volume:
    name: str
    kind: str
    source: Source


def _volumes(pod: Pod) -> list[_Volume]:
    """The pod's volumes; one without a source is an emptyDir, as the API server defaults it."""
    found: list[_Volume] = []
    for volume in pod.get("spec", {}).get("volumes") or []:
        kinds = [key for key in volume if key != "name"] or ["emptyDir"]
        found.append(_Volume(str(volume["name"]), kinds[0], volume.get(kinds[0]) or {}))
    return found


def _containers(pod: Pod) -> list[Container]:
    spec = pod.get("spec", {})
    return [
        *(spec.get("initContainers") or []),
        *(spec.get("containers") or []),
        *(spec.get("ephemeralContainers") or []),
    ]


def _used(pod: Pod) -> set[str]:
    """Names of the volumes that a container mounts or takes variables from; no others are set up."""
    mounted = {str(mount["name"]) for container in _containers(pod) for mount in container.get("volumeMounts") or []}
    references = (
        (entry.get("valueFrom") or {}).get("fileKeyRef") or {}
        for container in _containers(pod)
        for entry in container.get("env") or []
    )
    return mounted | {str(reference["volumeName"]) for reference in references if reference.get("volumeName")}


def _is_ready(place: Place | None) -> bool:
    """Whether a volume need not be set up again. What lies in memory can vanish: at the logout of an ordinary user
    systemd-logind empties ``/dev/shm`` of their files (RemoveIPC)."""
    return place is not None and (not place.in_memory or place.path.is_dir())


class VolumeManager:
    """Implements ``Volumes``. Its calls for one pod wait for each other; those of different pods do not.

    ``allocatable`` gives the node's allocatable resources as quantities, ``addresses`` a pod's addresses.
    ``shared_memory`` is where the memory area is made, None to do without.
    """

    def __init__(
        self,
        paths: NodePaths,
        references: References,
        *,
        allocatable: Callable[[], Mapping[str, str]],
        addresses: Callable[[Pod], Sequence[str]] = lambda _pod: (),
        cluster_domain: str = fields.CLUSTER_DOMAIN,
        shared_memory: Path | None = _SHARED_MEMORY,
        tokens: Tokens | None = None,
        host_threads: HostThreads | None = None,
    ) -> None:
        self._pod_dirs = PodDirs(paths.pods, shared_memory=shared_memory)
        self._references = references
        self._tokens = tokens or Tokens(references)
        self._addresses = addresses
        self._cluster_domain = cluster_domain
        self._threads = ThreadPoolExecutor(_THREADS, "volumes")
        self._slow_threads = ThreadPoolExecutor(_SLOW_THREADS, "volume trees")
        self._host_threads = host_threads or HostThreads()
        shared = Shared(
            references=references,
            pod_dirs=self._pod_dirs,
            tokens=self._tokens,
            allocatable=allocatable,
            host_threads=self._host_threads,
        )
        self._projecting: dict[str, Projecting] = {
            "configMap": ConfigMaps(shared),
            "secret": Secrets(shared),
            "projected": Projected(shared),
            "downwardAPI": DownwardApi(shared),
        }
        self._placing: dict[str, Placing] = {
            "emptyDir": EmptyDirs(shared),
            "hostPath": HostPaths(shared),
            "persistentVolumeClaim": Claims(shared),
            "ephemeral": EphemeralClaims(shared),
        }
        self._places: dict[str, dict[str, Place]] = {}
        self._loose: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}

    def close(self) -> None:
        """Give the threads back."""
        for threads in (self._threads, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    # ---- admission

    def check(self, pod: Pod) -> None:
        """See ``Volumes.check``."""
        for volume in _volumes(pod):
            kind = self._projecting.get(volume.kind) or self._placing.get(volume.kind)
            if volume.kind == image.KIND:
                problem = image.check(volume.source)
            elif kind is None:
                problem = f"volumes of kind {volume.kind} are not supported by this node"
            else:
                problem = kind.check(volume.source)
            if problem:
                raise VolumeRefusedError(f'volume "{volume.name}": {problem}')
        for container in _containers(pod):
            if container.get("volumeDevices"):
                raise VolumeRefusedError(
                    f'container "{container["name"]}" asks for volumeDevices: a WASI module has no block devices'
                )

    # ---- setting up

    async def setup(self, pod: Pod) -> None:
        """See ``Volumes.setup``."""
        uid = checked_uid(pod["metadata"]["uid"])
        async with self._lock(uid):
            places = self._places.setdefault(uid, {})
            used = _used(pod)
            missing = [
                volume
                for volume in _volumes(pod)
                if volume.kind != image.KIND and volume.name in used and not _is_ready(places.get(volume.name))
            ]
            results = await asyncio.gather(*(self._set_up(pod, volume) for volume in missing), return_exceptions=True)
            problems: list[str] = []
            for volume, result in zip(missing, results, strict=True):
                if isinstance(result, (VolumeError, KubeError, OSError)):
                    problems.append(f'MountVolume.SetUp failed for volume "{volume.name}" : {result}')
                elif isinstance(result, BaseException):
                    raise result
                else:
                    places[volume.name] = result
                    if result.loose:
                        self._loose.add(uid)
            if problems:
                raise VolumeError("; ".join(problems))

    async def place_image(self, pod: Pod, volume: str, archive: Path, digest: str) -> None:
        """See ``Volumes.place_image``."""
        uid = checked_uid(pod["metadata"]["uid"])
        folder = self._pod_dirs.pod(uid) / "volumes" / checked_name(volume)
        async with self._lock(uid):
            places = self._places.setdefault(uid, {})
            loop = asyncio.get_running_loop()
            places[volume] = await loop.run_in_executor(self._slow_threads, image.place, folder, archive, digest)

    async def _set_up(self, pod: Pod, volume: _Volume) -> Place:
        if (placing := self._placing.get(volume.kind)) is not None:
            return await placing.place(pod, volume.name, volume.source)
        projecting = self._projecting.get(volume.kind)
        if projecting is None:
            raise VolumeError(f"volumes of kind {volume.kind} are not supported by this node")
        folder = self._folder(pod, volume.name, projecting)
        try:
            await self._publish(pod, volume, projecting, max_age_seconds=0.0)
        except (KubeError, VolumeError) as error:
            if not atomic.is_published(folder):
                raise
            logger.warning("volume %s of pod %s stays as it was: %s", volume.name, pod["metadata"]["uid"], error)
        return Place(path=folder, read_only=True, in_memory=projecting.in_memory, live=True)

    def _folder(self, pod: Pod, name: str, kind: Projecting) -> Path:
        uid = pod["metadata"]["uid"]
        root = self._pod_dirs.memory_pod(uid) if kind.in_memory else self._pod_dirs.pod(uid)
        return root / "volumes" / checked_name(name)

    async def _publish(self, pod: Pod, volume: _Volume, kind: Projecting, *, max_age_seconds: float) -> bool:
        folder = self._folder(pod, volume.name, kind)
        payload = await kind.payload(
            pod,
            volume.source,
            max_age_seconds=max_age_seconds,
            published=lambda path: atomic.read(folder, path),
        )

        def write() -> bool:
            make_private(folder.parent)
            return atomic.write(folder, payload)

        try:
            return await self._in_thread(write)
        except (atomic.PayloadError, OSError) as error:
            raise VolumeError(str(error)) from error

    async def refresh(self, pod: Pod) -> None:
        """See ``Volumes.refresh``. Raises VolumeError after every volume had its turn; what was there stays."""
        uid = checked_uid(pod["metadata"]["uid"])
        async with self._lock(uid):
            ready = self._places.get(uid, {})
            problems: list[str] = []
            for volume in _volumes(pod):
                kind = self._projecting.get(volume.kind)
                if kind is None or volume.name not in ready:
                    continue
                try:
                    await self._publish(pod, volume, kind, max_age_seconds=self._references.refresh_age_seconds)
                except (VolumeError, KubeError) as error:
                    problems.append(f'MountVolume.SetUp failed for volume "{volume.name}" : {error}')
            if problems:
                raise VolumeError("; ".join(problems))

    async def read_file(self, pod: Pod, volume: str, path: str, *, limit_bytes: int) -> bytes | None:
        """See ``Volumes.read_file``."""
        place = self._places.get(checked_uid(pod["metadata"]["uid"]), {}).get(volume)
        if place is None or place.is_file or place.unusable:
            raise ContainerConfigError(f'cannot find the volume "{volume}" referenced by FileKeyRef')

        def read() -> bytes | None:
            with opened(open_root(place.path)) as root:
                names, missing = resolve(root, path)
                return None if missing is not None else read_whole(root, names, limit_bytes)

        try:
            return await self._host_threads.run(f'volume "{volume}"', read)
        except FileNotFoundError:
            return None
        except (OSError, VolumeError) as error:
            raise ContainerConfigError(f'cannot read "{path}" of volume "{volume}": {error}') from error

    # ---- instances

    def _instance(self, pod: Pod, container: Container, attempt: int) -> Instance:
        uid = pod["metadata"]["uid"]
        below = Path("containers", f"{checked_name(str(container['name']))}.{int(attempt)}")
        return Instance(disk=self._pod_dirs.pod(uid) / below, memory=self._pod_dirs.memory_pod(uid) / below)

    def mounts(
        self,
        pod: Pod,
        container: Container,
        environment: Mapping[str, str],
        *,
        attempt: int = 0,
        working_dir: str = "",
    ) -> Sequence[Mount]:
        """See ``Volumes.mounts``. Folders of instances before the last one are removed."""
        uid = checked_uid(pod["metadata"]["uid"])
        hosts_content = hosts.content(pod, self._addresses(pod), self._cluster_domain)
        instance = self._instance(pod, container, attempt)
        try:
            make_private(instance.disk)
            self._remove_old_instances(instance, attempt)
            mounts, message = plan_mounts(
                pod,
                container,
                self._places.get(uid, {}),
                environment,
                instance=instance,
                working_dir=working_dir,
                hosts_content=hosts_content,
            )
            if message is not None:
                message.record(instance.disk)
        except (OSError, VolumeError) as error:
            raise ContainerConfigError(
                f'cannot prepare the mounts of container "{container["name"]}": {error}'
            ) from error
        return mounts

    def _remove_old_instances(self, instance: Instance, attempt: int) -> None:
        if attempt < 2:
            return
        container = instance.disk.name.rpartition(".")[0]
        for folder in {instance.disk.parent, instance.memory.parent}:
            with contextlib.suppress(FileNotFoundError):
                for entry in folder.iterdir():
                    name, _, number = entry.name.rpartition(".")
                    if name == container and number.isdecimal() and int(number) < attempt - 1:
                        remove_tree(folder, entry.name)

    def termination_message(self, pod: Pod, container: Container, *, attempt: int = 0) -> str:
        """See ``Volumes.termination_message``."""
        checked_uid(pod["metadata"]["uid"])
        return read_message(self._instance(pod, container, attempt).disk, container)

    # ---- usage

    async def usage(self, pod: Pod) -> dict[str, Usage]:
        """Bytes and inodes of each volume that lies in the pod's own folders (not hostPath, not claims)."""
        places = dict(self._places.get(checked_uid(pod["metadata"]["uid"]), {}))
        own = {
            volume.name: places[volume.name].path
            for volume in _volumes(pod)
            if volume.name in places and (volume.kind == "emptyDir" or volume.kind in self._projecting)
        }

        return await self._measure(own)

    def loose_pods(self) -> Sequence[str]:
        """See ``Volumes.loose_pods``."""
        return list(self._loose)

    async def loose_usage(self, pod: Pod) -> dict[str, Usage]:
        """Of the memory volumes with a size that the kernel does not hold."""
        places = self._places.get(pod["metadata"]["uid"], {})
        loose = {name: place.path for name, place in places.items() if place.loose}
        return await self._measure(loose) if loose else {}

    async def _measure(self, paths: Mapping[str, Path]) -> dict[str, Usage]:
        def measure() -> dict[str, Usage]:
            found: dict[str, Usage] = {}
            for name, path in paths.items():
                with contextlib.suppress(OSError):
                    found[name] = usage(path)
            return found

        return await self._in_slow_thread(measure)

    def instance_folder(self, pod: Pod, container: str, attempt: int) -> Path:
        """Where what one instance wrote outside volumes lies on disk: its root file system, its termination message."""
        return self._instance(pod, {"name": container}, attempt).disk

    # ---- the end

    async def teardown(self, pod_uid: str) -> None:
        """See ``Volumes.teardown``. Raises VolumeError when something is left; call it again then."""
        uid = checked_uid(pod_uid)
        async with self._lock(uid):
            self._places.pop(uid, None)
            self._loose.discard(uid)
            self._references.release(uid)
            self._tokens.release(uid)
            roots = self._pod_dirs.roots()

            def remove() -> None:
                for root in roots:
                    if root != self._pod_dirs.disk:
                        unmount_volumes(root / uid)
                    remove_tree(root, uid)

            try:
                await self._in_slow_thread(remove)
            except OSError as error:
                raise VolumeError(f"the folders of pod {uid} cannot be removed yet: {error}") from error
        self._locks.pop(uid, None)

    async def orphans(self) -> Sequence[str]:
        """See ``Volumes.orphans``."""
        roots = self._pod_dirs.roots()

        def scan() -> list[str]:
            self._pod_dirs.remove_strays()
            found: set[str] = set()
            for root in roots:
                with contextlib.suppress(FileNotFoundError):
                    for entry in root.iterdir():
                        with contextlib.suppress(ValueError):
                            found.add(checked_uid(entry.name))
            return sorted(found)

        return await self._in_thread(scan)

    def _lock(self, uid: str) -> asyncio.Lock:
        return self._locks.setdefault(uid, asyncio.Lock())

    async def _in_slow_thread(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._slow_threads, function)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
