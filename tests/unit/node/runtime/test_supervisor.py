"""The supervisor as the agent meets it: real processes, a real socket, real log files."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime import linux, supervisor_registry, unix_sockets
from wasilet_node.runtime.client import RuntimeClient, ensure_supervisor, shutdown
from wasilet_node.runtime.protocol import (
    ContainerState,
    ContainerStatus,
    GuestKind,
    Mount,
    ResizeError,
    Resources,
    RuntimeUnavailableError,
    StartError,
    UnknownContainerError,
)
from wasilet_node.runtime.supervisor_connection import connect
from wasilet_node.settings import LogSettings, NodePaths

from tests.unit.node.runtime.component_guests import component_guest
from tests.unit.node.runtime.guests import (
    ARGUMENTS,
    ENVIRONMENT,
    HELLO,
    MEMORY_HOG,
    SLEEPER,
    SPINNER,
    TRAP,
    Rig,
    connected,
    end_supervisors,
    eventually,
    exit_with,
    gone,
    guest,
    running_supervisor,
    say,
)

pytestmark = pytest.mark.unit

CAP_SYS_RESOURCE = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("runtime") / "data"
    yield path
    asyncio.run(end_supervisors(NodePaths(data=path)))


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    """One supervisor for all tests that leave it alone."""
    async with connected(data) as running:
        yield running


@pytest.fixture
async def own_rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A supervisor that the test may end, count or upset."""
    async with running_supervisor(tmp_path / "data") as running:
        yield running


def log_text(status: ContainerStatus) -> str:
    """What the container wrote, without timestamps and tags."""
    lines = Path(status.log_path).read_text().splitlines()
    return "\n".join(line.split(" ", 3)[3] for line in lines)


async def listed(rig: Rig) -> Sequence[ContainerStatus]:
    """All containers, once the client has healed itself."""

    async def attempt() -> Sequence[ContainerStatus] | None:
        try:
            return await rig.client.list()
        except RuntimeUnavailableError:
            return None

    return await eventually(attempt)


def descriptors(pid: int) -> set[str]:
    """What the open descriptors of a process point to."""
    return {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}


async def test_a_module_runs_and_its_output_is_in_the_log(rig: Rig) -> None:
    status = await rig.run(HELLO)
    assert (status.exit_code, status.reason, status.signal) == (0, "Completed", None)
    assert 0 < status.created_at_ns <= status.started_at_ns <= status.finished_at_ns
    line = Path(status.log_path).read_text()
    assert line.endswith(" stdout F hello world\n")
    assert line[:4].isdigit()
    assert line.split(" ")[0].endswith("Z")


async def test_start_answers_when_the_guest_runs(rig: Rig) -> None:
    status = await rig.client.start(rig.config(rig.artifact(SLEEPER), annotations={"a": "b"}))
    assert status.state is ContainerState.RUNNING
    assert status.annotations == {"a": "b"}
    assert status.pid is not None
    assert Path(f"/proc/{status.pid}/oom_score_adj").read_text() == "1000\n"


@pytest.mark.parametrize("code", [0, 1, 2, 125, 126, 127, 128, 134, 137, 200, 255, 256, 300, -1])
async def test_every_exit_code_arrives_modulo_256(rig: Rig, code: int) -> None:
    status = await rig.run(exit_with(code))
    assert status.exit_code == code % 256
    assert status.reason == ("Completed" if code % 256 == 0 else "Error")
    assert status.message == ""


async def test_a_trap_is_134_with_its_message_and_the_output_before_it(rig: Rig) -> None:
    status = await rig.run(TRAP)
    assert (status.exit_code, status.signal, status.reason) == (134, None, "Error")
    assert "unreachable" in status.message
    assert log_text(status) == "doomed"


async def test_output_without_a_line_end_is_not_lost(rig: Rig) -> None:
    status = await rig.run(guest(say("no end") + "(call $proc_exit (i32.const 3))", text="no end"))
    assert Path(status.log_path).read_text().endswith(" stdout P no end\n")


