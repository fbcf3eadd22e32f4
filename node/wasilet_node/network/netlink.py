"""The few rtnetlink requests that a pod network needs: links, addresses, routes.

Written here because it is on the path of every pod's start: one veth with its address takes 1.5 ms this way, 23 ms by
pyroute2 (and 134 ms to import it), 10 ms by ``ip`` (measured). A socket belongs to the network namespace that its
thread was in when it was opened, for as long as it lives; so a ``Netlink`` is a handle on one namespace.

Numbers and layouts are those of ``linux/rtnetlink.h``, ``linux/if_link.h`` and ``linux/veth.h``; integers are in the
machine's own byte order.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_NAME_LENGTH = 15
"""IFNAMSIZ less the final zero."""

_TIMEOUT_SECONDS = 10.0
"""A kernel that deletes hundreds of namespaces holds the rtnetlink lock for up to a third of a second (measured)."""

_RECEIVE_BYTES = 65536
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BBHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NDA_DST = 1
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_ATTRIBUTE = struct.Struct("=HH")

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_GETADDR, _RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE, _RTM_DELNEIGH = 20, 22, 24, 25, 26, 29
_REQUEST, _ACK = 1, 4
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_DUMP = 0x300

_IFF_UP = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 10, 18, 28
_IFLA_AF_SPEC, _IFLA_INET_CONF, _DEVCONF_FORWARDING = 26, 1, 1
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_RT_TABLE_MAIN, _RT_TABLE_LOCAL, _RTPROT_STATIC = 254, 255, 4
_RTN_UNICAST, _RTN_LOCAL, _RTN_UNREACHABLE = 1, 2, 7
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST, _SCOPE_NOWHERE = 0, 253, 254, 255
_RTNH_F_ONLINK = 4
_TYPE_MASK = 0x3FFF

_TC = struct.Struct("=BBHiIII")
_RTM_NEWQDISC, _RTM_NEWTFILTER, _RTM_DELTFILTER = 36, 44, 45
_TCA_KIND, _TCA_OPTIONS = 1, 2
_CLSACT_HANDLE, _CLSACT_PARENT, _INGRESS_PARENT = 0xFFFF0000, 0xFFFFFFF1, 0xFFFFFFF2
_ETH_P_IP = 0x0800
_TCA_U32_SEL, _TCA_U32_ACT, _TC_U32_TERMINAL = 5, 7, 1
_U32_SELECTOR = struct.Struct("!BBBxHHhhI")
_U32_KEY = struct.Struct("!4s4sii")
_IP_DESTINATION_OFFSET = 16
_TCA_ACT_KIND, _TCA_ACT_OPTIONS, _TCA_MIRRED_PARMS = 1, 2, 2
_MIRRED = struct.Struct("=IIiiiiI")
_TC_ACT_STOLEN, _TCA_EGRESS_REDIR = 4, 1


class NetlinkError(OSError):
    """The kernel refused a request; the text says which."""


class NetlinkGoneError(NetlinkError):
    """What it was about is not there (any longer)."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route of the main table. ``destination`` of ``0.0.0.0/0``: the default route."""

    destination: IPNetwork
    gateway: IPAddress | None
    interface_index: int


