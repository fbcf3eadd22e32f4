"""What runs in the process that the zygote forks for each container: confine, load, run, report, ``os._exit``.

A process and not a thread, since a module asleep in ``poll_oneoff`` can be interrupted by nothing but a signal. The
order matters: descriptors first (an inherited epoll or agent socket would break the parent), then the promise to die
with the parent, then privileges, and only then a byte of the image. Nothing is imported here: all is loaded before the
first fork, so that children share the pages.

The outcome goes through its own pipe, as JSON lines, because a wait status cannot tell a trap from an exit with
134: ``{"started": true}`` once guest code is about to run, then one of ``{"exit": code}``, ``{"trap": message}``,
``{"error": message, "artifact": bool}``.

Privileges. Where the supervisor has its user namespace, each sandbox becomes a user that no other process is
(``linux.become_but_for_files``), while volumes are reached as root, to whom they belong. Elsewhere the uid stays. Every
capability is dropped but CAP_DAC_OVERRIDE, which root in a container holds too and without which a hostPath of another
user could not be read; root's supplementary groups go. ``no_new_privs`` holds for everyone.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import wasmtime
from wasmtime import component as wasmtime_component

from wasilet_node.runtime import landlock, linux, netns, private_root, resolving, seccomp
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

START_ERROR_EXIT_CODE = 128
MAX_MESSAGE_BYTES = 12 * 1024
MAX_OPEN_FILES = 1024
MAX_USER_PROCESSES = 16384
"""Threads, of all processes of the sandbox's user: the filter lets it start no process. The kernel does not hold uid 0
to it."""

MAX_THREADS = 1024
"""Of one sandbox that is a user of its own. The component host's own pool has 512 at most."""

FIRST_UID = 0x70000000
"""A sandbox's own user is this plus its pid, which no other process of the machine has meanwhile: nothing to allocate,
to remember or to give back. systemd's list of uids has the 268 million from here for nobody, and pids end at 4 million.
"""

MAX_STRING_BYTES = 128 * 1024
MAX_STRINGS_BYTES = 2 * 1024 * 1024
"""Of one argument or variable, and of all: Linux' own limits for execve (MAX_ARG_STRLEN, and a quarter of the usual
stack), which pods meet on every other node too. Without them a pod could make the supervisor write without end."""

_PREVIEW1 = "wasi_snapshot_preview1"
_PREVIEW0 = "wasi_unstable"
_COMMAND = "wasi:cli/run@0.2."


class GuestExit(Exception):  # noqa: N818 - a way to end, not an error
    """The guest called ``proc_exit`` or ``wasi:cli/exit``; wasmtime's bindings carry it through the guest's frames."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code & 0xFF


class ConfigError(ValueError):
    """A container's config holds what WASI or C strings cannot carry."""


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


@dataclass(frozen=True, kw_only=True)
class ChildPlan:
    """What the parent decides for one child."""

    config: ContainerConfig
    stdin: int
    stdout: int
    stderr: int
    report: int
    parent_pid: int
    guest_stdin: bool
    """Whether the guest reads descriptor 0; otherwise its stdin is empty."""

    cgroup_files: tuple[int, ...]
    """``cgroup.procs`` files, open for writing, of the groups to join."""

    memory_backstop_bytes: int | None
    nice: int
    record: int = -1
    """A file that has to be on disk before guest code runs; -1: none."""

    counters: int = -1
    """Where a server counts; -1: nowhere."""

    network: int = -1
    """The pod's network namespace; -1: the guest stays in the machine's."""

    own_user: bool = False
    """Whether it becomes a user that no other process is."""

    own_root: bool = False
    """Whether it has a file tree of its own."""

    def descriptors(self) -> dict[str, int]:
        """Those that it names, by field; ``cgroup_files`` are numbered."""
        names = ("stdin", "stdout", "stderr", "report", "record", "counters", "network")
        named = {name: getattr(self, name) for name in names}
        groups = {f"cgroup{index}": descriptor for index, descriptor in enumerate(self.cgroup_files)}
        return {name: descriptor for name, descriptor in (named | groups).items() if descriptor >= 0}


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