async def test_both_streams_are_kept_apart(rig: Rig) -> None:
    status = await rig.run(guest(say("a\n") + say("b\n", stream=2, offset=2), text="a\nb\n"))
    tags = {line.split(" ")[3]: line.split(" ")[1] for line in Path(status.log_path).read_text().splitlines()}
    assert tags == {"a": "stdout", "b": "stderr"}


async def test_arguments_and_environment_reach_the_guest_alone(rig: Rig) -> None:
    status = await rig.run(ARGUMENTS, argv=("name", "über", ""))
    assert log_text(status) == "name\0über\0\0"
    status = await rig.run(ENVIRONMENT, env=(("A", "1"), ("SECRET", "x=y")))
    assert log_text(status) == "A=1\0SECRET=x=y\0"
    status = await rig.run(ENVIRONMENT)
    assert not Path(status.log_path).read_text()


async def test_stopping_a_module_asleep_in_poll_oneoff_is_prompt(rig: Rig) -> None:
    config = rig.config(rig.artifact(SLEEPER))
    await rig.client.start(config)

    async def printed() -> bool | None:
        return Path(config.log_path).stat().st_size > 0 or None

    await eventually(printed)
    status = await rig.client.stop(config.id)
    assert status is not None
    assert (status.exit_code, status.signal, status.reason) == (137, 9, "Error")
    assert log_text(status) == "asleep"


async def test_stopping_a_spinning_module_is_prompt(rig: Rig) -> None:
    config = rig.config(rig.artifact(SPINNER))
    await rig.client.start(config)
    status = await rig.client.stop(config.id)
    assert status is not None
    assert status.exit_code == 137


async def test_stopping_an_unknown_container_says_so(rig: Rig) -> None:
    assert await rig.client.stop("f" * 64) is None
    await rig.client.remove("f" * 64)


async def test_the_same_id_starts_once(rig: Rig) -> None:
    config = rig.config(rig.artifact(HELLO))
    first, second = await asyncio.gather(rig.client.start(config), rig.client.start(config))
    assert first.started_at_ns == second.started_at_ns
    ended = await rig.ended(config.id)
    again = await rig.client.start(config)
    assert again.finished_at_ns == ended.finished_at_ns
    assert log_text(ended) == "hello world"


async def test_removed_containers_are_forgotten_on_disk_too(own_rig: Rig) -> None:
    status = await own_rig.run(HELLO)
    assert (own_rig.paths.containers / status.id / "exit.json").exists()
    await own_rig.client.remove(status.id)
    assert await own_rig.client.list() == ()
    assert not (own_rig.paths.containers / status.id).exists()
    assert Path(status.log_path).exists()


async def test_removing_a_running_container_kills_it(own_rig: Rig) -> None:
    status = await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER)))
    await own_rig.client.remove(status.id)
    assert status.pid is not None
    assert linux.start_time(status.pid) is None
    assert await own_rig.client.list() == ()


