"""Kubeconfig files, as the node needs them: a server, what to trust, and one way to identify itself.

Not the loader of the official client: that one runs the commands of ``exec`` users, writes certificates into temporary
files and merges ``KUBECONFIG`` lists. A node reads exactly one file, written by the user who lets it join, so
everything it cannot use is refused by name, and nothing is ever executed.

The client CA of the cluster (against which the node's HTTPS server checks its callers) is not part of the format.
Where it is another one than the server CA (k3s), it travels in an extension of the cluster entry, because a node may
not read ``kube-system/extension-apiserver-authentication``::

    clusters:
    - name: kubernetes
      cluster:
        server: https://192.0.2.10:6443
        certificate-authority-data: ...
        extensions:
        - name: wasilet.dev/client-ca
          extension: {apiVersion: wasilet.dev/v1, kind: ClientCA, certificate-authority-data: <base64 of PEM>}
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wasilet_common import kubeconfig
from wasilet_common.kubeconfig import (
    BOOTSTRAP_CONTEXT,
    BOOTSTRAP_USER,
    CLIENT_CA_EXTENSION,
    CLUSTER_NAME,
    Entry,
    KubeconfigError,
    KubeconfigFile,
    client_ca_extension,
)

__all__ = [
    "BOOTSTRAP_CONTEXT",
    "BOOTSTRAP_USER",
    "CLIENT_CA_EXTENSION",
    "Cluster",
    "Credentials",
    "Kubeconfig",
    "KubeconfigError",
    "is_node_kubeconfig",
    "load",
    "load_cluster",
    "parse",
    "render_node_kubeconfig",
]

logger = logging.getLogger(__name__)


_CERTIFICATE = "-----BEGIN CERTIFICATE-----"
_REFUSED_USER_FIELDS = {
    "exec": "runs a command",
    "auth-provider": "needs a plugin",
    "username": "uses basic authentication, which Kubernetes no longer has",
    "password": "uses basic authentication, which Kubernetes no longer has",
    "as": "impersonates a user",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the API server is and how it is recognised. Certificates are PEM text."""

    server: str
    """``https://host[:port][/path]``, no slash at the end."""

    ca_data: str | None = None
    """None: the machine's own trust store."""

    tls_server_name: str | None = None
    insecure_skip_tls_verify: bool = False
    proxy_url: str | None = None
    client_ca_data: str | None = None
    """What signs the certificates of the API server's clients; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who the caller is: a bearer token, or a client certificate with its key (PEM text). Never shown by repr."""

    token: str | None = field(default=None, repr=False)
    certificate: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Kubeconfig:
    """One context of a kubeconfig file, resolved."""

    cluster: Cluster
    credentials: Credentials


def load(path: Path) -> Kubeconfig:
    """Read the current context of a kubeconfig. Raises KubeconfigError."""
    file = _read(path)
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            logger.warning("%s holds a credential and can be read by others; type: chmod 600 %s", path, path)
    return _resolved(file)


def parse(data: bytes, *, origin: Path) -> Kubeconfig:
    """Parse the current context; ``origin`` is for messages and for relative file names. Raises KubeconfigError."""
    return _resolved(kubeconfig.parse(data, origin=origin))


def _read(path: Path) -> KubeconfigFile:
    try:
        return kubeconfig.read(path)
    except OSError as error:
        raise KubeconfigError(f"{path}: {error.strerror or error}") from error


def _resolved(file: KubeconfigFile) -> Kubeconfig:
    if file.data.get("kind", "Config") != "Config":
        raise KubeconfigError(f"{file.origin}: kind is {file.data['kind']!r}, not Config")
    contexts = file.entries("contexts")
    current = file.data.get("current-context")
    if not current:
        if len(contexts) != 1:
            raise KubeconfigError(f"{file.origin}: no current-context")
        current = next(iter(contexts))
    if not isinstance(current, str) or current not in contexts:
        raise KubeconfigError(f"{file.origin}: current-context {current!r} is not among its contexts")
    cluster, user = file.resolve(current)
    return Kubeconfig(cluster=_cluster(cluster), credentials=_credentials(user))


