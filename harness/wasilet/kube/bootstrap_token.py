"""Bootstrap tokens and the file that carries one to a node.

The token is drawn by a CSPRNG, lives an hour by default, and is handed over in a private file; it is never printed by
``list``, never in a command line, never in a log. The file is a kubeconfig as kubeadm writes it, with one addition:
the authority that signs *clients* of the cluster, which a node needs to know its callers and may not read itself
(on k3s it is another one than the servers').
"""

from __future__ import annotations

import base64
import contextlib
import re
import secrets
import string
import time
from dataclasses import dataclass, field
from pathlib import Path

from wasilet_common.kubeconfig import (
    BOOTSTRAP_CONTEXT,
    BOOTSTRAP_USER,
    CLUSTER_NAME,
    KubeconfigError,
    client_ca_extension,
    document,
    read,
)
from wasilet_common.time_format import NANOSECONDS, parse_rfc3339, rfc3339

from wasilet.errors import ApiError, StateError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.manifests import object_path, render_objects
from wasilet.storage import write_file

_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_PREFIX = "bootstrap-token-"  # noqa: S105  (a name, no secret)
_SECRETS = api_path("secrets", namespace="kube-system")
_FRESH_SECONDS = 600
"""A token that expires sooner is not handed to a node that has still to start."""


@dataclass(frozen=True)
class Token:
    """``<id>.<secret>``."""

    id: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        """As it stands in a bootstrap file."""
        return f"{self.id}.{self.secret}"


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What may be shown of a token that a cluster knows."""

    id: str
    expires: str
    """RFC 3339, UTC; empty: never."""

    description: str = ""
    groups: str = ""

    @property
    def seconds_left(self) -> float:
        """Negative when expired; infinite without an expiration."""
        if not self.expires:
            return float("inf")
        end = parse_rfc3339(self.expires)
        return -1.0 if end is None else end - time.time()


def new_token() -> Token:
    """6 and 16 characters of ``[a-z0-9]``."""
    return Token(*("".join(secrets.choice(_ALPHABET) for _ in range(length)) for length in (6, 16)))


def create_token(
    kube: Kube, *, ttl_seconds: int, description: str = "made by wasilet", token: Token | None = None
) -> Token:
    """Create a token's Secret. Raises ApiError."""
    token = token or new_token()
    (secret,) = render_objects(
        "bootstrap-token.yaml.j2",
        token_id=token.id,
        token_secret=token.secret,
        expiration=rfc3339(int(time.time() + ttl_seconds) * NANOSECONDS),
        description=description,
    )
    kube.create(object_path(secret, collection=True), secret)
    return token


def list_tokens(kube: Kube) -> list[TokenInfo]:
    """The cluster's bootstrap tokens, without their secrets."""
    answer = kube.get(_SECRETS, fieldSelector="type=bootstrap.kubernetes.io/token")
    return [_info(item) for item in answer.get("items") or []]


def delete_token(kube: Kube, token_id: str) -> bool:
    """Delete a token by its id (or by ``id.secret``); False when there is none. Raises UsageError, ApiError."""
    found = re.fullmatch(r"([a-z0-9]{6})(\.[a-z0-9]{16})?", token_id)
    if not found:
        raise UsageError("a token id has 6 characters of a-z and 0-9")
    return kube.delete(f"{_SECRETS}/{_SECRET_PREFIX}{found[1]}")


def _info(secret: KubeObject) -> TokenInfo:
    data = {key: _decoded(value) for key, value in (secret.get("data") or {}).items() if key != "token-secret"}
    return TokenInfo(
        id=data.get("token-id", ""),
        expires=data.get("expiration", ""),
        description=data.get("description", ""),
        groups=data.get("auth-extra-groups", ""),
    )


def _decoded(value: str) -> str:
    return base64.b64decode(value).decode(errors="replace")


def hand_over(kube: Kube, token: Token, path: Path, config: KubeObject) -> None:
    """Write the file of a token that was made for it; one that no one was given is taken back. Raises StateError."""
    try:
        write_bootstrap_file(path, config)
    except StateError:
        with contextlib.suppress(ApiError):
            delete_token(kube, token.id)
        raise


# --- the file --------------------------------------------------------------------------------------------------------


def bootstrap_config(
    *, server: str, ca: bytes | None, client_ca: bytes | None, token: Token, tls_server_name: str = ""
) -> KubeObject:
    """The kubeconfig of a joining node. ``tls_server_name``: what the server's certificate is for, when that is not
    the host of its URL."""
    cluster: KubeObject = {"server": server}
    if tls_server_name:
        cluster["tls-server-name"] = tls_server_name
    if ca:
        cluster["certificate-authority-data"] = base64.b64encode(ca).decode()
    if client_ca:
        cluster["extensions"] = [client_ca_extension(client_ca)]
    return document(
        cluster=cluster,
        user={"token": token.text},
        context=BOOTSTRAP_CONTEXT,
        cluster_name=CLUSTER_NAME,
        user_name=BOOTSTRAP_USER,
    )


def write_bootstrap_file(path: Path, config: KubeObject) -> None:
    """Write it, mode 0600, atomically. Raises StateError."""
    import yaml

    write_file(path, yaml.safe_dump(config, sort_keys=False).encode())


def read_bootstrap_file(path: Path) -> KubeObject:
    """The parsed file; empty when it is absent or damaged."""
    try:
        return dict(read(path).data)
    except (OSError, KubeconfigError):
        return {}


def bootstrap_token_id(path: Path) -> str:
    """The id of the token in a bootstrap file; empty when there is none."""
    try:
        return str(read_bootstrap_file(path)["users"][0]["user"]["token"]).partition(".")[0]
    except (KeyError, IndexError, TypeError):
        return ""


def usable_token(kube: Kube, path: Path, *, server: str, ca: bytes | None, client_ca: bytes | None) -> TokenInfo | None:
    """The token in a bootstrap file, when the file is right for this cluster and the token will last a while."""
    data = read_bootstrap_file(path)
    try:
        identifier, _, secret = str(data["users"][0]["user"]["token"]).partition(".")
    except (KeyError, IndexError, TypeError):
        return None
    if data != bootstrap_config(server=server, ca=ca, client_ca=client_ca, token=Token(identifier, secret)):
        return None
    for info in list_tokens(kube):
        if info.id == identifier and info.seconds_left > _FRESH_SECONDS:
            return info
    return None