async def test_an_import_that_nobody_offers_is_a_start_error(rig: Rig) -> None:
    source = '(module (import "env" "magic" (func)) (func (export "_start")))'
    config = rig.config(rig.artifact(source))
    with pytest.raises(StartError, match="magic"):
        await rig.client.start(config)
    status = await rig.ended(config.id)
    assert (status.reason, status.exit_code, status.started_at_ns) == ("StartError", 128, 0)
    with pytest.raises(StartError, match="magic"):
        await rig.client.start(config)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('(memory (export "memory") 1)', "exports no function _start"),
        ('(global (export "_start") i32 (i32.const 1))', "_start as a global"),
        ('(memory (export "_start") 1)', "_start as a memory"),
        ('(table (export "_start") 1 funcref)', "_start as a table"),
        ('(func (export "_start") (param i32))', r"type \(i32\) -> \(\)"),
        ('(func (export "_start") (result i32) (i32.const 0))', r"type \(\) -> \(i32\)"),
        ('(func (export "_start") (param i64 f32) (result i32 i32) (i32.const 0) (i32.const 0))', "i64 f32"),
        ('(import "wasi_unstable" "fd_write" (func (param i32 i32 i32 i32) (result i32)))', "wasi_unstable"),
        ('(import "wasi_unstable" "proc_exit" (func (param i32))) (func (export "_start"))', "wasi_snapshot_preview1"),
    ],
)
async def test_a_module_that_is_no_command_is_a_start_error_with_the_reason(rig: Rig, source: str, reason: str) -> None:
    config = rig.config(rig.artifact(f"(module {source})"))
    with pytest.raises(StartError, match=reason):
        await rig.client.start(config)
    status = await rig.ended(config.id)
    assert (status.reason, status.exit_code, status.started_at_ns) == ("StartError", 128, 0)


async def test_a_missing_mount_is_a_start_error_that_names_it(rig: Rig) -> None:
    mount = Mount(host="/no/such/folder", guest="/data")
    with pytest.raises(StartError, match=r"/data.*No such file"):
        await rig.client.start(rig.config(rig.artifact(HELLO), mounts=(mount,)))


@pytest.mark.parametrize("env", [(("A", "x\0y"),), (("A=B", "x"),), (("", "x"),)])
async def test_what_c_strings_cannot_carry_is_refused(rig: Rig, env: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(StartError):
        await rig.client.start(rig.config(rig.artifact(HELLO), env=env))


async def test_a_corrupt_artifact_is_a_start_error_and_is_removed(own_rig: Rig) -> None:
    artifact = Path(own_rig.artifact(HELLO))
    artifact.write_bytes(b"\x7fELF" + b"garbage" * 100)
    with pytest.raises(StartError, match="cannot load"):
        await own_rig.client.start(own_rig.config(str(artifact)))
    assert not artifact.exists()
    assert (await own_rig.run(HELLO)).exit_code == 0


async def test_files_outside_of_the_cache_are_never_removed(rig: Rig, tmp_path: Path) -> None:
    precious = tmp_path / "precious.cwasm"
    precious.write_bytes(b"not compiled")
    with pytest.raises(StartError):
        await rig.client.start(rig.config(str(precious)))
    assert precious.exists()


async def test_events_tell_of_running_and_exited_in_order(own_rig: Rig) -> None:
    seen: list[tuple[ContainerState, int | None]] = []
    listening = asyncio.Event()

    async def listen() -> None:
        events = own_rig.client.events()
        listening.set()
        async for status in events:
            seen.append((status.state, status.exit_code))
            if status.state is ContainerState.EXITED:
                return

    task = asyncio.create_task(listen())
    await listening.wait()
    await asyncio.sleep(0.05)
    await own_rig.client.start(own_rig.config(own_rig.artifact(exit_with(7))))
    await asyncio.wait_for(task, 10)
    assert seen == [(ContainerState.RUNNING, None), (ContainerState.EXITED, 7)]


async def test_containers_outlive_the_agent(own_rig: Rig) -> None:
    config = own_rig.config(own_rig.artifact(SLEEPER))
    started = await own_rig.client.start(config)
    await own_rig.client.close()
    own_rig.client = await ensure_supervisor(own_rig.paths, own_rig.logs)
    (status,) = await own_rig.client.list()
    assert status == started


async def test_a_killed_supervisor_takes_its_containers_along_and_its_successor_says_so(own_rig: Rig) -> None:
    sleeping = own_rig.config(own_rig.artifact(SLEEPER))
    started = await own_rig.client.start(sleeping)
    finished = await own_rig.run(exit_with(5))
    first = own_rig.pid()
    os.kill(first, signal.SIGKILL)

    async def alone() -> bool | None:
        return True if started.pid is None or linux.start_time(started.pid) is None else None

    await eventually(alone)
    statuses = {status.id: status for status in await listed(own_rig)}
    assert own_rig.pid() != first
    lost = statuses[sleeping.id]
    assert (lost.state, lost.exit_code, lost.reason) == (ContainerState.EXITED, 137, "ContainerStatusUnknown")
    assert "could not be located" in lost.message
    assert lost.annotations == started.annotations
    assert statuses[finished.id] == dataclasses.replace(finished, inherited=True)
    again = await own_rig.client.start(sleeping)
    assert again == lost, "a container whose start was recorded never runs twice"
    assert (await own_rig.run(HELLO)).exit_code == 0


async def test_two_agents_that_start_together_share_one_supervisor(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with running_supervisor(data) as rig:
        others = await asyncio.gather(*(ensure_supervisor(rig.paths, LogSettings()) for _ in range(3)))
        assert len(list(supervisor_registry.pointers(data))) == 1
        for other in others:
            await other.close()


async def test_shutdown_ends_containers_supervisor_and_pointers(own_rig: Rig) -> None:
    status = await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER)))
    pid = own_rig.pid()
    await shutdown(own_rig.paths)
    assert linux.start_time(pid) is None
    assert status.pid is not None
    assert linux.start_time(status.pid) is None
    assert supervisor_registry.current(own_rig.paths.data) is None
    assert not list(supervisor_registry.pointers(own_rig.paths.data))
    assert not list((own_rig.paths.data / "supervisors").iterdir())
    (known,) = await own_rig.client.list()
    assert (known.exit_code, known.reason) == (137, "Error")


