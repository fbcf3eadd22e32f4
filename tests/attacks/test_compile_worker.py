"""The compile worker's fence, tried by native code in a worker in place of the compilation."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet_node.runtime import landlock, seccomp, user_namespace
from wasilet_node.runtime.compile import CompileError, Compiler
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

from tests.attacks import hostile_compiler
from tests.attacks.tally import Tally

pytestmark = pytest.mark.unit

SECONDS = 60.0
ROWS = yaml.safe_load((Path(__file__).parent / "compile_worker.yaml").read_text())
FENCES = ["all", "user"]


class Workers:
    """Hostile workers, and a process of the test's own user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, fences: str, deed: str, facts: object = None) -> asyncio.subprocess.Process:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        output = self.folder / f"out{len(self.processes)}"
        command = (sys.executable, "-P", hostile_compiler.__file__, fences, deed, json.dumps(facts))
        return await self._spawn(*command, str(self.folder / "module.wasm"), str(output), env={"PYTHONPATH": path})

    async def outsider(self) -> asyncio.subprocess.Process:
        return await self._spawn("sleep", "600")

    async def _spawn(self, *command: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=env)
        self.processes.append(process)
        return process


async def said(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        return json.loads(await process.stdout.readline())


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o700)
    (folder / "module.wasm").write_bytes(b"\0asm\1\0\0\0")
    (folder / "roots").write_text("a secret")
    (folder / "roots").chmod(0o600)
    workers = Workers(folder)
    yield workers
    for process in workers.processes:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("fences", FENCES)
async def test_native_code_in_the_compiler_gets_nowhere(workers: Workers, tally: Tally, fences: str) -> None:
    if fences == "user" and not user_namespace.may_be_had():
        pytest.skip("only root's workers have users of their own")
    if fences == "all" and (landlock.abi() < landlock.LOWEST_ABI or not seccomp.available()):
        pytest.skip("a kernel without fences")
    other, outsider = await workers.start(fences, "wait"), await workers.outsider()
    assert await said(other) == "there"
    pids = {"another worker": other.pid, "an outsider": outsider.pid}
    every = {**ROWS["once"], **{row.format(of): how for row, how in ROWS["each"].items() for of in pids}}
    expected = {row: how[FENCES.index(fences)] for row, how in every.items()}
    expected = {row: how for row, how in expected.items() if how is not None}
    if os.geteuid() != 0:
        del expected["more threads than are allowed"]  # all processes of the user are counted
    facts = {"folder": str(workers.folder), "pids": pids, "rows": list(expected)}
    assert await said(await workers.start(fences, "attack", facts)) == expected
    assert (workers.folder / "roots").read_text() == "a secret"
    assert (other.returncode, outsider.returncode) == (None, None)
    tally.count("refused", len(expected))


async def test_a_compiler_that_writes_messages_without_end_is_ended(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """The agent, which reads them, keeps their end alone."""
    run = asyncio.create_subprocess_exec
    command = (sys.executable, "-P", hostile_compiler.__file__, "all", "flood", "null")

    async def hostile(*argv: str, **fields: Any) -> asyncio.subprocess.Process:
        fields["env"] |= {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        return await run(*command, *argv[4:6], **fields)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", hostile)
    compiler = Compiler(tmp_path / "cache", ImageSettings())
    async with asyncio.timeout(SECONDS):
        with pytest.raises(CompileError, match="printed more than 1 MiB"):
            await compiler.compile(workers.folder / "module.wasm", f"sha256:{'0' * 64}", GuestKind.MODULE)
    await compiler.close()
    tally.count("refused")
