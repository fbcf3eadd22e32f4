"""Which login a push or pull has for a registry: that of a cluster's own registry, else what ``docker login`` left.

docker writes a login into ``config.json`` under ``auths``, or keeps it by a credential helper that ``credHelpers`` (for
one registry) or ``credsStore`` (for all) names. Keys are a host as it was typed: with or without scheme and path, and
``https://index.docker.io/v1/`` for Docker Hub. oras knows the order and the protocol of the helpers; here they get a
limit, since one that waits for a keyring to be unlocked waits for ever.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet_common.oci.credentials import Credential, from_docker_config, matching
from wasilet_common.oci.reference import DEFAULT_REGISTRY, Reference, is_loopback

from wasilet.state import CLUSTER_LOGIN

HELPER_TIMEOUT_SECONDS = 20.0
_HUB_SERVER = "https://index.docker.io/v1/"
_IDENTITY_USER = "<token>"
"""What a helper returns in place of a user name when the secret is an identity token."""

logger = logging.getLogger(__name__)


def logins_for(reference: Reference, environ: Mapping[str, str] = os.environ) -> tuple[Credential, ...]:
    """The logins that fit, the best first; none: ask anonymously."""
    if is_loopback(reference.host):
        found = matching(reference, cluster_logins(environ))
        if found:
            return found
    config = docker_config(environ)
    written = from_docker_config(config)
    found = matching(reference, written) or tuple(
        login for login in written if login.username and _host(login.registry) == reference.registry.lower()
    )
    return found or _from_helpers(reference, config, environ)


def all_logins(environ: Mapping[str, str] = os.environ) -> tuple[Credential, ...]:
    """What docker's configuration holds in the clear: one may name a registry's token server."""
    return from_docker_config(docker_config(environ))


def cluster_logins(environ: Mapping[str, str]) -> tuple[Credential, ...]:
    """Of the registries of all this user's clusters."""
    from wasilet.settings import state_root

    files = sorted(state_root(environ).glob(f"*/{CLUSTER_LOGIN}"))
    return tuple(login for file in files for login in from_docker_config(file))


def docker_config(environ: Mapping[str, str]) -> Path:
    """``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``; it may not exist."""
    folder = environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path(environ.get("HOME") or Path.home()) / ".docker") / "config.json"


def basic_header(login: Credential) -> str:
    """The value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def _host(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()


def _from_helpers(reference: Reference, config: Path, environ: Mapping[str, str]) -> tuple[Credential, ...]:
    try:
        document = json.loads(config.read_bytes())
        helpers, store = document.get("credHelpers") or {}, document.get("credsStore") or ""
        wanted = {"auths": {}, "credHelpers": dict(helpers), "credsStore": str(store)}
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
    servers: Sequence[str] = (reference.registry, f"https://{reference.registry}")
    if reference.registry == DEFAULT_REGISTRY:
        servers = (_HUB_SERVER, "index.docker.io", "docker.io")
    if not store and not any(server in helpers for server in servers):
        return ()
    pair = _ask(wanted, servers, environ)
    if pair is None:
        return ()
    user, _, secret = base64.b64decode(pair).decode().partition(":")
    if user == _IDENTITY_USER:
        return (Credential(registry=reference.registry, identity_token=secret),)
    return (Credential(registry=reference.registry, username=user, password=secret),)


def _ask(config: dict[str, Any], servers: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """User and secret in base64, by the first helper that has them."""
    try:
        from oras.auth.base import AuthBackend
        from oras.auth.utils import get_basic_auth
    except ImportError:
        logger.warning("docker's credential helpers are asked by oras, which is not here: pip install 'wasilet[push]'")
        return None

    class Bounded(AuthBackend):  # type: ignore[misc]
        """oras' search through docker's configuration, its helpers run with a limit and this command's environment."""

        def __init__(self) -> None:
            super().__init__()
            self._auth_config = config
            self._basic_auth: str | None = None

        def _get_auth_from_creds_store(self, suffix: str, hostname: str) -> str | None:
            answer = _run_helper(suffix, hostname, environ)
            return str(get_basic_auth(*answer)) if answer is not None else None

        def found(self) -> str | None:
            """The first of the servers that has a login."""
            return next((self._basic_auth for server in servers if self._load_auth(server)), None)

    return Bounded().found()


def _run_helper(suffix: str, server: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    from wasilet.errors import HarnessError
    from wasilet.process import run

    name = f"docker-credential-{suffix}"
    if Path(name).name != name:
        return None
    try:
        done = run([name, "get"], timeout_seconds=HELPER_TIMEOUT_SECONDS, env=environ, input=server, check=False)
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (HarnessError, OSError, ValueError) as error:
        logger.warning("docker's credential helper %s gave no login: %s", name, type(error).__name__)
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("Username"), str):
        return None
    return answer["Username"], str(answer.get("Secret") or "")
