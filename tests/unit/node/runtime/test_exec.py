"""Exec, attach, mounts and the HTTP policy, through a real supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from wasilet_node.runtime import linux
from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerState,
    ContainerStatus,
    HttpPolicy,
    Mount,
    RuntimeUnavailableError,
    StartError,
    UnknownContainerError,
)
from wasilet_node.runtime.sessions import MAX_EXECS
from wasilet_node.runtime.zygote import SANDBOX_NAME
from wasilet_node.settings import LogSettings, NodePaths

from tests.unit.node.runtime.guests import (
    ECHO,
    SLEEPER,
    Rig,
    connected,
    end_supervisors,
    eventually,
    guest,
    running_supervisor,
    say,
)

pytestmark = pytest.mark.unit

# Does what its second argument's first letter says: an exec runs the container's own module with other arguments.
SWISS_KNIFE = guest(
    """
    (drop (call $args_sizes (i32.const 16) (i32.const 20)))
    (drop (call $args_get (i32.const 4096) (i32.const 8192)))
    (if (i32.lt_u (i32.load (i32.const 16)) (i32.const 2)) (then (call $sleep_ms (i64.const 3600000))))
    (local.set $i (i32.load8_u (i32.load (i32.const 4100))))
    (if (i32.eq (local.get $i) (i32.const 97)) (then (call $dump_args)))
    (if (i32.eq (local.get $i) (i32.const 99)) (then (call $echo)))
    (if (i32.eq (local.get $i) (i32.const 101)) (then (call $dump_environ)))
    (if (i32.eq (local.get $i) (i32.const 115)) (then (call $sleep_ms (i64.const 3600000))))
    (if (i32.eq (local.get $i) (i32.const 116)) (then (unreachable)))
    (if (i32.eq (local.get $i) (i32.const 120)) (then (call $proc_exit (i32.const 42))))
    (if (i32.eq (local.get $i) (i32.const 121)) (then
      (loop $for_ever (call $say (i32.const 1) (i32.const 1024) (i32.const 4096)) (br $for_ever))))
    """
)
PRINTER = guest(
    "(loop $again (call $sleep_ms (i64.const 5)) " + say("tick\n") + "(br $again))",
    text="tick\n",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("exec") / "data"
    yield path
    asyncio.run(end_supervisors(NodePaths(data=path)))


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    async with connected(data) as running:
        yield running


@pytest.fixture
async def knife(rig: Rig) -> AsyncIterator[ContainerStatus]:
    """A running container whose module execs can be told what to do."""
    status = await rig.client.start(rig.config(rig.artifact(SWISS_KNIFE), env=(("KEY", "value"),)))
    yield status
    await rig.client.remove(status.id)


async def test_an_exec_has_its_own_arguments_and_the_containers_environment(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "args", "more"], timeout_seconds=10)
    assert (result.exit_code, result.output) == (0, b"x\0args\0more\0")
    result = await rig.client.exec(knife.id, ["x", "env"], timeout_seconds=10)
    assert result.output == b"KEY=value\0"
    assert Path(knife.log_path).read_bytes() == b""


async def test_exit_codes_and_traps_of_an_exec(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "xit"], timeout_seconds=10)
    assert (result.exit_code, result.error, result.timed_out) == (42, "", False)
    result = await rig.client.exec(knife.id, ["x", "trap"], timeout_seconds=10)
    assert result.exit_code == 134
    assert "unreachable" in result.error


async def test_an_exec_ends_at_its_time_limit(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "sleep"], timeout_seconds=0.2)
    assert result.timed_out


async def test_an_execs_output_is_bounded(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "yes"], timeout_seconds=0.3, max_output_bytes=10_000)
    assert len(result.output) == 10_000
    assert result.timed_out


async def test_an_exec_reads_its_stdin(rig: Rig, knife: ContainerStatus) -> None:
    sent = os.urandom(300_000)
    result = await rig.client.exec(knife.id, ["x", "cat"], timeout_seconds=20, stdin=sent, max_output_bytes=1_000_000)
    assert (result.exit_code, result.output) == (0, sent)


async def test_without_stdin_a_guest_reads_nothing(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "cat"], timeout_seconds=10)
    assert (result.exit_code, result.output) == (0, b"")


async def test_a_container_runs_so_many_commands_beside_itself_and_no_more(rig: Rig, knife: ContainerStatus) -> None:
    streams = [await rig.client.exec_stream(knife.id, ("main", "s")) for _ in range(MAX_EXECS)]
    with pytest.raises(StartError, match=f"{MAX_EXECS} commands run in this container already"):
        await rig.client.exec_stream(knife.id, ("main", "x"))
    await streams[0].close()

    async def again() -> bool:
        try:
            return (await rig.client.exec(knife.id, ("main", "x"), timeout_seconds=10)).exit_code == 42
        except StartError:
            return False

    async with asyncio.timeout(10):
        while not await again():  # noqa: ASYNC110 - an ended process is reported by nothing else
            await asyncio.sleep(0.02)
    for stream in streams[1:]:
        await stream.close()


async def test_exec_in_what_does_not_run_is_refused(rig: Rig) -> None:
    with pytest.raises(UnknownContainerError, match="f" * 64):
        await rig.client.exec("f" * 64, ["x"], timeout_seconds=1)
    with pytest.raises(UnknownContainerError):
        await rig.client.attach("f" * 64)


async def test_arguments_that_cannot_be_passed_are_an_error_of_the_exec(rig: Rig, knife: ContainerStatus) -> None:
    result = await rig.client.exec(knife.id, ["x", "a\0b"], timeout_seconds=10)
    assert result.exit_code == 126
    assert "NUL" in result.error
    with pytest.raises(StartError):
        await rig.client.exec_stream(knife.id, ["x", "a\0b"])


async def test_a_stream_is_a_conversation(rig: Rig, knife: ContainerStatus) -> None:
    stream = await rig.client.exec_stream(knife.id, ["x", "cat"], stdin=True)
    received: list[bytes] = []
    spoken = asyncio.Event()

    async def read() -> None:
        async for frame in stream.frames():
            assert frame.stream == "stdout"
            received.append(frame.data)
            spoken.set()

    reader = asyncio.create_task(read())
    await stream.write_stdin(b"one ")
    await asyncio.wait_for(spoken.wait(), 10)
    await stream.write_stdin(b"two")
    await stream.close_stdin()
    await asyncio.wait_for(reader, 10)
    assert b"".join(received) == b"one two"
    assert stream.exit_code == 0
    await stream.write_stdin(b"to nobody")
    await stream.close()
    await stream.close()


async def test_a_slow_reader_slows_the_exec_and_not_the_supervisor(rig: Rig, knife: ContainerStatus) -> None:
    stream = await rig.client.exec_stream(knife.id, ["x", "yes"])
    frames = stream.frames()
    await anext(frames)
    await asyncio.sleep(0.3)
    await asyncio.wait_for(rig.client.list(), 10)
    assert linux.resident_bytes(rig.pid()) < 100_000_000
    await frames.aclose()
    await stream.close()


async def test_closing_a_stream_kills_the_exec(rig: Rig, knife: ContainerStatus) -> None:
    def name(pid: str) -> str:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end between the two reads
            return Path(f"/proc/{pid}/comm").read_text().strip()
        return ""

    def children() -> int:
        pids = Path(f"/proc/{rig.pid()}/task/{rig.pid()}/children").read_text().split()
        return sum(name(pid) == SANDBOX_NAME for pid in pids)

    before = children()
    stream = await rig.client.exec_stream(knife.id, ["x", "sleep"])

    async def runs() -> bool | None:
        return children() == before + 1 or None

    await eventually(runs)
    await stream.close()

    async def gone() -> bool | None:
        return children() == before or None

    await eventually(gone)


async def test_an_exec_ends_with_its_container(rig: Rig) -> None:
    status = await rig.client.start(rig.config(rig.artifact(SWISS_KNIFE)))
    stream = await rig.client.exec_stream(status.id, ["x", "sleep"])
    await rig.client.stop(status.id)
    assert [frame async for frame in stream.frames()] == []
    assert stream.exit_code == 137
    await stream.close()


async def test_attach_shows_what_comes_until_the_end(rig: Rig) -> None:
    status = await rig.client.start(rig.config(rig.artifact(PRINTER)))
    stream = await rig.client.attach(status.id)
    seen = b""
    async for frame in stream.frames():
        assert frame.stream == "stdout"
        seen += frame.data
        if seen.count(b"tick") == 3:
            await rig.client.stop(status.id)
    assert stream.exit_code == 137
    await stream.close()


async def test_leaving_an_attach_leaves_the_container_alone(rig: Rig) -> None:
    status = await rig.client.start(rig.config(rig.artifact(PRINTER)))
    stream = await rig.client.attach(status.id)
    await stream.close()
    await asyncio.sleep(0.05)
    assert next(found for found in await rig.client.list() if found.id == status.id).state is ContainerState.RUNNING
    await rig.client.remove(status.id)


async def attached(rig: Rig, container_id: str, data: bytes, *, eof: bool = False) -> None:
    """A client that sends ``data`` and leaves."""
    stream = await rig.client.attach(container_id, stdin=True)

    async def read() -> None:
        async for _ in stream.frames():
            pass

    reader = asyncio.create_task(read())
    try:
        async with asyncio.timeout(10):
            await stream.write_stdin(data)
            if eof:
                await stream.close_stdin()
    finally:
        await stream.close()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def log_text(config: ContainerConfig) -> str:
    return Path(config.log_path).read_text()


async def logged(config: ContainerConfig, text: str) -> None:
    async def there() -> bool | None:
        return text in log_text(config) or None

    await eventually(there)


async def state_of(rig: Rig, container_id: str) -> ContainerState:
    return next(found.state for found in await rig.client.list() if found.id == container_id)


@pytest.mark.parametrize("eof", [True, False], ids=["ends its input", "just leaves"])
async def test_with_stdin_once_the_first_client_ends_the_input(rig: Rig, *, eof: bool) -> None:
    config = rig.config(rig.artifact(ECHO), stdin=True, stdin_once=True)
    await rig.client.start(config)
    await attached(rig, config.id, b"over and out\n", eof=eof)
    status = await rig.ended(config.id)
    assert (status.exit_code, "over and out" in log_text(config)) == (0, True)


async def test_without_stdin_once_the_input_stays_open_across_clients(rig: Rig) -> None:
    config = rig.config(rig.artifact(ECHO), stdin=True)
    await rig.client.start(config)
    for number in range(3):
        await attached(rig, config.id, b"client %d\n" % number, eof=True)
        await logged(config, f"client {number}")
    assert await state_of(rig, config.id) is ContainerState.RUNNING
    await rig.client.remove(config.id)


async def test_a_container_that_asks_for_no_stdin_reads_its_end_at_once(rig: Rig) -> None:
    assert (await rig.run(ECHO)).exit_code == 0


async def test_what_is_sent_to_a_container_without_stdin_is_dropped(rig: Rig) -> None:
    config = rig.config(rig.artifact(PRINTER))
    await rig.client.start(config)
    await attached(rig, config.id, b"in vain", eof=True)
    assert await state_of(rig, config.id) is ContainerState.RUNNING
    await rig.client.remove(config.id)


async def test_watching_alone_does_not_use_stdin_once_up(rig: Rig) -> None:
    config = rig.config(rig.artifact(ECHO), stdin=True, stdin_once=True)
    await rig.client.start(config)
    stream = await rig.client.attach(config.id)
    await stream.close()
    await attached(rig, config.id, b"still open\n", eof=True)
    assert (await rig.ended(config.id)).exit_code == 0
    assert "still open" in log_text(config)


async def test_a_guest_that_does_not_read_holds_nobody_up_but_its_writer(rig: Rig) -> None:
    config = rig.config(rig.artifact(SLEEPER), stdin=True)
    await rig.client.start(config)
    stream = await rig.client.attach(config.id, stdin=True)
    frames = stream.frames()
    reading = asyncio.ensure_future(anext(frames))
    writing = asyncio.create_task(stream.write_stdin(b"x" * 1_000_000))
    await asyncio.wait_for(rig.client.list(), 10)
    assert not writing.done()
    second = await rig.client.attach(config.id, stdin=True)
    waiting = asyncio.create_task(second.write_stdin(b"y"))
    await stream.close()
    await asyncio.wait_for(writing, 10)
    await second.close()
    await asyncio.wait_for(waiting, 10)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert linux.resident_bytes(rig.pid()) < 100_000_000
    status = await rig.client.stop(config.id)
    assert status is not None
    await rig.client.remove(config.id)


@pytest.mark.parametrize(("tty", "code"), [(True, 130), (False, 137)])
async def test_an_attached_terminal_interrupts_the_guest(rig: Rig, *, tty: bool, code: int) -> None:
    config = rig.config(rig.artifact(SLEEPER), stdin=True, tty=tty)
    await rig.client.start(config)
    stream = await rig.client.attach(config.id, stdin=True)

    async def read() -> None:
        async for _ in stream.frames():
            pass

    reader = asyncio.create_task(read())
    await asyncio.wait_for(stream.interrupt(), 10)
    if not tty:
        await rig.client.stop(config.id)
    await asyncio.wait_for(reader, 10)
    assert stream.exit_code == code
    await stream.close()


async def test_a_lost_supervisor_breaks_a_stream_off(tmp_path: Path) -> None:
    import signal

    async with running_supervisor(tmp_path / "data") as rig:
        status = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
        stream = await rig.client.attach(status.id)
        os.kill(rig.pid(), signal.SIGKILL)
        with pytest.raises(RuntimeUnavailableError):
            async for _ in stream.frames():
                pass
        await stream.close()


def opener(path: str, *, directory: int, write: bool) -> str:
    """A guest that opens ``path`` in preopen ``directory`` (the first is 3) and exits with WASI's errno."""
    rights = "(i64.const 64)" if write else "(i64.const 2)"
    flags = 1 if write else 0
    return guest(
        f"(call $proc_exit (call $path_open (i32.const {directory}) (i32.const 1) (i32.const 1024) "
        f"(i32.const {len(path)}) (i32.const {flags}) {rights} {rights} (i32.const 0) (i32.const 600)))",
        text=path,
    )


