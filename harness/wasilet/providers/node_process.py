"""A node's agent on this machine: what it is called among the components, and its end."""

from __future__ import annotations

import sys
from pathlib import Path

from wasilet.controlplane.components import environment_for_tools
from wasilet.errors import CommandError
from wasilet.process import run
from wasilet.providers.base import Cluster


def node_component(node: str) -> str:
    """The component name of a node agent."""
    return f"node-{node}"


def end_node(cluster: Cluster, name: str) -> str:
    """End a node's containers and its agent, in an orderly way; text for the report."""
    settings, state = cluster.settings, cluster.state
    limit = settings.timeouts.node_stop_seconds
    try:
        run(
            [
                sys.executable,
                "-P",
                "-m",
                "wasilet_node",
                "shutdown",
                "--data-dir",
                state.node(name),
                "--timeout",
                f"{limit:g}",
            ],
            timeout_seconds=limit + 5,
            cwd=Path("/"),
            env=environment_for_tools(settings),
        )
    except CommandError as error:
        # Whatever could not be ended in an orderly way is ended by the next step; nothing may stay behind.
        return f"did not end by itself ({error.message})"
    state.forget(node_component(name))
    return "ended"
