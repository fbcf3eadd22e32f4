"""The downward API: fields of a pod and resources of its containers, as text.

Shared by environment variables and by downwardAPI volumes, which differ: only variables may name ``spec`` and
``status`` fields (the API server enforces the same lists). Semantics and messages are those of kubelet's
``pkg/fieldpath``, ``pkg/apis/core/pods`` and ``pkg/api/v1/resource``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wasilet_common import quantity

Pod = dict[str, Any]
Container = dict[str, Any]

_QUALIFIED_NAME = re.compile(
    r"(?:[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
)
_MAX_NAME = 63
_MAX_PREFIX = 253
_MAX_HOSTNAME = 63
_MAX_KERNEL_HOSTNAME = 64
CLUSTER_DOMAIN = "cluster.local"
_ENVIRONMENT_FIELDS = frozenset(
    {"spec.nodeName", "spec.serviceAccountName", "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs"}
)
_DEFAULTED = ("cpu", "memory", "ephemeral-storage")
_POD_LEVEL = ("cpu", "memory")


class FieldError(ValueError):
    """A field or resource cannot be read; the message is kubelet's."""


def _quote(text: str) -> str:
    """As Go's ``strconv.Quote``, which users of label files have parsers for."""
    escapes = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v"}
    escapes |= {'"': r"\"", "\\": r"\\"}
    parts: list[str] = []
    for character in text:
        if character in escapes:
            parts.append(escapes[character])
        elif character.isprintable():
            parts.append(character)
        elif ord(character) < 0x80:
            parts.append(f"\\x{ord(character):02x}")
        elif ord(character) < 0x10000:
            parts.append(f"\\u{ord(character):04x}")
        else:
            parts.append(f"\\U{ord(character):08x}")
    return '"' + "".join(parts) + '"'


def format_map(values: Mapping[str, str] | None) -> str:
    """``key="value"`` lines, sorted, without a newline at the end."""
    return "\n".join(f"{key}={_quote(text)}" for key, text in sorted((values or {}).items()))


def split_subscript(path: str) -> tuple[str, str | None]:
    """``metadata.labels['x']`` as ``("metadata.labels", "x")``; without a subscript the second is None."""
    if path.endswith("']"):
        name, opener, key = path[:-2].partition("['")
        if opener and name:
            return name, key
    return path, None


def _is_qualified(name: str) -> bool:
    prefix, slash, last = name.rpartition("/")
    if len(last) > _MAX_NAME or (slash and len(prefix) > _MAX_PREFIX):
        return False
    return _QUALIFIED_NAME.fullmatch(name) is not None


def metadata_field(pod: Pod, path: str) -> str:
    """A field of ``metadata``, the only ones that volumes may name. A label that is not set reads as ``""``.
    Raises FieldError."""
    metadata = pod.get("metadata", {})
    name, key = split_subscript(path)
    if key is not None:
        if name not in {"metadata.annotations", "metadata.labels"}:
            raise FieldError(f'fieldPath "{path}" does not support subscript')
        if not _is_qualified(key.lower() if name == "metadata.annotations" else key):
            raise FieldError(f"invalid key subscript in {path}: {key!r} is not a qualified name")
        return str((metadata.get(name.removeprefix("metadata.")) or {}).get(key, ""))
    match path:
        case "metadata.annotations" | "metadata.labels":
            return format_map(metadata.get(path.removeprefix("metadata.")))
        case "metadata.name" | "metadata.namespace" | "metadata.uid":
            return str(metadata.get(path.removeprefix("metadata."), ""))
    raise FieldError(f"unsupported fieldPath: {path}")


def environment_field(
    pod: Pod, path: str, *, pod_ips: Sequence[str], host_ips: Sequence[str], api_version: str = "v1"
) -> str:
    """A field that an environment variable may name. Raises FieldError."""
    if api_version not in {"", "v1"}:
        raise FieldError(f"unsupported pod version: {api_version}")
    name, key = split_subscript(path)
    if key is not None and name not in {"metadata.annotations", "metadata.labels"}:
        raise FieldError(f"field label does not support subscript: {path}")
    spec = pod.get("spec", {})
    match path:
        case "spec.nodeName" | "spec.host":
            return str(spec.get("nodeName", ""))
        case "spec.serviceAccountName":
            return str(spec.get("serviceAccountName", ""))
        case "status.hostIP":
            return host_ips[0] if host_ips else ""
        case "status.hostIPs":
            return ",".join(host_ips)
        case "status.podIP":
            return pod_ips[0] if pod_ips else ""
        case "status.podIPs":
            return ",".join(pod_ips)
    if not path.startswith("metadata."):
        raise FieldError(f"field label not supported: {path}")
    return metadata_field(pod, path)


