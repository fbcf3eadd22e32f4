"""Services at the machine's own addresses: NodePorts on loopback and the node's address, and load balancers.

A node's kube-proxy works in a network namespace of its own, so a NodePort is open at the address of the node's link
alone, and a LoadBalancer Service gets no address. This process listens for both on the machine and passes bytes
on to the Service's cluster address, to which the machine has a route. So kube-proxy still chooses the endpoint; the
client's address ends here, and ``externalTrafficPolicy: Local`` is no different from ``Cluster``. TCP and UDP: what is
asked for by SCTP is reported in an event.

A load balancer gets the Service's own port at the node's address where that is free, else any free one, which an event
and the annotation ``wasilet.dev/load-balancer-ports`` name. ``python -P -m wasilet.cluster.service_ports --kubeconfig
FILE --address ADDRESS --status-file FILE``; every listener goes with the process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wasilet_common.forwarding import Connections, Datagrams, Forwarding, connected_datagrams, listener
from wasilet_common.relay import Connection
from wasilet_common.time_format import rfc3339_of
from wasilet_node.runtime import rootless

from wasilet.controlplane.components import Component
from wasilet.errors import ApiError, HarnessError
from wasilet.kube.client import Hangup, Kube, KubeObject, api_path
from wasilet.kube.reflector import Reflector
from wasilet.state import State
from wasilet.storage import read_json, write_json

logger = logging.getLogger("wasilet.service-ports")

COMPONENT = "service-ports"
LOOPBACK = "127.0.0.1"
PORTS_ANNOTATION = "wasilet.dev/load-balancer-ports"
"""``80:41234`` or ``53/UDP:41235``, comma separated: the Service's port and the machine's, where they differ."""

PortKey = tuple[int, str]
"""A number and its protocol: a Service may have one number by both."""

_KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}

LOAD_BALANCER_CLASS = "wasilet.dev/host"
"""``spec.loadBalancerClass`` of Services that ask for this by name; one without a class is taken as well."""

_SERVICES = "/api/v1/services"
_REPORTER = "wasilet-service-ports"


def component(state: State, address: str, through: Path | None = None) -> Component:
    """The process; ``address``: the nodes'. ``through``: the socket of a keeper in whose network Services are reached;
    None: the machine itself reaches them. It is ready once it has served the Services that there were."""
    kubeconfig, status_file = state.etc / f"{COMPONENT}.conf", state.run / f"{COMPONENT}.status"

    def ready() -> bool:
        record = state.record(COMPONENT)
        return record is not None and read_json(status_file).get("pid") == record.process.pid

    return Component(
        name=COMPONENT,
        argv=(
            *(sys.executable, "-P", "-m", "wasilet.cluster.service_ports", "--kubeconfig", str(kubeconfig)),
            *("--address", address, "--status-file", str(status_file)),
            *(("--through", str(through)) if through is not None else ()),
        ),
        inputs=(kubeconfig,),
        addresses=(),
        ready=ready,
    )


@dataclass(frozen=True, kw_only=True, order=True)
class MachinePort:
    """One port that a Service asks the machine for."""

    service: tuple[str, str]
    """Namespace and name."""

    address: str
    port: int
    target: tuple[str, int]
    """The Service's cluster address and port."""

    protocol: str = "TCP"
    balanced: bool = False
    """Of a load balancer: another port will do where this one is taken."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one Service asks for."""

    ports: tuple[MachinePort, ...] = ()
    left_out: tuple[str, ...] = ()
    """Ports that are not served, as ``53/SCTP``."""


def is_balanced(service: KubeObject) -> bool:
    """Whether this process is the load balancer of a Service, by the rule of KEP-1959: no class, or its own."""
    spec = service.get("spec") or {}
    return spec.get("type") == "LoadBalancer" and spec.get("loadBalancerClass") in {None, LOAD_BALANCER_CLASS}


