"""Which addresses a guest, or a registry's redirect, may lead a connection to: pure judgement, no look-ups.

A host that can be named in many ways is one host: decimal, hexadecimal and octal IPv4 (``2130706433``, ``0x7f.1``,
``0177.0.0.1``), a trailing dot, brackets, a zone (``fe80::1%eth0``), full-width digits, and IPv6 that carries IPv4
inside (mapped, compatible, translated, NAT64, 6to4, Teredo, ISATAP). All of them are brought to one form first, and an
address is judged together with every IPv4 address that it carries, since a translator on the way may unwrap it.

A name says nothing about where it leads. Its caller resolves it, asks again for every address, and connects to the
address that was asked about: the operator of the name's DNS could answer a second look-up differently.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

KUBELET_PORTS = frozenset({10250, 10255})
"""kubelet's API and its old read-only port, on any node."""

_ATON = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+)){0,3}")
"""What the C library's ``inet_aton`` may take for an address; it would also take one followed by a space."""

_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
"""Metadata services of clouds that are not link-local: Alibaba Cloud, Azure, Oracle Cloud, AWS by IPv6."""

_HOSTS_FILE = frozenset(
    {
        *("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"),
        *("localhost4", "localhost4.localdomain4", "localhost6", "localhost6.localdomain6"),
    }
)
"""Names of loopback in the hosts files of Debian's and Red Hat's families."""

_LAST_32_BITS = tuple(
    ipaddress.IPv6Network(text)
    for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
"""IPv4-compatible, IPv4-mapped, IPv4-translated (RFC 2765), NAT64 (RFC 6052), NAT64 for local use (RFC 8215)."""


_REFUSED = {
    "loopback": "the node itself (loopback)",
    "link-local": "a link-local address",
    "multicast": "a multicast address",
    "unspecified": "the node itself (an unspecified address)",
    "broadcast": "a broadcast address",
    "a metadata service": "a metadata service",
}


class Reach(IntEnum):
    """How near an address is; a larger number is nearer, and more can be reached there that no one else reaches."""

    PUBLIC = 0
    PRIVATE = 1
    """RFC 1918, unique local, shared and other ranges that are not of the Internet."""

    LOOPBACK = 2
    LINK_LOCAL = 3
    """With metadata services, multicast, broadcast and unspecified addresses."""


def literal(host: str) -> Address | None:
    """The address that a host is written as, in any spelling that a resolver takes without asking; None: a name."""
    text = unicodedata.normalize("NFKC", host).replace("\u3002", ".").strip("[]").partition("%")[0].rstrip(".")
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    if not _ATON.fullmatch(text):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except (OSError, ValueError):
        return None


def names_this_machine(host: str) -> bool:
    """``localhost`` and what is below it (RFC 6761), and every spelling of a loopback or unspecified address."""
    name = unicodedata.normalize("NFKC", host).replace("\u3002", ".").rstrip(".").lower()
    if name in _HOSTS_FILE or name.endswith(".localhost"):
        return True
    address = literal(host)
    return address is not None and reserved(address) in {"loopback", "unspecified"}


def forms(address: Address) -> tuple[Address, ...]:
    """The address itself, then the IPv4 addresses that it carries."""
    if isinstance(address, ipaddress.IPv4Address) or address in {_V6_UNSPECIFIED, _V6_LOOPBACK}:
        return (address,)
    number = int(address)
    carried = [number & 0xFFFFFFFF] if any(address in network for network in _LAST_32_BITS) else []
    if address.sixtofour is not None:
        carried.append(int(address.sixtofour))
    if address.teredo is not None:
        carried += [int(part) for part in address.teredo]
    if number >> 32 & 0xFCFFFFFF == 0x00005EFE:  # ISATAP, RFC 5214: the interface's part of the address
        carried.append(number & 0xFFFFFFFF)
    return (address, *(ipaddress.IPv4Address(number) for number in carried))


_V6_UNSPECIFIED = ipaddress.IPv6Address("::")
_V6_LOOPBACK = ipaddress.IPv6Address("::1")


def reserved(address: Address) -> str:
    """``loopback``, ``link-local``, ``multicast``, ``unspecified``, ``broadcast`` or ``a metadata service``; empty for
    all others."""
    for form in forms(address):
        if form.is_loopback:
            return "loopback"
        if form.is_link_local or (isinstance(form, ipaddress.IPv6Address) and form.is_site_local):
            return "link-local"
        if form.is_multicast:
            return "multicast"
        if form.is_unspecified or form in _THIS_NETWORK:
            return "unspecified"
        if form == _BROADCAST:
            return "broadcast"
        if form in _METADATA:
            return "a metadata service"
    return ""


def reach(address: Address) -> Reach:
    """The nearest of the address's forms."""
    kind = reserved(address)
    if kind:
        return Reach.LOOPBACK if kind == "loopback" else Reach.LINK_LOCAL
    # Of one that carries others those alone count: Python calls some of the wrapping ranges private.
    outer, *carried = forms(address)
    return Reach.PUBLIC if all(form.is_global for form in carried or [outer]) else Reach.PRIVATE


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What guests may not connect to, beside reserved addresses."""

    own: frozenset[Address] = frozenset()
    """The node's addresses."""

    endpoints: frozenset[tuple[str, int]] = frozenset()
    """The API server: names in lower case, or addresses as ``ipaddress`` writes them, each with its port."""

    ports: frozenset[int] = KUBELET_PORTS
    """Refused on every address."""

    def refusal(self, host: str, port: int) -> str:
        """Why a connection is refused, to be read after "it is"; empty: nothing is against it.

        A name must be asked about again with each address that it resolves to.
        """
        if port in self.ports:
            return f"a kubelet's port ({port})"
        address = literal(host)
        if address is None:
            name = host.rstrip(".").lower()
            if names_this_machine(name):
                return "the node itself (loopback)"
            return "the cluster's API server" if (name, port) in self.endpoints else ""
        if kind := reserved(address):
            return _REFUSED[kind]
        for form in forms(address):
            if form in self.own:
                return "an address of the node itself"
            if (str(form), port) in self.endpoints:
                return "the cluster's API server"
        return ""


def guard(*, own: Iterable[str], endpoints: Iterable[tuple[str, int]], ports: Iterable[int]) -> Guard:
    """From texts, as they come over a wire; ``own`` that are no addresses are left out."""
    addresses = (literal(text) for text in own)
    return Guard(
        own=frozenset(form for address in addresses if address is not None for form in forms(address)),
        endpoints=frozenset((_canonical(host), port) for host, port in endpoints),
        ports=KUBELET_PORTS | frozenset(ports),
    )


def _canonical(host: str) -> str:
    address = literal(host)
    return host.rstrip(".").lower() if address is None else str(address)