@pytest.mark.parametrize(
    ("path", "read_only", "write", "errno"),
    [
        ("file", False, False, 0),
        ("file", True, False, 0),
        ("new", False, True, 0),
        ("new", True, True, 63),
        ("file", True, True, 63),
        ("../secret", False, False, 63),
        ("link", False, False, 63),
        ("/etc/passwd", False, False, 63),
        ("none", False, False, 44),
    ],
)
async def test_a_mount_is_all_that_a_guest_sees_of_the_files(
    rig: Rig, tmp_path: Path, *, path: str, read_only: bool, write: bool, errno: int
) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "file").write_text("content")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to("../secret")
    mount = Mount(host=str(folder), guest="/data", read_only=read_only)
    status = await rig.run(opener(path, directory=3, write=write), mounts=(mount,))
    assert status.exit_code == errno, status.message
    assert (folder / "new").exists() == (write and not read_only and errno == 0)


async def test_mounts_keep_their_order_so_nested_ones_are_found(rig: Rig, tmp_path: Path) -> None:
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
    (tmp_path / "inner" / "deep").touch()
    mounts = (
        Mount(host=str(tmp_path / "outer"), guest="/data"),
        Mount(host=str(tmp_path / "inner"), guest="/data/inner"),
        Mount(host=str(tmp_path / "inner"), guest="."),
    )
    for directory, errno in ((3, 44), (4, 0), (5, 0)):
        status = await rig.run(opener("deep", directory=directory, write=False), mounts=mounts)
        assert status.exit_code == errno