async def test_sigterm_records_the_exits(own_rig: Rig) -> None:
    config = own_rig.config(own_rig.artifact(SLEEPER))
    await own_rig.client.start(config)
    pid = own_rig.pid()
    os.kill(pid, signal.SIGTERM)

    async def gone() -> bool | None:
        return True if linux.start_time(pid) is None else None

    await eventually(gone)
    assert (own_rig.paths.containers / config.id / "exit.json").exists()


async def test_the_supervisor_has_one_thread_and_no_privileges(rig: Rig) -> None:
    await rig.run(HELLO)
    await rig.run(component_guest("(i32.const 0)"), kind=GuestKind.COMPONENT)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{rig.pid()}/status").read_text().splitlines() if ":" in line
    )
    assert status["Threads"].strip() == "1"
    assert status["NoNewPrivs"].strip() == "1"
    allowed = 1 << linux.CAP_DAC_OVERRIDE
    if Path(f"/proc/{rig.pid()}/ns/user").readlink() != Path("/proc/self/ns/user").readlink():
        # Over what was made in its own user namespace only: it puts sandboxes into networks, makes users of them, and
        # measures their memory.
        for capability in ("KILL", "SETGID", "SETUID", "SETPCAP", "SYS_ADMIN", "SYS_PTRACE"):
            allowed |= 1 << getattr(linux, f"CAP_{capability}")
    assert int(status["CapBnd"], 16) & ~allowed == 0 or os.geteuid() != 0
    assert int(status["CapEff"], 16) & ~allowed == 0


async def test_the_kernel_spares_the_supervisor_where_it_may_ask_for_that(rig: Rig) -> None:
    may = linux.effective_capabilities() >> CAP_SYS_RESOURCE & 1
    own = Path("/proc/self/oom_score_adj").read_text()
    assert Path(f"/proc/{rig.pid()}/oom_score_adj").read_text() == ("-999\n" if may else own)


async def test_a_sandbox_holds_no_descriptor_of_the_supervisor(rig: Rig) -> None:
    neighbour = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    status = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    assert neighbour.pid is not None
    assert status.pid is not None
    sockets = {link for link in descriptors(rig.pid()) if link.startswith("socket:")}
    assert sockets
    assert not descriptors(status.pid) & sockets
    shared = descriptors(status.pid) & descriptors(neighbour.pid)
    assert not {link for link in shared if link.startswith("pipe:")}


