"""The filter of system calls, tried by native code as a guest that broke out of WebAssembly would be, and on paper for
the architecture that this machine is not."""

from __future__ import annotations

import errno
import json
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from wasilet_node.runtime import seccomp
from wasilet_node.runtime.seccomp import Network

pytestmark = pytest.mark.unit
needs_filter = pytest.mark.skipif(not seccomp.available(), reason="this kernel takes no filters")

HIGHEST_CALL = 700
"""Well above the last system call of Linux 6.18 (about 470)."""

NEVER_FILTERED = {335, 336}
"""uretprobe and uprobe of x86_64, which the kernel passes by every filter and which end any process that calls them."""

PRELUDE = """
import ctypes, encodings.idna, errno, json, os, resource, signal, socket, struct, sys
from pathlib import Path
from wasilet_node.runtime import linux, seccomp

network = seccomp.Network(sys.argv[1])
column = seccomp.ARCHITECTURES[os.uname().machine].column
call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long
linux.set_no_new_privs()

def tried(number, *arguments):
    ctypes.set_errno(0)
    result = call(ctypes.c_long(number), *(ctypes.c_ulong(argument & 2**64 - 1) for argument in arguments))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


def run(script: str, network: Network, *arguments: str) -> str:
    command = [sys.executable, "-P", "-c", PRELUDE + script, network.value, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@needs_filter
@pytest.mark.parametrize("network", list(Network))
def test_every_system_call_that_is_not_on_the_list_is_refused(network: Network) -> None:
    """Really called, with arguments that would do no harm if it were not."""
    script = f"""
passing = {{numbers[column] for numbers in seccomp.allowed_calls(network).values()}}
passing |= {{rule.numbers[column] for rule in seccomp.guarded_calls(network).values()}}
assert seccomp.confine(network)
found = {{n: tried(n, -1, -1, -1, -1, -1, -1) for n in range({HIGHEST_CALL}) if n not in passing | {NEVER_FILTERED}}}
print(json.dumps([len(found), sorted({{n for n, outcome in found.items() if outcome != "EPERM"}})]))
"""
    count, let_through = json.loads(run(script, network))
    assert let_through == []
    assert count == HIGHEST_CALL - len({n for n in numbers_of(network, this_machine()) if n >= 0} | NEVER_FILTERED)


def this_machine() -> seccomp.Architecture:
    return seccomp.ARCHITECTURES[platform.machine()]


def numbers_of(network: Network, architecture: seccomp.Architecture) -> list[int]:
    tables = [*seccomp.allowed_calls(network).values(), *(g.numbers for g in seccomp.guarded_calls(network).values())]
    return [numbers[architecture.column] for numbers in tables]


HOLES = """
folder = Path(sys.argv[2])
precious = folder / "precious"
listener = socket.create_server(("127.0.0.1", 0))
listening = listener.getsockname()
unix = socket.socket(socket.AF_UNIX); unix.bind(str(folder / "s")); unix.listen()
victim = os.fork()
if victim == 0:
    linux.set_parent_death_signal()
    os.close(1)
    os.close(2)
    signal.pause()
    os._exit(0)
TCP = socket.socket() if network is not seccomp.Network.NONE else None
libc = ctypes.CDLL(None, use_errno=True)
precious_fd = os.open(precious, os.O_RDONLY)
before = precious.stat()
assert seccomp.confine(network)

def connected(family, kind, protocol, address):
    def attempt():
        with socket.socket(family, kind, protocol) as sock:
            sock.settimeout(5)
            sock.connect(address)
    return attempt

def fast_open():
    with socket.socket() as sock:
        sock.sendto(b"x", 0x20000000, listening)

def fast_open_option():
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, 30, 1)

def listen_without_bind():
    with socket.socket() as sock:
        sock.listen()

def bind():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setblocking(False)
        try:
            sock.accept()
        except BlockingIOError:
            pass

def raw(name_or_number, *arguments):
    def attempt():
        outcome = tried(name_or_number, *arguments)
        if outcome != "ok":
            number = getattr(errno, outcome)
            raise OSError(number, os.strerror(number))
    return attempt

limit = ctypes.create_string_buffer(struct.pack("QQ", 64, 64))
PRLIMIT = 302 if column == 0 else 261

def forked():
    pid = os.fork()
    if pid == 0:
        os._exit(0)

def program_of_memory():
    fd = os.memfd_create("x")
    os.write(fd, Path(sys.executable).read_bytes())
    os.execve(fd, ["x", "-c", ""], {})

