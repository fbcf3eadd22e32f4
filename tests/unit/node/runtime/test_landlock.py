"""The fence around a sandbox process, tried by native code as a guest that broke out of WebAssembly would be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime import landlock
from wasilet_node.runtime.protocol import Mount

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(landlock.abi() < landlock.LOWEST_ABI, reason="this kernel offers no Landlock"),
]

ATTEMPTS = """
import encodings.idna, json, os, signal, socket, sys
from pathlib import Path
from wasilet_node.runtime import landlock, linux
from wasilet_node.runtime.protocol import Mount

folder, network = Path(sys.argv[1]), sys.argv[2] == "network"
listener = socket.create_server(("127.0.0.1", 0))
found = {}

def attempt(name, function):
    try:
        function()
        found[name] = "ok"
    except OSError as error:
        found[name] = os.strerror(error.errno)

def move():
    (folder / "rw/a").mkdir()
    (folder / "rw/b").mkdir()
    (folder / "rw/a/x").write_text("x")
    (folder / "rw/a/x").rename(folder / "rw/b/x")
    os.truncate(folder / "rw/b/x", 0)
    (folder / "rw/b/x").unlink()
    (folder / "rw/b").rmdir()

def run():
    pid = os.fork()
    if pid == 0:
        try:
            os.execv("/bin/true", ["true"])
        except OSError as error:
            os._exit(error.errno)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(code, os.strerror(code))

mounts = [Mount(host=str(folder / "rw"), guest="/rw"), Mount(host=str(folder / "ro"), guest="/ro", read_only=True),
          Mount(host=str(folder / "missing"), guest="/missing")]
linux.set_no_new_privs()
found["confined"] = landlock.confine(mounts, files=[str(folder / "artifact"), "/etc/hosts"], tcp=network)
attempt("work in a mount", move)
attempt("link in a mount", lambda: os.symlink("x", folder / "rw/link"))
attempt("read a read-only mount", lambda: (folder / "ro/file").read_text())
attempt("write a read-only mount", lambda: (folder / "ro/file").write_text("x"))
attempt("read the artifact", lambda: (folder / "artifact").read_text())
attempt("write the artifact", lambda: (folder / "artifact").write_text("x"))
attempt("read a named file", lambda: Path("/etc/hosts").read_text())
attempt("read elsewhere", lambda: (folder / "secret").read_text())
attempt("list elsewhere", lambda: os.listdir(folder))
attempt("write elsewhere", lambda: (folder / "new").write_text("x"))
attempt("remove elsewhere", lambda: (folder / "secret").unlink())
attempt("run a program", run)
attempt("signal the parent", lambda: os.kill(os.getppid(), 0))
attempt("connect", lambda: socket.create_connection(listener.getsockname(), timeout=5).close())
attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)).close())
print(json.dumps(found))
"""


def tried(folder: Path, network: str = "") -> dict[str, Any]:
    for name in ("rw", "ro"):
        (folder / name).mkdir()
    for name in ("ro/file", "artifact", "secret"):
        (folder / name).write_text("text")
    command = [sys.executable, "-P", "-c", ATTEMPTS, str(folder), network]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(found: dict[str, Any]) -> set[str]:
    assert found.pop("confined") is True
    assert set(found.values()) <= {"ok", "Permission denied", "Operation not permitted"}, found
    return {name for name, outcome in found.items() if outcome != "ok"}


def by_version() -> set[str]:
    """What newer kernels refuse on top."""
    more = {4: {"connect", "listen"}, 6: {"signal the parent"}}
    return set().union(*(names for version, names in more.items() if landlock.abi() >= version))


def test_only_what_is_mounted_can_be_reached(tmp_path: Path) -> None:
    writes = {"write a read-only mount", "write the artifact", "write elsewhere", "remove elsewhere"}
    assert refused(tried(tmp_path)) == {*writes, "read elsewhere", "list elsewhere", "run a program", *by_version()}


def test_a_guest_that_may_speak_http_reads_what_that_needs_and_still_writes_nothing(tmp_path: Path) -> None:
    elsewhere = {"write elsewhere", "remove elsewhere", "read elsewhere", "list elsewhere"}
    others = {"write a read-only mount", "write the artifact", "run a program"}
    assert refused(tried(tmp_path, "network")) == {*elsewhere, *others, *by_version() - {"connect", "listen"}}


@pytest.mark.parametrize("version", [0, 1])
def test_kernels_that_cannot_do_it_run_without(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr("wasilet_node.runtime.landlock.abi", lambda: version)
    assert landlock.confine([Mount(host="/", guest="/")], files=[], tcp=False) is False
    assert Path("/etc/passwd").read_text()


def test_every_sandbox_is_confined_before_its_guest_is_looked_at(tmp_path: Path) -> None:
    """In a process of its own, because a fork needs one thread."""
    script = """
import dataclasses, sys
from pathlib import Path
from wasilet_node.runtime import engine, guest
from wasilet_node.runtime.loop import Loop
from wasilet_node.runtime.process import SandboxProcess
from wasilet_node.runtime.zygote import Zygote
from tests.unit.node.runtime.test_wire import CONFIG

def instead_of_a_guest(*_args, **_fields):
    return len(Path(sys.argv[1]).read_text())

guest.run_guest = instead_of_a_guest
loop = Loop()
process = SandboxProcess(loop, dataclasses.replace(CONFIG, http=None), on_output=print, on_started=print,
                         on_exit=lambda outcome: (print(outcome.message), loop.stop()))
zygote = Zygote(guest.make_tools(engine.make_linkers()))
process.spawn(zygote, guest_stdin=False, group=None, backstop_bytes=None)
loop.run()
"""
    (tmp_path / "secret").write_text("text")
    command = [sys.executable, "-c", script, str(tmp_path / "secret")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("PermissionError: [Errno 13] Permission denied")