async def test_usage_has_no_zeros(own_rig: Rig) -> None:
    config = own_rig.config(own_rig.artifact(SLEEPER), memory_limit_bytes=256 * 1024 * 1024)
    await own_rig.client.start(config)
    await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER)))
    used = await own_rig.client.usage()
    assert len(used) == 2
    for usage in used:
        assert usage.cpu_nanoseconds > 0
        assert 100_000 < usage.memory_bytes < 100_000_000
        assert usage.timestamp_ns > 0


async def test_a_memory_hog_is_oomkilled(rig: Rig) -> None:
    status = await rig.run(MEMORY_HOG, memory_limit_bytes=48 * 1024 * 1024)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert "memory limit" in status.message


@contextlib.asynccontextmanager
async def without_control_groups(data: Path) -> AsyncIterator[Rig]:
    data.mkdir()
    command = [sys.executable, "-P", "-m", "wasilet_node.runtime.supervisor", f"--data-dir={data}", "--no-cgroups"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0

    async def there() -> bool | None:
        return supervisor_registry.current(data) is not None or None

    await eventually(there)
    async with running_supervisor(data) as rig:
        yield rig


async def test_without_control_groups_the_commands_of_a_container_share_its_memory_limit(tmp_path: Path) -> None:
    """The largest goes: a command, and not the container that has done nothing."""
    fills_when_told = guest(
        """
        (drop (call $args_sizes (i32.const 16) (i32.const 20)))
        (if (i32.ge_u (i32.load (i32.const 16)) (i32.const 2)) (then
          (drop (memory.grow (i32.const 500)))
          (memory.fill (i32.const 65536) (i32.const 1) (i32.const 30000000))))
        (call $sleep_ms (i64.const 3600000))
        """
    )
    async with without_control_groups(tmp_path / "data") as rig:
        limit_bytes = 48 * 1024 * 1024
        status = await rig.client.start(rig.config(rig.artifact(fills_when_told), memory_limit_bytes=limit_bytes))
        filling = [rig.client.exec(status.id, ["x", "fill"], timeout_seconds=10) for _ in range(2)]
        results = sorted(await asyncio.gather(*filling), key=lambda result: result.timed_out)
        assert [(result.exit_code, result.timed_out) for result in results] == [(137, False), (137, True)]
        (found,) = await rig.client.list()
        assert found.state is ContainerState.RUNNING


async def test_without_control_groups_the_supervisor_watches_memory_itself(tmp_path: Path) -> None:
    async with without_control_groups(tmp_path / "data") as rig:
        assert not rig.client.capabilities.memory_cgroup
        assert not rig.client.capabilities.cpu_limits
        filled = guest(
            "(drop (memory.grow (i32.const 1000))) (memory.fill (i32.const 0) (i32.const 1) (i32.const 60000000)) "
            "(call $sleep_ms (i64.const 3600000))"
        )
        status = await rig.run(filled, memory_limit_bytes=48 * 1024 * 1024)
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
        modest = await rig.client.start(rig.config(rig.artifact(SLEEPER), memory_limit_bytes=16 * 1024 * 1024))
        await asyncio.sleep(0.3)
        (found,) = [known for known in await rig.client.list() if known.id == modest.id]
        assert found.state is ContainerState.RUNNING, "what is shared with the supervisor does not count"


async def test_a_cpu_limit_holds(rig: Rig) -> None:
    if not rig.client.capabilities.cpu_limits:
        pytest.skip("no cpu control group may be made here")
    status = await rig.client.start(rig.config(rig.artifact(SPINNER), cpu_limit_millicores=100))
    assert status.pid is not None
    before, started = linux.process_cpu_nanoseconds(status.pid), time.monotonic()
    await asyncio.sleep(0.5)
    after, elapsed = linux.process_cpu_nanoseconds(status.pid), time.monotonic() - started
    assert before is not None
    assert after is not None
    assert (after - before) / 1e9 < 0.35 * elapsed
    await rig.client.remove(status.id)


async def test_a_failing_memory_grow_is_an_ordinary_trap(rig: Rig) -> None:
    refused = "(if (i32.eq (memory.grow (i32.const 65535)) (i32.const -1)) (then (unreachable)))"
    status = await rig.run(guest(refused), memory_limit_bytes=48 * 1024 * 1024)
    assert (status.exit_code, status.reason) == (134, "Error")


async def test_limits_of_a_running_container_move(own_rig: Rig) -> None:
    """In the kernel where the machine has groups; the agent does not ask for it elsewhere."""
    pointer = next(pointer for _, pointer in supervisor_registry.pointers(own_rig.paths.data))
    if not pointer.cgroups:
        pytest.skip("this machine lets the supervisor make no control groups")
    started = await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER), memory_limit_bytes=64 << 20))
    wanted = Resources(memory_limit_bytes=96 << 20, cpu_limit_millicores=250, cpu_request_millicores=100)
    moved = await own_rig.client.resize(started.id, wanted, annotations={"x": "y"})
    assert (moved.pid, moved.annotations["x"]) == (started.pid, "y")
    listed = {status.id: status for status in await own_rig.client.list()}
    assert listed[started.id].annotations["x"] == "y"
    names = ("memory.limit_in_bytes", "memory.max")
    limits = [Path(group) / started.id / name for group in pointer.cgroups for name in names]
    assert {int(path.read_text()) for path in limits if path.exists()} == {96 << 20}
    groups = [Path(group) / started.id for group in pointer.cgroups]
    assert all(str(started.pid) in (group / "cgroup.procs").read_text().split() for group in groups)
    too_little = dataclasses.replace(wanted, memory_limit_bytes=4096)
    with pytest.raises(ResizeError, match="below current usage"):
        await own_rig.client.resize(started.id, too_little, annotations={})
    with pytest.raises(ResizeError, match="at a restart only"):
        await own_rig.client.resize(started.id, dataclasses.replace(wanted, memory_limit_bytes=None), annotations={})
    with pytest.raises(UnknownContainerError):
        await own_rig.client.resize("0" * 64, wanted, annotations={})
    await own_rig.client.remove(started.id)