def render_node_kubeconfig(cluster: Cluster, *, node_name: str, pair_path: Path) -> bytes:
    """The node's own kubeconfig, as kubelet.conf: the certificate is named by path, so renewal never rewrites it.

    JSON is YAML, and needs no quoting rules.
    """
    entry: dict[str, Any] = {"server": cluster.server}
    if cluster.ca_data is not None:
        entry["certificate-authority-data"] = base64.b64encode(cluster.ca_data.encode()).decode()
    if cluster.tls_server_name is not None:
        entry["tls-server-name"] = cluster.tls_server_name
    if cluster.insecure_skip_tls_verify:
        entry["insecure-skip-tls-verify"] = True
    if cluster.proxy_url is not None:
        entry["proxy-url"] = cluster.proxy_url
    if cluster.client_ca_data is not None:
        entry["extensions"] = [client_ca_extension(cluster.client_ca_data.encode())]
    user = f"system:node:{node_name}"
    document = kubeconfig.document(
        cluster=entry,
        user={"client-certificate": str(pair_path), "client-key": str(pair_path)},
        context=f"{user}@{CLUSTER_NAME}",
        cluster_name=CLUSTER_NAME,
        user_name=user,
    )
    return (json.dumps(document, indent=2) + "\n").encode()


def is_node_kubeconfig(data: bytes) -> bool:
    """Whether ``render_node_kubeconfig`` may have written this."""
    try:
        document = json.loads(data)
        return str(document["users"][0]["name"]).startswith("system:node:")
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def load_cluster(path: Path) -> Cluster:
    """Only the cluster of the current context: the certificate that the user entry names may be gone or expired.

    Raises KubeconfigError.
    """
    clusters = _read(path).entries("clusters")
    if len(clusters) != 1:
        raise KubeconfigError(f"{path}: has {len(clusters)} clusters, not one")
    return _cluster(next(iter(clusters.values())))


def _cluster(entry: Entry) -> Cluster:
    server = entry.text("server")
    if server is None:
        raise KubeconfigError(f"{entry.origin}: the cluster has no server")
    try:
        parts = urlsplit(server)
    except ValueError as error:
        raise KubeconfigError(f"{entry.origin}: server {server!r} is not an address: {error}") from error
    if parts.scheme != "https" or not parts.hostname:
        raise KubeconfigError(
            f"{entry.origin}: server {server!r} is not an https:// address; a credential is never sent in the clear"
        )
    insecure = entry.values.get("insecure-skip-tls-verify") is True
    ca_data = _pem(entry, "certificate-authority", _CERTIFICATE)
    if insecure and ca_data is not None:
        raise KubeconfigError(f"{entry.origin}: both insecure-skip-tls-verify and a certificate authority are set")
    return Cluster(
        server=server.rstrip("/"),
        ca_data=ca_data,
        tls_server_name=entry.text("tls-server-name"),
        insecure_skip_tls_verify=insecure,
        proxy_url=entry.text("proxy-url"),
        client_ca_data=_client_ca(entry),
    )


def _credentials(entry: Entry) -> Credentials:
    for name, why in _REFUSED_USER_FIELDS.items():
        if entry.values.get(name):
            raise KubeconfigError(
                f"{entry.origin}: its user has {name!r}, which {why}; a token or client certificate is needed"
            )
    certificate = _pem(entry, "client-certificate", _CERTIFICATE)
    key = _pem(entry, "client-key", "PRIVATE KEY-----")
    if (certificate is None) != (key is None):
        raise KubeconfigError(f"{entry.origin}: a client certificate and its key go together; one is missing")
    if key is not None and "ENCRYPTED" in key:
        raise KubeconfigError(f"{entry.origin}: the client key is encrypted")
    token = entry.token()
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
        raise KubeconfigError(f"{entry.origin}: the token has characters that no token has")
    if not token and certificate is None:
        raise KubeconfigError(f"{entry.origin}: its user has neither a token nor a client certificate")
    return Credentials(token=token or None, certificate=certificate, key=key)


def _client_ca(entry: Entry) -> str | None:
    extensions = entry.values.get("extensions") or []
    if not isinstance(extensions, list):
        raise KubeconfigError(f"{entry.origin}: extensions of the cluster is not a list")
    for item in extensions:
        if isinstance(item, dict) and item.get("name") == CLIENT_CA_EXTENSION:
            extension = item.get("extension")
            if not isinstance(extension, dict):
                raise KubeconfigError(f"{entry.origin}: {CLIENT_CA_EXTENSION} is not a mapping")
            data = _pem(Entry(entry.origin, extension), "certificate-authority", _CERTIFICATE)
            if data is None:
                raise KubeconfigError(f"{entry.origin}: {CLIENT_CA_EXTENSION} has no certificate-authority-data")
            return data
    return None


def _pem(entry: Entry, name: str, marker: str) -> str | None:
    data = entry.data(name)
    if data is None:
        return None
    text = data.decode("ascii", errors="replace")
    if marker not in text or "\ufffd" in text:
        raise KubeconfigError(f"{entry.origin}: {name} is not PEM")
    return text
