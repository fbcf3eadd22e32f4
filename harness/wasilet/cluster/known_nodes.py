"""The nodes that the harness knows in a cluster: those that it runs, and those that it made a bootstrap file for.

The approver approves a node's serving certificate by this knowledge: where a node is on this machine, the machine's
address is vouched for; and in a cluster that is not Wasilet's own no other node gets one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wasilet.cluster.approver_facts import policy_data, policy_file, write_policy
from wasilet.controlplane import joined_network
from wasilet.errors import UsageError

if TYPE_CHECKING:
    from wasilet.providers.base import Cluster


def policy_of(cluster: Cluster) -> dict[str, object]:
    """The approver's policy for a cluster, as of now. Called after its API server step."""
    here = cluster.provider.access(cluster).node_address
    record = cluster.state.cluster
    nodes = {name: [here] if local else [] for name, local in record.known_nodes.items()}
    joined = joined_network.plan_of(cluster.state)
    own = joined.addresses if joined is not None else ()
    nodes |= {name: [here, *own[index : index + 1]] for index, name in enumerate(cluster.node_names())}
    only_known = _is_adopted(cluster) and not cluster.settings.approve_any
    return policy_data(nodes, only_known=only_known, service_ranges=list(record.service_ranges))


def remember_node(cluster: Cluster, name: str, *, local: bool) -> None:
    """Make the approver know a node that is about to join. ``local``: it runs on this machine. Called with the
    cluster's lock held. Raises UsageError for a name of the harness' own nodes, and StateError."""
    if name in cluster.node_names() and not local:
        raise UsageError(
            f"{name!r} is the name of a node that this cluster has on this machine", hint="choose another name"
        )
    state = cluster.state
    state.update(known_nodes={**state.cluster.known_nodes, name: local})
    write_policy(policy_file(state), policy_of(cluster))


def _is_adopted(cluster: Cluster) -> bool:
    """Whether the cluster is someone else's."""
    return cluster.provider.name != "host" and not cluster.state.cluster.external.created