def check_config(config: ContainerConfig) -> None:
    """Refuse what cannot be passed on whole. Raises ConfigError with a message for the user; never a value in it."""
    total = 0
    for index, argument in enumerate(config.argv):
        total += _check_text(argument, f"args[{index}]")
    for name, value in config.env:
        _check_text(name, f"the name of the environment variable {name!r}")
        if not name or "=" in name:
            raise ConfigError(f"environment variable {name!r}: an empty name, or one with '=', cannot be set")
        total += _check_text(value, f"environment variable {name}") + len(name)
    if total > MAX_STRINGS_BYTES:
        what = "arguments and environment"
        raise ConfigError(f"argument list too long: {what} have {total} bytes, {MAX_STRINGS_BYTES} fit")
    for mount in config.mounts:
        _check_text(mount.guest, f"mount path {mount.guest!r}")
        _check_text(mount.host, f"the host path of {mount.guest}")
        if not mount.host.startswith("/"):
            raise ConfigError(f"mount {mount.guest}: host path {mount.host!r} is not absolute")


def _check_text(text: str, what: str) -> int:
    """Its bytes."""
    if "\0" in text:
        raise ConfigError(f"{what} contains a NUL byte, which WASI cannot carry")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is not valid UTF-8") from None
    if size > MAX_STRING_BYTES:
        raise ConfigError(f"argument list too long: {what} has {size} bytes, {MAX_STRING_BYTES} fit")
    return size


def run_child(plan: ChildPlan, tools: GuestTools) -> NoReturn:
    """The whole life of a forked child. Never returns, never raises."""
    _exit_with(plan.report, lambda: _run(plan, tools))


def run_here(
    config: ContainerConfig, tools: GuestTools, *, report: int, on_listening: Callable[[int], None]
) -> NoReturn:
    """Run in this very process, which was started for it and has the guest's stdin, stdout and stderr. A server listens
    on loopback, and ``on_listening`` gets its port."""

    def run() -> int:
        check_config(config)
        linux.close_range_except((report,))
        _limit(config, MAX_USER_PROCESSES)
        if config.kind is GuestKind.COMPONENT:
            tools.components.open()
        listener = _listen(config, loopback=True)
        if listener is not None:
            on_listening(listener.getsockname()[1])
        seccomp.confine(_network(config))
        return run_guest(config, tools, guest_stdin=True, memory_backstop_bytes=None, report=report, listener=listener)

    _exit_with(report, run)


def _exit_with(report: int, run: Callable[[], int]) -> NoReturn:
    code = START_ERROR_EXIT_CODE
    try:
        code = run()
    except LoadError as error:
        _report(report, {"error": _cut(str(error)), "artifact": error.artifact})
    except ConfigError as error:
        _report(report, {"error": _cut(str(error)), "artifact": False})
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process must end here and say why
        _report(report, {"error": _cut(f"{type(error).__name__}: {error}"), "artifact": False})
    finally:
        os._exit(code)


def _run(plan: ChildPlan, tools: GuestTools) -> int:
    gc.disable()
    for target, source in ((0, plan.stdin), (1, plan.stdout), (2, plan.stderr)):
        if source != target:
            os.dup2(source, target)
        else:
            os.set_inheritable(target, True)  # noqa: FBT003
    linux.close_range_except((plan.report, plan.record, plan.counters, plan.network, *plan.cgroup_files))
    linux.set_parent_death_signal()
    if os.getppid() != plan.parent_pid:
        os._exit(START_ERROR_EXIT_CODE)
    if plan.record >= 0:
        try:
            os.fsync(plan.record)
        except OSError as error:
            raise LoadError(f"cannot write the container's start record: {error}") from error
        os.close(plan.record)
    for file in plan.cgroup_files:
        os.write(file, b"0")
        os.close(file)
    if plan.config.kind is GuestKind.COMPONENT:
        tools.components.open()  # it may have been built since
    _enter_network(plan)
    _limit(plan.config, MAX_THREADS if plan.own_user else MAX_USER_PROCESSES)
    config = _enter_root(plan, tools) if plan.own_root else plan.config
    _drop_privileges(plan)
    listener = _listen(config)
    _confine(config, tools)
    return run_guest(
        config,
        tools,
        guest_stdin=plan.guest_stdin,
        memory_backstop_bytes=plan.memory_backstop_bytes,
        report=plan.report,
        nice=plan.nice,
        listener=listener,
        counters=plan.counters,
    )


