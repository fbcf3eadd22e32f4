"""What becomes of the process that the zygote forks for each container: confined, it runs its guest and ends.

A process and not a thread, since a module asleep in ``poll_oneoff`` can be interrupted by nothing but a signal. The
order matters: descriptors first (an inherited epoll or agent socket would break the parent), then the promise to die
with the parent, then privileges, and only then a byte of the image. Nothing is imported here: all is loaded before the
first fork, so that children share the pages.

Privileges. Where the supervisor has its user namespace, each sandbox becomes a user that no other process is
(``linux.become_but_for_files``), while volumes are reached as root, to whom they belong. Elsewhere the uid stays. Every
capability is dropped but CAP_DAC_OVERRIDE, which root in a container holds too and without which a hostPath of another
user could not be read; root's supplementary groups go. ``no_new_privs`` holds for everyone.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from wasilet_node.runtime import guest, landlock, linux, netns, own_user, private_root, seccomp
from wasilet_node.runtime.component_host import entry
from wasilet_node.runtime.guest import GuestTools, LoadError, shortened, write_report
from wasilet_node.runtime.protocol import ContainerConfig, GuestKind

START_ERROR_EXIT_CODE = 128
MAX_OPEN_FILES = 1024
MAX_STRING_BYTES = 128 * 1024
MAX_STRINGS_BYTES = 2 * 1024 * 1024
"""Of one argument or variable, and of all: Linux' own limits for execve (MAX_ARG_STRLEN, and a quarter of the usual
stack), which pods meet on every other node too. Without them a pod could make the supervisor write without end."""


class ConfigError(ValueError):
    """A container's config holds what WASI or C strings cannot carry."""


@dataclass(frozen=True, kw_only=True)
class ChildPlan:
    """What the parent decides for one child."""

    config: ContainerConfig
    stdin: int
    stdout: int
    stderr: int
    report: int
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

    user: int | None = None
    """The uid and gid that it becomes, which no other process has; None: it stays who it is."""

    own_root: bool = False
    """Whether it has a file tree of its own."""

    def descriptors(self) -> dict[str, int]:
        """Those that it names, by field; ``cgroup_files`` are numbered."""
        names = ("stdin", "stdout", "stderr", "report", "record", "counters", "network")
        named = {name: getattr(self, name) for name in names}
        groups = {f"cgroup{index}": descriptor for index, descriptor in enumerate(self.cgroup_files)}
        return {name: descriptor for name, descriptor in (named | groups).items() if descriptor >= 0}


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
        _limit(config, own_user.MAX_USER_PROCESSES)
        if config.kind is GuestKind.COMPONENT:
            tools.components.open()
        listener = _listen(config, loopback=True)
        if listener is not None:
            on_listening(listener.getsockname()[1])
        seccomp.confine(_network(config))
        return guest.run_guest(
            config, tools, guest_stdin=True, memory_backstop_bytes=None, report=report, listener=listener
        )

    _exit_with(report, run)


def _exit_with(report: int, run: Callable[[], int]) -> NoReturn:
    code = START_ERROR_EXIT_CODE
    try:
        code = run()
    except LoadError as error:
        write_report(report, {"error": shortened(str(error)), "artifact": error.artifact})
    except ConfigError as error:
        write_report(report, {"error": shortened(str(error)), "artifact": False})
    except BaseException as error:  # noqa: BLE001 - whatever it is, this process must end here and say why
        write_report(report, {"error": shortened(f"{type(error).__name__}: {error}"), "artifact": False})
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
    _end_if_orphan(plan)
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
    _limit(plan.config, own_user.MAX_THREADS if plan.user is not None else own_user.MAX_USER_PROCESSES)
    config = _enter_root(plan, tools) if plan.own_root else plan.config
    _drop_privileges(plan)
    listener = _listen(config)
    _confine(config, tools)
    return guest.run_guest(
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
    if plan.user is None:
        linux.drop_privileges()
        return
    try:
        linux.become_but_for_files(plan.user, keep=frozenset({linux.CAP_DAC_OVERRIDE}))
    except OSError as error:
        raise LoadError(f"the sandbox cannot become a user of its own: {error.strerror}") from error
    _end_if_orphan(plan)


def _end_if_orphan(plan: ChildPlan) -> None:
    """The signal at the parent's death, which was set just now, came too late if it had died before. Only the
    supervisor reads from the pipe for reports; its pid is none where the sandbox has its own pid namespace."""
    poll = select.poll()
    poll.register(plan.report, 0)
    if poll.poll(0):
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