x86 = column == 0
ATTEMPTS = {
    "MPTCP": connected(socket.AF_INET, socket.SOCK_STREAM, 262, listening),
    "TCP": connected(socket.AF_INET, socket.SOCK_STREAM, 0, listening),
    "UDP": connected(socket.AF_INET, socket.SOCK_DGRAM, 0, listening),
    "raw IP": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "SCTP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132),
    "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0),
    "unix socket": connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, str(folder / "s")),
    "unix socket pair": lambda: socket.socketpair(),
    "fast open": fast_open,
    "fast open by option": fast_open_option,
    "listen without bind": listen_without_bind,
    "bind, listen, accept": bind,
    "prlimit of another process": raw(PRLIMIT, victim, resource.RLIMIT_NOFILE, ctypes.addressof(limit), 0),
    "raise or lower a limit": raw(PRLIMIT, 0, resource.RLIMIT_NOFILE, ctypes.addressof(limit), 0),
    "signal another process": lambda: os.kill(victim, 0),
    "signal a thread of another process": raw(234 if x86 else 131, victim, victim, 0),
    "niceness of another process": lambda: os.setpriority(os.PRIO_PROCESS, victim, 19),
    "trace another process": raw(101 if x86 else 117, 16, victim, 0, 0),
    "read another process's memory": raw(310 if x86 else 270, victim, 0, 0, 0, 0, 0),
    "pidfd of another process": lambda: os.pidfd_open(victim),
    "fork": forked,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "exec of a memfd": program_of_memory,
    "chmod": lambda: os.chmod(precious, 0o777),
    "fchmod": lambda: os.fchmod(precious_fd, 0o777),
    "chown": lambda: os.chown(precious, 1, 1),
    "times by path": lambda: os.utime(precious, (1, 1)),
    "set an attribute": lambda: os.setxattr(precious, "user.x", b"x"),
    "io_uring": raw(425, 1, 0),
    "userfaultfd": raw(323 if x86 else 282, 0),
    "add a key": raw(248 if x86 else 217, 0, 0, 0, 0, -3),
    "keyctl": raw(250 if x86 else 219, 0, -3, 0),
    "BPF": raw(321 if x86 else 280, 0, 0, 0),
    "perf": raw(298 if x86 else 241, 0, 0, -1, -1, 0),
    "user namespace": lambda: libc.unshare(0x10000000) and raw(272 if x86 else 97, 0x10000000)(),
    "clone into a user namespace": raw(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0),
    "thread in a network namespace": raw(56 if x86 else 220, 0x40000000 | 0x10100, 0, 0, 0, 0),
    "enter a namespace": raw(308 if x86 else 268, precious_fd, 0),
    "mount": raw(165 if x86 else 40, 0, 0, 0, 0, 0),
    "open by handle": raw(304 if x86 else 265, -100, 0, 0),
    "another root": lambda: os.chroot(folder),
    "load a module": raw(313 if x86 else 273, precious_fd, 0, 0),
    "insert into a terminal": raw(16 if x86 else 29, 0, 0x5412, 0),
    "own a descriptor's signals": raw(72 if x86 else 25, precious_fd, 8, victim),
    "put a filter on a socket": lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 26, bytes(16)),
    "another filter": raw(317 if x86 else 277, 1, 0, 0),
    "change of user": lambda: os.setresuid(1, 1, 1),
    "shared memory of System V": raw(29 if x86 else 194, 0, 4096, 0o1600),
    "message queue": raw(240 if x86 else 180, 0, 0, 0, 0),
}
found = {}
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
        found[name] = "ok"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
after = precious.stat()
unchanged = (before.st_mode, before.st_mtime_ns, before.st_uid) == (after.st_mode, after.st_mtime_ns, after.st_uid)
print(json.dumps({"unchanged": unchanged, "found": found}))
sys.stdout.flush()
os._exit(0)
"""

CLIENT_MAY = {"TCP", "UDP"}
SERVER_MAY = {*CLIENT_MAY, "bind, listen, accept", "listen without bind"}
REFUSALS = {"EPERM", "EAFNOSUPPORT", "ENOTTY", "ENOSYS"}


@needs_filter
@pytest.mark.parametrize(
    ("network", "may"), [(Network.NONE, set()), (Network.CLIENT, CLIENT_MAY), (Network.SERVER, SERVER_MAY)]
)
def test_the_ways_out_that_an_audit_found_are_closed(network: Network, may: set[str], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    outcome = json.loads(run(HOLES, network, str(tmp_path)))
    found = outcome["found"]
    assert {name for name, result in found.items() if result == "ok"} == may
    assert {result for name, result in found.items() if name not in may} <= REFUSALS, found
    assert outcome["unchanged"]
    assert len(found) >= 49


@needs_filter
def test_what_a_runtime_needs_still_works() -> None:
    script = """