async def test_control_groups_are_removed_with_their_containers(own_rig: Rig) -> None:
    pointer = supervisor_registry.current(own_rig.paths.data)
    assert pointer is not None
    if not pointer.cgroups:
        pytest.skip("no control groups may be made here")
    config = own_rig.config(own_rig.artifact(SLEEPER), memory_limit_bytes=64 * 1024 * 1024, cpu_limit_millicores=100)
    await own_rig.client.start(config)
    assert any((Path(group) / config.id).is_dir() for group in pointer.cgroups)
    await own_rig.client.stop(config.id)

    async def removed() -> bool | None:
        return None if any((Path(group) / config.id).exists() for group in pointer.cgroups) else True

    await eventually(removed)
    await shutdown(own_rig.paths)
    assert not any(Path(group).exists() for group in pointer.cgroups)


async def test_control_groups_of_a_killed_supervisor_are_removed_by_the_next(own_rig: Rig) -> None:
    pointer = supervisor_registry.current(own_rig.paths.data)
    assert pointer is not None
    if not pointer.cgroups:
        pytest.skip("no control groups may be made here")
    await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER), memory_limit_bytes=64 * 1024 * 1024))
    os.kill(pointer.pid, signal.SIGKILL)

    async def dead() -> bool | None:
        return None if pointer.alive() else True

    await eventually(dead)
    await listed(own_rig)
    assert not any(Path(group).exists() for group in pointer.cgroups)