HTTP_GUEST = """
(module
  (import "wasi_experimental_http" "req" (func $req (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1) (data (i32.const 0) "GET") (data (i32.const 16) "{url}")
  (func (export "_start")
    (call $proc_exit (call $req (i32.const 16) (i32.const {size}) (i32.const 0) (i32.const 3)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 1028)))))
"""


async def test_a_container_reaches_the_origins_of_its_policy_and_no_others(rig: Rig) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        artifact = rig.artifact(HTTP_GUEST.format(url=url, size=len(url)))
        codes = []
        allowed = HttpPolicy(allowed_origins=(url,), local_origins=(url,))
        for policy in (allowed, HttpPolicy(allowed_origins=("https://a.example",)), None):
            config = rig.config(artifact, http=policy)
            await rig.client.start(config)
            codes.append((await rig.ended(config.id)).exit_code)
        server.shutdown()
        thread.join()
    assert codes == [0, 7, 7]


async def test_a_flood_of_output_is_logged_whole_and_starves_nobody(tmp_path: Path) -> None:
    flood = guest(
        "(loop $again (call $say (i32.const 1) (i32.const 1024) (i32.const 4000)) "
        "(local.set $i (i32.add (local.get $i) (i32.const 1))) "
        "(br_if $again (i32.lt_u (local.get $i) (i32.const 2000))))",
        text=("x" * 79 + "\n") * 50,
    )
    logs = LogSettings(max_size_bytes=4 * 1024 * 1024, max_files=5)
    async with running_supervisor(tmp_path / "data", logs=logs) as rig:
        noisy = rig.config(rig.artifact(flood))
        await rig.client.start(noisy)
        sleeper = await rig.client.start(rig.config(rig.artifact(SLEEPER)))
        assert await rig.client.stop(sleeper.id) is not None
        assert (await rig.ended(noisy.id)).exit_code == 0
        files = sorted(Path(noisy.log_path).parent.iterdir())
        assert sum(file.read_bytes().count(b"\n") for file in files) == 100_000
        assert len(files) > 1
