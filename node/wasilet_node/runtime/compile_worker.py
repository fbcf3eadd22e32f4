"""One compilation in a separate process: ``python -P -m wasilet_node.runtime.compile_worker IN OUT KIND
MEMORY_BYTES``.

KIND is ``module``, ``component`` or ``server``, which is a component that answers requests.

Cranelift parses what an image gives it, so it runs under limits, away from the agent and the supervisor, and behind a
sandbox's fences: the binary is read and the output file opened first; then root becomes a user that no other process
is, Landlock leaves no file and no TCP, and seccomp no socket, no process and no other system call than a sandbox has.
The result is written to OUT, which the parent renames when this process ended well. Messages go to stderr, exit code 1.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from wasilet_node.runtime import landlock, linux, own_user, seccomp

NICE = 10
EXIT_REFUSED = 1
EXIT_MEMORY = 3
SERVER = "server"
MAX_OPEN_FILES = 64
"""The compiler opens none; Python and the output have a few."""

_NOBODY = 65534
"""What root becomes in a user namespace that lacks a uid of its own for it."""


def main(arguments: list[str]) -> int:
    """Compile, or print on stderr what the compiler reports."""
    source, target, kind, memory_text = arguments
    parent = os.getppid()
    linux.set_parent_death_signal()
    if os.getppid() != parent:
        return EXIT_REFUSED
    os.nice(NICE)
    linux.set_oom_score(linux.MOST_EXPENDABLE)
    memory = int(memory_text)
    # RLIMIT_DATA counts memory that can be written; RLIMIT_AS would count wasmtime's and glibc's reservations.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What it writes it has had in memory; a broken compiler has the output open and must not fill the disk.
    _lower(resource.RLIMIT_FSIZE, memory)
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    try:
        return _compile(source, target, kind)
    except MemoryError:
        return EXIT_MEMORY


def _compile(source: str, target: str, kind: str) -> int:
    # All that will be needed: behind the fence nothing can be imported.
    import wasmtime
    from wasmtime import component

    from wasilet_node.runtime.engine import is_component, make_engine

    try:
        binary = Path(source).read_bytes()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        output = os.open(target, flags, 0o600)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    engine = make_engine(server=kind == SERVER)
    _enter_fence()
    try:
        found = "component" if is_component(binary) else "module"
        if found != ("component" if kind == SERVER else kind):
            sys.stderr.write(f"the image says it is a {kind}, but the binary is a {found}\n")
            return EXIT_REFUSED
        compiled: wasmtime.Module | component.Component
        compiled = component.Component(engine, binary) if found == "component" else wasmtime.Module(engine, binary)
        data = compiled.serialize()
    except (wasmtime.WasmtimeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    try:
        with os.fdopen(output, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        sys.stderr.write(f"the compiled module cannot be written: {error.strerror}\n")
        return EXIT_REFUSED
    return 0


def _enter_fence() -> None:
    """Before a byte of the image is looked at."""
    _become_unprivileged()
    landlock.confine((), files=(), tcp=False)
    seccomp.confine(seccomp.Network.NONE)


def _become_unprivileged() -> None:
    own = own_user.FIRST_UID + os.getpid()
    linux.drop_privileges(keep=frozenset(), uids=(own, _NOBODY))
    _lower(resource.RLIMIT_NPROC, own_user.MAX_THREADS if os.geteuid() == own else own_user.MAX_USER_PROCESSES)


def _lower(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(hard, limit)
    resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
