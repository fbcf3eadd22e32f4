"""Which serving certificate a node may have: the rules, without any I/O.

A Node's status proves nothing by itself, because a node writes its own: one that adds ``127.0.0.1``, the Service
``kubernetes`` or another node's address to it and then asks for a certificate could pose as them. So what is asked for
must be in the Node's status *and* be something that this Node can be alone:

- the only DNS name is the Node's own name, and not even that when it is a name of the API server or of a Service;
- an address is never unspecified, link-local, multicast, reserved, or of a Service range, for any caller;
- it is never loopback, an address of an API server, or an address of another Node, unless the harness gave that address
  to that node (:attr:`Policy.nodes`): on one machine nodes share an address with each other and with the control plane.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wasilet_common.addresses import forms, literal, names_this_machine, reserved

from wasilet.kube.client import KubeObject

SIGNER = "kubernetes.io/kubelet-serving"
USAGES = (
    frozenset({"digital signature", "server auth"}),
    frozenset({"digital signature", "key encipherment", "server auth"}),
)
MAX_REQUEST_BYTES = 65536
_NODE_PREFIX = "system:node:"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Verdict:
    """The outcome for one request. ``why`` is for people: the reason it was left alone, or what was approved."""

    approve: bool
    why: str
    pending: bool = False
    """Left alone for now: what is missing may come (the Node, or an address of it)."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the harness knows about the nodes of a cluster."""

    nodes: Mapping[str, frozenset[Address]] = field(default_factory=dict)
    """The nodes that it started or made a bootstrap file for, with the addresses that it vouches for: those of this
    machine for a node of this machine, none for one of another machine."""

    only_known: bool = False
    """Approve for these nodes only: in a cluster that is someone else's."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the cluster states about addresses that are not a node's to have."""

    service_ranges: frozenset[Network] = frozenset()
    api_servers: frozenset[Address] = frozenset()
    """Where API servers listen, the Service ``kubernetes`` included."""

    api_names: frozenset[str] = frozenset()
    """The names by which clients find an API server, in lower case: a Node may be called alike."""

    other_nodes: Mapping[Address, str] = field(default_factory=dict)
    """The name of a Node other than the requesting one, by each of its addresses."""