import threading, tempfile, time
folder = tempfile.mkdtemp()
at = os.open(folder, os.O_RDONLY)
assert seccomp.confine(network)
path = os.path.join(folder, "file")
with open(path, "w") as file:
    file.write("x")
    file.flush()
    os.utime(file.fileno(), (1, 1))
assert os.stat(path).st_mtime == 1
os.mkdir("a", dir_fd=at)
os.rename("file", "a/file", src_dir_fd=at, dst_dir_fd=at)
os.unlink("a/file", dir_fd=at)
os.rmdir("a", dir_fd=at)
os.rmdir(folder, dir_fd=at)
ran = []
thread = threading.Thread(target=lambda: ran.append(1))
thread.start()
thread.join()
os.nice(1)
time.sleep(0)
assert resource.getrlimit(resource.RLIMIT_NOFILE)
print(ran)
"""
    assert run(script, Network.NONE) == "[1]\n"


@needs_filter
def test_an_abort_still_looks_like_one() -> None:
    command = [sys.executable, "-P", "-c", PRELUDE + "seccomp.confine(network); os.abort()", "none"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == -6


X32_CALLS = {
    "read": 0,
    "getpid": 39,
    "fork": 57,
    "kill": 62,
    "io_uring_setup": 425,
    "execve of its own": 520,
    "ptrace of its own": 521,
    "the last of its own": 547,
    "a number of no call": 0x3FFFFFFF,
}


@needs_filter
@pytest.mark.skipif(not this_machine().x32, reason="only x86_64 has x32")
@pytest.mark.parametrize("number", [pytest.param(number, id=name) for name, number in X32_CALLS.items()])
def test_a_call_of_another_binary_interface_ends_the_process(number: int) -> None:
    script = f"seccomp.confine(network); tried(0x40000000 + {number}, -1, -1, -1, -1, -1, -1)"
    command = [sys.executable, "-P", "-c", PRELUDE + script, "none"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGSYS


INT_80 = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes((0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3)))  # mov eax, 20 (getpid of 32-bit x86); int 0x80; ret
enter = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
"""


@needs_filter
@pytest.mark.skipif(not this_machine().x32, reason="only x86_64 has the gate for 32-bit calls")
def test_the_gate_for_32_bit_calls_ends_a_process_of_64_bits() -> None:
    """Call 20 would be getpid there, and is writev, which is allowed, in the table of x86_64."""

    def status(script: str) -> int:
        command = [sys.executable, "-P", "-c", PRELUDE + INT_80 + script, "none"]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    if status("assert enter() == os.getpid()") != 0:
        pytest.skip("this kernel takes no 32-bit calls")
    assert status("seccomp.confine(network); enter()") == -signal.SIGSYS


