"""Environment variables that tell a container where services are.

``REDIS_SERVICE_HOST``, ``REDIS_SERVICE_PORT``, and the older link style (``REDIS_PORT_6379_TCP_ADDR``...), as
kubelet's ``pkg/kubelet/envvars`` makes them. Headless services have no address and so no variables.
"""

from __future__ import annotations

from collections.abc import Sequence

from wasilet_node.kube.base import KubeObject


def _variable_name(text: str) -> str:
    return text.replace("-", "_").upper()


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _one_service(service: KubeObject) -> dict[str, str]:
    spec = service.get("spec", {})
    host = spec["clusterIP"]
    ports = spec.get("ports") or []
    prefix = _variable_name(service["metadata"]["name"])
    variables = {f"{prefix}_SERVICE_HOST": host}
    for index, port in enumerate(ports):
        number, protocol = int(port["port"]), str(port.get("protocol") or "TCP")
        url = f"{protocol.lower()}://{_host_port(host, number)}"
        link = f"{prefix}_PORT_{number}_{protocol.upper()}"
        if index == 0:
            variables[f"{prefix}_SERVICE_PORT"] = str(number)
            variables[f"{prefix}_PORT"] = url
        if port.get("name"):
            variables[f"{prefix}_SERVICE_PORT_{_variable_name(port['name'])}"] = str(number)
        variables[link] = url
        variables[f"{link}_PROTO"] = protocol.lower()
        variables[f"{link}_PORT"] = str(number)
        variables[f"{link}_ADDR"] = host
    return variables


def service_environment(services: Sequence[KubeObject], namespace: str, *, links: bool) -> dict[str, str]:
    """The variables for a pod of ``namespace``: those of ``default/kubernetes`` always, those of its own namespace when
    ``links`` (``spec.enableServiceLinks``). A service ``kubernetes`` of another namespace takes precedence there, as in
    kubelet."""
    chosen: dict[str, KubeObject] = {}
    for service in services:
        metadata = service.get("metadata", {})
        address = service.get("spec", {}).get("clusterIP")
        if not address or address == "None":
            continue
        name, home = metadata.get("name", ""), metadata.get("namespace", "")
        if home == "default" and name == "kubernetes":
            chosen.setdefault(name, service)
        elif home == namespace and links:
            chosen[name] = service
    variables: dict[str, str] = {}
    for name in sorted(chosen):
        variables |= _one_service(chosen[name])
    return variables
