"""To be woken when the machine's network changes: an address came or went, or a route did."""

from __future__ import annotations

import errno
import socket

_GROUPS = 1 << 4 | 1 << 6
"""RTMGRP_IPV4_IFADDR and RTMGRP_IPV4_ROUTE of ``linux/rtnetlink.h``. Both: a route that goes with its interface is not
reported, its address is."""


def open_watch() -> socket.socket:
    """Readable when something changed in the network namespace that the calling thread is in. Raises OSError."""
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        watch.setblocking(False)  # noqa: FBT003
        watch.bind((0, _GROUPS))
    except BaseException:
        watch.close()
        raise
    return watch


def drain(watch: socket.socket) -> None:
    """Forget what was reported; what is there now is looked up."""
    while True:
        try:
            watch.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more was reported than it could hold
                raise
