"""What a kubeconfig holds, and how one is made: the one reader below the node's, the harness' and the user's files.

client-go's rules: the YAML of :mod:`wasilet_common.kube_yaml`, relative names are relative to the file, embedded data
wins over a named file, the first of several entries of one name counts. What a caller accepts of it (plugins, plain
HTTP, a missing current context) is the caller's own policy.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet_common.kube_yaml import YamlError, load

MAX_FILE_BYTES = 1024 * 1024

CLUSTER_NAME = "kubernetes"
BOOTSTRAP_USER = "tls-bootstrap-token-user"
BOOTSTRAP_CONTEXT = f"{BOOTSTRAP_USER}@{CLUSTER_NAME}"
"""kubeadm's names."""

CLIENT_CA_EXTENSION = "wasilet.dev/client-ca"
"""The extension of a cluster that holds what signs the certificates of the API server's clients."""

_SINGULAR = {"clusters": "cluster", "contexts": "context", "users": "user"}
SECTIONS = tuple(_SINGULAR)


class KubeconfigError(Exception):
    """A kubeconfig cannot be read or used; the message names the file and what is wrong with it."""


class NoSuchEntryError(KubeconfigError):
    """A context, cluster or user of that name is not there."""


@dataclass(frozen=True)
class Entry:
    """A cluster or a user of a file."""

    origin: Path
    values: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        """A field of text; None when it is absent or empty. Raises KubeconfigError when it is something else."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise KubeconfigError(f"{self.origin}: {name} is not text")
        return value

    def data(self, name: str) -> bytes | None:
        """``<name>-data`` decoded, else the file that ``<name>`` names; None when there is neither. Raises
        KubeconfigError."""
        encoded, path = self.text(f"{name}-data"), self.text(name)
        if encoded is None:
            return None if path is None else self.file(path)
        try:
            return base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise KubeconfigError(f"{self.origin}: {name}-data is not base64") from error

    def token(self) -> str | None:
        """``token``, else what is in ``tokenFile``. Raises KubeconfigError."""
        token, file = self.text("token"), self.text("tokenFile")
        if token is None and file is not None:
            return self.file(file).decode(errors="replace").strip()
        return token

    def file(self, name: str) -> bytes:
        """The content of a file that is named here. Raises KubeconfigError."""
        path = self.origin.parent / name
        try:
            with path.open("rb") as stream:
                return stream.read(MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KubeconfigError(f"{self.origin}: cannot read {path}: {reason}") from error


@dataclass(frozen=True)
class KubeconfigFile:
    """A file that was read."""

    origin: Path
    data: Mapping[str, Any]

    @property
    def current_context(self) -> str:
        """Empty: none. Raises KubeconfigError when it is no text."""
        return Entry(self.origin, self.data).text("current-context") or ""

    def entries(self, section: str) -> dict[str, Entry]:
        """The clusters, contexts or users by name. Raises KubeconfigError."""
        listed = self.data.get(section) or []
        if not isinstance(listed, list):
            raise KubeconfigError(f"{self.origin}: {section} is not a list")
        found: dict[str, Entry] = {}
        for item in listed:
            values = _mapping(item, self.origin, f"an entry of {section}")
            name = values.get("name")
            if not isinstance(name, str):
                raise KubeconfigError(f"{self.origin}: an entry of {section} has no name")
            what = _SINGULAR[section]
            content = _mapping(values.get(what) or {}, self.origin, f"{what} {name!r}")
            found.setdefault(name, Entry(self.origin, content))
        return found

    def resolve(self, context: str) -> tuple[Entry, Entry]:
        """Cluster and user of a context. Raises NoSuchEntryError, and KubeconfigError for what is misshapen."""
        contexts = self.entries("contexts")
        if context not in contexts:
            raise NoSuchEntryError(f"{self.origin}: context {context!r} is not among its contexts")
        return self._named(contexts[context], context, "clusters"), self._named(contexts[context], context, "users")

    def _named(self, chosen: Entry, context: str, section: str) -> Entry:
        what = _SINGULAR[section]
        name = chosen.values.get(what)
        entries = self.entries(section)
        if not isinstance(name, str) or name not in entries:
            raise NoSuchEntryError(f"{self.origin}: context {context!r} names {what} {name!r}, which is not there")
        return entries[name]


def read(path: Path) -> KubeconfigFile:
    """Read and parse a file. Raises KubeconfigError, and OSError when the file cannot be read."""
    with path.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise KubeconfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    return parse(data, origin=path)


def parse(data: bytes, *, origin: Path) -> KubeconfigFile:
    """``origin`` is for messages and for relative names. An empty text is an empty file. Raises KubeconfigError."""
    try:
        document = load(data)
    except YamlError as error:
        raise KubeconfigError(f"kubeconfig {origin} is not YAML: {error}") from error
    return KubeconfigFile(origin, {} if document is None else _mapping(document, origin, "the file"))


def document(
    *,
    cluster: Mapping[str, Any],
    user: Mapping[str, Any],
    context: str,
    cluster_name: str,
    user_name: str,
) -> dict[str, Any]:
    """A kubeconfig of one context, its current one."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster_name, "cluster": dict(cluster)}],
        "users": [{"name": user_name, "user": dict(user)}],
        "contexts": [{"name": context, "context": {"cluster": cluster_name, "user": user_name}}],
        "current-context": context,
    }


def client_ca_extension(pem: bytes) -> dict[str, Any]:
    """The entry among a cluster's ``extensions``."""
    extension = {
        "apiVersion": "wasilet.dev/v1",
        "kind": "ClientCA",
        "certificate-authority-data": base64.b64encode(pem).decode(),
    }
    return {"name": CLIENT_CA_EXTENSION, "extension": extension}


def _mapping(value: object, origin: Path, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise KubeconfigError(f"{origin}: {what} is not a mapping")
    return value
