"""Letting a guest open sockets, by wasi:sockets.

wasmtime's C API can inherit the network and allow name lookup, but not allow TCP and UDP, which have switches of their
own since wasmtime 48 and are off. They are two bytes behind the one that ``wasi_config_allow_ip_name_lookup`` sets:
found by what that call changes in a configuration, and set only where everything is as it must be. Anything else, a
version whose layout was never looked at above all, leaves guests without sockets.

``tests`` ask a real guest whether it may listen and connect, so that a new wasmtime is seen to be different before it
is used.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from wasilet_node.runtime import engine

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = frozenset({"48", "49", "50"})
"""Major versions whose layout was looked at: name lookup, UDP, TCP."""

_UDP, _TCP = 1, 2
_LARGEST_BYTES = 16 * 1024


class SocketSwitch:
    """Where in a ``wasi_config_t`` the switches are. Made once, before the first fork, by ``find``."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def allow(self, wasi: Any) -> None:
        """TCP, UDP and name lookup for the guest of this configuration."""
        ffi.wasi_config_inherit_network(wasi.ptr())
        ffi.wasi_config_allow_ip_name_lookup(wasi.ptr(), True)  # noqa: FBT003 - the library's own signature
        address = ctypes.cast(wasi.ptr(), ctypes.c_void_p).value
        if address is None:
            raise ValueError("the configuration is gone")
        for distance in (_UDP, _TCP):
            switch = ctypes.c_ubyte.from_address(address + self._offset + distance)
            if switch.value not in (0, 1):
                raise ValueError("the configuration is not laid out as it was")
            switch.value = 1


def find() -> SocketSwitch | None:
    """The switch of this wasmtime; None: there is none that is known."""
    version = engine.wasmtime_version()
    if version.partition(".")[0] not in KNOWN_VERSIONS:
        logger.warning("guests get no sockets: the layout of wasmtime %s is not known", version)
        return None
    offset = _offset_of_name_lookup()
    if offset is None:
        logger.warning("guests get no sockets: wasmtime %s is not laid out as expected", version)
        return None
    return SocketSwitch(offset)


def _offset_of_name_lookup() -> int | None:
    """Where the one byte is that allowing name lookup sets, if it is one, and two zeros follow it."""
    libc = ctypes.CDLL(None)
    usable = getattr(libc, "malloc_usable_size", None)
    if usable is None:
        return None
    usable.restype = ctypes.c_size_t
    usable.argtypes = [ctypes.c_void_p]
    wasi = wasmtime.WasiConfig()
    address = ctypes.cast(wasi.ptr(), ctypes.c_void_p).value
    size = int(usable(address)) if address is not None else 0
    if address is None or not _TCP < size <= _LARGEST_BYTES:
        return None
    ffi.wasi_config_allow_ip_name_lookup(wasi.ptr(), False)  # noqa: FBT003
    before = ctypes.string_at(address, size)
    ffi.wasi_config_allow_ip_name_lookup(wasi.ptr(), True)  # noqa: FBT003
    after = ctypes.string_at(address, size)
    changed = [index for index in range(size) if before[index] != after[index]]
    if len(changed) != 1 or (before[changed[0]], after[changed[0]]) != (0, 1):
        return None
    offset = changed[0]
    if offset + _TCP >= size or after[offset + _UDP : offset + _TCP + 1] != bytes(2):
        return None
    return offset