def asked(service: KubeObject, address: str) -> Request:
    """The ports of a Service on a machine whose nodes have ``address``."""
    metadata, spec = service["metadata"], service.get("spec") or {}
    cluster_ip = str(spec.get("clusterIP") or "None")
    if spec.get("type") not in {"NodePort", "LoadBalancer"} or cluster_ip == "None" or ":" in cluster_ip:
        return Request()
    key = (str(metadata["namespace"]), str(metadata["name"]))
    ports, left_out = [], []
    for port in spec.get("ports") or ():
        number, protocol = int(port["port"]), str(port.get("protocol") or "TCP")
        if protocol not in _KINDS:
            left_out.append(f"{number}/{protocol}")
            continue
        wanted = MachinePort(
            service=key, address=address, port=number, target=(cluster_ip, number), protocol=protocol, balanced=True
        )
        if node_port := port.get("nodePort"):
            places = dict.fromkeys((LOOPBACK, address))
            ports += [replace(wanted, address=place, port=int(node_port), balanced=False) for place in places]
        if is_balanced(service):
            ports.append(wanted)
    return Request(ports=tuple(ports), left_out=tuple(left_out))


@dataclass(frozen=True)
class _Open:
    forwarding: Forwarding
    port: int


class MachinePorts:
    """What is open now. Of one event loop."""

    def __init__(self, through: Path | None = None) -> None:
        """``through``: see :func:`component`."""
        self._through = through
        self._open: dict[MachinePort, _Open] = {}
        self._problems: dict[MachinePort, str] = {}

    async def update(self, service: tuple[str, str], ports: Sequence[MachinePort]) -> None:
        """Open and close until those of ``service`` are ``ports``; what fails is in :meth:`problems`."""
        for wanted in [known for known in (*self._open, *self._problems) if known.service == service]:
            if wanted not in ports:
                await self._close(wanted)
        for wanted in ports:
            if wanted not in self._open:
                await self._try(wanted)

    def balanced(self, service: tuple[str, str]) -> dict[PortKey, int]:
        """Of a load balancer: the machine's port for each of the Service's that is open."""
        return {
            (wanted.target[1], wanted.protocol): it.port
            for wanted, it in self._open.items()
            if wanted.service == service and wanted.balanced
        }

    def problems(self, service: tuple[str, str]) -> list[str]:
        """What could not be opened, and why."""
        return [words for wanted, words in self._problems.items() if wanted.service == service]

    def services(self) -> set[tuple[str, str]]:
        """All that have a port, or want one."""
        return {wanted.service for wanted in (*self._open, *self._problems)}

    async def _try(self, wanted: MachinePort) -> None:
        try:
            sock = listener((wanted.address, wanted.port), kind=_KINDS[wanted.protocol])
        except OSError as error:
            if not (wanted.balanced and error.errno in {errno.EADDRINUSE, errno.EACCES}):
                self._fail(wanted, error)
                return
            try:
                sock = listener((wanted.address, 0), kind=_KINDS[wanted.protocol])
            except OSError as again:
                self._fail(wanted, again)
                return
        self._problems.pop(wanted, None)
        await self._serve(wanted, sock)

    def _fail(self, wanted: MachinePort, error: OSError) -> None:
        words = f"{wanted.address}:{_port_text((wanted.port, wanted.protocol))}: {error.strerror or error}"
        if self._problems.get(wanted) != words:
            logger.warning("%s/%s cannot have %s", *wanted.service, words)
        self._problems[wanted] = words

    async def _serve(self, wanted: MachinePort, sock: socket.socket) -> None:
        forwarding = _forwarding(wanted, self._through)
        await forwarding.begin(sock)
        port = int(sock.getsockname()[1])
        self._open[wanted] = _Open(forwarding, port)
        logger.info("%s:%d leads to %s/%s (%s:%d)", wanted.address, port, *wanted.service, *wanted.target)

    async def _close(self, wanted: MachinePort) -> None:
        self._problems.pop(wanted, None)
        found = self._open.pop(wanted, None)
        if found is None:
            return
        await found.forwarding.close()
        logger.info("%s:%d is closed", wanted.address, found.port)


