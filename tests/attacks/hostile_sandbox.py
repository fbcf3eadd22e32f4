"""A supervisor whose sandboxes run native code instead of their guests, as after an escape from WebAssembly:
``python hostile_sandbox.py FENCES --data-dir DIR``.

``FENCES`` is ``all``, or what is left of them: ``user``, so that what is refused is refused to the sandbox's user,
``user and pids``, where it has its own pid namespace, too, or ``user and root``, where it has its own file tree; each
without Landlock and the filter of system calls. A container's first argument names what its sandbox does, the second is
JSON for it. It writes JSON to its stdout.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wasilet_node.runtime import guest, landlock, linux, own_user, pid_namespace, private_root, seccomp, supervisor

PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
HIGHEST = 5000
"""More threads or processes than any limit here."""

MANY = 900
"""Fewer."""

Facts = dict[str, Any]
_libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raises OSError for what a function of C gave."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def attacks(facts: Facts) -> dict[str, Callable[[], object]]:
    """By name. ``facts``: processes to attack (``pids`` by name), the supervisor's socket, a file in another pod's
    volume."""
    found: dict[str, Callable[[], object]] = {
        "its old user again": lambda: os.setresuid(0, 0, 0),
        "its old group again": lambda: os.setresgid(0, 0, 0),
        "another sandbox's user": lambda: os.setresuid(*[own_user.FIRST_UID + facts["pids"]["sandbox"]] * 3),
        "groups": lambda: os.setgroups([0]),
        "another user namespace": lambda: checked(_libc.unshare(0x10000000)),
        "another mount namespace": lambda: checked(_libc.unshare(0x00020000)),
        "a higher limit of threads": lambda: resource.setrlimit(resource.RLIMIT_NPROC, (HIGHEST, HIGHEST)),
        "a setting of the kernel": lambda: open_and_close("/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "a setting of its network": lambda: open_and_close("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY),
        "the supervisor's socket": lambda: _speak(facts["socket"]),
        "every process there is": lambda: os.kill(-1, 0),  # no signal: where no fence holds they are this machine's
    }
    for name, pid in facts["pids"].items():
        found |= attacks_on(name, pid)
    return found


def attacks_on(name: str, pid: int) -> dict[str, Callable[[], object]]:
    """By name."""
    return {
        f"name {name}": lambda: os.close(os.pidfd_open(pid)),
        f"kill {name}": lambda: os.kill(pid, signal.SIGKILL),
        f"stop {name} by pidfd": lambda: _stop(pid),
        f"limits of {name}": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64)),
        f"priority of {name}": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        f"processors of {name}": lambda: os.sched_setaffinity(pid, {0}),
        f"attach to {name}": lambda: checked(_libc.ptrace(PTRACE_ATTACH, pid, 0, 0)),
        f"seize {name}": lambda: checked(_libc.ptrace(PTRACE_SEIZE, pid, 0, 0)),
        f"memory of {name}": lambda: open_and_close(f"/proc/{pid}/mem", os.O_RDWR),
        f"environment of {name}": lambda: Path(f"/proc/{pid}/environ").read_bytes(),
        f"memory map of {name}": lambda: Path(f"/proc/{pid}/maps").read_bytes(),
        f"a descriptor of {name} by its link": lambda: open_and_close(f"/proc/{pid}/fd/1", os.O_WRONLY),
        f"volumes of {name}": lambda: list(Path(f"/proc/{pid}/root/").iterdir()),
        f"a descriptor of {name} by pidfd": lambda: _steal(pid),
    }


def attacks_on_files(facts: Facts) -> dict[str, Callable[[], object]]:
    """By name. ``facts``: ``paths`` by name that are none of its business, and that the test has made: where no fence
    holds, they are removed."""
    found: dict[str, Callable[[], object]] = {
        "list /proc": lambda: list(Path("/proc").iterdir()),
        "list /sys": lambda: list(Path("/sys").iterdir()),
        "list /dev": lambda: list(Path("/dev").iterdir()),
        "read the machine's users": lambda: open_and_close("/etc/passwd", os.O_RDONLY),
        "another root": lambda: os.chroot("/mount0"),
        "mount something": lambda: checked(_libc.mount(b"none", b"/mount0", b"tmpfs", 0, None)),
        "unmount its volume": lambda: checked(_libc.umount2(b"/mount0", 2)),
        "the old root": lambda: checked(_libc.umount2(b"/", 2)),
        "writable again": lambda: checked(_libc.mount(None, b"/mount1", None, 32 | 4096, None)),
        "a device": lambda: os.mknod("/mount0/device", 0o60600, os.makedev(254, 0)),
        "a file by its handle": lambda: _by_handle("/mount0"),
        "a file in its root": lambda: open_and_close("/", os.O_TMPFILE | os.O_WRONLY),
        "a file in a read-only volume": lambda: Path("/mount1/new").touch(),
        "a mode in a read-only volume": lambda: Path("/mount1").chmod(0o777),
        "out of its volume": lambda: _expect_names("/mount0/../../..", {"artifact", "mount0", "mount1"}),
        "a file in its volume": lambda: Path("/mount0/new").touch(),
        "connect to the supervisor": lambda: _speak(facts["paths"]["the socket"]),
    }
    for name, path in facts["paths"].items():
        found |= _attacks_on_file(name, path)
    return found


def _attacks_on_file(name: str, path: str) -> dict[str, Callable[[], object]]:
    return {
        f"read {name}": lambda: open_and_close(path, os.O_RDONLY),
        f"mode of {name}": lambda: Path(path).chmod(0o777),
        f"times of {name}": lambda: os.utime(path, (0, 0)),
        f"remove {name}": lambda: Path(path).unlink(),
    }


def _expect_names(folder: str, wanted: set[str]) -> None:
    if {path.name for path in Path(folder).iterdir()} != wanted:
        raise OSError(errno.EBADE, "there is more")


def _by_handle(path: str) -> None:
    """As ``shocker`` did: what a file system knows by number, from any descriptor on it."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    checked(_libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount), 0))
    folder = os.open(path, os.O_RDONLY)
    checked(_libc.open_by_handle_at(folder, handle, os.O_RDONLY))


