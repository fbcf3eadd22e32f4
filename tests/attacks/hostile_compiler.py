"""A compile worker that runs native code in place of the compilation, as after a module that broke the compiler:
``python hostile_compiler.py FENCES DEED FACTS IN OUT``.

``FENCES`` is ``all``, or ``user``: what is left without Landlock and the filter of system calls. ``DEED`` is
``attack``, ``wait`` or ``flood``; ``FACTS`` is JSON for it. Outcomes are JSON on stdout.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import json
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wasilet_node.runtime import compile_worker, engine, landlock, seccomp

from tests.attacks import hostile_sandbox as attacks

MEMORY = 2**31
HIGHEST = 3000
_IO_URING_SETUP = 425
_libc = ctypes.CDLL(None, use_errno=True)

Facts = dict[str, Any]


def attempts(facts: Facts) -> dict[str, Callable[[], object]]:
    """By name. ``facts``: ``pids`` by name, and ``folder``, which the test has made with all that is in it."""
    folder = Path(facts["folder"])
    found: dict[str, Callable[[], object]] = {
        "read root's file": lambda: attacks.open_and_close(str(folder / "roots"), os.O_RDONLY),
        "change root's file": lambda: attacks.open_and_close(str(folder / "roots"), os.O_WRONLY),
        "remove root's file": (folder / "roots").unlink,
        "read the module again": lambda: attacks.open_and_close(str(folder / "module.wasm"), os.O_RDONLY),
        "a file beside its output": (folder / "new").touch,
        "list the compiled files": lambda: _list(folder),
        "list the machine's root": lambda: _list(Path("/")),
        "run a program": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
        "run a program from memory": _run_from_memory,
        "fork": os.fork,
        "TCP": lambda: socket.socket(socket.AF_INET),
        "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "a Unix socket": socket.socketpair,
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "root again": lambda: os.setresuid(0, 0, 0),
        "its old group again": lambda: os.setresgid(0, 0, 0),
        "a user namespace": lambda: attacks.checked(_libc.unshare(0x10000000)),
        "io_uring": lambda: attacks.checked(_libc.syscall(_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))),
        "a setting of the kernel": lambda: attacks.open_and_close("/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "an output beyond its memory": lambda: os.pwrite(_output(), b"x", MEMORY),
        "a higher limit of files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MEMORY, 2 * MEMORY)),
        "more threads than are allowed": _threads,
        "more descriptors than are allowed": _descriptors,
    }
    for name, pid in facts["pids"].items():
        found |= attacks.attacks_on(name, pid)
    return found


def _output() -> int:
    """The descriptor of the output, which the worker has open."""
    return next(fd for fd in range(3, compile_worker.MAX_OPEN_FILES) if _is_file(fd))


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _run_from_memory() -> None:
    descriptor = os.memfd_create("program", 0)
    os.write(descriptor, Path("/proc/self/exe").read_bytes()[:64])
    os.execve(descriptor, ["program"], {})  # noqa: S606


def _list(folder: Path) -> None:
    list(folder.iterdir())


def _descriptors() -> None:
    made = list[int]()
    try:
        while len(made) < HIGHEST:
            made.append(os.dup(2))
    finally:
        for descriptor in made:
            os.close(descriptor)


def _threads() -> None:
    lock = _thread.allocate_lock()
    lock.acquire()
    _thread.stack_size(64 * 1024)
    try:
        for _ in range(HIGHEST):
            _thread.start_new_thread(lock.acquire, ())
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no more threads") from error


def attack(facts: Facts) -> None:
    """The outcome of each that the facts name."""
    every = attempts(facts)
    found = attacks.outcomes({name: every[name] for name in facts["rows"]})
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def wait(_facts: Facts) -> None:
    """Be there, for others to attack."""
    sys.stdout.write('"there"\n')
    sys.stdout.flush()
    while True:
        time.sleep(1)  # pause(2) is not allowed


def flood(_facts: Facts) -> None:
    """Write without end to where messages go."""
    while True:
        os.write(2, bytes(64 * 1024))


def main(arguments: list[str]) -> int:
    """A compile worker."""
    fences, deed, facts, source, target = arguments

    def instead_of_the_compiler(binary: bytes) -> bool:
        {"attack": attack, "wait": wait, "flood": flood}[deed](json.loads(facts))
        os._exit(bool(not binary))

    if fences == "user":
        landlock.confine = lambda *_args, **_fields: False
        seccomp.confine = lambda *_args, **_fields: False
    engine.is_component = instead_of_the_compiler
    return compile_worker.main([source, target, "module", str(MEMORY)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