class _RefusalError(Exception):
    def __init__(self, why: str, *, pending: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.pending = pending


def is_open(csr: KubeObject) -> bool:
    """Whether a request is the signer's and still undecided."""
    status = csr.get("status") or {}
    return (
        (csr.get("spec") or {}).get("signerName") == SIGNER
        and not status.get("conditions")
        and not status.get("certificate")
    )


def requesting_node(csr: KubeObject) -> str:
    """The name of the node that asks; empty when the requester is no node."""
    spec = csr.get("spec") or {}
    username = str(spec.get("username") or "")
    if not username.startswith(_NODE_PREFIX) or "system:nodes" not in (spec.get("groups") or []):
        return ""
    return username.removeprefix(_NODE_PREFIX)


def judge(csr: KubeObject, node: KubeObject | None, *, policy: Policy, facts: Callable[[], Facts]) -> Verdict:
    """Apply the rules to an open request.

    ``node``: the Node object of the requester, None when there is none. ``facts`` is called only for a request that
    passes everything else; what it raises is the caller's.
    """
    try:
        return Verdict(approve=True, why=_checked(csr, node, policy, facts))
    except _RefusalError as refusal:
        return Verdict(approve=False, why=refusal.why, pending=refusal.pending)


def _checked(csr: KubeObject, node: KubeObject | None, policy: Policy, facts: Callable[[], Facts]) -> str:
    spec = csr.get("spec") or {}
    if spec.get("signerName") != SIGNER:
        raise _RefusalError(f"the signer is {spec.get('signerName')!r}")
    name = requesting_node(csr)
    if not name:
        raise _RefusalError(f"the requester {spec.get('username')!r} is no node")
    usages = frozenset(map(str, spec.get("usages") or []))
    if usages not in USAGES:
        raise _RefusalError(f"the usages are {', '.join(sorted(usages)) or 'none'}")
    dns, ips = _requested_names(str(spec.get("request") or ""), str(spec["username"]))
    if policy.only_known and name not in policy.nodes:
        # Pending, because `invoke bootstrap` may make it known.
        raise _RefusalError(f"Wasilet knows no node {name!r} in this cluster, which is not its own", pending=True)
    if node is None:
        raise _RefusalError(f"there is no Node {name!r}", pending=True)
    if node.get("metadata", {}).get("name") != name:
        raise _RefusalError(f"the Node is not {name!r}")
    _check_dns(dns, name)
    for ip in sorted(ips, key=str):
        _check_kind(ip, vouched=ip in policy.nodes.get(name, ()))
    if foreign := sorted(str(ip) for ip in ips - node_addresses(node)):
        raise _RefusalError(f"not an address of Node {name!r}: {', '.join(foreign)}", pending=True)
    known = facts()
    if name.lower() in known.api_names and dns:
        raise _RefusalError(f"the DNS name {name!r} is a name of the API server")
    _check_owner(ips, name, known, vouched=policy.nodes.get(name, frozenset()))
    return f"{name}: {', '.join([*sorted(dns), *sorted(str(ip) for ip in ips)])}"


def _check_dns(names: Iterable[str], node: str) -> None:
    for name in sorted(names):
        if name != node:
            raise _RefusalError(f"the DNS name {name!r} is not the name of Node {node!r}")
        if reason := _reserved_name(name):
            raise _RefusalError(f"the DNS name {name!r} is {reason}")


def _reserved_name(name: str) -> str:
    labels = name.lower().rstrip(".").split(".")
    if "*" in name:
        return "a wildcard"
    if literal(name) is not None:  # "127.1" and "0x7f000001" too: clients connect to them as addresses
        return "an IP address"
    if labels[-1] in {"localhost", "localdomain"} or labels[0] == "localhost" or names_this_machine(name):
        return "a name of every machine"
    if labels[0].startswith("kubernetes"):
        return "a name of the API server"
    return "a name of a Service" if "svc" in labels[1:] else ""


def _check_kind(ip: Address, *, vouched: bool) -> None:
    if (kind := reserved(ip)) == "a metadata service":
        raise _RefusalError(f"the address {ip} is that of a metadata service")
    if kind == "loopback" and not (vouched and ip.is_loopback):
        raise _RefusalError(f"the address {ip} is loopback")
    for seen in forms(ip):
        if seen.is_unspecified:
            raise _RefusalError(f"the address {ip} is unspecified")
        if seen.is_link_local or (isinstance(seen, ipaddress.IPv6Address) and seen.is_site_local):
            raise _RefusalError(f"the address {ip} is link-local")
        if seen.is_multicast:
            raise _RefusalError(f"the address {ip} is multicast")
        if not seen.is_loopback and (seen.is_reserved or (seen.version == 4 and int(seen) >> 24 == 0)):
            raise _RefusalError(f"the address {ip} is reserved")


def _check_owner(ips: Iterable[Address], name: str, facts: Facts, *, vouched: frozenset[Address]) -> None:
    for ip in sorted(ips, key=str):
        for seen in forms(ip):
            if any(seen in network for network in facts.service_ranges if network.version == seen.version):
                raise _RefusalError(f"the address {ip} is of the Service range")
            if ip in vouched:
                continue
            if seen in facts.api_servers:
                raise _RefusalError(f"the address {ip} is that of an API server")
            if owner := facts.other_nodes.get(seen):
                raise _RefusalError(
                    f"the address {ip} is that of Node {owner!r} too; when {name!r} runs on the same machine, make its "
                    f"bootstrap file with `invoke token create --node {name}`, or approve by hand: "
                    "`kubectl certificate approve`",
                    pending=True,
                )


def node_addresses(node: KubeObject) -> frozenset[Address]:
    """A Node's IP addresses, by its status."""
    ips: set[Address] = set()
    for entry in (node.get("status") or {}).get("addresses") or []:
        if entry.get("type") in {"InternalIP", "ExternalIP"} and (parsed := parsed_address(str(entry.get("address")))):
            ips.add(parsed)
    return frozenset(ips)


def parsed_address(text: str) -> Address | None:
    """An IP address; None for anything else."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def parsed_network(text: str) -> Network | None:
    """An IP network; None for anything else."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


# --- the request -----------------------------------------------------------------------------------------------------


def _requested_names(request: str, username: str) -> tuple[frozenset[str], frozenset[Address]]:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        pem = base64.b64decode(request, validate=True)
        if len(pem) > MAX_REQUEST_BYTES:
            raise _RefusalError("the request is too large")
        parsed = x509.load_pem_x509_csr(pem)
        if not parsed.is_signature_valid:
            raise _RefusalError("the request is not signed by the key it is for")
        _check_subject(parsed.subject, username)
        return _names_of(parsed)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType) as error:
        raise _RefusalError(f"the request cannot be read: {error}") from error
    except x509.DuplicateExtension as error:
        raise _RefusalError("an extension is there twice") from error


def _check_subject(subject: Any, username: str) -> None:
    from cryptography.x509.oid import NameOID

    found = sorted((attribute.oid.dotted_string, str(attribute.value)) for attribute in subject)
    wanted = sorted(
        [(NameOID.COMMON_NAME.dotted_string, username), (NameOID.ORGANIZATION_NAME.dotted_string, "system:nodes")]
    )
    if found != wanted:
        raise _RefusalError(f"the subject is {subject.rfc4514_string()!r}, not that of {username}")


def _names_of(request: Any) -> tuple[frozenset[str], frozenset[Address]]:
    from cryptography import x509

    dns: set[str] = set()
    ips: set[Address] = set()
    for extension in request.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            for name in value:
                if isinstance(name, x509.DNSName):
                    dns.add(name.value)
                elif isinstance(name, x509.IPAddress) and isinstance(
                    name.value, ipaddress.IPv4Address | ipaddress.IPv6Address
                ):
                    ips.add(name.value)
                else:
                    raise _RefusalError(f"a {type(name).__name__} is asked for")
        elif isinstance(value, x509.BasicConstraints):
            if value.ca:
                raise _RefusalError("an authority's certificate is asked for")
        elif not isinstance(value, x509.KeyUsage | x509.ExtendedKeyUsage):
            raise _RefusalError(f"extension {extension.oid.dotted_string} is asked for")
    if not dns and not ips:
        raise _RefusalError("no name and no address is asked for")
    return frozenset(dns), frozenset(ips)
