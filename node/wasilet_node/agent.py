"""The composition root: makes every part, wires them, and keeps them all running or none.

Order of the start: the supervisor is spawned first, since it loads wasmtime while this process loads the API client;
then the node joins (or finds its certificate), and from there everything runs at once. Nothing waits for the API server
that does not need it: with a certificate in hand and the API server away, pods are found and kept all the same.

No part is restarted on its own. A task that ends or fails takes the whole agent down, in good order and within seconds,
with a non-zero exit code: a service manager starts it again, and containers do not notice, as the supervisor keeps
them. Half an agent, one that renews its lease while nothing watches pods, would be worse than none.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasilet_node import instance
from wasilet_node.pods.under_way import UnderWay
from wasilet_node.runtime.linux import start_time
from wasilet_node.settings import NodeSettings

if TYPE_CHECKING:
    from wasilet_node.certificates import Certificates
    from wasilet_node.certificates_store import NodeNames, Pair
    from wasilet_node.images.manager import ImageManager
    from wasilet_node.kube.client import KubeClient
    from wasilet_node.kube.events import KubeEventRecorder
    from wasilet_node.kube.references import References
    from wasilet_node.network.service import PodNetwork
    from wasilet_node.pods.manager import PodManager
    from wasilet_node.pods.probes import ProbeReport
    from wasilet_node.registration import Registration
    from wasilet_node.runtime.client import RuntimeClient
    from wasilet_node.server.app import KubeletServer

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 3.0
_COLLECT_AFTER_OBJECTS = 10_000
"""Python's own 700 is for programs that make few."""

_RECORD_CHECK_SECONDS = 5.0


