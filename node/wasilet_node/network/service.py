"""The pod network as the agent sees it: asynchronous, made when the Node has its podCIDR, repaired when it broke.

Everything that touches the kernel happens in one thread, which stays in the node's network namespace; a second one
makes sockets there, for probes and port-forward, so that these never wait behind a pod's start. The agent itself stays
in the machine's namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from wasilet_node.network import host_ports, machine_changes, resolver_files
from wasilet_node.network.addresses import PodRecord, PodRecords
from wasilet_node.network.attachment import Attachment
from wasilet_node.network.channel import TIMEOUT_SECONDS, NamespaceChannel
from wasilet_node.network.errors import NetworkAbsentError, NetworkError
from wasilet_node.network.node_network import NodeNetwork
from wasilet_node.network.node_processes import Kept, Program, kube_proxy, network_policies, outward
from wasilet_node.network.pod_networks import MACHINE_KEY, NODE_KEY, POOL_LOW, PodNetworks
from wasilet_node.network.policy_gate import SOCKET_NAME, PolicyGate
from wasilet_node.runtime import linux, netns, rootless, supervisor_registry
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import NetworkSettings, NodePaths

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
RETRY_SECONDS = 2.0
SETTLE_SECONDS = 5.0
"""How long a pod, and a Node that was there before, wait for a network that is being made or found again."""

REFILL_SECONDS = 30.0
REFILL_WAITS_SECONDS = 1.0
"""How long the making of namespaces for later pods lets starts that are under way go first."""

CALM_SECONDS = 1.0
"""How long changes of the machine's network gather before they are looked at: a routing daemon makes many, and each
look reads all routes."""

_LOOK_SECONDS = 0.1
_T = TypeVar("_T")
HostsFile = Callable[[dict[str, Any], tuple[str, ...]], bytes]


async def _always(_limit_seconds: float) -> bool:
    return True


class PodNetwork:
    """One object per agent. ``run`` for ever; the rest may be called at any time."""

    def __init__(
        self,
        settings: NetworkSettings,
        paths: NodePaths,
        *,
        node_name: str,
        hosts_of: Callable[[dict[str, Any], tuple[str, ...]], bytes],
        machine: int | None = None,
        supervisor_seconds: float = TIMEOUT_SECONDS,
        calm: Callable[[float], Awaitable[bool]] = _always,
    ) -> None:
        """``hosts_of``: the contents of a pod's hosts file. ``machine``: what the node is joined to, if not to the
        namespace that this is called in (``wasilet_node.network.keeper``). ``supervisor_seconds``: how long a
        supervisor may take for an answer. ``calm``: waits until no pod is being started or ended, for so many seconds
        at most, and whether that is so; namespaces for later pods let these go first."""
        self._calm = calm
        self.settings = settings
        self._supervisor_seconds = supervisor_seconds
        self._paths = paths
        self._hosts_of = hosts_of
        self._pod_cidr: ipaddress.IPv4Network | None = None
        self._node_name = node_name
        self._host_ports = host_ports.HostPorts(self.connect, self.connect_datagrams)
        self._gate = PolicyGate(paths.network / SOCKET_NAME)
        self._wake = asyncio.Event()
        self._look_at = 0.0
        self._ready = asyncio.Event()
        self._machine = machine
        self._plug = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="pod network", initializer=_begin, initargs=(machine,)
        )
        self._dial: ThreadPoolExecutor | None = None
        self._node: NodeNetwork | None = None
        self._channel: NamespaceChannel | None = None
        self._pods: PodNetworks | None = None
        self.problem: str | None = "the Node has no podCIDR yet"
        """Why pods cannot start, None when they can."""

        self.absent: str | None = None
        """Why there is no pod network here at all, so that pods share the machine's; None: there is one."""

        self.on_change: Callable[[], None] = lambda: None
        """Called when ``problem`` or ``absent`` changed."""

    # ---- life

    def set_pod_cidr(self, text: str | None) -> None:
        """What ``Node.spec.podCIDR`` holds."""
        if not text or self._pod_cidr is not None:
            return
        try:
            self._pod_cidr = ipaddress.IPv4Network(text)
        except ValueError:
            self._set_problem(f"the Node's podCIDR {text!r} is no IPv4 network")
            return
        self._wake.set()

    async def settle(self, limit_seconds: float) -> None:
        """Wait until it is known whether there is a network, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._ready.wait()

    async def run(self) -> None:
        """For ever: make the network, keep the pool full, and its processes running. Cancel it to end; the network
        stays."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_network(), name="pod network")
                group.create_task(self._keep_processes(), name="node processes")
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._host_ports.close_all()
                    await self._in_thread(self._close)
            self._plug.shutdown(wait=False, cancel_futures=True)
            if self._dial is not None:
                self._dial.shutdown(wait=False, cancel_futures=True)

    async def _keep_network(self) -> None:
        with self._watching():
            await self._keep_on()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Look again when the machine's network changed, in which the network's own thread is so far."""
        loop, pending = asyncio.get_running_loop(), False

        def calm() -> None:
            nonlocal pending
            pending = False
            self._look_at = 0.0
            self._wake.set()

        def changed() -> None:
            nonlocal pending
            machine_changes.drain(watch)
            if not pending:
                pending = True
                loop.call_later(CALM_SECONDS, calm)

        try:
            watch = self._plug.submit(machine_changes.open_watch).result()
        except OSError as error:
            logger.warning("changes of the machine's network are seen every %g s only: %s", REFILL_SECONDS, error)
            yield
            return
        loop.add_reader(watch, changed)
        try:
            yield
        finally:
            loop.remove_reader(watch)
            watch.close()

    async def _keep_on(self) -> None:
        while True:
            self._wake.clear()
            timeout = REFILL_SECONDS
            if self._pod_cidr is not None and self.absent is None:
                timeout = await self._keep()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()

    async def _keep_processes(self) -> None:
        await self._ready.wait()
        if self.absent is not None or self._pod_cidr is None:
            return
        node = await self._in_namespace(netns.open_own)
        try:
            await self._run_processes(node, self._pod_cidr)
        finally:
            os.close(node)

    async def _run_processes(self, node: int, pod_cidr: ipaddress.IPv4Network) -> None:
        settings, programs = self.settings, list[Program]()
        if settings.kube_proxy is not None:
            programs.append(kube_proxy(settings, self._node_name))
        if settings.network_policies_kubeconfig is not None:
            programs.append(network_policies(settings, pod_cidr, self._paths.network / SOCKET_NAME))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._gate.run(), name="policy gate")
            way_out = outward(pod_cidr, node)
            for program, spawn in ((way_out, _in_own_namespace), *((each, self._in_namespace) for each in programs)):
                kept = Kept(program, folder=self._paths.network, spawn=spawn)
                group.create_task(kept.run(), name=program.name)

    async def _in_namespace(self, work: Callable[[], _T]) -> _T:
        if self._dial is None:
            raise OSError(errno.ENETDOWN, "the node's network is not there")
        return await asyncio.get_running_loop().run_in_executor(self._dial, work)

    async def _keep(self) -> float:
        """Seconds until it is to be looked at again. A pod that took a network has only the pool filled up: a look
        reads all of the machine's routes, and pods come in bursts."""
        now = asyncio.get_running_loop().time()
        try:
            if now >= self._look_at:
                await self._in_thread(self._ensure)
                await self._in_thread(self._know_machine)
                self._look_at = now + REFILL_SECONDS
                self._set_problem(None)
            while True:
                await self._let_starts_go()
                if not await self._in_thread(self._refill):
                    break
        except NetworkAbsentError as error:
            self.absent = str(error)
            logger.warning("pods share the machine's network: %s", error)
            self._set_problem(None)
        except (NetworkError, OSError) as error:
            logger.warning("the pod network: %s", error)
            if self._pods is None:
                self._set_problem(str(error))
            self._look_at = 0.0
            return RETRY_SECONDS
        return max(0.0, self._look_at - asyncio.get_running_loop().time())

    async def _let_starts_go(self) -> None:
        """While enough are left for the next ones."""
        loop = asyncio.get_running_loop()
        until = loop.time() + REFILL_WAITS_SECONDS
        while self._pods is not None and self._pods.ready > POOL_LOW and loop.time() < until:
            if await self._calm(_LOOK_SECONDS):
                break

    def _set_problem(self, problem: str | None) -> None:
        if problem is None:
            self._ready.set()
        if problem != self.problem:
            self.problem = problem
            self.on_change()

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._plug, work, *arguments)

    # ---- pods

    async def attach(self, pod: dict[str, Any], guest: GuestKind | None = GuestKind.COMPONENT) -> Attachment | None:
        """See ``Networks.attach``."""
        if pod["spec"].get("hostNetwork"):
            return None
        await self.settle(SETTLE_SECONDS)
        if self.absent is not None:
            return None
        if self.problem is not None and self._pods is None:
            raise NetworkError(self.problem)
        try:
            record = await self._in_thread(self._claim, str(pod["metadata"]["uid"]), guest)
            if guest is GuestKind.COMPONENT:
                self._wake.set()
            addresses = (record.address,)
            self._gate.claim(record.uid, record.address)
            await self._host_ports.open(record.uid, host_ports.wanted(pod), record.address)
            return Attachment(key=record.key, addresses=addresses)
        except NetworkAbsentError:
            return None
        except OSError as error:
            raise NetworkError(f"{error.strerror or error}") from error

    async def await_policies(self, pod: dict[str, Any]) -> None:
        """See ``Networks.await_policies``."""
        if not await self._gate.passed(str(pod["metadata"]["uid"])):
            logger.warning("the rules of NetworkPolicies do not know pod %s yet; it starts", pod["metadata"]["name"])

    async def etc_files(self, pod: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        """See ``Networks.etc_files``. Only for containers that read them: writing three files costs as much as a
        status."""
        try:
            return await asyncio.to_thread(self._files, pod, self.addresses(pod) or ())
        except OSError as error:
            raise NetworkError(f"{error.strerror or error}") from error

    async def detach(self, uid: str) -> None:
        """Take a pod's network down; idempotent. Raises NetworkError."""
        await self._host_ports.close(uid)
        if self._pods is not None:
            await self._in_thread(self._release, uid)
        self._gate.release(uid)
        if (folder := self._folder(uid)).exists():
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def addresses(self, pod: dict[str, Any]) -> tuple[str, ...] | None:
        """Of a pod that has a network now; None: it shares the machine's, or has none yet."""
        record = self._pods.find(str(pod["metadata"]["uid"])) if self._pods is not None else None
        return (record.address,) if record is not None else None

    def shares_machine(self, pod: dict[str, Any]) -> bool:
        """Whether the pod's address is the node's."""
        return bool(pod["spec"].get("hostNetwork")) or self.absent is not None

    def uids(self) -> list[str]:
        """Of all pods that have a network."""
        return self._pods.uids() if self._pods is not None else []

    # ---- sockets

    def make_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket in the node's namespace, from where every pod of the cluster is reached. Takes some 50 us of the
        caller's time. Raises OSError."""
        if self._dial is None:
            raise OSError(errno.ENETDOWN, self.absent or self.problem or "the node's network is not there yet")
        made = self._dial.submit(socket.socket, family, kind | socket.SOCK_NONBLOCK, protocol).result()
        made.setblocking(False)  # noqa: FBT003
        return made

    async def connect(self, address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TCP connection to a pod. Raises OSError."""
        made = self.make_socket()
        try:
            await asyncio.get_running_loop().sock_connect(made, (address, port))
            return await asyncio.open_connection(sock=made)
        except BaseException:
            made.close()
            raise

    def connect_datagrams(self, address: str, port: int) -> socket.socket:
        """A socket for datagrams to a pod, as :meth:`make_socket`. Raises OSError."""
        made = self.make_socket(kind=socket.SOCK_DGRAM)
        try:
            made.connect((address, port))
        except OSError:
            made.close()
            raise
        return made

    async def connect_inside(self, pod: dict[str, Any], port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TCP connection to a port of a pod's own loopback, where only it listens, else of its address. Raises
        OSError."""
        record = self._pods.find(str(pod["metadata"]["uid"])) if self._pods is not None else None
        if record is not None and not record.key:
            return await self.connect(record.address, port)  # which is refused
        try:
            made, address = await self._in_thread(self._socket_inside, str(pod["metadata"]["uid"]))
        except NetworkError as error:
            raise OSError(errno.ENETUNREACH, str(error)) from error
        try:
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
            return await asyncio.open_connection(sock=made)
        except ConnectionRefusedError:
            made.close()
            return await self.connect(address, port)
        except BaseException:
            made.close()
            raise

    # ---- in the thread

    def _close(self) -> None:
        """What this agent has open; the network stays."""
        if self._pods is not None:
            self._pods.close()
        if self._channel is not None:
            self._channel.close()
        if self._node is not None:
            self._node.close()

    def _socket_inside(self, uid: str, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, str]:
        pods = self._ensure()
        record = pods.find(uid)
        if record is None or not record.key:
            raise NetworkError("the pod has no network of its own")
        made = pods.inside(record, lambda: socket.socket(socket.AF_INET, kind))
        made.setblocking(False)  # noqa: FBT003
        return made, record.address

    def _ensure(self) -> PodNetworks:
        """The network, joined to the supervisor that lives now. Raises NetworkError, OSError."""
        pointer = supervisor_registry.current(self._paths.data)
        if pointer is None or self._pod_cidr is None:
            raise NetworkError("there is no supervisor that could keep the pods' networks")
        if self._pods is not None and self._channel is not None and self._channel.pointer.pid == pointer.pid:
            if self._channel.usable:
                return self._pods
            # That supervisor gave no answer once, which may be long ago. It has kept the pods' networks all the same,
            # so they stay known until they are found again over a new connection.
        elif self._channel is not None:
            self._channel.close()
            if self._pods is not None:
                # It holds a namespace that goes with its supervisor.
                self._pods.close()
            self._channel = self._pods = None
        channel = NamespaceChannel(pointer, timeout_seconds=self._supervisor_seconds)
        try:
            self._node = self._have_node(channel, self._pod_cidr)
            pods = PodNetworks(self._node, channel, PodRecords(self._paths.network / "pods"))
        except BaseException:
            channel.close()
            raise
        if self._pods is not None:
            self._pods.close()
        self._channel, self._pods = channel, pods
        return pods

    def _know_machine(self) -> None:
        if self._node is not None:
            self._node.know_machine()
            self._node.keep_machine()

    def _have_node(self, channel: NamespaceChannel, pod_cidr: ipaddress.IPv4Network) -> NodeNetwork:
        """This thread in the node's namespace, and the supervisor holding it."""
        node = self._node
        if node is not None:
            # The supervisor was replaced; the namespace has been kept by this thread.
            descriptor = netns.open_own()
        else:
            node = NodeNetwork(self.settings, pod_cidr, data=self._paths.data)
            descriptor = self._enter_or_make(node, channel)
            # At once: this thread is in the namespace from here on, also when the supervisor is lost the next moment.
            # A forgotten one would be made again from inside itself.
            self._node = node
            self._dial = ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="pod sockets", initializer=_move_to, initargs=(os.dup(descriptor),)
            )
            # At once, too: until there is a thread, no one closes that descriptor.
            self._dial.submit(int)
        try:
            channel.hold(NODE_KEY, descriptor)
            if self._machine is not None:
                channel.hold(MACHINE_KEY, self._machine)
        finally:
            os.close(descriptor)
        return node

    def _enter_or_make(self, node: NodeNetwork, channel: NamespaceChannel) -> int:
        if NODE_KEY in channel.kept():
            descriptor = channel.get(NODE_KEY)
            try:
                node.enter(descriptor)
            except NetworkError as error:
                os.close(descriptor)
                logger.warning("%s; it is made again", error)
            else:
                logger.info("found the node's network again")
                return descriptor
        descriptor = node.make()
        logger.info("made the node's network: pods %s, uplink %s", node.pod_cidr, self.settings.uplink)
        return descriptor

    def _claim(self, uid: str, guest: GuestKind | None) -> PodRecord:
        pods = self._ensure()
        if guest is GuestKind.COMPONENT:
            return pods.plug(uid)
        return pods.answer(uid) if guest is GuestKind.MODULE else pods.claim(uid)

    def _release(self, uid: str) -> None:
        if self._pods is not None:
            self._ensure().release(uid)

    def _refill(self) -> bool:
        return self._ensure().refill()

    def _files(self, pod: dict[str, Any], addresses: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        conf, _problem = resolver_files.for_pod(
            pod,
            cluster_dns=self.settings.cluster_dns,
            cluster_domain=self.settings.cluster_domain,
            machine=resolver_files.read_machine(),
        )
        folder = self._folder(str(pod["metadata"]["uid"]))
        resolver_files.write(folder, conf.text(), self._hosts_of(pod, addresses))
        return resolver_files.bindings(folder)

    def _folder(self, uid: str) -> Path:
        return self._paths.network / "etc" / uid


async def _in_own_namespace(work: Callable[[], _T]) -> _T:
    """In this thread: the kernel ends a child with the thread that started it."""
    if not rootless.is_inside():
        return work()
    with rootless.passing_on():
        return work()


def _begin(machine: int | None) -> None:
    """The calling thread, which is to make the node's network."""
    if machine is not None:
        netns.setns(machine)
        linux.pass_on_capabilities()


def _move_to(descriptor: int) -> None:
    """The calling thread, for good, into the namespace of a descriptor that is this function's to close."""
    try:
        netns.setns(descriptor)
        if rootless.is_inside():
            linux.pass_on_capabilities()
    finally:
        os.close(descriptor)