def _enter_network(plan: ChildPlan) -> None:
    """Into the pod's network and, for name lookup, a mount namespace with the pod's own files. Raises LoadError."""
    if plan.network >= 0:
        try:
            if plan.config.etc_files:
                private_root.unshare_mounts()
                for place, file in plan.config.etc_files:
                    netns.mount(file, place, netns.MS_BIND)
            netns.setns(plan.network)
        except OSError as error:
            raise LoadError(f"cannot enter the pod's network: {error.strerror}") from error
        os.close(plan.network)


def _enter_root(plan: ChildPlan, tools: GuestTools) -> ContainerConfig:
    """Into a file tree of its own; the config with the paths of that. Raises LoadError."""
    config = plan.config
    try:
        if not config.etc_files:
            private_root.unshare_mounts()
        artifact, mounts = private_root.enter(
            os.path.dirname(config.artifact),  # noqa: PTH120 - one string is wanted
            file=config.artifact,
            shown=tools.network_files if _has_network(config) else (),
            mounts=config.mounts,
        )
    except OSError as error:
        missing = error.filename == config.artifact
        text = f"cannot load the compiled file: {error.strerror}" if missing else str(error.strerror)
        raise LoadError(text, artifact=missing) from error
    return dataclasses.replace(config, artifact=artifact, mounts=mounts)


def _drop_privileges(plan: ChildPlan) -> None:
    """For good. Raises LoadError: a sandbox that is to be a user of its own never runs as another."""
    if not plan.own_user:
        linux.drop_privileges()
        return
    try:
        linux.become_but_for_files(FIRST_UID + os.getpid(), keep=frozenset({linux.CAP_DAC_OVERRIDE}))
    except OSError as error:
        raise LoadError(f"the sandbox cannot become a user of its own: {error.strerror}") from error
    if os.getppid() != plan.parent_pid:
        os._exit(START_ERROR_EXIT_CODE)


def _confine(config: ContainerConfig, tools: GuestTools) -> None:
    """Before a byte of the image is looked at, and while there is one thread: it holds for this and those that it
    makes. Landlock first, since the filter forbids its calls."""
    network = _has_network(config)
    files = (config.artifact, *tools.network_files) if network else (config.artifact,)
    landlock.confine(config.mounts, files=files, tcp=network)
    seccomp.confine(_network(config))


def _has_network(config: ContainerConfig) -> bool:
    return config.http is not None or bool(config.network)


def _network(config: ContainerConfig) -> seccomp.Network:
    outward = config.http is not None
    if config.network:
        return seccomp.Network.SERVER
    if config.server is not None:
        return seccomp.Network.SERVER if outward else seccomp.Network.ACCEPT
    return seccomp.Network.CLIENT if outward else seccomp.Network.NONE


def _listen(config: ContainerConfig, *, loopback: bool = False) -> socket.socket | None:
    """A server's socket, made before the fences. Raises LoadError."""
    if config.server is None:
        return None
    try:
        return entry.listen(config.server, loopback=loopback)
    except OSError as error:
        raise LoadError(str(error.strerror)) from error


def _limit(config: ContainerConfig, processes: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # All containers would die with the supervisor, which would otherwise be as good a victim as any of them.
    linux.set_oom_score(linux.MOST_EXPENDABLE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if config.server is None else entry.SERVER_OPEN_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = processes if hard == resource.RLIM_INFINITY else min(hard, processes)
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


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
        _report(report, {"trap": _cut(str(trap).strip())})
        return TRAP_EXIT_CODE
    except LoadError:
        raise
    except Exception as error:  # noqa: BLE001 - a host function failed: for the guest that is a trap
        _report(report, {"trap": _cut(f"a host function failed: {type(error).__name__}: {error}")})
        return TRAP_EXIT_CODE
    _report(report, {"exit": code})
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
        _report(self.report, {"started": True})


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
    network = " (components have no network: HTTP is for modules, by wasi-experimental-http)"
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


def _cut(text: str) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


def _report(descriptor: int, message: dict[str, object]) -> None:
    try:
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # no one listens any more: then no one needs to know
