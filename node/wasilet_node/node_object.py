"""What a Node object holds: labels, taints, capacity, the status without conditions. Pure: nothing is read.

When it is written, and what is done when someone else wrote into it, is ``wasilet_node.registration``'s.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from wasilet_node.certificates_store import NodeNames
from wasilet_node.conditions import MEMORY_THRESHOLD_BYTES, disk_threshold_bytes
from wasilet_node.contract import DECLARED_FEATURES
from wasilet_node.kube.base import KubeObject
from wasilet_node.machine import Facts

ARCHITECTURE_LABEL = "wasm32-wasi"
ARCHITECTURE = "wasm-wasi"
_MAX_IMAGES = 50
"""kubelet's nodeStatusMaxImages."""


def labels(hostname: str, more: Mapping[str, str]) -> dict[str, str]:
    """Krustlet's, and ``more``, which may replace them."""
    return {
        "beta.kubernetes.io/arch": ARCHITECTURE_LABEL,
        "beta.kubernetes.io/os": ARCHITECTURE_LABEL,
        "kubernetes.io/arch": ARCHITECTURE_LABEL,
        "kubernetes.io/os": ARCHITECTURE_LABEL,
        "kubernetes.io/hostname": hostname,
        "type": "wasilet",
        **more,
    }


def status(
    machine: Facts,
    *,
    max_pods: int,
    address: str,
    hostname: str,
    port: int,
    runtime_version: str,
    kubelet_version: str,
    images: Sequence[Mapping[str, object]],
) -> KubeObject:
    """``Node.status`` without conditions. ``port``: of the kubelet API."""
    return {
        "capacity": capacity(machine, max_pods),
        "allocatable": allocatable(machine, max_pods),
        "addresses": [
            {"type": "InternalIP", "address": address},
            {"type": "Hostname", "address": hostname},
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        "nodeInfo": {
            "architecture": ARCHITECTURE,
            "bootID": machine.boot_id,
            "containerRuntimeVersion": f"wasmtime://{runtime_version}",
            "kernelVersion": machine.kernel_version,
            "kubeProxyVersion": "",
            "kubeletVersion": kubelet_version,
            "machineID": machine.machine_id,
            "operatingSystem": "linux",
            "osImage": machine.os_image,
            "systemUUID": machine.system_uuid,
        },
        "images": list(images[:_MAX_IMAGES]),
        "declaredFeatures": list(DECLARED_FEATURES),
    }


def names(address: str, node_name: str) -> NodeNames:
    """What the serving certificate names. No host name: approvers grant a Node's own name only, since a node may write
    any host name into its status."""
    ips = frozenset({str(ipaddress.ip_address(address))})
    try:
        ipaddress.ip_address(node_name)
    except ValueError:
        return NodeNames(dns=frozenset({node_name}), ips=ips)
    return NodeNames(ips=ips)


def capacity(machine: Facts, max_pods: int) -> dict[str, str]:
    """All that the machine has."""
    return {
        "cpu": _cpu(machine.cpu_millicores),
        "memory": f"{machine.memory_bytes // 1024}Ki",
        "ephemeral-storage": str(machine.disk_bytes),
        "pods": str(max_pods),
    }


def allocatable(machine: Facts, max_pods: int) -> dict[str, str]:
    """Capacity less what must stay free, as kubelet: a pod that fits must not bring pressure at once."""
    memory = max(0, machine.memory_bytes - MEMORY_THRESHOLD_BYTES)
    disk = max(0, machine.disk_bytes - disk_threshold_bytes(machine.disk_bytes))
    return {
        "cpu": _cpu(machine.cpu_millicores),
        "memory": f"{memory // 1024}Ki",
        "ephemeral-storage": str(disk),
        "pods": str(max_pods),
    }


def _cpu(millicores: int) -> str:
    return str(millicores // 1000) if millicores % 1000 == 0 else f"{millicores}m"


def taints_of(node: KubeObject) -> tuple[dict[str, str], ...]:
    """Its taints, as the API server has them."""
    return tuple((node.get("spec") or {}).get("taints") or ())


def taint(text: str) -> dict[str, str]:
    """``key[=value]:Effect``, validated by the command line."""
    pair, _, effect = text.rpartition(":")
    key, _, value = pair.partition("=")
    return {"key": key, "effect": effect, **({"value": value} if value else {})}
