"""A guest: a module or component, loaded and run on this process's descriptors.

The outcome goes through its own pipe, as JSON lines, because a wait status cannot tell a trap from an exit with
134: ``{"started": true}`` once guest code is about to run, then one of ``{"exit": code}``, ``{"trap": message}``,
``{"error": message, "artifact": bool}``. Whether this process is confined is its caller's affair (``sandbox``).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wasmtime
from wasmtime import component as wasmtime_component

from wasilet_node.runtime import resolving
from wasilet_node.runtime.component_host import entry
from wasilet_node.runtime.component_host.entry import ComponentHost
from wasilet_node.runtime.component_host.library import Library
from wasilet_node.runtime.engine import Linkers
from wasilet_node.runtime.hostcalls import sockets
from wasilet_node.runtime.hostcalls.http import HttpHost
from wasilet_node.runtime.hostcalls.sockets import SocketSwitch
from wasilet_node.runtime.protocol import ContainerConfig, GuestKind
from wasilet_node.runtime.safe_path import open_directory, opened

TRAP_EXIT_CODE = 134
"""128 + SIGABRT: what the wasmtime command and Krustlet's users know."""

MAX_MESSAGE_BYTES = 12 * 1024
_PREVIEW1 = "wasi_snapshot_preview1"
_PREVIEW0 = "wasi_unstable"
_COMMAND = "wasi:cli/run@0.2."


class GuestExit(Exception):  # noqa: N818 - a way to end, not an error
    """The guest called ``proc_exit`` or ``wasi:cli/exit``; wasmtime's bindings carry it through the guest's frames."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code & 0xFF


class LoadError(Exception):
    """A guest that cannot be started. ``artifact``: the precompiled file itself is bad."""

    def __init__(self, message: str, *, artifact: bool = False) -> None:
        super().__init__(message)
        self.artifact = artifact


@dataclass(frozen=True, kw_only=True)
class GuestTools:
    """Made once, before the first fork."""

    linkers: Linkers
    http: HttpHost
    components: ComponentHost
    """Runs components where it is there; else wasmtime's Python bindings run those that they can."""
    sockets: SocketSwitch | None = None
    """None: guests cannot open sockets."""

    network_files: tuple[str, ...]
    """What a guest with outbound HTTP may read besides its mounts."""


def make_tools(linkers: Linkers) -> GuestTools:
    """Add Wasilet's own host functions to the linkers; before the first fork."""
    http = HttpHost()
    exit_type = wasmtime.FuncType([wasmtime.ValType.i32()], [])
    module: Any = linkers.module
    # wasmtime refuses codes from 126 up ("invalid exit status"); Wasilet's takes every code.
    module.define_func(_PREVIEW1, "proc_exit", exit_type, _proc_exit)
    http.define(linkers.module)
    components = ComponentHost()
    components.open()  # here, so that all sandboxes share it
    return GuestTools(
        linkers=linkers,
        sockets=sockets.find(),
        http=http,
        components=components,
        network_files=resolving.readable_paths(),
    )


def run_guest(
    config: ContainerConfig,
    tools: GuestTools,
    *,
    guest_stdin: bool,
    memory_backstop_bytes: int | None,
    report: int,
    nice: int = 0,
    listener: socket.socket | None = None,
    counters: int = -1,
) -> int:
    """Load and run a guest on this process's standard descriptors; the exit code. Raises LoadError before it runs."""
    if config.kind is GuestKind.COMPONENT:
        library = tools.components.library
        if library is not None:
            _Started(report, nice).give_way()
            return _run_in_host(
                library,
                config,
                report=report,
                stdin=guest_stdin,
                memory_bytes=entry.instance_memory(config, memory_backstop_bytes),
                listener=listener,
                counters=counters,
            )
        if config.server is not None:
            raise LoadError(tools.components.why_not)
    tools.http.configure(config.http)
    store = wasmtime.Store(tools.linkers.engine)
    if memory_backstop_bytes is not None:
        store.set_limits(memory_size=memory_backstop_bytes)
    load = _load_component if config.kind is GuestKind.COMPONENT else _load_module
    try:
        code = load(config, tools, store, guest_stdin, _Started(report, nice))()
    except GuestExit as request:
        code = request.code
    except wasmtime.ExitTrap as request:
        code = request.code & 0xFF
    except (wasmtime.Trap, wasmtime.WasmtimeError) as trap:
        write_report(report, {"trap": shortened(str(trap).strip())})
        return TRAP_EXIT_CODE
    except LoadError:
        raise
    except Exception as error:  # noqa: BLE001 - a host function failed: for the guest that is a trap
        write_report(report, {"trap": shortened(f"a host function failed: {type(error).__name__}: {error}")})
        return TRAP_EXIT_CODE
    write_report(report, {"exit": code})
    return code


