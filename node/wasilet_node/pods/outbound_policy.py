"""The operator's own rule of outbound HTTP, above what a pod's annotation asks: which namespace may call what.

A file, YAML or JSON, read again whenever a pod with the annotation starts. Namespaces that it does not name have the
entry ``"*"``, and nothing where there is none::

    team-a: [https://api.example, http://192.0.2.1:8080]
    trusted: "*"      # whatever the annotation lists
    "*": []
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wasilet_common.kube_yaml import YamlError, load

from wasilet_node.pods import origins
from wasilet_node.pods.origins import Origin, OriginError

ALL = "*"
_MAX_BYTES = 1024 * 1024

Policy = Mapping[str, frozenset[Origin] | None]
"""Origins by namespace; None: all."""


class OutboundPolicyError(ValueError):
    """The file cannot be used; the text says where and why."""


def read(path: Path) -> Policy:
    """Raises OutboundPolicyError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise OutboundPolicyError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise OutboundPolicyError(f"{path} is longer than {_MAX_BYTES} bytes")
    try:
        found = load(data)
    except YamlError as error:
        raise OutboundPolicyError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise OutboundPolicyError(f"{path} is no mapping of namespaces to origins")
    return {str(namespace): _origins(path, str(namespace), listed) for namespace, listed in found.items()}


def allows(policy: Policy, namespace: str, origin: Origin) -> bool:
    """Whether pods of a namespace may call an origin, as ``origins.key`` writes it."""
    listed = policy[namespace] if namespace in policy else policy.get(ALL, frozenset())
    return listed is None or origin in listed


def _origins(path: Path, namespace: str, listed: object) -> frozenset[Origin] | None:
    if listed == ALL:
        return None
    if not isinstance(listed, list):
        raise OutboundPolicyError(f'{path}: {namespace} is neither a list of origins nor "*"')
    return frozenset(_origin(path, namespace, entry) for entry in listed)


def _origin(path: Path, namespace: str, entry: object) -> Origin:
    if not isinstance(entry, str):
        raise OutboundPolicyError(f"{path}: {namespace}: {entry!r} is no origin")
    try:
        return origins.key(origins.checked(entry))
    except OriginError as error:
        raise OutboundPolicyError(f"{path}: {namespace}: no origin: {entry!r} {error}") from error
