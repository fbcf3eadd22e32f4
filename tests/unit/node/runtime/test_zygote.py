"""The process that sandboxes are forked from: clean, ahead of time, replaceable, and never left behind."""

from __future__ import annotations

import os
import re
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from wasilet_node.runtime import linux, supervisor_registry
from wasilet_node.runtime.protocol import ContainerState
from wasilet_node.runtime.zygote import READY_SANDBOXES

from tests.unit.node.runtime.guests import ENVIRONMENT, HELLO, SLEEPER, Rig, eventually, running_supervisor

pytestmark = pytest.mark.unit


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_supervisor(tmp_path / "data") as rig:
        yield rig


def parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


def children(pid: int) -> set[int]:
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                if parent_of(int(path.name)) == pid:
                    found.add(int(path.name))
            except OSError:
                continue
    return found


async def settled(rig: Rig, running: int = 0) -> set[int]:
    """The supervisor's children once the zygote and all sandboxes ahead of time are there: those beside ``running``."""

    async def there() -> set[int] | None:
        found = children(rig.pid())
        return found if len(found) >= running + 1 + 3 else None

    return await eventually(there)


def zygote(supervisor: int) -> int:
    """The oldest child."""
    return min(children(supervisor), key=lambda pid: (linux.start_time(pid) or 0, pid))


def holds(pid: int, marker: bytes) -> bool:
    """Whether the private memory of a process has it anywhere."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if match is None or "[v" in line:
                continue
            start, end = (int(text, 16) for text in match.groups())
            if end - start > 256 * 2**20:
                continue  # a guest's memory and its guards, which no supervisor has
            try:
                memory.seek(start)
                if marker in memory.read(end - start):
                    return True
            except (OSError, ValueError):
                continue
    return False


async def test_no_sandbox_holds_a_secret_of_another_container(rig: Rig) -> None:
    secret = secrets.token_hex(24)
    first = await rig.client.start(rig.config(rig.artifact(SLEEPER), env=(("PASSWORD", secret),)))
    removed = await rig.run(ENVIRONMENT, env=(("PASSWORD", secret),))
    await rig.client.remove(removed.id)
    await settled(rig, running=1)
    second = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    await rig.client.exec(first.id, ("x",), timeout_seconds=0.1)
    third = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    assert first.pid is not None
    assert second.pid is not None
    assert third.pid is not None
    assert holds(first.pid, secret.encode())  # else this test sees nothing
    assert not holds(second.pid, secret.encode())
    assert not holds(third.pid, secret.encode())
    assert not holds(zygote(rig.pid()), secret.encode())


async def test_no_sandbox_holds_what_the_agent_and_the_supervisor_keep_to_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's environment, and the secret that opens the supervisor's socket."""
    token = secrets.token_hex(24)
    monkeypatch.setenv("REGISTRY_TOKEN", token)
    async with running_supervisor(tmp_path / "data") as rig:
        pointer = supervisor_registry.current(rig.paths.data)
        assert pointer is not None
        await settled(rig)
        pids = [(await rig.client.start(rig.config(rig.artifact(SLEEPER)))).pid for _ in range(READY_SANDBOXES + 1)]
        assert holds(pointer.pid, pointer.secret.encode())  # else this test sees nothing
        assert not holds(pointer.pid, token.encode())
        found = [pid for pid in (zygote(rig.pid()), *pids) if pid and holds(pid, pointer.secret.encode())]
        assert found == []


async def test_a_sandbox_is_the_supervisors_own_child_and_was_there_before_it_was_needed(rig: Rig) -> None:
    ahead = await settled(rig)
    status = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    assert status.pid is not None
    assert status.pid in ahead
    assert parent_of(status.pid) == rig.pid()
    assert len(await settled(rig, running=1)) <= 1 + 1 + READY_SANDBOXES


async def test_a_killed_zygote_harms_no_container_and_is_replaced(rig: Rig) -> None:
    secret = secrets.token_hex(24)
    config = rig.config(rig.artifact(SLEEPER), env=(("PASSWORD", secret),))
    await rig.client.start(config)
    await settled(rig, running=1)
    old = zygote(rig.pid())
    os.kill(old, signal.SIGKILL)
    for _ in range(6):  # more than wait
        assert (await rig.run(HELLO)).exit_code == 0
    assert linux.start_time(old) is None
    assert {status.id: status.state for status in await rig.client.list()}[config.id] is ContainerState.RUNNING
    later = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    assert later.pid is not None
    assert not holds(later.pid, secret.encode())


async def test_a_killed_sandbox_that_waited_is_passed_over(rig: Rig) -> None:
    waiting = await settled(rig) - {zygote(rig.pid())}
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)

    async def dead() -> bool | None:
        return None if any(linux.start_time(pid) for pid in waiting) else True

    await eventually(dead)
    assert (await rig.run(HELLO)).exit_code == 0

    async def reaped() -> bool | None:
        return None if waiting & children(rig.pid()) else True

    await eventually(reaped)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_is_left_of_a_supervisor(rig: Rig, number: signal.Signals) -> None:
    await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    family = await settled(rig, running=1)
    pointer = supervisor_registry.current(rig.paths.data)
    assert pointer is not None
    os.kill(pointer.pid, number)

    async def gone() -> bool | None:
        return None if any(linux.start_time(pid) for pid in (*family, pointer.pid)) else True

    await eventually(gone)