def _run_in_host(
    library: Library,
    config: ContainerConfig,
    *,
    report: int,
    stdin: bool,
    memory_bytes: int | None,
    listener: socket.socket | None,
    counters: int,
) -> int:
    """The library writes the report itself. Raises LoadError."""
    try:
        with entry.spec(
            config,
            report=report,
            stdin=stdin,
            memory_bytes=memory_bytes,
            listener=listener.detach() if listener is not None else -1,
            counters=counters,
        ) as text:
            return library.run(text)
    except OSError as error:
        raise LoadError(str(error.strerror)) from error


@dataclass(frozen=True)
class _Started:
    """What happens when the guest's own code is next, each once."""

    report: int
    nice: int

    def give_way(self) -> None:
        """From here on this process yields to the rest of the machine."""
        if self.nice:
            os.nice(self.nice)

    def report_started(self) -> None:
        """The supervisor may call the container running."""
        write_report(self.report, {"started": True})


def _configure_wasi(config: ContainerConfig, tools: GuestTools, store: wasmtime.Store, *, guest_stdin: bool) -> None:
    wasi: Any = wasmtime.WasiConfig()
    wasi.argv = list(config.argv)
    wasi.env = [list(pair) for pair in config.env]
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    if guest_stdin:
        wasi.inherit_stdin()
    for mount in config.mounts:
        try:
            if mount.root:
                # Guests write above this folder: a path could lead elsewhere by now, a descriptor cannot.
                with opened(open_directory(mount.root, mount.host)) as fd:
                    wasi.preopen_dir(f"/proc/self/fd/{fd}", mount.guest, not mount.read_only)
            else:
                wasi.preopen_dir(mount.host, mount.guest, not mount.read_only)
        except OSError as error:
            raise LoadError(f"mount {mount.guest}: {error.strerror}: {mount.host}") from error
        except wasmtime.WasmtimeError as error:
            reason = _why_unopenable(mount.host)
            raise LoadError(f"mount {mount.guest}: {reason or error}") from error
    if config.network:
        if tools.sockets is None:
            raise LoadError("this version of wasmtime lets no guest open sockets")
        tools.sockets.allow(wasi)
    store.set_wasi(wasi)


