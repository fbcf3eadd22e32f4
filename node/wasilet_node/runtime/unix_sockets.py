"""Unix sockets at paths of any length.

``sun_path`` has 107 bytes, which a data folder may exceed; so sockets are bound and connected through
``/proc/self/fd/<folder>/<name>``, which is always short.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def listen(path: Path, backlog: int) -> socket.socket:
    """A listening socket, not blocking, of mode 0600 in a folder that exists. It takes the place of one that an ended
    process left. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        with _short(path) as short:
            listener.bind(short)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.setblocking(False)  # noqa: FBT003
    return listener


def connect(path: Path, *, timeout_seconds: float) -> socket.socket:
    """A connected, blocking socket. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_seconds)
        with _short(path) as short:
            sock.connect(short)
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
