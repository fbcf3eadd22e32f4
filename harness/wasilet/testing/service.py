"""A Service of the test's namespace: made or found, its endpoints waited for, asked over HTTP.

It is asked at its cluster IP where this machine reaches that, else at its ready endpoints in turn, and those that are
pods by a forward where this machine has no way to them. (The API server's proxy of Services would do only where all
endpoints are pods.)
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet_node.runtime import rootless

from wasilet.errors import ApiError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.testing.http import REQUEST_SECONDS, Answer, NoAnswerError, ask
from wasilet.testing.reach import CONNECT_SECONDS, PodId, Reach, is_routed

SERVICE_LABEL = "kubernetes.io/service-name"


def service_objects(
    name: str,
    *,
    port: int,
    target_port: int | str | None,
    selector: Mapping[str, str] | None,
    endpoints: Sequence[str],
    spec: Mapping[str, Any] | None,
) -> list[KubeObject]:
    """The Service, and an EndpointSlice where its endpoints are named one by one. Raises UsageError."""
    if endpoints and selector:
        raise UsageError(f"service {name!r} has endpoints by a selector or by addresses, not by both")
    if endpoints and not isinstance(target_port or port, int):
        raise UsageError(f"service {name!r}: addresses have no named ports", hint="give target_port a number")
    ports = [{"name": "http", "port": port, "targetPort": target_port or port, "protocol": "TCP"}]
    body: KubeObject = {"ports": ports, **({"selector": dict(selector)} if selector else {}), **(spec or {})}
    made: list[KubeObject] = [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}]
    if endpoints:
        made.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": f"{name}-test", "labels": {SERVICE_LABEL: name}},
                "addressType": "IPv6" if ":" in endpoints[0] else "IPv4",
                "ports": [{"name": "http", "port": target_port or port, "protocol": "TCP"}],
                "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in endpoints],
            }
        )
    return made


class Service:
    """A Service that is there."""

    def __init__(
        self,
        kube: Kube,
        body: KubeObject,
        *,
        within_seconds: float,
        reach: Reach | None = None,
        keeper: Path | None = None,
    ) -> None:
        """``reach``: the ways to pods; None: all endpoints are asked at their addresses. ``keeper``: the socket of what
        keeps a network without root, in which the Service is reached; None: it is at most this machine's."""
        self._kube = kube
        self._keeper = keeper
        self._reach = reach
        self._within_seconds = within_seconds
        self._reached: dict[int, bool] = {}
        self._turn = -1
        self.raw = body
        """The object as the API server answered."""

    def __repr__(self) -> str:
        """For pytest's assertion messages."""
        return f"<service/{self.name} {self.cluster_ip}>"

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """``metadata.namespace``."""
        return str(self.raw["metadata"]["namespace"])

    @property
    def cluster_ip(self) -> str:
        """``spec.clusterIP``: an address, or ``None`` as a text for a headless Service."""
        return str(self.raw["spec"].get("clusterIP") or "")

    @property
    def port(self) -> int:
        """The first one."""
        return int(self.raw["spec"]["ports"][0]["port"])

    @property
    def selector(self) -> dict[str, str]:
        """``spec.selector``."""
        return dict(self.raw["spec"].get("selector") or {})

    def wait_endpoints(self, count: int = 1, *, within_seconds: float | None = None) -> list[str]:
        """Wait until at least so many endpoints are ready; their addresses, sorted. Raises AssertionError."""
        __tracebackhide__ = True
        limit = self._within_seconds if within_seconds is None else within_seconds
        deadline = time.monotonic() + limit
        slices: dict[str, KubeObject] = {}
        path = api_path("endpointslices", group="discovery.k8s.io", namespace=self.namespace)
        while (left := deadline - time.monotonic()) > 0:
            slices.clear()
            seconds = max(1, int(left + 1))
            with (
                contextlib.suppress(ApiError),  # the API server is away: asked again
                self._kube.watch(
                    path,
                    timeout_seconds=seconds,
                    idle_seconds=min(left, seconds + 5.0),
                    labelSelector=f"{SERVICE_LABEL}={self.name}",
                ) as events,
            ):
                for event in events:
                    _learn(slices, event)
                    if len(found := ready_addresses(slices.values())) >= count:
                        return found
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        found = ready_addresses(slices.values())
        there = ", ".join(found) or "none"
        raise AssertionError(
            f"service/{self.name}: {count} ready endpoints did not come within {limit:g} s; there are: {there}"
        )

    def get(self, path: str = "/", *, port: int = 0, timeout_seconds: float = REQUEST_SECONDS) -> Answer:
        """One GET, whatever its answer. Raises NoAnswerError."""
        return self.send("GET", path, port=port, timeout_seconds=timeout_seconds)

    def send(
        self,
        method: str,
        path: str,
        *,
        port: int = 0,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_seconds: float = REQUEST_SECONDS,
    ) -> Answer:
        """One request, whatever its answer. Raises NoAnswerError."""
        port = port or self.port
        if self._keeper is not None or self._is_reached(port):
            host, to = self.cluster_ip, port
        else:
            host, to = self._endpoint(port)
        url = f"http://{f'[{host}]' if ':' in host else host}:{to}{path}"
        return ask(
            url,
            method=method,
            send_headers=headers,
            body=body,
            timeout_seconds=timeout_seconds,
            connect=functools.partial(_connect_inside, self._keeper) if self._keeper is not None else None,
        )

    def _endpoint(self, port: int) -> tuple[str, int]:
        """The way to one of the ready endpoints, each in its turn. Raises NoAnswerError while there is none."""
        path = api_path("endpointslices", group="discovery.k8s.io", namespace=self.namespace)
        try:
            slices = self._kube.get(path, labelSelector=f"{SERVICE_LABEL}={self.name}").get("items") or []
        except ApiError as error:
            raise NoAnswerError(f"the endpoints of service/{self.name} cannot be read: {error.message}") from error
        name = next((str(p.get("name") or "") for p in self.raw["spec"]["ports"] if p["port"] == port), None)
        found = sorted(
            (address, int(known["port"]), pod)
            for each in slices
            for known in each.get("ports") or []
            if str(known.get("name") or "") == name
            for address, pod in _ready(each)
        )
        if not found:
            raise NoAnswerError(f"service/{self.name} has no ready endpoint for its port {port}")
        self._turn += 1
        address, to, pod = found[self._turn % len(found)]
        return self._reach.way(pod, address, to) if self._reach is not None and pod.name else (address, to)

    def _is_reached(self, port: int) -> bool:
        """Whether this machine has a way to the cluster IP; remembered once that is certain."""
        if self.cluster_ip in {"", "None"} or not self._reached.get(port, True):
            return False
        if not is_routed(self.cluster_ip):
            return False
        if port not in self._reached:
            try:
                socket.create_connection((self.cluster_ip, port), timeout=CONNECT_SECONDS).close()
            except ConnectionRefusedError:
                return False  # by the Service's own rules as long as it has no endpoint, or by a router
            except OSError:
                self._reached[port] = False
                return False
            self._reached[port] = True
        return True


