"""One compilation in a process of its own: ``python -P -m wasilet_node.runtime.compile_worker IN OUT KIND
MEMORY_BYTES``.

Cranelift eats what an image gives it, so it runs under limits and without the agent's privileges, away from it and from
the supervisor. The result is written to OUT, which the parent renames when this process ended well. Messages go to
stderr, exit code 1.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from wasilet_node.runtime import linux

NICE = 10
EXIT_REFUSED = 1
EXIT_MEMORY = 3


def main(arguments: list[str]) -> int:
    """Compile, or say on stderr what the compiler says."""
    source, target, kind, memory_text = arguments
    parent = os.getppid()
    linux.set_parent_death_signal()
    if os.getppid() != parent:
        return EXIT_REFUSED
    os.nice(NICE)
    linux.drop_privileges()
    linux.set_oom_score(linux.MOST_EXPENDABLE)
    memory = int(memory_text)
    # RLIMIT_DATA counts memory that can be written; RLIMIT_AS would count wasmtime's and glibc's reservations.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import wasmtime
    from wasmtime import component

    from wasilet_node.runtime.engine import is_component, make_engine

    try:
        binary = Path(source).read_bytes()
        found = "component" if is_component(binary) else "module"
        if found != kind:
            sys.stderr.write(f"the image says it is a {kind}, but the binary is a {found}\n")
            return EXIT_REFUSED
        engine = make_engine()
        compiled: wasmtime.Module | component.Component
        compiled = component.Component(engine, binary) if found == "component" else wasmtime.Module(engine, binary)
        data = compiled.serialize()
    except (wasmtime.WasmtimeError, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    except MemoryError:
        return EXIT_MEMORY
    try:
        _write(target, data)
    except OSError as error:
        sys.stderr.write(f"the compiled module cannot be written: {error.strerror}\n")
        return EXIT_REFUSED
    return 0


def _write(target: str, data: bytes | bytearray) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
