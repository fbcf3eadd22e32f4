"""Settings of a run that finds stand-ins where the tools would be, and no control plane behind them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from wasilet.settings import Settings, cache_root, load

from tests.rigs.standins.world import World

ADMIN = """\
apiVersion: v1
kind: Config
clusters: [{name: k, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: k, context: {cluster: k, user: k}}]
users: [{name: k, user: {token: t, client-key-data: a2V5}}]
current-context: k
"""
"""An administrator's kubeconfig of an API server that is not there."""


def standin_settings(world: World, folder: Path, provider: str, *tools: str, **given: Any) -> Settings:
    """For cluster ``unit``, all of it in a folder; waits are short."""
    private = ("WASILET_", "DOCKER_", "MINIKUBE_", "K3D_")
    base = {key: value for key, value in os.environ.items() if not key.startswith(private)}
    environ = {
        **world.environment(base, *tools),
        **given.pop("environment", {}),
        "WASILET_STATE_HOME": str(folder / "state"),
        "WASILET_CACHE": str(cache_root()),
        "KUBECONFIG": str(folder / "user.conf"),
    }
    made = load(environ=environ, **{"name": "unit", "provider": provider, "download": False, **given})
    return replace(made, timeouts=replace(made.timeouts, ready_seconds=0.5))