def _find_container(pod: Pod, name: str) -> Container:
    spec = pod.get("spec", {})
    for container in [*spec.get("containers", []), *spec.get("initContainers", [])]:
        if container.get("name") == name:
            return dict(container)
    raise FieldError(f"container {name} not found")


def resource_field(
    pod: Pod, reference: Mapping[str, Any], allocatable: Mapping[str, str], *, container: Container | None = None
) -> str:
    """``resourceFieldRef``: a limit or request divided by ``divisor``, rounded up.

    ``container`` is the one whose variable it is, taken when the reference names none (volumes must name one). A limit
    of cpu, memory or ephemeral-storage that is not set reads as the pod's (KEP-2837) or else the node's allocatable.
    Raises FieldError.
    """
    name = reference.get("containerName") or ""
    if name or container is None:
        container = _find_container(pod, str(name))
    resources = container.get("resources") or {}
    resource = str(reference.get("resource", ""))
    kind, _, what = resource.partition(".")
    if kind not in {"limits", "requests"} or not (what in _DEFAULTED or what.startswith("hugepages-")):
        raise FieldError(f"unsupported container resource : {resource}")
    try:
        amount = quantity.parse(quantity.lookup(resources.get(kind), what))
        if kind == "limits" and what in _POD_LEVEL and amount == 0:
            pod_level = (pod.get("spec", {}).get("resources") or {}).get("limits")
            amount = quantity.parse(quantity.lookup(pod_level, what))
        if kind == "limits" and what in _DEFAULTED and amount == 0:
            amount = quantity.parse(quantity.lookup(allocatable, what))
        divisor = quantity.parse(reference.get("divisor") or "0") or quantity.parse("1")
    except quantity.QuantityError as error:
        raise FieldError(f"{resource}: {error}") from error
    # kubelet divides thousandths for cpu and whole units for the rest, each rounded up before the division.
    scale = 1000 if what == "cpu" else 1
    denominator = math.ceil(divisor * scale)
    if denominator == 0:
        raise FieldError(f"{resource}: divisor {reference.get('divisor')} is too small")
    return str(math.ceil(math.ceil(amount * scale) / denominator))


def hostname(pod: Pod) -> str:
    """The pod's host name: ``spec.hostnameOverride``, ``spec.hostname`` or its name, cut to 63 characters as kubelet
    cuts it. Source: ``GeneratePodHostNameAndDomain``."""
    spec = pod.get("spec", {})
    name = str(spec.get("hostnameOverride") or spec.get("hostname") or pod.get("metadata", {}).get("name", ""))
    return name if len(name) <= _MAX_HOSTNAME else name[:_MAX_HOSTNAME].rstrip("-.")


def process_hostname(pod: Pod, cluster_domain: str = CLUSTER_DOMAIN) -> str:
    """The name of the host that a process of the pod is given: the pod's, the full one with ``setHostnameAsFQDN``, the
    machine's own with ``hostNetwork``. Raises FieldError when no kernel would take it (``GetNodenameForKernel``)."""
    spec = pod.get("spec", {})
    if spec.get("hostNetwork"):
        return os.uname().nodename
    name, domain = hostname(pod), host_domain(pod, cluster_domain)
    if not domain or not spec.get("setHostnameAsFQDN"):
        return name
    full = f"{name}.{domain}"
    if len(full) > _MAX_KERNEL_HOSTNAME:
        raise FieldError(
            f"failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long "
            f"({_MAX_KERNEL_HOSTNAME} characters is the max, {len(full)} characters requested)"
        )
    return full


def host_domain(pod: Pod, cluster_domain: str) -> str:
    """``<subdomain>.<namespace>.svc.<cluster domain>`` when the pod has a subdomain, else ``""``."""
    spec = pod.get("spec", {})
    if spec.get("hostnameOverride") or not spec.get("subdomain"):
        return ""
    return f"{spec['subdomain']}.{pod['metadata']['namespace']}.svc.{cluster_domain}"
