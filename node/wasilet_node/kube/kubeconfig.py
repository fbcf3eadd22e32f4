"""Kubeconfig files, as the node needs them: a server, what to trust, and one way to say who we are.

Not the loader of the official client: that one runs the commands of ``exec`` users, writes certificates into temporary
files and merges ``KUBECONFIG`` lists. A node reads exactly one file, written by whoever lets it join, so everything it
cannot use is refused by name, and nothing is ever executed.

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
import binascii
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

logger = logging.getLogger(__name__)

BOOTSTRAP_USER = "tls-bootstrap-token-user"
BOOTSTRAP_CONTEXT = f"{BOOTSTRAP_USER}@kubernetes"
CLIENT_CA_EXTENSION = "wasilet.dev/client-ca"

_MAX_FILE_BYTES = 1024 * 1024
_REFUSED_USER_FIELDS = {
    "exec": "runs a command",
    "auth-provider": "needs a plugin",
    "username": "uses basic authentication, which Kubernetes no longer has",
    "password": "uses basic authentication, which Kubernetes no longer has",
    "as": "impersonates somebody",
}


class KubeconfigError(Exception):
    """A kubeconfig cannot be read or used; the message names the file and what is wrong with it."""


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
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
            mode = path.stat().st_mode
    except OSError as error:
        raise KubeconfigError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise KubeconfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
    if mode & 0o077:
        logger.warning("%s holds a credential and can be read by others; type: chmod 600 %s", path, path)
    return parse(data, origin=path)


def parse(data: bytes, *, origin: Path) -> Kubeconfig:
    """Parse the current context; ``origin`` is for messages and for relative file names. Raises KubeconfigError."""
    try:
        document = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KubeconfigError(f"{origin}: not YAML: {_first_line(error)}") from error
    reader = _Reader(origin)
    config = reader.mapping(document, "the file")
    if config.get("kind", "Config") != "Config":
        raise KubeconfigError(f"{origin}: kind is {config['kind']!r}, not Config")
    contexts = reader.named(config, "contexts", "context")
    current = config.get("current-context")
    if not current:
        if len(contexts) != 1:
            raise KubeconfigError(f"{origin}: no current-context")
        current = next(iter(contexts))
    if not isinstance(current, str) or current not in contexts:
        raise KubeconfigError(f"{origin}: current-context {current!r} is not among its contexts")
    context = contexts[current]
    cluster = reader.pick(reader.named(config, "clusters", "cluster"), context, "cluster", current)
    user = reader.pick(reader.named(config, "users", "user"), context, "user", current)
    return Kubeconfig(cluster=reader.cluster(cluster), credentials=reader.credentials(user))


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
        extension = {
            "apiVersion": "wasilet.dev/v1",
            "kind": "ClientCA",
            "certificate-authority-data": base64.b64encode(cluster.client_ca_data.encode()).decode(),
        }
        entry["extensions"] = [{"name": CLIENT_CA_EXTENSION, "extension": extension}]
    user = f"system:node:{node_name}"
    context = f"{user}@kubernetes"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "kubernetes", "cluster": entry}],
        "users": [{"name": user, "user": {"client-certificate": str(pair_path), "client-key": str(pair_path)}}],
        "contexts": [{"name": context, "context": {"cluster": "kubernetes", "user": user}}],
        "current-context": context,
    }
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
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise KubeconfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise KubeconfigError(f"{path}: not YAML: {_first_line(error)}") from error
    reader = _Reader(path)
    config = reader.mapping(document, "the file")
    clusters = reader.named(config, "clusters", "cluster")
    if len(clusters) != 1:
        raise KubeconfigError(f"{path}: has {len(clusters)} clusters, not one")
    return reader.cluster(next(iter(clusters.values())))


class _Reader:
    """Walks a decoded kubeconfig; every complaint names the file."""

    def __init__(self, origin: Path) -> None:
        self._origin = origin

    def mapping(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise KubeconfigError(f"{self._origin}: {what} is not a mapping")
        return value

    def named(self, config: Mapping[str, Any], plural: str, singular: str) -> dict[str, dict[str, Any]]:
        entries = config.get(plural) or []
        if not isinstance(entries, list):
            raise KubeconfigError(f"{self._origin}: {plural} is not a list")
        result: dict[str, dict[str, Any]] = {}
        for entry in entries:
            item = self.mapping(entry, f"an entry of {plural}")
            name = item.get("name")
            if not isinstance(name, str):
                raise KubeconfigError(f"{self._origin}: an entry of {plural} has no name")
            result.setdefault(name, self.mapping(item.get(singular) or {}, f"{singular} {name!r}"))
        return result

    def pick(
        self, entries: Mapping[str, dict[str, Any]], context: Mapping[str, Any], what: str, current: str
    ) -> dict[str, Any]:
        name = context.get(what)
        if not isinstance(name, str) or name not in entries:
            raise KubeconfigError(f"{self._origin}: context {current!r} names {what} {name!r}, which is not there")
        return entries[name]

    def cluster(self, entry: Mapping[str, Any]) -> Cluster:
        server = self._text(entry, "server")
        if server is None:
            raise KubeconfigError(f"{self._origin}: the cluster has no server")
        parts = urlsplit(server)
        if parts.scheme != "https" or not parts.hostname:
            raise KubeconfigError(
                f"{self._origin}: server {server!r} is not an https:// address; a credential is never sent in the clear"
            )
        insecure = entry.get("insecure-skip-tls-verify") is True
        ca_data = self._certificate(entry, "certificate-authority")
        if insecure and ca_data is not None:
            raise KubeconfigError(f"{self._origin}: both insecure-skip-tls-verify and a certificate authority are set")
        return Cluster(
            server=server.rstrip("/"),
            ca_data=ca_data,
            tls_server_name=self._text(entry, "tls-server-name"),
            insecure_skip_tls_verify=insecure,
            proxy_url=self._text(entry, "proxy-url"),
            client_ca_data=self._client_ca(entry),
        )

    def credentials(self, entry: Mapping[str, Any]) -> Credentials:
        for name, why in _REFUSED_USER_FIELDS.items():
            if entry.get(name):
                raise KubeconfigError(
                    f"{self._origin}: its user has {name!r}, which {why}; a token or client certificate is needed"
                )
        certificate = self._certificate(entry, "client-certificate")
        key = self._pem(entry, "client-key", "PRIVATE KEY-----")
        if (certificate is None) != (key is None):
            raise KubeconfigError(f"{self._origin}: a client certificate and its key go together; one is missing")
        if key is not None and "ENCRYPTED" in key:
            raise KubeconfigError(f"{self._origin}: the client key is encrypted")
        token = self._text(entry, "token")
        token_file = self._text(entry, "tokenFile")
        if token is None and token_file is not None:
            token = self._file(token_file).strip()
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
            raise KubeconfigError(f"{self._origin}: the token has characters that no token has")
        if not token and certificate is None:
            raise KubeconfigError(f"{self._origin}: its user has neither a token nor a client certificate")
        return Credentials(token=token or None, certificate=certificate, key=key)

    def _client_ca(self, entry: Mapping[str, Any]) -> str | None:
        extensions = entry.get("extensions") or []
        if not isinstance(extensions, list):
            raise KubeconfigError(f"{self._origin}: extensions of the cluster is not a list")
        for item in extensions:
            if isinstance(item, dict) and item.get("name") == CLIENT_CA_EXTENSION:
                extension = self.mapping(item.get("extension"), CLIENT_CA_EXTENSION)
                data = self._certificate(extension, "certificate-authority")
                if data is None:
                    raise KubeconfigError(f"{self._origin}: {CLIENT_CA_EXTENSION} has no certificate-authority-data")
                return data
        return None

    def _certificate(self, entry: Mapping[str, Any], name: str) -> str | None:
        return self._pem(entry, name, "-----BEGIN CERTIFICATE-----")

    def _pem(self, entry: Mapping[str, Any], name: str, marker: str) -> str | None:
        encoded = self._text(entry, f"{name}-data")
        path = self._text(entry, name)
        if encoded is not None:
            try:
                text = base64.b64decode("".join(encoded.split()), validate=True).decode("ascii")
            except (binascii.Error, ValueError) as error:
                raise KubeconfigError(f"{self._origin}: {name}-data is not base64 of PEM text") from error
        elif path is not None:
            text = self._file(path)
        else:
            return None
        if marker not in text:
            raise KubeconfigError(f"{self._origin}: {name} is not PEM")
        return text

    def _file(self, name: str) -> str:
        path = self._origin.parent / name
        try:
            with path.open("rb") as stream:
                return stream.read(_MAX_FILE_BYTES).decode("ascii")
        except (OSError, ValueError) as error:
            raise KubeconfigError(f"{self._origin}: cannot read {path}: {_first_line(error)}") from error

    def _text(self, entry: Mapping[str, Any], name: str) -> str | None:
        value = entry.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise KubeconfigError(f"{self._origin}: {name} is not text")
        return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