def _forwarding(wanted: MachinePort, through: Path | None) -> Forwarding:
    target = wanted.target

    async def connect() -> Connection:
        if through is None:
            return await asyncio.open_connection(*target)
        return await _connect_inside(through, target)

    def open_flow() -> socket.socket:
        return connected_datagrams(target) if through is None else _flow_inside(through, target)

    if wanted.protocol == "UDP":
        return Datagrams(open_flow, to_port=target[1])
    return Connections(connect, name=f"{target[0]}:{target[1]}")


async def _connect_inside(keeper: Path, target: tuple[str, int]) -> Connection:
    """Without root: by a socket of the network that the keeper holds. Raises OSError."""
    made = await asyncio.to_thread(rootless.socket_inside, keeper, socket.SOCK_STREAM)
    try:
        await asyncio.get_running_loop().sock_connect(made, target)
        return await asyncio.open_connection(sock=made)
    except BaseException:
        made.close()
        raise


def _flow_inside(keeper: Path, target: tuple[str, int]) -> socket.socket:
    """The same for datagrams. Raises OSError."""
    made = rootless.socket_inside(keeper, socket.SOCK_DGRAM)
    try:
        made.connect(target)
    except OSError:
        made.close()
        raise
    return made


def _port_text(port: PortKey) -> str:
    number, protocol = port
    return str(number) if protocol == "TCP" else f"{number}/{protocol}"


def load_balancer_status(address: str, ports: Mapping[PortKey, int]) -> KubeObject:
    """``status.loadBalancer``: the node's address, by a proxy (KEP-1860), so that kube-proxy does not take what pods
    send there for its own; nothing while nothing is open."""
    if not ports:
        return {}
    listed = [
        {"port": own, "protocol": protocol} for own, protocol in sorted((own, key[1]) for key, own in ports.items())
    ]
    return {"ingress": [{"ip": address, "ipMode": "Proxy", "ports": listed}]}


