"""TCP ports of this machine: whether one is free, and who has it."""

from __future__ import annotations

import socket

from wasilet.errors import PortTakenError

EVERYWHERE = "0.0.0.0"  # noqa: S104  (asked about, never listened on)
"""A port that is free here has no listener on any address of this machine."""


def port_is_free(port: int, address: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Go and asyncio servers set this too: without it, connections in TIME_WAIT would look like a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Bound, never listening: a neighbouring thread's fork may carry this socket along for a moment, and
            # SO_REUSEADDR lets two sockets share a port as long as neither of them listens.
            probe.bind((address, port))
        except OSError:
            return False
    return True


def port_taken(port: int, what: str) -> PortTakenError:
    """The error that names the port, what needs it and (where /proc shows it) who has it."""
    holder = port_holder(port)
    by = f" by {holder}" if holder else " by another program"
    return PortTakenError(
        f"port {port}, which {what} needs, is taken{by}",
        hint="end that program, or fix another port in ~/.invoke.yaml; see docs/harness.md, Settings",
    )


def port_holder(port: int) -> str:
    """``name (pid n)`` of who listens on a TCP port; empty when it belongs to another user or to no one."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""
