"""The supervisor when things go wrong around it: it hangs, its disk is full, its files vanish, its agent dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from wasilet_node.runtime import supervisor_registry, supervisor_start, unix_sockets, wire, zygote
from wasilet_node.runtime.client import RuntimeClient, ensure_supervisor
from wasilet_node.runtime.protocol import ContainerState, ContainerStatus, RuntimeUnavailableError, StartError
from wasilet_node.runtime.records import Owner, Records
from wasilet_node.runtime.stale_cleanup import remove_traces_of_the_dead
from wasilet_node.settings import LogSettings, NodePaths

from tests.unit.node.runtime.guests import (
    HELLO,
    SLEEPER,
    Rig,
    connected,
    end_supervisors,
    eventually,
    gone,
    running_supervisor,
)

pytestmark = pytest.mark.unit


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_supervisor(tmp_path / "data") as running:
        yield running


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[Rig]:
    """A supervisor that looks after its files all the time."""
    data = tmp_path / "data"
    data.mkdir()
    script = (
        "import sys; from wasilet_node.runtime import containers, supervisor; containers.RECORD_RETRY_SECONDS = 0.05; "
        "supervisor.FOLDER_CHECK_SECONDS = 0.05; sys.exit(supervisor.main(sys.argv[1:]))"
    )
    log = (data / "supervisor.log").open("wb")
    with log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", script, f"--data-dir={data}"), stderr=log
        )
        assert await process.wait() == 0
    try:
        await eventually(lambda: _known(data))
        async with connected(data) as running:
            yield running
    finally:
        await end_supervisors(NodePaths(data=data))


async def _known(data: Path) -> supervisor_registry.Pointer | None:
    return supervisor_registry.current(data)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is alive and does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def state_of(rig: Rig, container_id: str) -> ContainerState | None:
    return next((known.state for known in await rig.client.list() if known.id == container_id), None)


# ---- it hangs


async def test_one_that_hangs_is_noticed_and_goes_on_with_the_same_containers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasilet_node.runtime.client.PING_TIMEOUT_SECONDS", 0.3)
    before = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    await rig.client.ping()
    with stopped(rig.pid()):
        begun = time.monotonic()
        with pytest.raises(RuntimeUnavailableError, match=r"no answer from the supervisor in 0\.3 s"):
            await rig.client.ping()
        assert time.monotonic() - begun < 3
    await rig.client.ping()
    (after,) = await rig.client.list()
    assert (after.id, after.pid, after.state) == (before.id, before.pid, ContainerState.RUNNING)


async def test_a_start_that_nobody_waits_for_any_more_is_not_made_up_for(rig: Rig) -> None:
    """An agent that dies, or gives its connection up, while the supervisor hangs: the next one asks again."""
    config = rig.config(rig.artifact(SLEEPER))
    pointer = supervisor_registry.current(rig.paths.data)
    assert pointer is not None
    with stopped(pointer.pid):
        sock = unix_sockets.connect(Path(pointer.socket), timeout_seconds=5.0)
        sock.sendall(wire.encode({"op": "hello", "versions": [1], "seq": 1}))
        sock.sendall(wire.encode({"op": "start", "config": wire.dump_config(config), "seq": 2}))
        sock.close()
    await rig.client.ping()
    assert await rig.client.list() == ()
    assert (await rig.run(HELLO)).exit_code == 0
    assert len(await rig.client.list()) == 1


async def test_a_client_that_is_closed_takes_its_unanswered_start_back(rig: Rig) -> None:
    large = rig.config(rig.artifact(SLEEPER), env=tuple((f"V{i}", "x" * 100_000) for i in range(15)))
    other = await ensure_supervisor(rig.paths, rig.logs)
    with stopped(rig.pid()):
        starts = [
            asyncio.create_task(other.start(dataclasses.replace(large, id=f"{number:064x}"))) for number in range(8)
        ]
        await asyncio.sleep(0.2)
        await other.close()
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        assert all(isinstance(outcome, RuntimeUnavailableError) for outcome in outcomes)
    await rig.client.ping()
    await asyncio.sleep(0.1)
    assert await rig.client.list() == ()


async def test_what_waits_for_one_that_hangs_does_not_grow_without_end(rig: Rig) -> None:
    config = rig.config(rig.artifact(SLEEPER), env=tuple((f"V{i}", "x" * 100_000) for i in range(15)))
    with stopped(rig.pid()):
        starts = [asyncio.create_task(rig.client.start(config)) for _ in range(20)]
        await asyncio.sleep(0.3)
        (link,) = rig.client._links
        assert link._writer.transport.get_write_buffer_size() < 4 * 1024 * 1024
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
    await rig.client.ping()


async def test_an_older_one_that_hangs_is_not_taken_for_gone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its containers would look lost, and be started a second time beside it."""
    kept = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    old = supervisor_registry.current(rig.paths.data)
    assert old is not None
    supervisor_registry.write_pointer(rig.paths.data, dataclasses.replace(old, build="other"))
    monkeypatch.setattr("wasilet_node.runtime.supervisor_connection.CALL_TIMEOUT_SECONDS", 0.3)
    await rig.client.close()
    rig.client = RuntimeClient(rig.paths, rig.logs)
    with stopped(old.pid):
        monkeypatch.setattr(
            "wasilet_node.runtime.supervisor_connection.Link.call.__kwdefaults__",
            {"timeout_seconds": 1.0},
            raising=False,
        )
        with pytest.raises(RuntimeUnavailableError, match="did not answer hello"):
            await asyncio.wait_for(rig.client.list(), 60)
        with pytest.raises(RuntimeUnavailableError):
            await asyncio.wait_for(rig.client.start(rig.config(rig.artifact(SLEEPER))), 60)

    async def whole() -> list[ContainerStatus] | None:
        with contextlib.suppress(RuntimeUnavailableError):
            return list(await rig.client.list())
        return None

    assert [known.id for known in await eventually(whole)] == [kept.id]
    assert rig.pid() != old.pid


