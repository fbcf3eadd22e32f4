"""What the approver knows besides a request: the harness' policy, and what the cluster states about its addresses.

The policy is a private file that the harness writes and the approver reads again for each request, so that a node that
becomes known needs no restart of the approver. It is replaced atomically, and a damaged one approves nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from wasilet.cluster.approver_rules import (
    Address,
    Facts,
    Network,
    Policy,
    node_addresses,
    parsed_address,
    parsed_network,
)
from wasilet.errors import ApiError, StateError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.storage import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wasilet.state import State

_SERVICE_CIDRS = api_path("servicecidrs", group="networking.k8s.io", version="v1")
_API_SLICE = api_path("endpointslices", "kubernetes", group="discovery.k8s.io", version="v1", namespace="default")
_API_SERVICE = api_path("services", "kubernetes", namespace="default")
_NODES = api_path("nodes")
_NO_RANGE = "192.0.2.1"
"""An address of no cluster's Service range: the error that names the range is what is wanted."""


def policy_file(state: State) -> Path:
    """Where the policy of a cluster's approver is."""
    return state.etc / "approver-policy.json"


def policy_data(nodes: Mapping[str, list[str]], *, only_known: bool, service_ranges: list[str]) -> dict[str, object]:
    """What the file holds."""
    return {
        "nodes": {name: sorted(nodes[name]) for name in sorted(nodes)},
        "only_known": only_known,
        "service_ranges": sorted(service_ranges),
    }


def write_policy(path: Path, data: dict[str, object]) -> None:
    """Replace the file. Raises StateError."""
    write_json(path, data)


def read_policy(path: Path | None) -> tuple[Policy, frozenset[Network]]:
    """The policy, and the Service ranges for a cluster whose API does not report them. Raises StateError when the file
    is missing or damaged; None: no node is known, and none has to be."""
    if path is None:
        return Policy(), frozenset()
    data = read_json(path)
    if not data:
        raise StateError(f"the approver's policy {path} is missing", hint="`invoke up` writes it")
    try:
        nodes = {
            str(name): frozenset(ip for text in addresses if (ip := parsed_address(str(text))))
            for name, addresses in data["nodes"].items()
        }
        ranges = frozenset(net for text in data["service_ranges"] if (net := parsed_network(str(text))))
        return Policy(nodes=nodes, only_known=bool(data["only_known"])), ranges
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"the approver's policy {path} is damaged: {error!r}", hint="`invoke up` writes it") from error


def gather_facts(kube: Kube, node: str, *, ranges: frozenset[Network] = frozenset()) -> Facts:
    """Ask the cluster which addresses Node ``node`` may not have. ``ranges``: further Service ranges. Raises ApiError:
    what cannot be known must not be taken for nothing."""
    service = kube.find(_API_SERVICE)
    addresses = {ip for ip in map(parsed_address, _cluster_ips(service)) if ip}
    found = {net for net in map(parsed_network, _service_cidrs(kube)) if net} | set(ranges)
    # Where neither the API nor the harness reports the range, at least the one address that matters most is of it.
    found |= {net for ip in addresses if (net := parsed_network(str(ip)))}
    host = (urlsplit(kube.server).hostname or "").lower()
    if own := parsed_address(host):
        addresses.add(own)
    for endpoint in (kube.find(_API_SLICE) or {}).get("endpoints") or []:
        addresses |= {ip for ip in map(parsed_address, endpoint.get("addresses") or []) if ip}
    return Facts(
        service_ranges=frozenset(found),
        api_servers=frozenset(addresses),
        api_names=frozenset({host} if host and own is None else ()),
        other_nodes=_other_nodes(kube, node),
    )


def service_ranges(kube: Kube) -> list[str]:
    """The Service ranges as an administrator can learn them: by the API (1.33 and newer), else by a dry run of a
    Service that cannot be, whose refusal names the range. Empty when neither reports one. Raises ApiError."""
    if known := _service_cidrs(kube):
        return known
    body = {
        "metadata": {"generateName": "wasilet-range-"},
        "spec": {"clusterIP": _NO_RANGE, "ports": [{"port": 1}]},
    }
    try:
        kube.create(f"{api_path('services', namespace='default')}?dryRun=All", body)
    except ApiError as error:
        if match := re.search(r"range of valid IPs is ([0-9a-fA-F:./]+)", error.message):
            return [match[1]]
        if error.code != 422:
            raise
    return []


def _service_cidrs(kube: Kube) -> list[str]:
    listed = kube.find(_SERVICE_CIDRS) or {}
    return [str(cidr) for item in listed.get("items") or [] for cidr in (item.get("spec") or {}).get("cidrs") or []]


def _cluster_ips(service: KubeObject | None) -> list[str]:
    spec = (service or {}).get("spec") or {}
    return [str(ip) for ip in spec.get("clusterIPs") or [spec.get("clusterIP")] if ip]


def _other_nodes(kube: Kube, node: str) -> dict[Address, str]:
    others: dict[Address, str] = {}
    for item in kube.get(_NODES).get("items") or []:
        name = str(item["metadata"]["name"])
        if name != node:
            others |= dict.fromkeys(node_addresses(item), name)
    return others


def same_policy(path: Path, data: dict[str, object]) -> bool:
    """Whether the file says just that."""
    with contextlib.suppress(StateError):
        return bool(read_json(path) == json.loads(json.dumps(data)))
    return False
