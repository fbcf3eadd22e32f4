"""All pods of the node: the watch, one worker per pod, the runtime's events, clean-up after a restart, eviction.

The manager only connects. It makes a worker for every uid that the watch shows, hands on what concerns it, and drops it
when the pod is gone from the API server and from the node. Nothing is removed before the first complete list has been
seen: until then an unknown container may well be a pod's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from wasilet_common import pod_fields
from wasilet_common.backoff import RetryBackoff
from wasilet_common.cri_log import layout
from wasilet_common.pod_fields import Pod

from wasilet_node.kube.base import KubeObject
from wasilet_node.network.errors import NetworkError
from wasilet_node.pods import admission, resources, termination
from wasilet_node.pods.admission import Neighbour
from wasilet_node.pods.container_start import ANNOTATION_MODULE
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.eviction import Evictor
from wasilet_node.pods.worker import PodWorker
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, RuntimeUnavailableError
from wasilet_node.volumes.base import VolumeError

logger = logging.getLogger(__name__)

MIRROR_ANNOTATION = "kubernetes.io/config.mirror"
HOUSEKEEPING_SECONDS = 10.0
MEMORY_VOLUMES_SECONDS = 0.5
RELIST_SECONDS = 30.0
_ORPHANS_AT_ONCE = 16
_SUBSCRIBED_SECONDS = 0.2


class PodManager:
    """The pods bound to this node. ``run`` for ever; ``pods`` and ``pod`` for the kubelet API."""

    def __init__(self, dependencies: PodDependencies, *, node_name: str) -> None:
        self._dependencies = replace(dependencies, room=self.room)
        self._node_name = node_name
        self._evictor = Evictor(self._dependencies)
        self._workers: dict[str, PodWorker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unclaimed: dict[str, dict[str, ContainerStatus]] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self._in_use: frozenset[str] = frozenset()
        self._synced = asyncio.Event()

    # ---- for the kubelet API

    @property
    def synced(self) -> asyncio.Event:
        """Set once the first complete list of pods has been taken in."""
        return self._synced

    def pods(self) -> list[Pod]:
        """All pods bound to this node, each with its latest status. Do not change them."""
        return [worker.pod_with_status() for worker in self._workers.values()]

    def pod(self, namespace: str, name: str) -> Pod | None:
        """One pod with its latest status. Of two uids of one name (deleted, made again) the living one."""
        found = [worker for worker in self._workers.values() if pod_fields.key(worker.pod) == (namespace, name)]
        if not found:
            return None
        return min(found, key=lambda worker: (worker.removed, pod_fields.is_deleted(worker.pod))).pod_with_status()

    # ---- life

    async def run(self) -> None:
        """For ever. Cancel it to end; containers go on running."""
        for instance in await self._list_runtime():
            self._unclaimed.setdefault(instance.pod_uid, {})[instance.id] = instance
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_runtime(), name="runtime events")
                group.create_task(self._relist_runtime(), name="runtime relist")
                group.create_task(self._watch_pods(), name="watch pods")
                group.create_task(self._keep_house(), name="pod housekeeping")
                group.create_task(self._watch_memory_volumes(), name="sizes of memory volumes")
        finally:
            tasks = [*self._tasks.values(), *self._cleaning]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_pods(self) -> None:
        listed: list[KubeObject] = []
        watch = self._dependencies.kube.watch("/api/v1/pods", field_selector=f"spec.nodeName={self._node_name}")
        async for event in watch:
            if event.type != "SYNCED" and not _has_identity(event.object):
                logger.error("the API server told of a pod without a name or uid, which is left alone")
                continue
            match event.type:
                case "SYNC":
                    listed.append(event.object)
                case "SYNCED":
                    self._take_list(listed)
                    listed = []
                case "DELETED":
                    self._removed(event.object)
                case _:
                    self._seen(event.object)

    def _take_list(self, listed: list[KubeObject]) -> None:
        # Those that run already count first, or a restart of the agent could refuse them for newcomers.
        listed.sort(key=lambda pod: (not self._was_admitted(pod), pod["metadata"].get("creationTimestamp") or ""))
        for pod in listed:
            self._seen(pod, listed=True)
        present = {pod_fields.uid(pod) for pod in listed}
        for uid, worker in list(self._workers.items()):
            if uid not in present:
                worker.remove()
        self._synced.set()
        self._spawn_cleaning()

    def _seen(self, pod: KubeObject, *, listed: bool = False) -> None:
        uid = pod_fields.uid(pod)
        worker = self._workers.get(uid)
        try:
            if worker is not None:
                worker.update(pod, listed=listed)
                return
            if MIRROR_ANNOTATION in (pod["metadata"].get("annotations") or {}):
                return
            worker = self._make_worker(pod)
        except (KeyError, TypeError, ValueError, AttributeError):
            # One pod that cannot be read must not end the watch of all others.
            logger.exception("pod %s cannot be taken in", pod_fields.format_pod(pod))
            return
        self._workers[uid] = worker
        task = asyncio.create_task(worker.run(), name=f"worker {pod_fields.format_pod(pod)}")
        self._tasks[uid] = task
        task.add_done_callback(lambda done: self._worker_ended(uid, done))

    def _removed(self, pod: KubeObject) -> None:
        worker = self._workers.get(pod_fields.uid(pod))
        if worker is not None:
            worker.update(pod)
            worker.remove()

    def _was_admitted(self, pod: Pod) -> bool:
        return bool(
            pod_fields.is_terminal(pod)
            or (pod.get("status") or {}).get("startTime")
            or self._unclaimed.get(pod_fields.uid(pod))
        )

    def _make_worker(self, pod: Pod) -> PodWorker:
        dependencies = self._dependencies
        admitted = self._was_admitted(pod)
        instances = self._unclaimed.pop(pod_fields.uid(pod), {}).values()
        refusal = admission.ADMITTED
        if not pod_fields.is_deleted(pod) and not pod_fields.is_terminal(pod) and not instances:
            # What can never run is asked after a restart of the agent too: such a pod was held, not admitted.
            refusal = admission.never(pod, volumes=dependencies.volumes)
            if not admitted and refusal is admission.ADMITTED:
                refusal = admission.admit(pod, node=dependencies.node(), neighbours=self._neighbours())
        if refusal.verdict is not None:
            dependencies.events.event(pod, "Warning", refusal.verdict.reason, refusal.verdict.message)
        if refusal.hold is not None and not admitted:
            dependencies.events.event(pod, "Warning", "Failed", f"Error: {refusal.hold.message}")
        return PodWorker(dependencies, pod, instances=instances, rejected=refusal.verdict, held=refusal.hold)

    def _neighbours(self) -> Iterable[Neighbour]:
        return [
            Neighbour(pod=worker.pod, requests=worker.requests())
            for worker in self._workers.values()
            if worker.holds_resources
        ]

    def room(self, pod: Pod) -> str:
        """See ``PodDependencies.room``. Raises QuantityError."""
        others = [each for each in self._neighbours() if pod_fields.uid(each.pod) != pod_fields.uid(pod)]
        short = admission.lacking(resources.pod_requests(pod), others, self._dependencies.node().allocatable)
        return "" if short is None else short.message

    def _worker_ended(self, uid: str, task: asyncio.Task[None]) -> None:
        self._workers.pop(uid, None)
        self._tasks.pop(uid, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a pod's worker ended", exc_info=error)

    # ---- the runtime

    async def _list_runtime(self) -> list[ContainerStatus]:
        retry = RetryBackoff(initial=0.1, maximum=5.0)
        while True:
            try:
                return list(await self._dependencies.runtime.list())
            except RuntimeUnavailableError as error:
                logger.warning("the runtime does not answer: %s", error)
                await asyncio.sleep(retry.next())

    async def _watch_runtime(self) -> None:
        retry = RetryBackoff(initial=0.1, maximum=5.0)
        while True:
            catching_up = asyncio.create_task(self._catch_up(), name="runtime list after subscription")
            try:
                async for instance in self._dependencies.runtime.events():
                    retry.reset()
                    self._on_status(instance)
            except RuntimeUnavailableError as error:
                logger.warning("the runtime's events ended: %s", error)
            finally:
                catching_up.cancel()
                await asyncio.gather(catching_up, return_exceptions=True)
            await asyncio.sleep(retry.next())

    async def _catch_up(self) -> None:
        """What happened before the subscription stood; there is no telling when it does, so shortly after."""
        await asyncio.sleep(_SUBSCRIBED_SECONDS)
        await self._relist()

    def _on_status(self, instance: ContainerStatus) -> None:
        worker = self._workers.get(instance.pod_uid)
        if worker is not None:
            worker.observe(instance)
        else:
            self._unclaimed.setdefault(instance.pod_uid, {})[instance.id] = instance

    async def _relist_runtime(self) -> None:
        """A backstop: an event that was lost is made up for within half a minute."""
        while True:
            await asyncio.sleep(RELIST_SECONDS)
            await self._relist()

    async def _relist(self) -> None:
        asked_at = asyncio.get_running_loop().time()
        by_pod: dict[str, dict[str, ContainerStatus]] = {}
        for instance in await self._list_runtime():
            by_pod.setdefault(instance.pod_uid, {})[instance.id] = instance
        for uid, worker in list(self._workers.items()):
            worker.relisted(by_pod.get(uid, {}), asked_at=asked_at)
        self._unclaimed = {uid: found for uid, found in by_pod.items() if uid not in self._workers}
        if self._unclaimed and self._synced.is_set():
            self._spawn_cleaning()

    # ---- clean-up

    def _spawn_cleaning(self) -> None:
        if not self._cleaning:
            task = asyncio.create_task(self._clean_up(), name="clean up orphans")
            self._cleaning.add(task)
            task.add_done_callback(self._cleaned)

    def _cleaned(self, task: asyncio.Task[None]) -> None:
        self._cleaning.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("clean-up of pods that are gone", exc_info=error)

    async def _clean_up(self) -> None:
        """Stop and remove what belongs to no pod of the API server: containers, volumes, logs."""
        limit = asyncio.Semaphore(_ORPHANS_AT_ONCE)
        containers = [i for i in await self._list_runtime() if i.pod_uid not in self._workers]
        folders = await asyncio.to_thread(_log_folders, layout.pods_root(self._dependencies.paths.logs))
        orphans = await self._dependencies.volumes.orphans()
        uids = {*orphans, *(i.pod_uid for i in containers), *folders, *self._dependencies.networks.uids()}

        async def clean(uid: str) -> None:
            async with limit:
                if uid in self._workers:
                    return
                try:
                    for instance in containers:
                        if instance.pod_uid == uid:
                            if instance.state is not ContainerState.EXITED:
                                logger.info("container %s of a pod that is gone is stopped", instance.id)
                                await termination.stop_instance(self._dependencies, instance.id)
                            await self._dependencies.runtime.remove(instance.id)
                    await self._dependencies.volumes.teardown(uid)
                    await self._dependencies.networks.detach(uid)
                except (RuntimeUnavailableError, VolumeError, NetworkError, OSError) as error:
                    logger.warning("remains of pod %s: %s", uid, error)
                    return
                if uid in folders:
                    await asyncio.to_thread(layout.remove_folder, folders[uid])
                self._unclaimed.pop(uid, None)

        await asyncio.gather(*(clean(uid) for uid in uids if uid and uid not in self._workers))

    # ---- housekeeping

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            self._report_images_in_use()
            try:
                await self._evictor.round(self._workers)
            except Exception:
                # Whatever a measurement stumbles over, the node's other work goes on.
                logger.exception("whether a pod has to be evicted could not be told")

    async def _watch_memory_volumes(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_VOLUMES_SECONDS)
            try:
                await self._evictor.memory_round(self._workers)
            except Exception:
                logger.exception("the sizes of memory volumes could not be told")

    def _report_images_in_use(self) -> None:
        in_use = frozenset(
            digest
            for worker in self._workers.values()
            for instance in worker.latest().values()
            if (digest := instance.annotations.get(ANNOTATION_MODULE))
        )
        if in_use != self._in_use:
            self._in_use = in_use
            self._dependencies.images.set_in_use(in_use)


def _has_identity(pod: KubeObject) -> bool:
    return all(isinstance(pod["metadata"].get(name), str) and pod["metadata"][name] for name in ("name", "uid"))


def _log_folders(root: Path) -> dict[str, Path]:
    """Pod uid to log folder."""
    if not root.is_dir():
        return {}
    return {layout.uid_of(entry.name): entry for entry in root.iterdir() if "_" in entry.name}