# ---- it cannot be started


async def test_many_who_find_none_share_one_attempt_and_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0

    async def fail(*_: object) -> supervisor_registry.Pointer:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.1)
        raise RuntimeUnavailableError("no memory")

    monkeypatch.setattr("wasilet_node.runtime.client.find_or_start", fail)
    client = RuntimeClient(NodePaths(data=tmp_path), LogSettings())
    outcomes = await asyncio.gather(*(client.list() for _ in range(100)), return_exceptions=True)
    assert {str(outcome) for outcome in outcomes} == {"no memory"}
    assert attempts == 1
    with pytest.raises(RuntimeUnavailableError, match="no memory"):
        await client.list()
    assert attempts == 1
    monkeypatch.setattr("wasilet_node.runtime.client.RETRY_SECONDS", 0.0)
    with pytest.raises(RuntimeUnavailableError, match="no memory"):
        await client.list()
    assert attempts == 2
    await client.close()


async def test_closing_a_client_ends_its_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object) -> supervisor_registry.Pointer:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr("wasilet_node.runtime.client.find_or_start", hang)
    monkeypatch.setattr("wasilet_node.runtime.client.PING_TIMEOUT_SECONDS", 0.05)
    client = RuntimeClient(NodePaths(data=tmp_path), LogSettings())
    with pytest.raises(RuntimeUnavailableError, match="no answer"):
        await client.ping()
    await client.close()


async def test_one_that_hangs_while_it_starts_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path" / "wasilet_node" / "runtime"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "supervisor.py").write_text(
        "import json, os, sys, time\n"
        "fd = int(sys.argv[-1].partition('=')[2])\n"
        "if os.fork(): sys.exit()\n"
        "os.write(fd, json.dumps({'pid': os.getpid()}).encode() + b'\\n')\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr("wasilet_node.runtime.supervisor_start.START_TIMEOUT_SECONDS", 2.0)
    with pytest.raises(RuntimeUnavailableError, match=r"not ready after 2\.0 s"):
        await supervisor_start.find_or_start(NodePaths(data=tmp_path / "data"), LogSettings())
    pid = int((tmp_path / "pid").read_text())

    async def ended() -> bool | None:
        return None if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() else True

    await eventually(ended)


