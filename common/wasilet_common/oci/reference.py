"""Image references: how a pod names an image, taken apart and made canonical.

The grammar is that of github.com/distribution/reference, which kubelet and containerd use, with Docker's defaults:
``hello`` is ``docker.io/library/hello:latest``. A reference with a tag and a digest means the digest. This module
imports nothing that is slow to load, because the harness uses it too; the media types that the harness writes are
re-exported here.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Final

from wasilet_common.oci.mediatypes import CNCF_WASM_CONFIG, CNCF_WASM_LAYER, OCI_INDEX, OCI_MANIFEST, TITLE_ANNOTATION

__all__ = [
    "CNCF_WASM_CONFIG",
    "CNCF_WASM_LAYER",
    "OCI_INDEX",
    "OCI_MANIFEST",
    "TITLE_ANNOTATION",
    "InvalidReferenceError",
    "Reference",
    "is_digest",
    "is_loopback",
    "parse",
]

DEFAULT_REGISTRY: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
_LEGACY_DEFAULT_REGISTRY: Final = "index.docker.io"
_DOCKER_HUB_HOST: Final = "registry-1.docker.io"
_MAX_REPOSITORY_LENGTH: Final = 255

_DOMAIN_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_DOMAIN_LABEL}(?:\.{_DOMAIN_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?", re.ASCII)
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", re.ASCII)
_IDENTIFIER = re.compile(r"[a-f0-9]{64}", re.ASCII)


class InvalidReferenceError(ValueError):
    """An image name that does not parse: the waiting reason ``InvalidImageName``, kubelet's wording as the message."""


@dataclass(frozen=True)
class Reference:
    """A canonical image reference; ``tag`` is None only when ``digest`` is given without one."""

    registry: str
    """``docker.io``, or ``host[:port]`` as written."""

    repository: str
    """The path within the registry, as ``library/hello``."""

    tag: str | None
    digest: str | None

    @property
    def name(self) -> str:
        """``registry/repository``."""
        return f"{self.registry}/{self.repository}"

    @property
    def host(self) -> str:
        """``host[:port]`` of the registry's API; Docker Hub's differs from its name."""
        return _DOCKER_HUB_HOST if self.registry == DEFAULT_REGISTRY else self.registry

    @property
    def target(self) -> str:
        """What is asked of the registry: the digest where there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        """The form that containerd stores: a digest makes the tag drop out."""
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return f"{self.name}:{self.tag}"

    def at(self, digest: str) -> str:
        """``registry/repository@digest``, as in ``containerStatuses[].imageID``."""
        return f"{self.name}@{digest}"


def is_digest(text: str) -> bool:
    """Whether ``text`` is a digest of an algorithm that the node verifies (sha256, sha512)."""
    return _DIGEST.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether ``host[:port]`` can only be this machine: ``localhost``, 127.0.0.0/8 or ``[::1]``. No look-ups."""
    name = _without_port(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def parse(text: str) -> Reference:
    """Take a reference apart. Raises InvalidReferenceError with the message that kubelet would give."""
    try:
        return _parse(text)
    except InvalidReferenceError as error:
        raise InvalidReferenceError(f"couldn't parse image name {json.dumps(text)}: {error}") from None


def _parse(text: str) -> Reference:
    if _IDENTIFIER.fullmatch(text):
        raise InvalidReferenceError(
            f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings",
        )
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise InvalidReferenceError("invalid reference format")
    registry, remainder = _split_registry(rest)
    repository, colon, tag = remainder.partition(":")
    if repository.lower() != repository:
        raise InvalidReferenceError(
            f"invalid reference format: repository name ({repository}) must be lowercase",
        )
    if not _DOMAIN.fullmatch(registry) or not _REPOSITORY.fullmatch(repository):
        raise InvalidReferenceError("invalid reference format")
    if colon and not _TAG.fullmatch(tag):
        raise InvalidReferenceError("invalid reference format")
    if len(repository) > _MAX_REPOSITORY_LENGTH:
        raise InvalidReferenceError(f"repository name must not be more than {_MAX_REPOSITORY_LENGTH} characters")
    if not _usable_host(registry):
        raise InvalidReferenceError("invalid reference format")
    return Reference(
        registry=registry,
        repository=repository,
        tag=tag or (None if digest else DEFAULT_TAG),
        digest=digest or None,
    )


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and first == _LEGACY_DEFAULT_REGISTRY:
        first = DEFAULT_REGISTRY
    elif not slash or not (first == "localhost" or "." in first or ":" in first or first.lower() != first):
        first, rest = DEFAULT_REGISTRY, name
    if first == DEFAULT_REGISTRY and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _usable_host(registry: str) -> bool:
    name = _without_port(registry)
    port = registry[len(name) + 1 :]
    if port and (len(port) > 5 or not 0 < int(port) < 65536):
        return False
    if name.startswith("["):
        try:
            ipaddress.IPv6Address(name[1:-1])
        except ValueError:
            return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
