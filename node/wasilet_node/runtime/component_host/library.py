"""The library's C functions, by ctypes.

Three of them: its version, the wasmtime it was built with, and ``run``, which takes one JSON text (``entry.spec``) and
returns the exit code of a process that has lived. Opening it starts no thread, so the supervisor does so before it
forks; only a sandbox ever calls ``run``.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from wasilet_node.runtime.engine import wasmtime_version

ABI_VERSION = 1
"""Of the C functions and the JSON text; ``ABI_VERSION`` in the crate's ``lib.rs``."""


class HostUnavailableError(Exception):
    """There is no component host; the message gives the reason, and what installs it."""


class Library:
    """An opened library that fits this version of Wasilet and of wasmtime."""

    def __init__(self, path: Path) -> None:
        """Raises HostUnavailableError."""
        self.path = path
        try:
            handle = ctypes.CDLL(str(path))
            abi = handle.wasilet_component_host_abi
            wasmtime = handle.wasilet_component_host_wasmtime
            self._run = handle.wasilet_component_host_run
        except (OSError, AttributeError) as error:
            raise HostUnavailableError(f"the component host {path} cannot be opened: {error}") from error
        abi.restype = ctypes.c_uint32
        wasmtime.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._run.restype = ctypes.c_int
        if abi() != ABI_VERSION:
            raise HostUnavailableError(f"the component host {path} is of version {abi()}, not {ABI_VERSION}")
        built_with = wasmtime().decode()
        if built_with != wasmtime_version():
            why = f"was built with wasmtime {built_with}, but this is {wasmtime_version()}"
            raise HostUnavailableError(f"the component host {path} {why}")

    def run(self, spec: bytes) -> int:
        """Run a component in this process, to its end; the exit code. The report went through its own pipe."""
        # A backtrace of the library's own frames takes 70 ms per error, and shows guests the inside of their host.
        os.environ.pop("RUST_BACKTRACE", None)
        return int(self._run(spec, len(spec)))