def _spare_the_collector() -> None:
    """All modules are there now and stay: each full collection would look at them again, 45 ms in which nothing else
    is done."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS, 10, 10)


class Agent:
    """One run of the agent."""

    def __init__(
        self, settings: NodeSettings, kubeconfig_copy: Path | None, version: str, machine: int | None = None
    ) -> None:
        """``machine``: see ``PodNetwork``."""
        self._settings = settings
        self._kubeconfig_copy = kubeconfig_copy
        self._version = version
        self._machine = machine
        self._problem: str | None = None
        self._server_changed = asyncio.Event()
        self._server: KubeletServer
        self._registration: Registration
        self._under_way = UnderWay()

    async def run(self) -> None:
        """Until cancelled; raises what ended it otherwise."""
        async with AsyncExitStack() as stack:
            certificates, kube, runtime = await self._join_and_find_supervisor(stack)
            await self._run_parts(stack, certificates, kube, runtime)

    async def _join_and_find_supervisor(self, stack: AsyncExitStack) -> tuple[Certificates, KubeClient, RuntimeClient]:
        from wasilet_node.runtime.client import ensure_supervisor

        finding = asyncio.create_task(ensure_supervisor(self._settings.paths, self._settings.logs), name="supervisor")
        try:
            # In a thread, so that the supervisor is spawned meanwhile: loading the client takes most of the start.
            await asyncio.to_thread(_load_client)
            from wasilet_node.certificates import Certificates

            certificates = Certificates(
                node_name=self._settings.node_name,
                pki=self._settings.paths.pki,
                kubeconfig=self._settings.paths.data / "kubeconfig",
                bootstrap_file=self._settings.bootstrap_file,
                user_agent=f"wasilet/{self._version} (linux) node",
            )
            kube = await certificates.join()
            stack.push_async_callback(kube.close)
            self._copy_kubeconfig()
            runtime = await finding
        except BaseException:
            finding.cancel()
            (found,) = await asyncio.gather(finding, return_exceptions=True)
            if not isinstance(found, BaseException):
                await found.close()
            raise
        stack.push_async_callback(runtime.close)
        return certificates, kube, runtime

    async def _run_parts(
        self, stack: AsyncExitStack, certificates: Certificates, kube: KubeClient, runtime: RuntimeClient
    ) -> None:
        from wasilet_node.kube.events import KubeEventRecorder
        from wasilet_node.kube.references import References

        node_name = self._settings.node_name
        events = KubeEventRecorder(kube, host=node_name, busy=lambda: kube.writes_statuses)
        references = References(kube, node=lambda: (node_name, self._registration.uid()))
        references.start()
        stack.push_async_callback(references.close)
        images = await self._image_manager(stack)
        network = self._pod_network()
        node = self._registration = self._make_registration(kube, certificates, events, images, network)
        pods = self._pod_manager(
            stack,
            kube=kube,
            runtime=runtime,
            images=images,
            events=events,
            references=references,
            network=network,
        )
        server = self._server = self._make_server(kube, certificates, runtime, pods, network)
        self._set_serving(certificates.serving_pair(node.names))
        _spare_the_collector()
        await self._supervise(
            events,
            {
                "pods": pods.run(),
                "kubelet API": server.run(),
                "registration": self._keep_registered(kube, certificates),
                "certificates": certificates.run(on_serving=self._set_serving, on_client_ca=self._set_client_ca),
                "image collection": images.run(),
                "runtime check": self._check_runtime(runtime, node),
                "record": self._keep_record(node, server),
                **({"pod network": network.run()} if network is not None else {}),
            },
        )

    # ---- the parts

    async def _image_manager(self, stack: AsyncExitStack) -> ImageManager:
        from wasilet_node.images.compile import Compiler
        from wasilet_node.images.manager import ImageManager

        settings = self._settings
        compiler = Compiler(settings.paths.compiled, settings.images)
        stack.push_async_callback(compiler.close)
        images = ImageManager(directory=settings.paths.images, settings=settings.images, compiler=compiler)
        await images.start()
        stack.push_async_callback(images.close)
        return images

    def _make_registration(
        self,
        kube: KubeClient,
        certificates: Certificates,
        events: KubeEventRecorder,
        images: ImageManager,
        network: PodNetwork | None,
    ) -> Registration:
        from wasilet_node.identity import instance_id
        from wasilet_node.images.offer import world_labels
        from wasilet_node.machine import is_advertisable
        from wasilet_node.registration import Registration

        settings = self._settings

        def on_names(names: NodeNames) -> None:
            certificates.set_names(names)
            self._server.set_address(registration.address)
            self._server_changed.set()

        registration = Registration(
            kube=kube,
            events=events,
            settings=settings,
            server=kube.cluster.server,
            port=self._kubelet_port,
            hostname=settings.hostname or settings.node_name,
            agent_version=self._version,
            instance_id=instance_id(settings.paths.data),
            runtime_version=_wasmtime_version(),
            problem=lambda: self._problem or (network.problem if network is not None else None),
            network=network,
            images=images.list,
            worlds=world_labels,
            on_names=on_names,
            on_unauthorized=certificates.rejected,
        )
        if not is_advertisable(registration.address):
            logger.warning(
                "the node's address is %s: 'kubectl logs' and 'exec' work where the API server runs on this machine, "
                "its node proxy refuses such addresses",
                registration.address,
            )
        return registration

    def _pod_manager(
        self,
        stack: AsyncExitStack,
        *,
        kube: KubeClient,
        runtime: RuntimeClient,
        images: ImageManager,
        events: KubeEventRecorder,
        references: References,
        network: PodNetwork | None,
    ) -> PodManager:
        from wasilet_common.oci.credentials import from_secrets

        from wasilet_node.machine import interface_addresses
        from wasilet_node.network.attachment import MachineNetwork
        from wasilet_node.pods.dependencies import PodDependencies
        from wasilet_node.pods.environment import EnvironmentBuilder
        from wasilet_node.pods.http_policy import Outbound
        from wasilet_node.pods.manager import PodManager
        from wasilet_node.volumes.manager import VolumeManager

        settings, node = self._settings, self._registration
        networks = network or MachineNetwork()
        volumes = VolumeManager(
            settings.paths,
            references,
            allocatable=lambda: node.info().allocatable,
            addresses=lambda pod: networks.addresses(pod) or node.info().addresses,
        )
        stack.callback(volumes.close)
        return PodManager(
            PodDependencies(
                kube=kube,
                runtime=runtime,
                images=images,
                volumes=volumes,
                events=events,
                environments=EnvironmentBuilder(references, volumes),
                references=references,
                parse_credentials=from_secrets,
                paths=settings.paths,
                node=node.info,
                observe_probe=self._record_probe,
                networks=networks,
                under_way=self._under_way,
                outbound=Outbound(
                    local_origins=settings.local_origins,
                    own_addresses=lambda: (*node.info().addresses, *interface_addresses()),
                    api_server=kube.cluster.server,
                    kubelet_port=self._kubelet_port,
                    policy_file=settings.outbound_policy,
                ),
            ),
            node_name=settings.node_name,
        )

    def _make_server(
        self,
        kube: KubeClient,
        certificates: Certificates,
        runtime: RuntimeClient,
        pods: PodManager,
        network: PodNetwork | None,
    ) -> KubeletServer:
        from wasilet_node.network.attachment import MachineNetwork
        from wasilet_node.server.app import KubeletServer

        client_ca = certificates.client_ca()
        return KubeletServer(
            settings=self._settings,
            kube=kube,
            pods=pods,
            runtime=runtime,
            log_root=self._settings.paths.logs,
            client_ca_pem=client_ca.encode() if client_ca is not None else None,
            address=self._registration.address,
            healthy=lambda: self._problem,
            networks=network or MachineNetwork(),
        )

    async def _keep_registered(self, kube: KubeClient, certificates: Certificates) -> None:
        from wasilet_node.lease import LeaseKeeper

        settings, node = self._settings, self._registration
        lease = LeaseKeeper(
            kube=kube,
            node_name=settings.node_name,
            node_uid=node.uid,
            duration_seconds=settings.lease_duration_seconds,
            renew_interval_seconds=settings.lease_renew_interval_seconds,
            on_unauthorized=certificates.rejected,
        )
        # The Node names the port, and 'kubectl logs' may come the moment it is there.
        await self._server.wait_listening()
        await node.register()
        self._write_record(node, self._server)
        async with asyncio.TaskGroup() as group:
            group.create_task(lease.run(), name="lease")
            group.create_task(node.run(), name="node")

    # ---- what the parts report to each other

    def _kubelet_port(self) -> int:
        return self._server.port or self._settings.port

    def _set_serving(self, pair: Pair) -> None:
        self._server.set_certificate(pair.certificate.encode(), pair.key.encode())

    def _set_client_ca(self, pem: str | None) -> None:
        self._server.set_client_ca(pem.encode() if pem is not None else None)

    def _record_probe(self, report: ProbeReport) -> None:
        metadata = report.pod["metadata"]
        self._server.probes.record(
            kind=report.kind.value,
            result="successful" if report.successful else "failed",
            container=report.container,
            pod=metadata["name"],
            namespace=metadata["namespace"],
            pod_uid=metadata["uid"],
            duration_seconds=report.duration_seconds if report.successful else None,
        )

    def _pod_network(self) -> PodNetwork | None:
        from wasilet_node.network.service import PodNetwork
        from wasilet_node.volumes import hosts

        wanted = self._settings.network
        if wanted is None:
            return None
        return PodNetwork(
            wanted,
            self._settings.paths,
            node_name=self._settings.node_name,
            hosts_of=lambda pod, addresses: hosts.content(pod, addresses, wanted.cluster_domain),
            machine=self._machine,
            calm=self._under_way.calm,
        )

    async def _supervise(self, events: KubeEventRecorder, parts: dict[str, Coroutine[Any, Any, None]]) -> None:
        """All or none: the first that ends, for whatever reason, ends the rest."""
        writer = asyncio.create_task(events.run(), name="events")
        tasks = {asyncio.create_task(part, name=name) for name, part in parts.items()}
        try:
            done, _ = await asyncio.wait({*tasks, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not writer.done():
                await events.flush(timeout_seconds=_FLUSH_SECONDS)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        for task in done:
            task.result()
            raise RuntimeError(f"the part {task.get_name()!r} ended, which it never should")

    async def _check_runtime(
        self, runtime: RuntimeClient, registration: Registration, *, every_seconds: float = 5.0
    ) -> None:
        from wasilet_node.runtime.protocol import RuntimeUnavailableError

        while True:
            try:
                await runtime.ping()
                problem = None
            except RuntimeUnavailableError as error:
                problem = f"container runtime is down: {error}"
            if problem != self._problem:
                if problem is None:
                    logger.info("the container runtime is back")
                else:
                    logger.error("%s", problem)
                self._problem = problem
                registration.wake()
            await asyncio.sleep(every_seconds)

    async def _keep_record(self, registration: Registration, server: KubeletServer) -> None:
        """Another address may mean another port, and the new socket is there a moment after the change."""
        written = None
        while True:
            self._server_changed.clear()
            place = (registration.address, server.port)
            if place != written and self._write_record(registration, server):
                written = place
            try:
                async with asyncio.timeout(_RECORD_CHECK_SECONDS):
                    await self._server_changed.wait()
            except TimeoutError:
                pass

    def _write_record(self, registration: Registration, server: KubeletServer) -> bool:
        pid = os.getpid()
        record = instance.AgentRecord(
            pid=pid,
            start_time=start_time(pid) or 0,
            node_name=self._settings.node_name,
            address=self._settings.bind_address or registration.address,
            port=server.port or 0,
        )
        try:
            instance.write(self._settings.paths.data, record)
        except OSError as error:
            # Others find the agent by it; a full disk is no reason to end the one that could make room on it.
            logger.warning("agent.json cannot be written: %s", error.strerror or error)
            return False
        return True

    def _copy_kubeconfig(self) -> None:
        """Where Krustlet's users expect it; never over a file that is not a node's."""
        target = self._kubeconfig_copy
        if target is None:
            return
        from wasilet_common.files import write_private

        from wasilet_node.kube.kubeconfig import is_node_kubeconfig

        data = (self._settings.paths.data / "kubeconfig").read_bytes()
        try:
            try:
                present: bytes | None = target.read_bytes()
            except FileNotFoundError:
                present = None
            if present == data:
                return
            if present is not None and not is_node_kubeconfig(present):
                logger.info("KUBECONFIG %s is not a node's: left alone", target)
                return
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(target, data)
        except OSError as error:
            logger.warning("the node's kubeconfig was not copied to %s: %s", target, error)


def _load_client() -> None:
    import wasilet_node.certificates
    import wasilet_node.kube.transport

    wasilet_node.kube.transport.load()


def _wasmtime_version() -> str:
    try:
        return installed_version("wasmtime")
    except PackageNotFoundError:
        return "unknown"