def _learn(slices: dict[str, KubeObject], event: KubeObject) -> None:
    obj = event.get("object") or {}
    name = str((obj.get("metadata") or {}).get("name"))
    if event.get("type") in {"ADDED", "MODIFIED"}:
        slices[name] = obj
    elif event.get("type") == "DELETED":
        slices.pop(name, None)


def ready_addresses(slices: Any) -> list[str]:
    """Of EndpointSlices: the addresses that take connections, sorted, each once."""
    return sorted({address for each in slices for address, _ in _ready(each)})


def _ready(endpoint_slice: KubeObject) -> Iterator[tuple[str, PodId]]:
    """Addresses, and the pods that have them; without a name: it is no pod's."""
    for endpoint in endpoint_slice.get("endpoints") or []:
        # Not set means ready, as the API's documentation of the field says.
        if (endpoint.get("conditions") or {}).get("ready") is not False:
            target = endpoint.get("targetRef") or {}
            is_pod = target.get("kind") == "Pod"
            pod = PodId(str(target.get("name") or "") if is_pod else "", str(target.get("uid") or ""))
            for address in endpoint.get("addresses") or []:
                yield str(address), pod


def _connect_inside(keeper: Path, address: tuple[str, int], timeout_seconds: float) -> socket.socket:
    """Raises OSError."""
    made = rootless.socket_inside(keeper, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_seconds)
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made
