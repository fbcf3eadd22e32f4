"""What the supervisor's user namespace keeps from it, from its sandboxes, and from who takes them over."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wasilet_node.runtime import linux, seccomp, user_namespace

from tests.unit.node.runtime.guests import SLEEPER, Rig, running_supervisor

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root has one"),
]

FROM_INSIDE = """
import errno, json, os, sys
from wasilet_node.runtime import linux, netns

host = os.open("/proc/self/ns/net", os.O_RDONLY)
netns.setns(os.open(f"/proc/{sys.argv[1]}/ns/user", os.O_RDONLY), netns.CLONE_NEWUSER)
found = {}

def attempt(name, function):
    try:
        found[name] = function() or "ok"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]

attempt("all capabilities", lambda: hex(linux.effective_capabilities() >> linux.CAP_SYS_ADMIN & 1))
attempt("another user namespace", lambda: netns.unshare(netns.CLONE_NEWUSER))
attempt("the machine's network", lambda: netns.setns(host))
attempt("a mount for all", lambda: netns.mount("/tmp", "/mnt", netns.MS_BIND))
attempt("a host name for all", lambda: __import__("socket").sethostname("x"))
attempt("a device", lambda: os.mknod("/dev/shm/wasilet-test-device", 0o60600, os.makedev(254, 0)))
attempt("a network of its own", lambda: netns.unshare(netns.CLONE_NEWNET))
print(json.dumps(found))
"""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_supervisor(tmp_path / "data") as rig:
        yield rig


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_all_of_its_capabilities_hold_over_what_was_made_inside_only(rig: Rig) -> None:
    """Even a process with every capability in that namespace, which the supervisor itself has not."""
    assert Path(f"/proc/{rig.pid()}/uid_map").read_text().split() == ["0", "0", "4294967295"]
    command = [sys.executable, "-P", "-c", FROM_INSIDE, str(rig.pid())]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {
        "all capabilities": "0x1",
        "another user namespace": "ENOSPC",
        "the machine's network": "EPERM",
        "a mount for all": "EPERM",
        "a host name for all": "EPERM",
        "a device": "EPERM",
        "a network of its own": "ok",
    }


async def test_a_sandbox_has_dropped_what_the_supervisor_keeps(rig: Rig) -> None:
    status = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    assert status.pid is not None
    namespaces = {Path(f"/proc/{pid}/ns/user").readlink() for pid in (status.pid, rig.pid())}
    assert len(namespaces) == 1
    assert Path("/proc/self/ns/user").readlink() not in namespaces
    found = status_of(status.pid)
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
        assert int(found[name], 16) & ~(1 << linux.CAP_DAC_OVERRIDE) == 0, name
    assert found["NoNewPrivs"] == "1"
    assert found["Groups"] == ""
    assert found["Seccomp"] == ("2" if seccomp.available() else "0")
