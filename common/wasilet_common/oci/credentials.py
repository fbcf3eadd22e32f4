"""Pull secrets: which registry credentials a pod brings, and which of them fit an image.

Both secret types are read, ``kubernetes.io/dockerconfigjson`` (``auths``) and the older ``kubernetes.io/dockercfg``;
entries give ``username`` and ``password``, or ``auth`` with both in base64, or an ``identitytoken``. Matching is that
of kubelet's pkg/credentialprovider/keyring.go: a key is a host with globs for whole labels, a port that must be equal,
and a path that must be a prefix; keys are tried in reverse order, which puts longer paths of one host first; Docker
Hub's old names count as ``docker.io``.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from wasilet_common.oci.reference import DEFAULT_REGISTRY, Reference

logger = logging.getLogger(__name__)

_HUB_KEY: Final = "index.docker.io"
_SECRET_KEYS: Final = {
    "kubernetes.io/dockerconfigjson": ".dockerconfigjson",
    "kubernetes.io/dockercfg": ".dockercfg",
}


@dataclass(frozen=True, kw_only=True)
class SecretSource:
    """Which Secret a credential stands in."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class Credential:
    """One entry of a docker config, of the pod's or its service account's pull secrets."""

    registry: str
    username: str = ""
    password: str = ""
    identity_token: str = ""
    source: SecretSource | None = field(default=None, compare=False)
    """None: it is the node's own. Two Secrets may hold one and the same login."""

    def __repr__(self) -> str:
        """Never shows a secret."""
        return f"Credential(registry={self.registry!r}, username={self.username!r})"


def from_secrets(secrets: Iterable[Mapping[str, Any]]) -> tuple[Credential, ...]:
    """All credentials of Secret objects (decoded JSON), in the secrets' order.

    Secrets of other types are skipped, as kubelet does; one that does not parse is skipped with a warning that names it
    and shows nothing of it.
    """
    credentials: list[Credential] = []
    for secret in secrets:
        key = _SECRET_KEYS.get(str(secret.get("type", "")))
        data = secret.get("data")
        encoded = data.get(key) if key is not None and isinstance(data, Mapping) else None
        if not isinstance(encoded, str) or not encoded:
            continue
        try:
            document = json.loads(base64.b64decode(encoded, validate=True))
            entries = document.get("auths", {}) if key == ".dockerconfigjson" else document
            source = _source(secret)
            credentials += [
                replace(_credential(str(registry), entry), source=source) for registry, entry in entries.items()
            ]
        except (ValueError, TypeError, AttributeError, RecursionError):
            metadata = secret.get("metadata")
            names = metadata if isinstance(metadata, Mapping) else {}
            logger.warning(
                "the pull secret %s/%s is not a valid docker config, and is not used",
                names.get("namespace"),
                names.get("name"),
            )
    return tuple(credentials)


def _source(secret: Mapping[str, Any]) -> SecretSource:
    metadata = secret.get("metadata")
    names = metadata if isinstance(metadata, Mapping) else {}
    return SecretSource(**{field: str(names.get(field) or "") for field in ("namespace", "name", "uid")})


def from_docker_config(file: Path) -> tuple[Credential, ...]:
    """The logins of a docker ``config.json``, as ``docker login`` writes it; none when there is no such file. What does
    not parse is left out with a warning that shows nothing of it."""
    try:
        auths = json.loads(file.read_bytes()).get("auths") or {}
        entries = [(str(registry), entry) for registry, entry in auths.items()]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("the logins in %s cannot be read (%s), and are not used", file, type(error).__name__)
        return ()
    found = []
    for registry, entry in entries:
        try:
            found.append(_credential(registry, entry))
        except (ValueError, TypeError, AttributeError):
            logger.warning("the login for %s in %s is not valid, and is not used", registry, file)
    return tuple(found)


def matching(reference: Reference, credentials: Iterable[Credential]) -> tuple[Credential, ...]:
    """Those that fit an image, most specific first; of one registry key, all of them in their order."""
    keyed = [(_key(credential.registry), credential) for credential in credentials if _useful(credential)]
    fitting = [(key, credential) for key, credential in keyed if _fits(key, reference)]
    if not fitting and reference.registry == DEFAULT_REGISTRY:
        fitting = [(key, credential) for key, credential in keyed if key == _HUB_KEY]
    # Stable, so the order of the pod's secrets decides among equals.
    return tuple(credential for _, credential in sorted(fitting, key=lambda pair: pair[0], reverse=True))


def _credential(registry: str, entry: Mapping[str, Any]) -> Credential:
    username, password = entry.get("username") or "", entry.get("password") or ""
    auth, identity_token = entry.get("auth") or "", entry.get("identitytoken") or ""
    if not all(isinstance(value, str) for value in (username, password, auth, identity_token)):
        raise TypeError("not a string")
    if auth:
        try:
            decoded = base64.b64decode("".join(auth.split()), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ValueError("auth is not base64") from error
        username, colon, password = decoded.partition(":")
        if not colon:
            raise ValueError("auth has no colon")
        password = password.rstrip("\0")
    return Credential(registry=registry, username=username, password=password, identity_token=identity_token)


def _useful(credential: Credential) -> bool:
    return bool(credential.username or credential.identity_token)


def _key(registry: str) -> str:
    """``host[:port][/path]``: without scheme, and ``/v1/`` or ``/v2/`` meaning the whole host."""
    for scheme in ("https://", "http://"):
        registry = registry.removeprefix(scheme)
    host, slash, path = registry.partition("/")
    path = slash + path
    if path.startswith(("/v1/", "/v2/")):
        path = path[3:]
    return host if path in {"", "/"} else f"{host}{path}"


def _fits(key: str, reference: Reference) -> bool:
    key_host, slash, key_path = key.partition("/")
    key_labels, key_port = _split_host(key_host)
    labels, port = _split_host(reference.registry)
    if key_port != port or len(key_labels) != len(labels):
        return False
    if not f"/{reference.repository}".startswith(slash + key_path):
        return False
    return all(_label_fits(glob, label) for glob, label in zip(key_labels, labels, strict=True))


def _label_fits(glob: str, label: str) -> bool:
    return fnmatch.fnmatchcase(label, glob)


def _split_host(host: str) -> tuple[Sequence[str], str]:
    if host.startswith("["):
        name, _, rest = host.partition("]")
        return (name,), rest.removeprefix(":")
    name, _, port = host.partition(":")
    return name.split("."), port