async def test_without_a_scope_it_starts_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A systemd that does not let this user make units says so on standard error and ends with 1."""
    monkeypatch.setattr("wasilet_node.runtime.systemd_scope.command_prefix", lambda: ("/bin/false",))
    async with running_supervisor(tmp_path / "data") as rig:
        assert (await rig.run(HELLO)).exit_code == 0


async def test_it_starts_through_what_is_put_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "wasilet_node.runtime.systemd_scope.command_prefix", lambda: ("env", "WASILET_RUN_ID=in-a-scope")
    )
    async with running_supervisor(tmp_path / "data") as rig:
        assert "WASILET_RUN_ID=in-a-scope" in Path(f"/proc/{rig.pid()}/environ").read_text().split("\0")


async def test_a_folder_that_cannot_be_used_is_an_unavailable_runtime(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(RuntimeUnavailableError, match="cannot look for a supervisor"):
        await ensure_supervisor(NodePaths(data=tmp_path / "data"), LogSettings())


# ---- nothing is left: descriptors, disk


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _children(pid: int) -> Counter[str]:
    """By name. Sandboxes made ahead of time are ``wasilet-ready``: one descriptor of the supervisor's each, and how
    many there are is a matter of the moment; while more are made, they are called as the zygote is."""
    names: Counter[str] = Counter()
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names[child.name()] += 1
    return names


async def _settled(pid: int) -> int:
    """Descriptors beside those of the sandboxes made ahead of time, once none of these is being made."""
    seen: list[int] = []

    async def probe() -> int | None:
        names = _children(pid)
        if names["wasilet-zygote"] != 1 or names["wasilet-ready"] < zygote.REFILL_BELOW:
            seen.clear()
        else:
            seen.append(_descriptors(pid) - names["wasilet-ready"])
        await asyncio.sleep(0.1)
        return seen[-1] if len(seen) > 2 and len(set(seen[-3:])) == 1 else None

    return await eventually(probe, timeout_seconds=20)


async def test_without_descriptors_a_start_and_an_exec_are_refused_at_once(rig: Rig) -> None:
    running = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
    pid = rig.pid()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    beside_the_spares = await _settled(pid)
    used = _descriptors(pid)
    refused = rig.config(rig.artifact(SLEEPER))
    for spare in (0, 1, 3, 5):  # none, the exec's own connection, then some of the pipes
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + spare, before[1]))
        async with asyncio.timeout(20):
            result = await rig.client.exec(running.id, ["guest"], timeout_seconds=5)
            assert result.exit_code == 126, result
            assert "Too many open files" in result.error
            with pytest.raises(StartError, match="Too many open files"):
                await rig.client.start(dataclasses.replace(refused, id=f"{spare:064x}"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    async def all_closed() -> bool | None:
        return await _settled(pid) == beside_the_spares or None

    await eventually(all_closed)  # the supervisor's reserve comes back in its own time
    assert (await rig.run(HELLO)).exit_code == 0
    assert await state_of(rig, running.id) is ContainerState.RUNNING


async def test_an_exit_that_cannot_be_recorded_is_told_and_recorded_later(hasty: Rig) -> None:
    config = hasty.config(hasty.artifact(SLEEPER))
    await hasty.client.start(config)
    record = hasty.paths.containers / config.id / "exit.json"
    record.mkdir()  # as good as a full disk
    status = await hasty.client.stop(config.id)
    assert status is not None
    assert status.exit_code == 137
    record.rmdir()

    async def recorded() -> bool | None:
        return True if record.is_file() and record.stat().st_size else None

    await eventually(recorded)
    log = (hasty.paths.data / "supervisor.log").read_text()
    assert f"cannot write the exit record of container {config.id}" in log


def test_a_full_disk_does_not_keep_a_supervisor_from_knowing_what_was_lost(tmp_path: Path) -> None:
    from tests.unit.node.runtime.test_wire import CONFIG

    records = Records(tmp_path, Owner(pid=os.getpid(), start_time=1))
    os.close(records.write_start(CONFIG, 5))
    (tmp_path / CONFIG.id / "exit.json").mkdir()
    ((_, status),) = Records(tmp_path, Owner(pid=os.getpid(), start_time=2)).load()
    assert status.reason == "ContainerStatusUnknown"


# ---- its files vanish


@pytest.mark.parametrize("what", ["socket", "pointer", "folder"])
async def test_a_socket_or_pointer_that_somebody_removed_is_made_again(hasty: Rig, what: str) -> None:
    running = await hasty.client.start(hasty.config(hasty.artifact(SLEEPER)))
    pointer = supervisor_registry.current(hasty.paths.data)
    assert pointer is not None
    folder = hasty.paths.data / supervisor_registry.FOLDER_NAME
    if what == "socket":
        Path(pointer.socket).unlink()
    elif what == "pointer":
        (folder / f"{pointer.pid}.json").unlink()
    else:
        folder.rename(hasty.paths.data / "aside")

    async def back() -> bool | None:
        return supervisor_registry.is_announced(hasty.paths.data, pointer) or None

    await eventually(back)
    await hasty.client.close()
    hasty.client = await ensure_supervisor(hasty.paths, hasty.logs)
    assert hasty.pid() == pointer.pid
    (known,) = await hasty.client.list()
    assert (known.id, known.pid, known.state) == (running.id, running.pid, ContainerState.RUNNING)


async def test_another_data_folder_of_the_same_name_is_not_its_own(hasty: Rig) -> None:
    await hasty.client.start(hasty.config(hasty.artifact(SLEEPER)))
    pointer = supervisor_registry.current(hasty.paths.data)
    assert pointer is not None
    aside = hasty.paths.data.with_name("aside")
    hasty.paths.data.rename(aside)
    hasty.paths.data.mkdir()
    await gone(pointer)
    assert list(hasty.paths.data.iterdir()) == []


async def test_sockets_that_nobody_listens_on_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / supervisor_registry.FOLDER_NAME
    listener, path = supervisor_registry.listen(tmp_path)
    listener.close()
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    stray = folder / f"{process.pid}.sock"
    stray.touch()
    remove_traces_of_the_dead(tmp_path)
    assert not stray.exists()
    assert path.exists(), "this process may be about to announce itself"


# ---- its own log


def test_its_own_log_is_bounded_and_a_second_writer_follows(tmp_path: Path) -> None:
    script = """