def _why_unopenable(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return f"{error.strerror}: {path}"
    return ""


def _load_module(
    config: ContainerConfig,
    tools: GuestTools,
    store: wasmtime.Store,
    guest_stdin: bool,  # noqa: FBT001 - one signature with _load_component
    started: _Started,
) -> Callable[[], int]:
    try:
        module = wasmtime.Module.deserialize_file(tools.linkers.engine, config.artifact)
    except wasmtime.WasmtimeError as error:
        raise LoadError(f"cannot load the compiled module: {error}", artifact=True) from error
    _check_command(module)
    _configure_wasi(config, tools, store, guest_stdin=guest_stdin)
    try:
        ready = tools.linkers.module.instantiate_pre(module)
    except wasmtime.WasmtimeError as error:
        raise LoadError(f"the module imports what this node does not offer: {error}") from error
    started.give_way()
    started.report_started()
    call: Any = ready.instantiate(store).exports(store)["_start"]

    def run() -> int:
        call(store)
        return 0

    return run


def _check_command(module: wasmtime.Module) -> None:
    """Refuse by name what no instance of it could run. Raises LoadError."""
    if any(imported.module == _PREVIEW0 for imported in module.imports):
        raise LoadError(
            f"the module imports {_PREVIEW0}, the WASI snapshot of 2019, which this node does not offer: build it "
            f"again with a toolchain of 2020 or later, so that it imports {_PREVIEW1}"
        )
    found = next((export.type for export in module.exports if export.name == "_start"), None)
    if found is None:
        raise LoadError("the module exports no function _start: it is a library or reactor, not a command")
    if not isinstance(found, wasmtime.FuncType):
        kind = _KINDS.get(type(found), "something else")
        raise LoadError(f"the module exports _start as a {kind}, not as a function: it is not a command")
    if found.params or found.results:
        types = " -> ".join(f"({' '.join(map(str, each))})" for each in (found.params, found.results))
        raise LoadError(f"the module's _start has the type {types}; that of a command takes and returns nothing")


_KINDS = {wasmtime.GlobalType: "global", wasmtime.MemoryType: "memory", wasmtime.TableType: "table"}


def _load_component(
    config: ContainerConfig,
    tools: GuestTools,
    store: wasmtime.Store,
    guest_stdin: bool,  # noqa: FBT001 - one signature with _load_module
    started: _Started,
) -> Callable[[], int]:
    try:
        guest = wasmtime_component.Component.deserialize_file(tools.linkers.engine, config.artifact)
    except wasmtime.WasmtimeError as error:
        raise LoadError(f"cannot load the compiled component: {error}", artifact=True) from error
    _configure_wasi(config, tools, store, guest_stdin=guest_stdin)
    engine = tools.linkers.engine
    exports = list(guest.type.exports(engine))
    command = next((name for name in exports if name.startswith(_COMMAND)), None)
    if command is None:
        names = ", ".join(exports) or "nothing"
        what = "no wasi:cli/run of WASI 0.2, so it is not a command"
        raise LoadError(f"the component exports {what}; it exports {names}")
    cli_exit = _CliExit()
    cli_exit.define(tools.linkers, [name for name in guest.type.imports(engine) if name.startswith("wasi:cli/exit@")])
    started.give_way()
    try:
        instance = tools.linkers.component.instantiate(store, guest)
    except wasmtime.WasmtimeError as error:
        if cli_exit.request is None and "wasm trap" not in str(error):
            raise LoadError(_why_no_instance(str(error))) from error
        started.report_started()
        raise cli_exit.request or error from error
    interface = instance.get_export_index(store, command)
    function = instance.get_export_index(store, "run", interface)
    call = instance.get_func(store, function) if function is not None else None
    if call is None:
        raise LoadError(f"the component's {command} has no function run")
    run_type: Any = call.type(store)
    if run_type.params or not isinstance(run_type.result, wasmtime_component.ResultType):
        raise LoadError(f"the function run of the component's {command} is not of WASI's type: func() -> result")
    started.report_started()
    entry = call

    def run() -> int:
        return 1 if getattr(entry(store), "tag", "ok") == "err" else 0

    return run


def _why_no_instance(error: str) -> str:
    if "not found in the linker" not in error:
        return f"the component cannot be instantiated: {error}"
    network = " (wasi:http needs the component host: type wasilet-node component-host)"
    return f"the component imports what this node does not offer{network if '`wasi:http/' in error else ''}: {error}"


class _CliExit:
    """``wasi:cli/exit``: wasmtime links ``exit`` alone, and nothing of ``exit-with-code``, whose code is wanted."""

    def __init__(self) -> None:
        self.request: GuestExit | None = None
        """Kept here because an exception does not come through ``instantiate``, where start functions run."""

    def define(self, linkers: Linkers, names: list[str]) -> None:
        """For the interfaces, one per version, that a component imports."""
        linker: Any = linkers.component
        for name in names:
            with linker.root() as root, root.add_instance(name) as interface:
                interface.add_func("exit", self._exit)
                interface.add_func("exit-with-code", self._exit_with_code)

    def _exit(self, _store: Any, status: Any) -> None:
        self._exit_with_code(_store, 1 if getattr(status, "tag", "ok") == "err" else 0)

    def _exit_with_code(self, _store: Any, code: int) -> None:
        self.request = GuestExit(code)
        raise self.request


def _proc_exit(code: int) -> None:
    raise GuestExit(code)


def shortened(text: str) -> str:
    """A message of the length that a report has room for."""
    data = text.encode(errors="replace")
    return text if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


def write_report(descriptor: int, message: dict[str, object]) -> None:
    """A line of the report."""
    try:
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # no one listens any more: then no one needs to know
