"""The one place that makes wasmtime engines and linkers.

A precompiled file loads only into an engine with the settings it was compiled with, so the compile worker, the
supervisor and ``invoke run`` must never differ: they all come here. No fuel and no epochs: both cost guest speed, and
neither can wake a module that sleeps in ``poll_oneoff``; a sandbox is a process and is ended by a signal. Servers are
the exception: they answer many requests in one process, so one that computes without end must be interrupted without
the others' end. They are compiled with epochs, have their own key, and only the component host loads them.

Nothing here builds a ``Module``: that starts threads, and the supervisor forks. wasmtime itself is imported where an
engine is made: the agent needs the key alone, and is spared the library.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wasmtime
    from wasmtime import component as wasmtime_component

WASM_STACK_BYTES = 1024 * 1024
"""What a guest's native frames may use of the main thread's stack, which is 8 MiB on the usual Linux."""

_SETTINGS: tuple[tuple[str, object], ...] = (
    ("strategy", "cranelift"),
    ("cranelift_opt_level", "speed"),
    ("wasm_component_model", True),
    ("max_wasm_stack", WASM_STACK_BYTES),
)
"""Attributes of ``wasmtime.Config``; part of the key of the compile cache."""

_SERVER_SETTINGS: tuple[tuple[str, object], ...] = (*_SETTINGS, ("epoch_interruption", True))


@dataclass(frozen=True)
class Linkers:
    """An engine and what guests may import. Linkers belong to one process at a time: children change their copy."""

    engine: wasmtime.Engine
    module: wasmtime.Linker
    component: wasmtime_component.Linker


def make_engine(*, server: bool = False) -> wasmtime.Engine:
    """An engine with the project's settings; ``server``: with those of components that answer requests."""
    import wasmtime

    config: Any = wasmtime.Config()
    for name, value in _SERVER_SETTINGS if server else _SETTINGS:
        setattr(config, name, value)
    return wasmtime.Engine(config)


def make_linkers() -> Linkers:
    """WASI preview 1 for modules and preview 2 for components. Neither reaches a network unless its store allows it
    (``hostcalls.sockets``)."""
    import wasmtime
    from wasmtime import component as wasmtime_component

    engine = make_engine()
    module: Any = wasmtime.Linker(engine)
    module.define_wasi()
    module.allow_shadowing = True
    component: Any = wasmtime_component.Linker(engine)
    component.allow_shadowing = True
    component.add_wasip2()
    return Linkers(engine=engine, module=module, component=component)


def wasmtime_version() -> str:
    """The version of the installed wasmtime, as ``50.0.1``."""
    import importlib.metadata  # here: it loads the whole of email, which a command that ends a node has no use for

    return importlib.metadata.version("wasmtime")


def cpu_features() -> str:
    """What of the processor decides which machine code may run: architecture and feature flags, sorted."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
            break
    return f"{platform.machine()}:{' '.join(sorted(flags))}"


def engine_key(*, server: bool = False) -> str:
    """16 hex digits that name wasmtime's version, the engine's settings and the processor's features.

    Two engines with one key load each other's precompiled files.
    """
    settings = _SERVER_SETTINGS if server else _SETTINGS
    parts = [wasmtime_version(), cpu_features(), *(f"{name}={value}" for name, value in settings)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def is_component(binary: bytes) -> bool:
    """Whether a wasm binary is a component: its 4 bytes after the magic are version 0xd, layer 1; a module's are 1, 0.

    From the component model's binary format. Raises ValueError when it is no wasm binary at all.
    """
    if len(binary) < 8 or binary[:4] != b"\0asm":
        raise ValueError("not a WebAssembly binary: it does not begin with \\0asm")
    layer = int.from_bytes(binary[6:8], "little")
    if layer not in (0, 1):
        raise ValueError(f"not a WebAssembly module or component: layer {layer}")
    return layer == 1