import logging, os, sys
from pathlib import Path
from wasilet_node.runtime.supervisor_log import OwnLog, open_log

data = Path(sys.argv[1])
fd = open_log(data)
os.dup2(fd, 2)
first = OwnLog(data, max_bytes=2000)
logger = logging.getLogger("x")
logger.addHandler(first)
if os.fork() == 0:
    for number in range(300):
        logger.error("child %d", number)
    os._exit(0)
os.wait()
for number in range(300):
    logger.error("parent %d", number)
os.write(2, b"the last word\\n")
"""
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], timeout=60, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["supervisor.log", "supervisor.log.1"]
    current, previous = ((tmp_path / name).read_text() for name in ("supervisor.log", "supervisor.log.1"))
    assert max(len(current), len(previous)) < 2100
    assert current.endswith("parent 299\nthe last word\n")
    assert (tmp_path / "supervisor.log").stat().st_mode & 0o777 == 0o600


def test_a_log_that_is_somebody_elses_is_not_rotated(tmp_path: Path) -> None:
    script = """
import logging, sys
from pathlib import Path
from wasilet_node.runtime.supervisor_log import OwnLog

logging.getLogger("x").addHandler(OwnLog(Path(sys.argv[1]), max_bytes=10))
for number in range(10):
    logging.getLogger("x").error("line %d", number)
"""
    with (tmp_path / "elsewhere").open("wb") as other:
        subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], stderr=other, timeout=60, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere").read_text().count("line") == 10
