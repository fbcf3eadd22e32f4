"""The Node object: made, brought up to date, reported, and made again when someone deleted it.

Written with the rights of a node alone: labels that NodeRestriction refuses are refused on the command line already
(``wasilet_node.__main__``), taints are given at creation only (a node may not change its own), and the object is
watched by its name, the only way a node may.

The status is computed every 10 s and sent when it differs from what was sent, when the server's copy disagrees (the
node lifecycle controller writes Unknown while the lease is late), and every five minutes in any case. Time stamps of
heartbeats alone are no difference: a quiet node costs the API server one patch in five minutes, plus the lease.

Krustlet skipped a Node that was there already, and never noticed when its own was deleted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from wasilet_common.backoff import RetryBackoff
from wasilet_common.time_format import rfc3339

from wasilet_node import identity, node_object
from wasilet_node.certificates_store import NodeNames
from wasilet_node.conditions import (
    Conditions,
    Verdict,
    network_verdict,
    pressures,
    with_times,
)
from wasilet_node.contract import Contract
from wasilet_node.kube.base import (
    ApiStatusError,
    ConflictError,
    EventRecorder,
    Kube,
    KubeError,
    KubeObject,
    NotFoundError,
)
from wasilet_node.machine import Levels, facts, find_address, levels
from wasilet_node.pods.nodeinfo import NodeInfo
from wasilet_node.settings import NodeSettings

logger = logging.getLogger(__name__)

NODES_PATH = "/api/v1/nodes"

_ATTACH_ANNOTATION = "volumes.kubernetes.io/controller-managed-attach-detach"

_NETWORK_SECONDS = 5.0
_SAY_AGAIN_SECONDS = 60.0

_EVENT_OF_STATUS = {
    ("Ready", "True"): ("Normal", "NodeReady"),
    ("Ready", "False"): ("Normal", "NodeNotReady"),
    ("MemoryPressure", "True"): ("Normal", "NodeHasInsufficientMemory"),
    ("MemoryPressure", "False"): ("Normal", "NodeHasSufficientMemory"),
    ("DiskPressure", "True"): ("Normal", "NodeHasDiskPressure"),
    ("DiskPressure", "False"): ("Normal", "NodeHasNoDiskPressure"),
    ("PIDPressure", "True"): ("Normal", "NodeHasInsufficientPID"),
    ("PIDPressure", "False"): ("Normal", "NodeHasSufficientPID"),
}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a Registration does what it repeats."""

    first_retry_seconds: float = 0.2
    longest_retry_seconds: float = 7.0
    """Between attempts to register, while the API server is away."""

    report_gap_seconds: float = 1.0
    """The least time between two reports, however much changes."""

    lease_look_seconds: float = 1.0
    """Between looks at the lease of another instance's Node."""


class NodeNetworkState(Protocol):
    """``wasilet_node.network.service.PodNetwork``, as far as the Node reports it."""

    absent: str | None
    on_change: Callable[[], None]

    def set_pod_cidr(self, text: str | None) -> None:
        """What ``Node.spec.podCIDR`` holds."""

    async def settle(self, limit_seconds: float) -> None:
        """Wait until it is known whether there is a network, or for so long."""


class NodeTakenError(Exception):
    """A Node of that name exists and is someone else's."""