async def test_control_groups_of_one_that_was_killed_with_its_data_gone_are_removed_by_any_other(
    own_rig: Rig, tmp_path: Path
) -> None:
    pointer = supervisor_registry.current(own_rig.paths.data)
    assert pointer is not None
    if not pointer.cgroups:
        pytest.skip("no control groups may be made here")
    await own_rig.client.start(own_rig.config(own_rig.artifact(SLEEPER), memory_limit_bytes=64 * 1024 * 1024))
    os.kill(pointer.pid, signal.SIGKILL)
    await own_rig.client.close()
    await gone(pointer)
    shutil.rmtree(own_rig.paths.data)
    async with running_supervisor(tmp_path / "another"):
        assert not any(Path(group).exists() for group in pointer.cgroups)


async def test_an_older_supervisor_keeps_its_containers_beside_a_new_one(own_rig: Rig) -> None:
    config = own_rig.config(own_rig.artifact(SLEEPER))
    await own_rig.client.start(config)
    old = supervisor_registry.current(own_rig.paths.data)
    assert old is not None
    # What an upgrade of wasmtime looks like to the agent: the supervisor that runs was built otherwise.
    outdated = supervisor_registry.Pointer(
        pid=old.pid,
        start_time=old.start_time,
        socket=old.socket,
        protocol_version=1,
        build="other",
        secret=old.secret,
    )
    supervisor_registry.write_pointer(own_rig.paths.data, outdated)
    await own_rig.client.close()
    own_rig.client = await ensure_supervisor(own_rig.paths, own_rig.logs)
    assert own_rig.pid() != old.pid
    fresh = own_rig.config(own_rig.artifact(SLEEPER))
    await own_rig.client.start(fresh)
    assert {status.id for status in await own_rig.client.list()} == {config.id, fresh.id}
    assert len(await own_rig.client.usage()) == 2
    assert (await own_rig.client.start(config)).pid is not None
    stopped = await own_rig.client.stop(config.id)
    assert stopped is not None
    await own_rig.client.remove(config.id)

    async def retired() -> bool | None:
        return None if old.alive() else True

    await eventually(retired)

    async def only_the_new() -> bool | None:
        try:
            return {status.id for status in await own_rig.client.list()} == {fresh.id} or None
        except RuntimeUnavailableError:
            return None

    await eventually(only_the_new)


async def test_a_client_that_says_no_hello_gets_nothing(own_rig: Rig) -> None:
    from wasilet_node.runtime import wire
    from wasilet_node.runtime.supervisor_connection import open_connection, read_message

    pointer = supervisor_registry.current(own_rig.paths.data)
    assert pointer is not None
    reader, writer = await open_connection(pointer)
    writer.write(wire.encode({"op": "list", "seq": 1}))
    answer = await read_message(reader)
    assert answer["error"]["type"] == "Version"
    writer.write(b"\xff\xff\xff\xff")
    with pytest.raises(EOFError):
        await read_message(reader)
    writer.close()
    assert await own_rig.client.list() == ()


@pytest.mark.parametrize("secret", ["", "0" * 64, "ä"])
async def test_a_client_that_does_not_know_the_secret_gets_nothing(rig: Rig, secret: str) -> None:
    pointer = supervisor_registry.current(rig.paths.data)
    assert pointer is not None
    assert len(pointer.secret) == 64
    assert pointer.secret not in repr(pointer)
    with pytest.raises(RuntimeUnavailableError, match="must send the secret"):
        await connect(dataclasses.replace(pointer, secret=secret))
    assert (await rig.run(HELLO)).exit_code == 0


