"""The registry's second entry point, for clusters whose own nodes do not reach this machine's loopback."""

from __future__ import annotations

from wasilet.controlplane.components import Component
from wasilet.errors import HarnessError
from wasilet.providers.base import Cluster
from wasilet.providers.existing_facts import facts

REGISTRY_FOR_NODES = "registry-for-nodes"
REGISTRY_FOR_NODES_STEP = "registry-for-nodes"


def registry_for_nodes(cluster: Cluster) -> Component:
    """The same blobs, to be read only, on the one address that the cluster's containers reach this machine by. The
    first entry point stays on loopback: what may write does not leave the machine."""
    from wasilet.controlplane.local_registry import registry_component

    address = facts(cluster).registry_address
    if not address:
        raise HarnessError("the cluster's nodes reach no registry here yet", hint="`invoke up` repairs it")
    port = cluster.ports().get("registry_for_nodes")
    if port is None:
        port = cluster.state.allocate_ports({"registry_for_nodes": 0}, addresses=("127.0.0.1", address))[
            "registry_for_nodes"
        ]
    return registry_component(
        binary=cluster.binary("registry"),
        port=port,
        state=cluster.state,
        name=REGISTRY_FOR_NODES,
        address=address,
        readonly=True,
    )


def hosts_toml(cluster: Cluster) -> tuple[str, str]:
    """``(folder name, text)`` of containerd's registry host configuration: ``localhost:<port>`` means this machine's
    registry to the cluster's own nodes too, so one reference serves wasm nodes and Linux nodes."""
    from wasilet.controlplane.local_registry import registry_address

    name = registry_address(cluster.ports()["registry"])
    url = f"http://{facts(cluster).registry_address}:{cluster.ports()['registry_for_nodes']}"
    return name, f'server = "{url}"\n\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'