class Registration:
    """The Node of this agent. ``register`` first, then ``run``; ``info`` is a snapshot for the pod workers."""

    def __init__(
        self,
        *,
        kube: Kube,
        events: EventRecorder,
        settings: NodeSettings,
        server: str,
        port: Callable[[], int],
        hostname: str,
        agent_version: str,
        instance_id: str,
        runtime_version: str,
        problem: Callable[[], str | None],
        images: Callable[[], Awaitable[Sequence[dict[str, object]]]],
        on_names: Callable[[NodeNames], None],
        on_unauthorized: Callable[[], None],
        worlds: Callable[[], Mapping[str, str]] = dict,
        network: NodeNetworkState | None = None,
        find_address: Callable[[str], str] = find_address,
        pace: Pace = Pace(),
    ) -> None:
        """``server``: the API server's URL, by which ``find_address`` finds the address where settings have none.
        ``port``: of the kubelet API.
        ``instance_id``: see ``wasilet_node.identity``.
        ``problem``: why no pod can run, None when it can. ``worlds``: labels of what runs here, asked at each report.
        ``on_names`` is called after the status holds them."""
        self._kube = kube
        self._contract = Contract(kube)
        self._events = events
        self._settings = settings
        self._server = server
        self._port = port
        self._hostname = hostname
        self._agent_version = agent_version
        self._instance_id = instance_id
        self._runtime_version = runtime_version
        self._problem = problem
        self._images = images
        self._on_names = on_names
        self._on_unauthorized = on_unauthorized
        self._worlds = worlds
        self._network = network
        self._find_address = find_address
        self._pace = pace
        if network is not None:
            network.on_change = self.wake
        self._path = f"{NODES_PATH}/{settings.node_name}"
        self._facts = facts(settings.paths.data)
        self._conditions = Conditions(time.monotonic)
        self._node: KubeObject | None = None
        self._sent: KubeObject | None = None
        self._sent_at = 0.0
        self._unschedulable = False
        self._wake = asyncio.Event()
        self._gone = asyncio.Event()
        self._address = settings.node_ip or find_address(server)
        self._info = NodeInfo(
            name=settings.node_name,
            addresses=(self._address,),
            labels=self._labels(),
            allocatable=node_object.allocatable(self._facts, settings.max_pods),
        )

    @property
    def address(self) -> str:
        """The address that is advertised."""
        return self._address

    @property
    def names(self) -> NodeNames:
        """What the serving certificate must be valid for."""
        return node_object.names(self._address, self._settings.node_name)

    def uid(self) -> str | None:
        """The Node's uid, None while there is none."""
        uid = (self._node or {}).get("metadata", {}).get("uid")
        return None if uid is None else str(uid)

    def info(self) -> NodeInfo:
        """The Node as of now."""
        return self._info

    def wake(self) -> None:
        """Something that the status reports has changed (the runtime went or came): report now, not in 10 s."""
        self._wake.set()

    async def register(self) -> None:
        """Make the Node, or bring the existing one up to date. An API server that is away is waited for.

        Raises NodeTakenError.
        """
        retry = RetryBackoff(self._pace.first_retry_seconds, self._pace.longest_retry_seconds)
        said_at = 0.0
        while True:
            try:
                await self._register_once()
                return
            except KubeError as error:
                self._note(error)
                if time.monotonic() - said_at >= _SAY_AGAIN_SECONDS:
                    said_at = time.monotonic()
                    logger.warning("the node is not registered yet: %s", error)
            await asyncio.sleep(retry.next())

    async def run(self) -> None:
        """Keep the Node there and true, until cancelled. Raises NodeTakenError."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="node-watch")
            group.create_task(self._report_for_ever(), name="node-status")

    async def report(self, *, force: bool = False) -> None:
        """Compute the status, and send it when it is news. Raises KubeError."""
        node = self._node
        if node is None:
            return
        await self._look_up_address()
        await self._keep_world_labels(node)
        now_levels = levels(self._settings.paths.data)
        status = await self._status(now_levels)
        verdicts = self._verdicts(now_levels)
        due = time.monotonic() - self._sent_at >= self._settings.status_report_interval_seconds
        if not (force or due or self._is_news(status, verdicts)):
            self._refresh_info(now_levels)
            return
        current = (node.get("status") or {}).get("conditions") or []
        patch = {"status": {**status, "conditions": with_times(verdicts, current, _now())}}
        # Addresses merge by type in a strategic merge patch; a changed one would be kept beside the new one.
        patch["status"]["addresses"] = [*status["addresses"], {"$patch": "replace"}]
        try:
            self._node = await self._kube.patch(f"{self._path}/status", patch)
        except NotFoundError:
            self._gone.set()
            raise
        self._sent = {**status, "verdicts": verdicts}
        self._sent_at = time.monotonic()
        self._report_changes(current, verdicts)
        self._refresh_info(now_levels)
        self._on_names(self.names)

    async def _register_once(self) -> None:
        now_levels = levels(self._settings.paths.data)
        status = await self._status(now_levels)
        verdicts = self._verdicts(now_levels)
        node: KubeObject = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self._settings.node_name,
                "labels": self._labels(),
                "annotations": {_ATTACH_ANNOTATION: "true", identity.ANNOTATION: self._instance_id},
            },
            "spec": {"taints": [node_object.taint(text) for text in self._settings.taints]},
            "status": {**status, "conditions": with_times(verdicts, [], _now())},
        }
        if self._settings.provider_id is not None:
            node["spec"]["providerID"] = self._settings.provider_id
        try:
            self._node = await self._kube.create(NODES_PATH, node)
        except ConflictError:
            await self._adopt(await self._kube.get(self._path))
            return
        self._sent = {**status, "verdicts": verdicts}
        self._sent_at = time.monotonic()
        self._gone.clear()
        logger.info("registered node %s at %s", self._settings.node_name, self._address)
        self._event("Normal", "Starting", "Starting kubelet.")
        self._report_changes([], verdicts)
        self._refresh_info(now_levels)
        self._on_names(self.names)

    async def _adopt(self, node: KubeObject) -> None:
        """Bring a Node that is there up to date: labels, provider id, then the whole status."""
        info = (node.get("status") or {}).get("nodeInfo") or {}
        runtime = str(info.get("containerRuntimeVersion") or "")
        architecture = str(info.get("architecture") or "")
        if runtime and architecture != node_object.ARCHITECTURE and not runtime.startswith("wasmtime://"):
            raise NodeTakenError(
                f"the node {self._settings.node_name} exists and runs {runtime}; choose another name with --node-name"
            )
        name = self._settings.node_name
        if identity.is_foreign(node, self._instance_id):
            logger.warning("the node %s is another instance's; looking whether that one is alive", name)
            if await identity.is_alive(self._kube, name, look_seconds=self._pace.lease_look_seconds):
                raise NodeTakenError(
                    f"the node {name} is alive: another agent, with another data folder, renews its lease; stop that "
                    "one, or choose another name with --node-name"
                )
        metadata = node.get("metadata") or {}
        labels = metadata.get("labels") or {}
        patch: KubeObject = {}
        missing = {name: value for name, value in self._labels().items() if labels.get(name) != value}
        if missing:
            patch["metadata"] = {"labels": missing}
        if (metadata.get("annotations") or {}).get(identity.ANNOTATION) != self._instance_id:
            patch.setdefault("metadata", {})["annotations"] = {identity.ANNOTATION: self._instance_id}
        if self._settings.provider_id is not None and not (node.get("spec") or {}).get("providerID"):
            patch["spec"] = {"providerID": self._settings.provider_id}
        if patch:
            node = await self._kube.patch(self._path, patch)
        self._pass_on_pod_cidr(node)
        if self._network is not None:
            # A moment of NotReady would take the pods of this node, which run on, out of their Services.
            await self._network.settle(_NETWORK_SECONDS)
        rebooted = info.get("bootID") not in (None, "", self._facts.boot_id)
        self._node = node
        self._gone.clear()
        logger.info("found node %s and brought it up to date", self._settings.node_name)
        self._event("Normal", "Starting", "Starting kubelet.")
        if rebooted:
            self._event("Warning", "Rebooted", f"Node {name} has been rebooted, boot id: {self._facts.boot_id}")
        await self.report(force=True)

    async def _follow(self) -> None:
        events = cast("Any", self._kube.watch(NODES_PATH, field_selector=f"metadata.name={self._settings.node_name}"))
        seen = False
        async with aclosing(events):
            async for event in events:
                if event.type == "SYNCED":
                    if not seen:
                        self._lost(None)
                    seen = False
                elif event.type == "DELETED":
                    self._lost(event.object)
                else:
                    seen = seen or event.type == "SYNC"
                    self._node = event.object
                    self._pass_on_pod_cidr(event.object)
                    self._info = replace(
                        self._info,
                        labels=event.object.get("metadata", {}).get("labels") or {},
                        taints=node_object.taints_of(event.object),
                    )
                    self._report_schedulable(event.object)
                    if self._disagrees(event.object):
                        self._wake.set()

    def _lost(self, node: KubeObject | None) -> None:
        known = self.uid()
        if node is not None and known is not None and node.get("metadata", {}).get("uid") != known:
            # The old one's end, reported after this one's was made.
            return
        self._node = None
        self._gone.set()
        self._wake.set()

    async def _report_for_ever(self) -> None:
        said_at = 0.0
        while True:
            try:
                async with asyncio.timeout(self._settings.status_interval_seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(max(0.0, self._sent_at + self._pace.report_gap_seconds - time.monotonic()))
            self._wake.clear()
            try:
                if self._gone.is_set():
                    logger.warning("the node %s was deleted; making it again", self._settings.node_name)
                    await self.register()
                else:
                    await self.report()
            except KubeError as error:
                self._note(error)
                if time.monotonic() - said_at >= _SAY_AGAIN_SECONDS:
                    said_at = time.monotonic()
                    logger.warning("the node's status was not reported: %s", error)

    def _verdicts(self, now_levels: Levels) -> list[Verdict]:
        found = self._conditions.judge(now_levels, self._problem())
        if self._network is not None:
            found.append(network_verdict(self._network.absent))
        elif self._settings.network_absent:
            found.append(network_verdict(self._settings.network_absent))
        return found

    def _pass_on_pod_cidr(self, node: KubeObject) -> None:
        if self._network is not None:
            self._network.set_pod_cidr((node.get("spec") or {}).get("podCIDR"))

    def _note(self, error: KubeError) -> None:
        if isinstance(error, ApiStatusError) and error.code == 401:
            self._on_unauthorized()

    async def _look_up_address(self) -> None:
        # In a thread: the API server may have a name, and its name server may be away.
        address = self._settings.node_ip
        if address is None:
            address = await asyncio.to_thread(self._find_address, self._server)
        if address != self._address:
            logger.info("the node's address changed from %s to %s", self._address, address)
            self._address = address

    async def _status(self, now_levels: Levels) -> KubeObject:
        """Node.status without conditions."""
        return node_object.status(
            replace(self._facts, disk_bytes=now_levels.disk_bytes),
            max_pods=self._settings.max_pods,
            address=self._address,
            hostname=self._hostname,
            port=self._port(),
            runtime_version=self._runtime_version,
            kubelet_version=f"{await self._contract.version()}+wasilet-{self._agent_version}",
            images=await self._images(),
        )

    def _is_news(self, status: KubeObject, verdicts: list[Verdict]) -> bool:
        if self._sent != {**status, "verdicts": verdicts}:
            return True
        return self._node is not None and self._disagrees(self._node)

    def _disagrees(self, node: KubeObject) -> bool:
        """Whether someone else wrote into what is the node's to report."""
        if self._sent is None:
            return False
        status = node.get("status") or {}
        theirs = {condition.get("type"): condition.get("status") for condition in status.get("conditions") or []}
        ours: list[Verdict] = self._sent["verdicts"]
        if any(theirs.get(verdict.type) != verdict.status for verdict in ours):
            return True
        return bool((status.get("addresses") or []) != self._sent["addresses"])

    def _refresh_info(self, now_levels: Levels) -> None:
        node = self._node or {}
        machine = replace(self._facts, disk_bytes=now_levels.disk_bytes)
        self._info = NodeInfo(
            name=self._settings.node_name,
            addresses=(self._address,),
            labels=(node.get("metadata") or {}).get("labels") or self._labels(),
            allocatable=node_object.allocatable(machine, self._settings.max_pods),
            pressures=pressures(now_levels),
            taints=node_object.taints_of(node),
        )

    def _labels(self) -> dict[str, str]:
        return node_object.labels(self._hostname, {**self._worlds(), **self._settings.labels})

    async def _keep_world_labels(self, node: KubeObject) -> None:
        """What runs here may have come or gone while the agent runs. Raises KubeError."""
        labels = (node.get("metadata") or {}).get("labels") or {}
        wanted = {name: self._settings.labels.get(name, value) for name, value in self._worlds().items()}
        changed = {name: value for name, value in wanted.items() if labels.get(name) != value}
        if changed:
            self._node = await self._kube.patch(self._path, {"metadata": {"labels": changed}})

    def _report_changes(self, before: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> None:
        known = {condition.get("type"): condition.get("status") for condition in before}
        for verdict in verdicts:
            if known.get(verdict.type) != verdict.status:
                if (verdict.type, verdict.status) not in _EVENT_OF_STATUS:
                    continue
                type_, reason = _EVENT_OF_STATUS[(verdict.type, verdict.status)]
                self._event(type_, reason, f"Node {self._settings.node_name} status is now: {reason}")

    def _report_schedulable(self, node: KubeObject) -> None:
        """Someone has cordoned the node, or uncordoned it."""
        unschedulable = bool((node.get("spec") or {}).get("unschedulable"))
        if unschedulable != self._unschedulable:
            self._unschedulable = unschedulable
            reason = "NodeNotSchedulable" if unschedulable else "NodeSchedulable"
            self._event("Normal", reason, f"Node {self._settings.node_name} status is now: {reason}")

    def _event(self, type_: str, reason: str, message: str) -> None:
        # While there is no Node its name stands for the uid, as kubelet's; kubectl describe looks for both.
        name = self._settings.node_name
        metadata = {"name": name, "uid": self.uid() or name}
        self._events.event({"apiVersion": "v1", "kind": "Node", "metadata": metadata}, type_, reason, message)


def _now() -> str:
    return rfc3339(time.time_ns())