class Netlink:
    """Requests to one network namespace: that of the calling thread at the time this is made."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        """Close it when it is no longer needed."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    # ---- links

    def add_bridge(self, name: str, *, hardware_address: bytes = b"") -> None:
        """A bridge, down. Without a ``hardware_address`` of its own it has the lowest of its ports', hence another one
        whenever a lower one comes. Raises NetlinkError (FileExistsError's number when the name is taken)."""
        kind = _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, b"bridge"))
        if hardware_address:
            kind += _attribute(_IFLA_ADDRESS, hardware_address)
        self._request(_RTM_NEWLINK, _CREATE | _EXCLUSIVE, _link() + _name(name) + kind, f"make bridge {name}")

    def add_veth(
        self, name: str, *, peer: str, peer_namespace: int, master: int = 0, mtu: int = 0, hardware_address: bytes = b""
    ) -> None:
        """A pair of interfaces: ``name`` here, up, a port of the bridge with index ``master``; ``peer`` in the
        namespace of that descriptor, down. ``hardware_address``: six bytes, of both. Raises NetlinkError."""
        size = _attribute(_IFLA_MTU, _u32(mtu)) if mtu else b""
        if hardware_address:
            size += _attribute(_IFLA_ADDRESS, hardware_address)
        other = _link() + _name(peer) + size + _attribute(_IFLA_NET_NS_FD, _u32(peer_namespace))
        info = _attribute(_IFLA_INFO_KIND, b"veth") + _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, other))
        body = _link(up=True) + _name(name) + size
        if master:
            body += _attribute(_IFLA_MASTER, _u32(master))
        self._request(_RTM_NEWLINK, _CREATE | _EXCLUSIVE, body + _attribute(_IFLA_LINKINFO, info), f"make veth {name}")

    def set_up(self, index: int) -> None:
        """Bring an interface up. Raises NetlinkError."""
        self._request(_RTM_NEWLINK, 0, _link(index, up=True), f"bring up interface {index}")

    def set_master(self, index: int, master: int) -> None:
        """Make an interface a port of the bridge with index ``master``; idempotent. Raises NetlinkError."""
        body = _link(index, up=True) + _attribute(_IFLA_MASTER, _u32(master))
        self._request(_RTM_NEWLINK, 0, body, f"make interface {index} a port of interface {master}")

    def set_forwarding(self, index: int) -> None:
        """Let IPv4 packets that come in by this interface go on to others. Raises NetlinkError."""
        settings = _attribute(_IFLA_INET_CONF, _attribute(_DEVCONF_FORWARDING, _u32(1)))
        body = _link(index) + _attribute(_IFLA_AF_SPEC, _attribute(socket.AF_INET, settings))
        self._request(_RTM_SETLINK, 0, body, f"forward from interface {index}")

    def delete_link(self, index: int) -> None:
        """Remove an interface; waits 14 to 20 ms for the kernel. Raises NetlinkError."""
        self._request(_RTM_DELLINK, 0, _link(index), f"remove interface {index}")

    def index_of(self, name: str) -> int | None:
        """The index of an interface of this namespace; None: there is none of that name. Raises NetlinkError."""
        return next((index for index, found in self.links() if found == name), None)

    def require(self, name: str) -> int:
        """As ``index_of``. Raises NetlinkError when there is none."""
        index = self.index_of(name)
        if index is None:
            raise NetlinkError(errno.ENODEV, f"there is no interface {name}")
        return index

    def links(self) -> list[tuple[int, str]]:
        """Index and name of every interface. Raises NetlinkError."""
        found = []
        for body in self._dump(_RTM_GETLINK, _link(), "list interfaces"):
            _, _, _, index, _, _ = _LINK.unpack_from(body)
            name = _attributes(body[_LINK.size :]).get(_IFLA_IFNAME, b"")
            found.append((index, name.rstrip(b"\0").decode(errors="replace")))
        return found

    # ---- addresses and routes

    def add_address(self, index: int, address: IPAddress, *, prefix: int, peer: IPAddress | None = None) -> None:
        """Give an interface an address; ``peer``: of the other end of a point-to-point link. Raises NetlinkError."""
        body = _ADDRESS.pack(_family(address), prefix, 0, _SCOPE_UNIVERSE, index)
        body += _attribute(_IFA_LOCAL, address.packed) + _attribute(_IFA_ADDRESS, (peer or address).packed)
        self._request(_RTM_NEWADDR, _CREATE | _REPLACE, body, f"give interface {index} the address {address}")

    def add_route(
        self, destination: IPNetwork, *, gateway: IPAddress | None = None, index: int, replace: bool = False
    ) -> None:
        """A route through an interface; with a ``gateway``, that is taken to be on the link. Raises NetlinkError."""
        scope = _SCOPE_UNIVERSE if gateway is not None else _SCOPE_LINK
        flags = _REPLACE if replace else _EXCLUSIVE
        self._add_route((_RT_TABLE_MAIN, scope, _RTN_UNICAST), destination, gateway, index, flags)

    def add_local_route(self, destination: IPNetwork, *, gateway: IPAddress | None = None, index: int) -> None:
        """A route of the table that comes before the main one. Without a ``gateway`` every address of ``destination``
        is one of this namespace's own; the most specific route counts, as in every table. Raises NetlinkError."""
        place = (_SCOPE_UNIVERSE, _RTN_UNICAST) if gateway is not None else (_SCOPE_HOST, _RTN_LOCAL)
        self._add_route((_RT_TABLE_LOCAL, *place), destination, gateway, index, _EXCLUSIVE)

    def have_local_address(self, address: IPAddress, *, index: int) -> None:
        """Let an address be one of this namespace's own without giving it to an interface: answering for one of many
        costs no list of them. Idempotent. Raises NetlinkError."""
        try:
            self.add_local_route(ipaddress.ip_network(address), index=index)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise

    def forget_local_address(self, address: IPAddress, *, index: int) -> None:
        """The opposite. Idempotent. Raises NetlinkError."""
        body = _route((_RT_TABLE_LOCAL, _SCOPE_HOST, _RTN_LOCAL), ipaddress.ip_network(address), None, index)
        try:
            self._request(_RTM_DELROUTE, 0, body, f"forget the address {address}")
        except NetlinkError as error:
            if error.errno != errno.ESRCH:
                raise

    def forget_neighbour(self, address: IPAddress, *, index: int) -> None:
        """Ask again, at the next packet, who has an address on the link of an interface. Idempotent. Raises
        NetlinkError."""
        body = _NEIGHBOUR.pack(_family(address), index, 0, 0, 0) + _attribute(_NDA_DST, address.packed)
        try:
            self._request(_RTM_DELNEIGH, 0, body, f"forget who has {address}")
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise

    def _add_route(
        self, place: tuple[int, int, int], destination: IPNetwork, gateway: IPAddress | None, index: int, flags: int
    ) -> None:
        body = _route(place, destination, gateway, index)
        self._request(_RTM_NEWROUTE, _CREATE | flags, body, f"add a route to {destination}")

    def remove_route(self, route: Route) -> None:
        """Take a route of the main table away. Raises NetlinkError; NetlinkGoneError when it is not there."""
        destination = route.destination
        body = _ROUTE.pack(
            _family(destination.network_address), destination.prefixlen, 0, 0, _RT_TABLE_MAIN, 0, _SCOPE_NOWHERE, 0, 0
        )
        body += _attribute(_RTA_DST, destination.network_address.packed)
        body += _attribute(_RTA_OIF, _u32(route.interface_index))
        self._request(_RTM_DELROUTE, 0, body, f"remove the route to {destination}")

    def refuse(self, destination: IPNetwork) -> None:
        """Have no route to a network but more specific ones: what is sent there is refused at once. Idempotent. Raises
        NetlinkError."""
        body = _ROUTE.pack(
            _family(destination.network_address), destination.prefixlen, 0, 0,
            _RT_TABLE_MAIN, _RTPROT_STATIC, _SCOPE_UNIVERSE, _RTN_UNREACHABLE, 0,
        )  # fmt: skip
        body += _attribute(_RTA_DST, destination.network_address.packed)
        self._request(_RTM_NEWROUTE, _CREATE | _REPLACE, body, f"refuse {destination}")

    def addresses(self) -> frozenset[ipaddress.IPv4Address]:
        """The IPv4 addresses of all interfaces. Raises NetlinkError."""
        found = set()
        for body in self._dump(_RTM_GETADDR, _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0), "list addresses"):
            attributes = _attributes(body[_ADDRESS.size :])
            data = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if data is not None and len(data) == 4:
                found.add(ipaddress.IPv4Address(data))
        return frozenset(found)

    def routes(self) -> list[Route]:
        """The IPv4 routes of the main table. Raises NetlinkError."""
        found = []
        body = _ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        for answer in self._dump(_RTM_GETROUTE, body, "list routes"):
            family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(answer)
            attributes = _attributes(answer[_ROUTE.size :])
            if _RTA_TABLE in attributes:
                (table,) = struct.unpack("=I", attributes[_RTA_TABLE])
            if family != socket.AF_INET or table != _RT_TABLE_MAIN or kind != _RTN_UNICAST:
                continue
            address = ipaddress.IPv4Address(attributes.get(_RTA_DST, bytes(4)))
            gateway = attributes.get(_RTA_GATEWAY)
            (index,) = struct.unpack("=I", attributes.get(_RTA_OIF, bytes(4)))
            found.append(
                Route(
                    destination=ipaddress.IPv4Network((address, length)),
                    gateway=ipaddress.IPv4Address(gateway) if gateway else None,
                    interface_index=index,
                )
            )
        return found

    # ---- traffic control

    def take_ingress(self, index: int) -> None:
        """Let what comes in by an interface be redirected; idempotent. Raises NetlinkError."""
        body = _TC.pack(socket.AF_UNSPEC, 0, 0, index, _CLSACT_HANDLE, _CLSACT_PARENT, 0)
        body += _attribute(_TCA_KIND, b"clsact\0")
        try:
            self._request(_RTM_NEWQDISC, _CREATE | _EXCLUSIVE, body, f"classify what interface {index} takes in")
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise

    def redirect(self, index: int, destination: ipaddress.IPv4Network, *, to: int, priority: int) -> None:
        """Send what comes in by an interface for ``destination`` out by the interface ``to``, past the packet filter
        and the routes; the frame stays as it is. Raises NetlinkError where the kernel has no cls_u32 or act_mirred."""
        mirred = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, to)
        action = _attribute(_TCA_ACT_KIND, b"mirred\0") + _attribute(
            _TCA_ACT_OPTIONS, _attribute(_TCA_MIRRED_PARMS, mirred)
        )
        selector = _U32_SELECTOR.pack(_TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _U32_KEY.pack(
            destination.netmask.packed, destination.network_address.packed, 0, 0
        )
        # The offset of a key is in the machine's byte order, its value in the network's.
        selector = selector[:-8] + struct.pack("=ii", _IP_DESTINATION_OFFSET, 0)
        options = _attribute(_TCA_U32_SEL, selector) + _attribute(_TCA_U32_ACT, _attribute(1, action))
        body = _filter(index, priority) + _attribute(_TCA_KIND, b"u32\0") + _attribute(_TCA_OPTIONS, options)
        self._request(_RTM_NEWTFILTER, _CREATE | _EXCLUSIVE, body, f"redirect {destination} from interface {index}")

    def forget_redirects(self, index: int, *, priority: int) -> None:
        """Remove those of an interface with this priority; idempotent. Raises NetlinkError."""
        try:
            self._request(_RTM_DELTFILTER, 0, _filter(index, priority), f"forget redirects of interface {index}")
        except NetlinkError as error:
            if error.errno not in {errno.ENOENT, errno.EINVAL}:  # none there; nothing is classified there
                raise

    # ---- messages

    def _request(self, kind: int, flags: int, body: bytes, what: str) -> None:
        self._send(kind, flags | _ACK, body, what)
        for answer, data in self._receive(what):
            if answer == _NLMSG_ERROR:
                _raise_for(data, what)
                return

    def _dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        """All of it: while a dump is under way its socket can begin no other."""
        self._send(kind, _DUMP, body, what)
        found: list[bytes] = []
        while True:
            for answer, data in self._receive(what):
                if answer == _NLMSG_DONE:
                    return found
                if answer == _NLMSG_ERROR:
                    _raise_for(data, what)
                    return found
                found.append(data)

    def _send(self, kind: int, flags: int, body: bytes, what: str) -> None:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0)
        try:
            self._socket.send(header + body)
        except OSError as error:
            raise NetlinkError(error.errno, f"cannot {what}: {error.strerror}") from error

    def _receive(self, what: str) -> Iterator[tuple[int, bytes]]:
        """The messages of one datagram that answer the last request."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise NetlinkError(None, f"cannot {what}: the kernel did not answer in {_TIMEOUT_SECONDS:g} s") from None
        except OSError as error:
            raise NetlinkError(error.errno, f"cannot {what}: {error.strerror}") from error
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size:
                return
            if sequence == self._sequence:
                yield kind, data[offset + _HEADER.size : offset + length]
            offset += _aligned(length)


def _route(place: tuple[int, int, int], destination: IPNetwork, gateway: IPAddress | None, index: int) -> bytes:
    table, scope, kind = place
    body = _ROUTE.pack(
        _family(destination.network_address), destination.prefixlen, 0, 0,
        table, _RTPROT_STATIC, scope, kind,
        _RTNH_F_ONLINK if gateway is not None else 0,
    )  # fmt: skip
    if destination.prefixlen:
        body += _attribute(_RTA_DST, destination.network_address.packed)
    if gateway is not None:
        body += _attribute(_RTA_GATEWAY, gateway.packed)
    return body + _attribute(_RTA_OIF, _u32(index))


def _raise_for(data: bytes, what: str) -> None:
    (number,) = struct.unpack_from("=i", data)
    if number:
        kind = NetlinkGoneError if -number in {errno.ENODEV, errno.ESRCH} else NetlinkError
        raise kind(-number, f"cannot {what}: {os.strerror(-number)}")


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(_aligned(length) - length)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)
    return found


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


def _filter(index: int, priority: int) -> bytes:
    return _TC.pack(socket.AF_UNSPEC, 0, 0, index, 0, _INGRESS_PARENT, priority << 16 | socket.htons(_ETH_P_IP))


def _link(index: int = 0, *, up: bool = False) -> bytes:
    flag = _IFF_UP if up else 0
    return _LINK.pack(socket.AF_UNSPEC, 0, 0, index, flag, flag)


def _name(name: str) -> bytes:
    if not 0 < len(name.encode()) <= MAX_NAME_LENGTH:
        raise ValueError(f"{name!r} is no name for an interface: 1 to {MAX_NAME_LENGTH} bytes")
    return _attribute(_IFLA_IFNAME, name.encode() + b"\0")


def _family(address: IPAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6
