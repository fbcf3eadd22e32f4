"""Which pod has which address: taken from ``Node.spec.podCIDR``, recorded on disk before it is used.

Records are ``<data>/network/pods/<pod uid>.json``. An address that has just been given back is the last to be given
again, since connections and caches elsewhere may still believe in it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from wasilet_node.network.errors import AddressesExhaustedError, NetworkError

logger = logging.getLogger(__name__)

MINIMUM_ADDRESSES = 8
_UID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class PodRecord:
    """A pod's network as it is written down."""

    uid: str
    key: str
    """Of its namespace, with the supervisor; empty: it has none, as nothing in it has a socket."""

    address: str
    interface: str
    """The node's end of its veth; empty where it has no namespace."""

    supervisor: int
    """The pid of the supervisor that keeps the namespace."""


def gateway_of(cidr: ipaddress.IPv4Network) -> ipaddress.IPv4Address:
    """The node's own address among its pods: the first one that is not the network's."""
    return cidr.network_address + 1


class AddressPool:
    """The free addresses of one CIDR. Network, gateway and broadcast addresses are never given."""

    def __init__(self, cidr: ipaddress.IPv4Network, *, taken: Iterable[ipaddress.IPv4Address] = ()) -> None:
        """Raises NetworkError for a CIDR that is too small to be one."""
        if cidr.num_addresses < MINIMUM_ADDRESSES:
            raise NetworkError(f"the podCIDR {cidr} has {cidr.num_addresses} addresses; {MINIMUM_ADDRESSES} are needed")
        self.cidr = cidr
        self._taken = set(taken)
        self._next = cidr.network_address + 2
        self._given_back: deque[ipaddress.IPv4Address] = deque()

    def take(self) -> ipaddress.IPv4Address:
        """One that has never been given before, as long as there is one. Raises AddressesExhaustedError."""
        while self._next < self.cidr.broadcast_address:
            address, self._next = self._next, self._next + 1
            if address not in self._taken:
                self._taken.add(address)
                return address
        while self._given_back:
            address = self._given_back.popleft()
            if address not in self._taken:
                self._taken.add(address)
                return address
        raise AddressesExhaustedError(f"no free address in {self.cidr}: {len(self._taken)} are in use")

    def give_back(self, address: ipaddress.IPv4Address) -> None:
        """Idempotent."""
        if address in self._taken:
            self._taken.remove(address)
            self._given_back.append(address)

    @property
    def in_use(self) -> int:
        """How many are taken."""
        return len(self._taken)


class PodRecords:
    """The folder of records. Raises OSError when the disk does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, record: PodRecord) -> None:
        """Before the address is used. Neither renamed into place nor synced: a record that a crash left torn was never
        acted on, and a machine that loses its power loses the namespaces too."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._path(record.uid), flags, 0o600), "wb") as file:
            file.write(json.dumps(asdict(record)).encode())

    def remove(self, uid: str) -> None:
        """Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self._path(uid).unlink()

    def load(self) -> Iterator[PodRecord]:
        """All that can be read; one that a crash left torn was never acted on, and goes."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                data = json.loads(path.read_bytes())
                record = PodRecord(
                    uid=str(data["uid"]),
                    key=str(data["key"]),
                    address=str(ipaddress.IPv4Address(data["address"])),
                    interface=str(data["interface"]),
                    supervisor=int(data["supervisor"]),
                )
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("the network record %s cannot be read and is removed: %r", path.name, error)
                path.unlink(missing_ok=True)
                continue
            yield record

    def _path(self, uid: str) -> Path:
        if not _UID.fullmatch(uid):
            raise NetworkError(f"{uid!r} is no uid")
        return self._folder / f"{uid}.json"
