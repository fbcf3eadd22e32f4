"""What is found out about the fences of sandboxes, and who is told."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wasilet_node.runtime import landlock, seccomp, user_namespace

from tests.attacks.test_sandbox_user import hostile
from tests.ordinary_user import ordinary_user
from tests.unit.node.runtime.guests import running_supervisor

pytestmark = pytest.mark.unit

OWN = ("own user", "own file tree", "own pid namespace")
COMMAND = (sys.executable, "-P", "-m", "wasilet_node.runtime.fences")
WITHOUT_CAPABILITIES = """
import os, sys
from wasilet_node.runtime import linux
linux.keep_only_capabilities(frozenset())
os.execv(sys.argv[1], sys.argv[1:])
"""

WITHOUT_CLONE3 = """
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 435), (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(program)))
assert ctypes.CDLL(None).prctl(22, 2, header, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
"""As a unit of systemd that restricts namespaces: this call's flags cannot be looked at, so it answers ENOSYS."""

NO_NAMESPACE = """
import errno, sys
from wasilet_node.runtime import fences, rootless
def refuse():
    raise OSError(errno.EPERM, "as where the machine forbids it")
rootless.make = refuse
sys.exit(fences.main())
"""

needs_root = pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root's sandboxes have all fences")


def answers(*prefix: str, user: int | None = None) -> dict[str, tuple[bool, str]]:
    done = subprocess.run(
        [*prefix, *COMMAND], capture_output=True, text=True, check=True, timeout=60, user=user, env=dict(os.environ)
    )
    return {fence["name"]: (fence["holds"], fence["detail"]) for fence in json.loads(done.stdout)}


@needs_root
def test_root_has_all_that_the_kernel_has() -> None:
    found = answers()
    assert {name: found[name][0] for name in OWN} == dict.fromkeys(OWN, True)
    assert found["Landlock"][0] is (landlock.abi() >= landlock.LOWEST_ABI)
    assert found["seccomp"][0] is seccomp.available()


@needs_root
def test_root_without_capabilities_has_the_kernels_alone_and_the_reason_is_given() -> None:
    found = answers(sys.executable, "-P", "-c", WITHOUT_CAPABILITIES)
    assert {name: found[name][0] for name in OWN} == dict.fromkeys(OWN, False)
    assert all("root without CAP_SYS_ADMIN" in found[name][1] for name in OWN)
    assert found["Landlock"] == answers()["Landlock"]


@needs_root
def test_a_service_of_systemd_has_all_of_them_too() -> None:
    """Tried under systemd itself by ``tests.rigs.cgroup2``."""
    found = answers(sys.executable, "-P", "-c", WITHOUT_CLONE3)
    assert {name: found[name][0] for name in OWN} == dict.fromkeys(OWN, True)


@needs_root
def test_an_ordinary_user_with_a_namespace_has_all_but_the_own_user() -> None:
    with ordinary_user() as user:
        found = {fence["name"]: fence for fence in json.loads(user.run(*COMMAND))}
    assert [found[name]["holds"] for name in OWN] == [False, True, True]
    assert found["own user"]["detail"].endswith(": that needs root")


@needs_root
def test_an_ordinary_user_without_one_has_the_kernels_alone_and_the_reason_is_given() -> None:
    with ordinary_user() as user:
        found = {fence["name"]: fence for fence in json.loads(user.run(sys.executable, "-P", "-c", NO_NAMESPACE))}
    assert [found[name]["holds"] for name in OWN] == [False, False, False]
    assert all(found[name]["detail"].endswith(": that needs root") for name in OWN)
    assert found["seccomp"]["holds"] is seccomp.available()


async def test_the_supervisor_and_the_node_write_a_line_for_each_into_their_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with running_supervisor(tmp_path / "data") as rig:
            lines = [fence.line for fence in rig.client.capabilities.fences]
    assert len(lines) == 5
    assert [record.getMessage() for record in caplog.records if record.getMessage() in lines] == lines
    log = (tmp_path / "data" / "supervisor.log").read_text()
    assert [line for line in lines if line not in log] == []


@needs_root
async def test_a_missing_one_is_a_warning_of_the_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Taken out of the supervisor, which only reports it."""
    async with hostile(tmp_path / "data", "user"):
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in warned if "own file tree: missing, " in line and line.endswith(": it is taken out")]
    assert [line for line in warned if "own pid namespace: missing, " in line and line.endswith(": it is taken out")]
