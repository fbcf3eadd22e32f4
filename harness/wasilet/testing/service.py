"""A Service of the test's namespace: made or found, its endpoints waited for, asked over HTTP.

It is asked at its cluster IP where this machine reaches that, else through the API server's proxy of Services, which
takes one of its endpoints too.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from wasilet.errors import ApiError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.testing.http import MAX_BODY_BYTES, REQUEST_SECONDS, Answer, NoAnswerError, answer_of, ask

CONNECT_SECONDS = 0.5
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
    """The Service, and its Endpoints where they are named one by one. Raises UsageError."""
    if endpoints and selector:
        raise UsageError(f"service {name!r} has endpoints by a selector or by addresses, not by both")
    if endpoints and not isinstance(target_port or port, int):
        raise UsageError(f"service {name!r}: addresses have no named ports", hint="give target_port a number")
    ports = [{"name": "http", "port": port, "targetPort": target_port or port, "protocol": "TCP"}]
    body: KubeObject = {"ports": ports, **({"selector": dict(selector)} if selector else {}), **(spec or {})}
    made: list[KubeObject] = [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}]
    if endpoints:
        # Endpoints and not an EndpointSlice: Kubernetes mirrors the one into the other, in this direction only, and the
        # API server's proxy of Services reads Endpoints.
        subset = {
            "addresses": [{"ip": address} for address in endpoints],
            "ports": [{"name": "http", "port": target_port or port, "protocol": "TCP"}],
        }
        made.append({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name}, "subsets": [subset]})
    return made


class Service:
    """A Service that is there."""

    def __init__(self, kube: Kube, body: KubeObject, *, within_seconds: float) -> None:
        self._kube = kube
        self._within_seconds = within_seconds
        self._reached: dict[int, bool] = {}
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
        if self._is_reached(port):
            host = f"[{self.cluster_ip}]" if ":" in self.cluster_ip else self.cluster_ip
            url = f"http://{host}:{port}{path}"
            return ask(url, method=method, send_headers=headers, body=body, timeout_seconds=timeout_seconds)
        began = time.monotonic()
        proxy = api_path("services", namespace=self.namespace) + f"/{self.name}:{port}/proxy{path}"
        try:
            status, got, data = self._kube.proxied(
                method,
                proxy,
                headers=headers,
                body=body,
                timeout_seconds=timeout_seconds,
                max_bytes=MAX_BODY_BYTES + 1,
            )
        except ApiError as error:
            raise NoAnswerError(f"{method} service/{self.name}{path}: {error.message}") from error
        return answer_of(status, got, data, began=began)

    def _is_reached(self, port: int) -> bool:
        """Whether this machine has a way to the cluster IP; remembered once that is certain."""
        if self.cluster_ip in {"", "None"} or not self._reached.get(port, True):
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
    return sorted(
        {
            str(address)
            for each in slices
            for endpoint in each.get("endpoints") or []
            # Not set means ready, as the API's documentation of the field says.
            if (endpoint.get("conditions") or {}).get("ready") is not False
            for address in endpoint.get("addresses") or []
        }
    )
