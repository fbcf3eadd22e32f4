"""``invoke token``: bootstrap tokens listed, created and deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wasilet.cluster.join import make_known
from wasilet.cluster.opening import open_cluster
from wasilet.controlplane.local_registry import login_file
from wasilet.errors import UsageError
from wasilet.kube.bootstrap_token import bootstrap_config, create_token, delete_token, hand_over, list_tokens
from wasilet.providers.base import Cluster
from wasilet.settings import Settings, invocation_path

ACTIONS = ("create", "list", "delete")


def run_action(
    settings: Settings, action: str, *, token_id: str = "", file: str = "", node: str = ""
) -> list[dict[str, Any]]:
    """``invoke token``: what to print, one object per line. A new token is printed once, here, unless it goes to a
    file. ``node``: of this machine, which the approver has to know; the answer names the file with the login of the
    cluster's registry then, since no one else gives it to that node."""
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}", hint=", ".join(ACTIONS))
    if node and action != "create":
        raise UsageError(f"--node means nothing to {action}")
    with open_cluster(settings) as cluster:
        if node:
            make_known(cluster, node, local=True, what="invoke token")
        answer = _run_action(cluster, settings, action, token_id=token_id, file=invocation_path(file) if file else "")
        login = login_file(cluster.state)
        return [{**entry, "registry_login": str(login)} for entry in answer] if node and login.is_file() else answer


def _run_action(cluster: Cluster, settings: Settings, action: str, *, token_id: str, file: str) -> list[dict[str, Any]]:
    kube = cluster.admin()
    if action == "list":
        return [
            {"id": info.id, "expires": info.expires or "never", "description": info.description}
            for info in list_tokens(kube)
        ]
    if action == "delete":
        if not delete_token(kube, token_id):
            raise UsageError(f"there is no token {token_id!r}", hint="`invoke token list` shows them")
        return [{"deleted": token_id.partition(".")[0]}]
    token = create_token(kube, ttl_seconds=settings.token_ttl_seconds)
    if not file:
        return [{"token": token.text}]
    access = cluster.provider.access(cluster)
    path = Path(file)
    config = bootstrap_config(server=access.server, ca=access.ca, client_ca=access.client_ca, token=token)
    hand_over(kube, token, path, config)
    return [{"id": token.id, "file": str(path)}]