def test_a_child_of_the_supervisor_is_no_client_although_it_knows_the_secret(tmp_path: Path) -> None:
    """A sandbox that broke out, whose grandchildren are no better."""
    script = """
import os, sys, threading
from pathlib import Path
from wasilet_node.runtime import supervisor_registry, unix_sockets, wire
from wasilet_node.runtime.supervisor import Supervisor
from wasilet_node.settings import LogSettings, NodePaths

data = Path(sys.argv[1])
supervisor = Supervisor(NodePaths(data=data), LogSettings(), use_cgroups=False)
child = os.fork()
if child == 0:
    if os.fork() == 0:
        pointer = supervisor_registry.current(data)
        sock = unix_sockets.connect(Path(pointer.socket), timeout_seconds=20)
        try:
            sock.sendall(wire.encode({"op": "hello", "seq": 1, "versions": [2], "secret": pointer.secret}))
            answer = sock.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
        print("answered", answer, flush=True)
        os._exit(0)
    os.wait()
    os.kill(os.getppid(), 15)
    os._exit(0)
supervisor.run()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "answered b''\n"
    assert "refused a connection of process" in done.stderr


@pytest.mark.parametrize("field", ["artifact", "log_path"])
@pytest.mark.parametrize("place", ["{data}/../elsewhere/x", "{data}/{folder}/../x", "{data}", "/etc/x", "{folder}/x"])
async def test_files_outside_of_the_data_folder_are_neither_loaded_nor_written(
    rig: Rig, field: str, place: str
) -> None:
    folder = {"artifact": rig.paths.compiled, "log_path": rig.paths.logs}[field].name
    path = place.format(data=rig.paths.data, folder=folder)
    fields: dict[str, Any] = {field: path}
    config = dataclasses.replace(rig.config(rig.artifact(HELLO)), **fields)
    with pytest.raises(StartError, match="does not lie in"):
        await rig.client.start(config)
    assert not Path(path).is_file()
    assert config.id not in {status.id for status in await rig.client.list()}


async def test_a_closed_client_refuses_calls(rig: Rig) -> None:
    await rig.client.close()
    with pytest.raises(RuntimeUnavailableError):
        await rig.client.list()


async def test_a_supervisor_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "containers").write_text("a file is in the way")
    with pytest.raises(RuntimeUnavailableError, match="did not start"):
        await ensure_supervisor(NodePaths(data=tmp_path / "data"), LogSettings())


def test_the_client_is_a_runtime() -> None:
    from wasilet_node.runtime.protocol import Runtime

    def accepts(_runtime: type[Runtime]) -> None: ...

    accepts(RuntimeClient)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env": (("BIG", "x" * (128 * 1024 + 1)),)}, "environment variable BIG has 131073 bytes"),
        ({"env": tuple((f"V{i}", "x" * 32768) for i in range(80))}, "argument list too long: arguments"),
        ({"argv": ("guest", "x" * 70_000_000)}, "the container's configuration is too large"),
    ],
)
async def test_more_than_linux_passes_on_is_refused(rig: Rig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message):
        await rig.client.start(rig.config(rig.artifact(HELLO), **fields))
    assert (await rig.run(HELLO)).exit_code == 0


async def test_a_supervisor_without_free_descriptors_waits_for_one(own_rig: Rig) -> None:
    pid = own_rig.pid()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(descriptors(pid)) - 1, before[1]))
    caller = asyncio.create_task(own_rig.client.attach("0" * 64))
    await asyncio.sleep(0.1)
    spent = linux.process_cpu_nanoseconds(pid) or 0
    await asyncio.sleep(0.5)
    assert (linux.process_cpu_nanoseconds(pid) or 0) - spent < 100_000_000
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    with pytest.raises(UnknownContainerError):
        await caller


async def test_a_burst_of_connections_waits_its_turn(own_rig: Rig) -> None:
    pointer = supervisor_registry.current(own_rig.paths.data)
    assert pointer is not None
    os.kill(pointer.pid, signal.SIGSTOP)
    try:
        socks = [unix_sockets.connect(Path(pointer.socket), timeout_seconds=1.0) for _ in range(300)]
    finally:
        os.kill(pointer.pid, signal.SIGCONT)
    for sock in socks:
        sock.close()
    assert (await own_rig.run(HELLO)).exit_code == 0