def open_and_close(path: str, flags: int) -> None:
    """Raises OSError."""
    os.close(os.open(path, flags))


def _stop(pid: int) -> None:
    signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGSTOP)


def _steal(pid: int) -> None:
    checked(_libc.syscall(438, os.pidfd_open(pid), 1, 0))


def _speak(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        if not sock.recv(1):
            raise OSError(errno.ECONNREFUSED, "closed")


def attack(facts: Facts) -> object:
    """The outcome of each on processes."""
    return outcomes(attacks(facts))


def attack_files(facts: Facts) -> object:
    """The outcome of each on files."""
    return outcomes(attacks_on_files(facts))


def outcomes(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    """By name: ``ok`` or how it was refused."""
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "ok"
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, str(error))
        except ValueError as error:  # setrlimit's
            found[name] = str(error)
    return found


def fills(facts: Facts) -> dict[str, Callable[[], object]]:
    """By name: each takes of the volume what it gets, and more than ``size`` bytes of it would be too much."""
    volume, size = Path(facts["volume"]), int(facts["size"])
    return {
        "one file": lambda: _write(volume / "file", 2 * size),
        "one file ahead": lambda: _on_file(volume, lambda file: os.posix_fallocate(file, 0, 2 * size)),
        "pages of a sparse file": lambda: _on_file(
            volume, lambda file: [os.pwrite(file, b"x", place << 20) for place in range(size >> 11)]
        ),
        "a mapped file": lambda: _fill_mapped(volume / "file", 2 * size),
        "files with a page each": lambda: _many(volume, lambda path: _write(path, 4096)),
        "empty files": lambda: _many(volume, Path.touch),
        "folders": lambda: _many(volume, Path.mkdir),
        "folders in folders": lambda: _nest(volume),
        "names of one file": lambda: _many(volume, lambda path: os.link(_touched(volume / "file"), path)),
        "links of 4,000 bytes": lambda: _many(volume, lambda path: path.symlink_to("x" * 4000)),
        "links of 100 bytes": lambda: _many(volume, lambda path: path.symlink_to("x" * 100)),
        "pipes": lambda: _many(volume, os.mkfifo),
        "attributes": lambda: _set_attributes(volume, size),
        "files without a name": lambda: _fill_unnamed(volume, size),
        "a larger volume": lambda: checked(_libc.mount(None, os.fsencode(volume), None, 32, b"size=1g")),
    }


def _many(volume: Path, make: Callable[[Path], object]) -> None:
    for number in range(HIGHEST):
        make(volume / str(number))


def _on_file(volume: Path, do: Callable[[int], object]) -> None:
    with (volume / "file").open("wb", buffering=0) as file:
        do(file.fileno())


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _write(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // 4096)):
            file.write(bytes(4096))


def _fill_mapped(path: Path, size: int) -> None:
    """In a child, since what is not there is a SIGBUS."""
    with path.open("w+b", buffering=0) as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as memory:
            pid = os.fork()
            if pid == 0:
                for place in range(0, size, 4096):
                    memory[place] = 1
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        raise OSError(errno.ENOSPC, signal.Signals(os.WTERMSIG(status)).name)


def _nest(volume: Path) -> None:
    for number in range(HIGHEST // 100):
        (volume / str(number)).joinpath(*(["x"] * 100)).mkdir(parents=True)


def _set_attributes(volume: Path, size: int) -> None:
    (volume / "file").touch()
    for number in range(size >> 11):
        os.setxattr(volume / "file", f"user.{number}", bytes(4096))


def _fill_unnamed(volume: Path, size: int) -> None:
    descriptors = list[int]()
    try:
        for _ in range(16):
            descriptors.append(os.open(volume, os.O_TMPFILE | os.O_RDWR))
            os.write(descriptors[-1], bytes(size // 8))
            os.posix_fallocate(descriptors[-1], 0, size // 8)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def fill(facts: Facts) -> object:
    """How each ended, and the most that the volume then said it held."""
    found = dict[str, object]()
    volume = Path(facts["volume"])
    for name, attempt in fills(facts).items():
        outcome = outcomes({name: attempt})[name]
        state = os.statvfs(volume)
        found[name] = [outcome, (state.f_blocks - state.f_bfree) * state.f_frsize]
        for path in volume.iterdir():
            if not path.is_symlink() and path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return found


def threads(_facts: Facts) -> object:
    """How many it gets beside its first; they stay."""
    return _started_threads(HIGHEST)


def _started_threads(wanted: int) -> int:
    lock = _thread.allocate_lock()
    lock.acquire()
    _thread.stack_size(64 * 1024)
    for number in range(wanted):
        try:
            _thread.start_new_thread(lock.acquire, ())
        except RuntimeError:
            return number
    return wanted


def processes(_facts: Facts) -> object:
    """How many threads and processes it gets beside its first, most of them threads, which are made sooner; the
    processes end first."""
    pids = []
    begun = _started_threads(MANY)
    try:
        for _ in range(HIGHEST):
            pid = os.fork()
            if pid == 0:
                linux.set_parent_death_signal()  # the sandbox may be ended before it has counted them
                signal.pause()
                os._exit(0)
            pids.append(pid)
    except BlockingIOError:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return begun + len(pids)


def files(facts: Facts) -> object:
    """What a file that it makes in its volume looks like, and that others' files there are its own to change."""
    mine, theirs = Path(facts["volume"]) / "mine", Path(facts["volume"]) / "theirs"
    mine.write_text("mine")
    mine.chmod(0o640)
    theirs.write_text(theirs.read_text() + " and changed")
    made = mine.stat()
    return {"uid": made.st_uid, "gid": made.st_gid, "mode": made.st_mode & 0o7777, "theirs": theirs.read_text()}


def names(facts: Facts) -> object:
    """In a folder."""
    return sorted(path.name for path in Path(facts["folder"]).iterdir())


def nothing(_facts: Facts) -> object:
    """Be there."""
    return None


_DEEDS = {deed.__name__: deed for deed in (attack, attack_files, fill, threads, processes, files, names, nothing)}


def instead_of_a_guest(config: Any, *_args: object, report: int, **_fields: object) -> int:
    """Native code in place of the guest; afterwards it stays until it is stopped."""
    os.write(report, b'{"started": true}\n')
    found = _DEEDS[config.argv[0]](json.loads(config.argv[1]))
    os.write(1, json.dumps(found).encode() + b"\n")
    while True:
        time.sleep(1)


def main(arguments: list[str]) -> int:
    """A supervisor."""
    guest.run_guest = instead_of_a_guest
    if arguments[0] in {"user", "user and pids"}:
        private_root.why_unavailable = lambda: "it is taken out"
    if arguments[0] in {"user", "user and root"}:
        pid_namespace.why_unavailable = lambda: "it is taken out"
    if arguments[0] != "all":
        landlock.confine = lambda *_args, **_fields: False
        seccomp.confine = lambda *_args, **_fields: False
    with contextlib.suppress(OSError):
        linux.set_name("hostile")
    return supervisor.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