class ServicePorts:
    """The loop: a thread lists and watches, the event loop opens, closes and reports."""

    def __init__(self, kube: Kube, address: str, status_file: Path | None = None, through: Path | None = None) -> None:
        self._kube = kube
        self._status_file = status_file
        self._address = address
        self._ports = MachinePorts(through)
        self._services: dict[tuple[str, str], KubeObject] = {}
        self._recorded: dict[tuple[str, str], str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        changes: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        hangup = Hangup()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changes.put_nowait, item)

        services = Reflector(
            kube=self._kube,
            path=_SERVICES,
            hangup=hangup,
            listed=put,
            changed=lambda kind, service: put((kind, service)),
            failed=lambda error: logger.warning("%s; trying again", error),
        )
        threading.Thread(target=services.run, name="watch", daemon=True).start()
        retry = asyncio.create_task(self._retry(changes))
        ended = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                change = asyncio.create_task(changes.get())
                await asyncio.wait((change, ended), return_when=asyncio.FIRST_COMPLETED)
                if change.done():
                    await self._take(change.result())
                else:
                    change.cancel()
        finally:
            hangup.end()
            retry.cancel()
            for service in self._ports.services():
                await self._ports.update(service, ())

    async def _retry(self, changes: asyncio.Queue[Any]) -> None:
        """A port that a foreign process had may be free again."""
        while True:
            await asyncio.sleep(10.0)
            for service in self._ports.services():
                if self._ports.problems(service) and service in self._services:
                    changes.put_nowait(("MODIFIED", self._services[service]))

    async def _take(self, change: Any) -> None:
        if isinstance(change, list):  # all there are: what is not among them has gone
            found = {_key(service): service for service in change}
            for service in set(self._services) - set(found):
                await self._forget(service)
            for service_object in found.values():
                await self._examine(service_object)
            if self._status_file is not None:
                write_json(self._status_file, {"pid": os.getpid()})
            return
        kind, changed = change
        if kind == "DELETED":
            await self._forget(_key(changed))
        else:
            await self._examine(changed)

    async def _forget(self, service: tuple[str, str]) -> None:
        self._services.pop(service, None)
        self._recorded.pop(service, None)
        await self._ports.update(service, ())

    async def _examine(self, service: KubeObject) -> None:
        key = _key(service)
        if service["metadata"].get("deletionTimestamp"):
            await self._forget(key)
            return
        self._services[key] = service
        request = asked(service, self._address)
        await self._ports.update(key, request.ports)
        try:
            await self._report(service, request)
        except ApiError as error:
            if error.code not in {404, 409}:  # gone, or changed meanwhile: the watch delivers what it is now
                logger.warning("%s/%s: %s", *key, error)

    async def _report(self, service: KubeObject, request: Request) -> None:
        key = _key(service)
        path = api_path("services", key[1], namespace=key[0])
        if is_balanced(service):
            ports = self._ports.balanced(key)
            status = load_balancer_status(self._address, ports)
            body: KubeObject = {}
            if ((service.get("status") or {}).get("loadBalancer") or {}) != status:
                body["status"] = {"loadBalancer": status or {"ingress": None}}
            moved = ",".join(f"{_port_text(port)}:{own}" for port, own in sorted(ports.items()) if port[0] != own)
            if (service["metadata"].get("annotations") or {}).get(PORTS_ANNOTATION, "") != moved:
                body["metadata"] = {"annotations": {PORTS_ANNOTATION: moved or None}}
            if body:
                await asyncio.to_thread(self._kube.patch, f"{path}/status", body)
            if moved:
                where = ", ".join(
                    f"{_port_text(port)} is at {self._address}:{own}" for port, own in sorted(ports.items())
                )
                await self._record_event(service, "Normal", "PortMoved", f"taken on this machine already: {where}")
        if problems := self._ports.problems(key):
            await self._record_event(service, "Warning", "PortUnavailable", "; ".join(problems))
        elif request.left_out:
            words = f"{', '.join(request.left_out)}: only TCP and UDP are passed on from the machine's own addresses"
            await self._record_event(service, "Warning", "ProtocolNotForwarded", words)

    async def _record_event(self, service: KubeObject, kind: str, reason: str, message: str) -> None:
        """An event, once per message."""
        key = _key(service)
        if self._recorded.get(key) == message:
            return
        self._recorded[key] = message
        now = rfc3339_of(datetime.now(UTC))
        metadata = service["metadata"]
        event = {
            "metadata": {"generateName": f"{key[1]}.", "namespace": key[0]},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Service",
                "namespace": key[0],
                "name": key[1],
                "uid": metadata.get("uid"),
                "resourceVersion": metadata.get("resourceVersion"),
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": _REPORTER},
            "reportingComponent": _REPORTER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await asyncio.to_thread(self._kube.create, api_path("events", namespace=key[0]), event)


def _key(service: KubeObject) -> tuple[str, str]:
    return str(service["metadata"]["namespace"]), str(service["metadata"]["name"])


async def _run(kube: Kube, address: str, status_file: Path, through: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await ServicePorts(kube, address, status_file, through).run(stop)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="wasilet.cluster.service_ports", description=summary)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--address", required=True, help="the nodes' address, where load balancers listen")
    parser.add_argument("--status-file", type=Path, required=True, help="written once all Services are served")
    parser.add_argument("--through", type=Path, help="the socket of the network keeper that reaches Services")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        kube = Kube.from_kubeconfig(options.kubeconfig)
        asyncio.run(_run(kube, options.address, options.status_file, options.through))
    except HarnessError as error:
        logger.error("%s", error)  # noqa: TRY400  (one clear line; the trace adds nothing)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