def judged(program: Sequence[seccomp.Instruction], audit: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """The filter's verdict, by what ``bpf(4)`` says each instruction does."""
    words = [number, audit, 0, 0]
    for argument in arguments:
        words += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    accumulator = at = 0
    while True:
        code, true, false, operand = program[at]
        at += 1
        if code == 0x20:
            accumulator = words[operand // 4]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x15:
            at += true if accumulator == operand else false
        elif code == 0x35:
            at += true if accumulator >= operand else false
        else:
            assert code == 0x06
            return operand


ALLOW, EPERM, KILL = 0x7FFF0000, 0x50000 | errno.EPERM, 0x80000000
AF_INET, AF_UNIX, NULL, POINTER = 2, 1, 0, 1 << 40
CASES: Sequence[tuple[str, tuple[int, ...], Network, int]] = [
    ("clone", (0x3D0F00,), Network.NONE, ALLOW),  # what glibc's threads use
    ("clone", (0x1200011,), Network.NONE, EPERM),  # fork
    ("clone", (0x3D0F00 | 0x10000000,), Network.NONE, EPERM),
    ("clone", (0x3D0F00 | 0x80,), Network.NONE, EPERM),  # a time namespace
    ("clone3", (POINTER, 88), Network.NONE, 0x50000 | errno.ENOSYS),
    ("prlimit64", (0, 7, NULL, POINTER), Network.NONE, ALLOW),
    ("prlimit64", (0, 7, POINTER, NULL), Network.NONE, EPERM),  # its lower half is 0
    ("prlimit64", (1, 7, NULL, POINTER), Network.NONE, EPERM),
    ("utimensat", (5, NULL, POINTER, 0), Network.NONE, ALLOW),
    ("utimensat", (5, POINTER, POINTER, 0), Network.NONE, EPERM),
    ("fcntl", (5, 1030), Network.NONE, ALLOW),
    ("fcntl", (5, 1033), Network.NONE, EPERM),
    ("ioctl", (0, 0x5401), Network.NONE, ALLOW),
    ("ioctl", (0, 0x5412), Network.NONE, 0x50000 | errno.ENOTTY),
    ("socket", (AF_INET, 1 | 0x80000, 6), Network.CLIENT, ALLOW),
    ("socket", (AF_INET, 2, 17), Network.CLIENT, ALLOW),
    ("socket", (10, 2, 0), Network.CLIENT, ALLOW),
    ("socket", (AF_INET, 1, 17), Network.CLIENT, 0x50000 | errno.EAFNOSUPPORT),
    ("socket", (AF_INET, 1, 262), Network.SERVER, 0x50000 | errno.EAFNOSUPPORT),
    ("socket", (AF_INET, 3, 0), Network.SERVER, 0x50000 | errno.EAFNOSUPPORT),
    ("socket", (AF_UNIX, 1, 0), Network.SERVER, 0x50000 | errno.EAFNOSUPPORT),
    ("sendto", (3, POINTER, 1, 0x4000, POINTER, 16), Network.CLIENT, ALLOW),
    ("sendto", (3, POINTER, 1, 0x20000000, POINTER, 16), Network.CLIENT, EPERM),
    ("sendmsg", (3, POINTER, 0x20004000), Network.SERVER, EPERM),
    ("sendmmsg", (3, POINTER, 1, 0x20000000), Network.SERVER, EPERM),
    ("setsockopt", (3, 6, 1), Network.CLIENT, ALLOW),
    ("setsockopt", (3, 6, 30), Network.CLIENT, EPERM),
    ("setsockopt", (3, 1, 50), Network.SERVER, EPERM),
    ("setsockopt", (3, 41, 26), Network.SERVER, ALLOW),
    ("setsockopt", (3, 263, 1), Network.SERVER, EPERM),
    ("getpriority", (0, 0), Network.NONE, ALLOW),
    ("setpriority", (0, 1, 19), Network.NONE, EPERM),
]


@pytest.mark.parametrize("machine", list(seccomp.ARCHITECTURES))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1]}-{case[2].value}")
def test_guarded_calls_on_both_architectures(machine: str, case: tuple[str, tuple[int, ...], Network, int]) -> None:
    name, arguments, network, verdict = case
    architecture = seccomp.ARCHITECTURES[machine]
    number = seccomp.guarded_calls(network)[name].numbers[architecture.column]
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    assert judged(seccomp.program(architecture, network), architecture.audit, number, padded) == verdict


@pytest.mark.parametrize("machine", list(seccomp.ARCHITECTURES))
@pytest.mark.parametrize("network", list(Network))
def test_the_whole_table_on_both_architectures(machine: str, network: Network) -> None:
    architecture = seccomp.ARCHITECTURES[machine]
    program = seccomp.program(architecture, network)
    allowed = {numbers[architecture.column] for numbers in seccomp.allowed_calls(network).values()}
    guarded = {rule.numbers[architecture.column] for rule in seccomp.guarded_calls(network).values()}
    assert not allowed & guarded
    for number in range(HIGHEST_CALL):
        if number not in guarded:
            assert judged(program, architecture.audit, number) == (ALLOW if number in allowed else EPERM)
        assert judged(program, 0x40000003, number) == KILL  # 32-bit x86
    assert len(program) < 4096  # the kernel's BPF_MAXINSNS


def headers() -> dict[str, dict[str, int]]:
    """Both tables as this machine's kernel headers have them; empty where there are none."""
    compiled: dict[str, dict[str, int]] = {}
    include = Path("/usr/include")
    sources = {
        "x86_64": sorted(include.glob("*/asm/unistd_64.h")),
        "aarch64": sorted(include.glob("asm-generic/unistd.h")),
    }
    for machine, paths in sources.items():
        for path in paths[:1]:
            found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", path.read_text())
            compiled[machine] = {name: int(number) for name, number in found}
    return compiled


@pytest.mark.skipif(set(headers()) != set(seccomp.ARCHITECTURES), reason="no kernel headers")
def test_the_numbers_are_those_of_the_kernels_headers() -> None:
    known = headers()
    tables = {name: rule.numbers for name, rule in seccomp.guarded_calls(Network.SERVER).items()}
    for name, numbers in {**seccomp.allowed_calls(Network.SERVER), **tables}.items():
        for machine, architecture in seccomp.ARCHITECTURES.items():
            number = numbers[architecture.column]
            if number >= 0 and not (name == "newfstatat" and machine == "aarch64"):
                assert known[machine][name] == number, (machine, name)
