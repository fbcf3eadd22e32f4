"""Components in the component host, as the supervisor runs them: commands keep their contract, servers answer.

Needs the library, which is found or skipped: ``wasilet-node component-host`` builds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError
from wasilet_node.runtime.engine import make_engine
from wasilet_node.runtime.protocol import ContainerStatus, GuestKind, HttpPolicy, Mount, ServerSettings, StartError
from wasilet_node.settings import NodePaths
from wasmtime import component as wasmtime_component

from tests.unit.node.runtime.component_guests import ACCESS_DENIED, component_guest, config_guest, socket_guest
from tests.unit.node.runtime.guests import Rig, connected, end_supervisors

pytestmark = pytest.mark.unit
GUESTS = Path(__file__).resolve().parents[3] / "guests"
SETTINGS = ServerSettings(request_timeout_seconds=1.0, idle_timeout_seconds=1.5, header_timeout_seconds=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        locate.load()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("host") / "data"
    yield path
    asyncio.run(end_supervisors(NodePaths(data=path)))


@pytest.fixture(scope="module")
def artifacts(data: Path) -> dict[str, str]:
    folder = NodePaths(data=data).compiled
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = {}
    for name in ("http_p2", "http_p3"):
        compiled = wasmtime_component.Component(make_engine(server=True), (GUESTS / f"{name}.wasm").read_bytes())
        (folder / name).write_bytes(compiled.serialize())
        made[name] = str(folder / name)
    return made


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    async with connected(data) as running:
        yield running


@dataclass
class Server:
    """A server that runs."""

    rig: Rig
    id: str
    url: str
    log: Path
    client: aiohttp.ClientSession

    async def get(self, path: str, **options: object) -> tuple[int, str]:
        async with self.client.get(self.url + path, **options) as response:  # type: ignore[arg-type]
            return response.status, await response.text()

    async def stop(self, grace: float) -> ContainerStatus | None:
        return await self.rig.client.stop(self.id, grace_seconds=grace)

    def lines(self) -> list[str]:
        return [line.split(" ", 3)[-1] for line in self.log.read_text(encoding="utf-8").splitlines()]


@contextlib.asynccontextmanager
async def serving(
    rig: Rig, artifact: str, settings: ServerSettings = SETTINGS, *, port: int = 0, **fields: object
) -> AsyncIterator[Server]:
    port = port or free_port()
    config = rig.config(artifact, kind=GuestKind.COMPONENT, server=replace(settings, port=port), **fields)
    await rig.client.start(config)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(20)) as client:
        try:
            yield Server(rig, config.id, f"http://127.0.0.1:{port}", Path(config.log_path), client)
        finally:
            await rig.client.stop(config.id)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---- commands


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("(i32.const 0)", 0),
        ("(i32.const 1)", 1),
        ("(call $exit (i32.const 1)) (i32.const 0)", 1),
        ("(call $exit_code (i32.const 77)) (i32.const 0)", 77),
        ("(call $exit_code (i32.const 255)) (i32.const 0)", 255),
    ],
)
async def test_a_command_ends_with_its_code(rig: Rig, body: str, code: int) -> None:
    status = await rig.run(component_guest(body), kind=GuestKind.COMPONENT)
    assert (status.exit_code, status.message) == (code, "")


async def test_a_command_may_exit_or_trap_while_it_is_instantiated(rig: Rig) -> None:
    status = await rig.run(
        component_guest("(i32.const 0)", start="(call $exit_code (i32.const 7))"), kind=GuestKind.COMPONENT
    )
    assert (status.exit_code, status.reason, status.message) == (7, "Error", "")
    for source in (component_guest("(unreachable)"), component_guest("(i32.const 0)", start="(unreachable)")):
        status = await rig.run(source, kind=GuestKind.COMPONENT)
        assert (status.exit_code, status.reason) == (134, "Error")
        assert "wasm trap: wasm `unreachable` instruction executed" in status.message


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (component_guest("(i32.const 0)", export="wasi:cli/run@0.9.0"), "exports no wasi:cli/run .*@0.9.0"),
        (
            component_guest("(i32.const 0)", imports='(import "cats:shelter/door" (instance (export "open" (func))))'),
            "^the component imports what this node does not offer: .*`cats:shelter/door`",
        ),
        (
            component_guest("(i32.const 0)").replace("(func $run (result (result))", "(func $run (result u32)"),
            r"wasi:cli/run@0.2.3 is not of WASI's type: func\(\) -> result",
        ),
    ],
)
async def test_a_command_that_cannot_run_is_refused_with_the_reason(rig: Rig, source: str, why: str) -> None:
    config = rig.config(rig.artifact(source, GuestKind.COMPONENT), kind=GuestKind.COMPONENT)
    with pytest.raises(StartError, match=why):
        await rig.client.start(config)


async def test_a_mount_that_is_not_there_is_named(rig: Rig) -> None:
    artifact = rig.artifact(component_guest("(i32.const 0)"), GuestKind.COMPONENT)
    config = rig.config(artifact, kind=GuestKind.COMPONENT, mounts=(Mount(host="/no/such", guest="/data"),))
    with pytest.raises(StartError, match=r"^mount /data: No such file or directory: /no/such$"):
        await rig.client.start(config)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_without_a_network_of_its_own_a_component_gets_no_sockets(rig: Rig, protocol: str) -> None:
    status = await rig.run(socket_guest(protocol), kind=GuestKind.COMPONENT)
    assert (status.exit_code, status.message) == (100 + ACCESS_DENIED, "")


@pytest.mark.parametrize(("key", "code"), [("GREETING", ord("*")), ("ABSENT", 100)])
async def test_configuration_is_the_containers_environment(rig: Rig, key: str, code: int) -> None:
    status = await rig.run(config_guest(key), kind=GuestKind.COMPONENT, env=(("GREETING", "*"), ("OTHER", "x")))
    assert (status.exit_code, status.message) == (code, "")


@pytest.mark.parametrize(("body", "code"), [("(i32.const 0)", 0), ("(call $exit_code (i32.const 7)) (i32.const 0)", 7)])
async def test_a_command_of_wasi_0_3_runs(rig: Rig, body: str, code: int) -> None:
    guest = component_guest(body, export="wasi:cli/run@0.3.0").replace("(func $run (result", "(func $run async (result")
    status = await rig.run(guest, kind=GuestKind.COMPONENT)
    assert (status.exit_code, status.message) == (code, "")


async def test_a_file_that_does_not_load_is_removed(rig: Rig) -> None:
    artifact = rig.artifact(component_guest("(i32.const 0)"), GuestKind.COMPONENT)
    Path(artifact).write_bytes(b"\x7fELF nonsense")
    with pytest.raises(StartError, match="cannot load the compiled component"):
        await rig.client.start(rig.config(artifact, kind=GuestKind.COMPONENT))
    assert not Path(artifact).exists()


# ---- servers


@pytest.mark.parametrize("name", ["http_p2", "http_p3"])
async def test_a_server_answers(rig: Rig, artifacts: dict[str, str], name: str) -> None:
    async with serving(rig, artifacts[name], env=(("WHO", "world"),)) as server:
        assert await server.get("/hello") == (200, "hello\n")
        assert await server.get("/env?WHO") == (200, "world")


async def test_mounts_arguments_and_output_are_as_for_any_container(
    rig: Rig, artifacts: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content", encoding="utf-8")
    mount = Mount(host=str(tmp_path), guest="/data", read_only=True)
    async with serving(rig, artifacts["http_p2"], argv=("app", "-v"), mounts=(mount,)) as server:
        assert await server.get("/read?/data/file") == (200, "content")
        assert await server.get("/read?/etc/passwd") != (200, Path("/etc/passwd").read_text(encoding="utf-8"))
        assert await server.get("/args") == (200, "app -v")
        await server.get("/print")
        await server.stop(0)
        assert {"to stdout", "to stderr"} <= set(server.lines())


@pytest.mark.parametrize(
    ("name", "reuse", "counts"),
    [("http_p2", None, ["1", "1", "1"]), ("http_p2", 2, ["1", "2", "1"]), ("http_p3", None, ["1", "2", "3"])],
)
async def test_instances_are_new_or_reused_as_asked(
    rig: Rig, artifacts: dict[str, str], name: str, reuse: int | None, counts: list[str]
) -> None:
    async with serving(rig, artifacts[name], replace(SETTINGS, reuse=reuse)) as server:
        assert [(await server.get("/count"))[1].strip() for _ in counts] == counts


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("http_p2", ("/panic", 500, "GET /panic: 500: wasm trap: wasm `unreachable` instruction executed")),
        ("http_p2", ("/loop", 504, "GET /loop: 504: no answer in time")),
        ("http_p2", ("/sleep?9000", 504, "GET /sleep: 504: no answer in time")),
        # A body that is written before its head: no one reads what goes beyond the buffer.
        ("http_p2", ("/body-first?1000000", 504, "GET /body-first: 504: no answer in time")),
        ("http_p2", ("/never", 500, "GET /never: 500: the guest returned without an answer")),
        ("http_p2", ("/recurse", 500, "GET /recurse: 500: wasm trap: call stack exhausted")),
        ("http_p2", ("/error-code", 500, "GET /error-code: 500: the guest answered with an error: internal error")),
        ("http_p2", ("/allocate", 500, "GET /allocate: 500: wasm trap")),
        ("http_p3", ("/panic", 500, "GET /panic: 500: wasm trap: wasm `unreachable` instruction executed")),
        ("http_p3", ("/loop", 504, "GET /loop: 504: no answer in time")),
        ("http_p3", ("/error-code", 500, "GET /error-code: 500: the guest answered with an error: internal error")),
    ],
)
async def test_a_request_that_fails_is_one_status_and_one_line(
    rig: Rig, artifacts: dict[str, str], name: str, failing: tuple[str, int, str]
) -> None:
    path, status, reason = failing
    # Long enough for a busy machine to fill the memory that may be filled.
    settings = replace(SETTINGS, request_timeout_seconds=4.0)
    async with serving(rig, artifacts[name], settings, memory_limit_bytes=256 * 2**20) as server:
        assert (await server.get(path))[0] == status
        assert await server.get("/hello") == (200, "hello\n")
        await server.stop(0)
        ours = [line for line in server.lines() if line.startswith("wasilet: ")]
        assert len(ours) == 1, ours
        assert ours[0].startswith(f"wasilet: {reason}")


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [("/twice", "once\n", "GET /twice: after the head"), ("/bad-status", "", "GET /bad-status: 500: ")],
)
async def test_an_answer_that_cannot_be_given_again_or_at_all_is_one_line(
    rig: Rig, artifacts: dict[str, str], path: str, text: str, line: str
) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        status, answer = await server.get(path)
        assert status == (200 if text else 500)
        assert not text or answer == text
        assert await server.get("/hello") == (200, "hello\n")
        await server.stop(0)
        ours = [found for found in server.lines() if found.startswith("wasilet: ")]
        assert len(ours) == 1, ours
        assert ours[0].startswith(f"wasilet: {line}")


@pytest.mark.parametrize("reuse", [None, 10])
async def test_a_body_that_is_written_before_its_head_and_fits_into_the_buffer_arrives(
    rig: Rig, artifacts: dict[str, str], reuse: int | None
) -> None:
    async with serving(rig, artifacts["http_p2"], replace(SETTINGS, reuse=reuse)) as server:
        assert await server.get("/body-first?5") == (200, "xxxxx")
        assert await server.get("/hello") == (200, "hello\n")
        await server.stop(0)
        assert not [line for line in server.lines() if line.startswith("wasilet: ")]


@pytest.mark.parametrize("name", ["http_p2", "http_p3"])
async def test_a_guest_that_computes_holds_up_no_other_request(rig: Rig, artifacts: dict[str, str], name: str) -> None:
    async with serving(rig, artifacts[name], replace(SETTINGS, request_timeout_seconds=60.0)) as server:
        looping = asyncio.create_task(server.get("/loop"))
        for _ in range(5):
            assert await server.get("/hello") == (200, "hello\n")
        assert not looping.done()
        looping.cancel()


async def test_an_instance_that_computes_after_its_answer_is_given_no_further_request(
    rig: Rig, artifacts: dict[str, str]
) -> None:
    """One of WASI 0.3 counts as free once it has answered: what it were given would wait until it is ended."""
    settings = replace(SETTINGS, request_timeout_seconds=8.0, idle_timeout_seconds=60.0)
    async with serving(rig, artifacts["http_p3"], settings) as server:
        async with server.client.post(server.url + "/then-loop") as looping:
            assert await looping.content.readexactly(8) == b"a piece\n"
            for _ in range(3):
                assert await server.get("/hello") == (200, "hello\n")
            answers = await asyncio.gather(*(server.get("/hello") for _ in range(20)))
            assert answers == [(200, "hello\n")] * 20
            assert not looping.content.at_eof()
        await server.stop(0)


@pytest.mark.parametrize("name", ["http_p2", "http_p3"])
@pytest.mark.parametrize("path", ["/then-loop", "/then-panic"])
async def test_an_answer_that_breaks_off_never_looks_whole(
    rig: Rig, artifacts: dict[str, str], name: str, path: str
) -> None:
    async with serving(rig, artifacts[name]) as server:
        with pytest.raises(aiohttp.ClientError):  # POST: a GET that broke off is sent again by aiohttp
            async with server.client.post(server.url + path) as response:
                await response.read()
        assert await server.get("/hello") == (200, "hello\n")
        await server.stop(0)
        ours = [line for line in server.lines() if line.startswith("wasilet: ")]
        assert len(ours) == 1, ours
        assert ours[0].startswith(f"wasilet: POST {path}: after the head")


async def test_bodies_stream_both_ways_and_have_limits(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"], replace(SETTINGS, max_body_bytes=100_000)) as server:

        async def pieces(count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield b"x" * 10_000

        async with server.client.post(server.url + "/echo", data=pieces(10)) as response:
            assert len(await response.read()) == 100_000
        async with server.client.post(server.url + "/length", data=b"x" * 100_001) as response:
            assert response.status == 413
        async with server.client.post(server.url + "/length", data=pieces(11)) as response:
            assert "body size exceeds limit" in await response.text()


async def test_trailers_arrive(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        assert b"x-sum: 42" in await raw(server, b"GET /trailers HTTP/1.1\r\nhost: a\r\nte: trailers\r\n\r\n")


async def test_what_wasi_http_cannot_is_refused_by_name(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        upgrade = b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
        answer = await raw(server, b"GET /hello HTTP/1.1\r\nhost: a\r\n" + upgrade)
        assert answer.startswith(b"HTTP/1.1 501")
        assert b"no WebSocket" in answer
        assert (await raw(server, b"GET /hello HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 400")
        continued = b"POST /length HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        assert (await raw(server, continued)).startswith(b"HTTP/1.1 100")


async def raw(server: Server, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        writer.write(data)
        answer = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while piece := await reader.read(65536):
                    answer += piece
        return answer
    finally:
        writer.close()


async def test_a_slow_head_and_silence_end_the_connection(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        for begin in (b"GET / HT", b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            writer.write(begin)
            async with asyncio.timeout(10):
                assert await reader.read() == b""
            writer.close()


async def test_many_idle_connections_lock_nobody_out(rig: Rig, artifacts: dict[str, str]) -> None:
    settings = replace(SETTINGS, max_connections=20, idle_timeout_seconds=60.0)
    async with serving(rig, artifacts["http_p2"], settings) as server:
        port = int(server.url.rpartition(":")[2])
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        assert await server.get("/hello") == (200, "hello\n")
        for _, writer in idle:
            writer.close()


async def test_ten_thousand_idle_connections_lock_nobody_out(rig: Rig, artifacts: dict[str, str]) -> None:
    """With the defaults of a pod. The server's descriptors are bounded by what it allows, not by who comes."""
    settings = replace(ServerSettings(), linger_seconds=0.1)
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 1000:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 1000), hard))
    idle: list[socket.socket] = []
    try:
        async with serving(rig, artifacts["http_p2"], settings) as server:
            for number in range(count):
                connection = socket.socket()
                connection.setblocking(False)  # noqa: FBT003
                idle.append(connection)
                connection.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2])))
                if number % 100 == 99:
                    await asyncio.sleep(0)
            assert await server.get("/hello") == (200, "hello\n")
            (counters,) = [usage.http for usage in await rig.client.usage() if usage.id == server.id]
            assert counters is not None
            assert counters.connections <= settings.max_connections
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_body_without_end_is_ended(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"], replace(SETTINGS, max_body_bytes=100_000)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        writer.write(b"POST /length HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while not reader.at_eof():
                    writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                    sent += 4096
                    await asyncio.wait_for(writer.drain(), 10)
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(reader.read(65536), 0.001):
                            break
        writer.close()
        assert sent > 100_000
        assert await server.get("/hello") == (200, "hello\n")


async def test_a_body_that_stops_coming_is_a_504(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        writer.write(b"POST /length HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nbegin")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 504")
        writer.close()
        assert await server.get("/hello") == (200, "hello\n")


async def test_a_handler_that_asks_itself_is_answered_or_bounded(rig: Rig, artifacts: dict[str, str]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    policy = HttpPolicy(allowed_origins=(url,), local_origins=(url,))
    async with serving(rig, artifacts["http_p2"], port=port, http=policy) as server:
        assert await server.get(f"/fetch?{url}/fetch?{url}/hello") == (200, "200 12 200 6 hello\n")
    # With one request at a time the inner one would wait for the outer, and that for it.
    alone = replace(SETTINGS, max_concurrent_requests=1)
    async with serving(rig, artifacts["http_p2"], alone, port=port, http=policy) as server:
        status, text = await server.get(f"/fetch?{url}/hello")
        assert status == 504 or text.startswith("503 "), (status, text)
        assert await server.get("/hello") == (200, "hello\n")


async def test_requests_beyond_the_bound_wait_for_their_turn(rig: Rig, artifacts: dict[str, str]) -> None:
    settings = replace(SETTINGS, max_concurrent_requests=2, request_timeout_seconds=5.0)
    async with serving(rig, artifacts["http_p2"], settings) as server:
        answers = await asyncio.gather(*(server.get("/sleep?100") for _ in range(10)))
        assert answers == [(200, "slept\n")] * 10


async def test_instances_that_go_on_after_their_answer_take_no_place_from_the_next(
    rig: Rig, artifacts: dict[str, str]
) -> None:
    """Their clients have gone, so their requests are over, and they still compute until they are ended."""
    settings = replace(
        SETTINGS, reuse=1, max_concurrent_requests=1, request_timeout_seconds=5.0, idle_timeout_seconds=5.0
    )
    async with serving(rig, artifacts["http_p3"], settings) as server:
        for _ in range(12):
            async with server.client.post(server.url + "/then-loop") as response:
                assert response.status == 200, await response.text()
        assert await server.get("/hello") == (200, "hello\n")


async def test_a_request_that_waits_too_long_is_503(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"], replace(SETTINGS, max_concurrent_requests=1)) as server:
        first = asyncio.create_task(server.get("/sleep?900"))
        answers = await asyncio.gather(*(server.get("/sleep?900") for _ in range(3)))
        assert 503 in {status for status, _ in answers}
        await first


async def test_a_stop_drains_what_is_under_way(rig: Rig, artifacts: dict[str, str]) -> None:
    settings = replace(SETTINGS, request_timeout_seconds=5.0, linger_seconds=0.2)
    async with serving(rig, artifacts["http_p2"], settings) as server:
        slow = asyncio.create_task(server.get("/sleep?600"))
        await asyncio.sleep(0.1)
        status = await server.stop(10)
        assert await slow == (200, "slept\n")
        assert status is not None
        assert (status.exit_code, status.reason, status.message) == (0, "Completed", "")


async def test_a_drain_ends_with_the_grace_and_with_a_stop_without_one(rig: Rig, artifacts: dict[str, str]) -> None:
    settings = replace(SETTINGS, request_timeout_seconds=60.0)
    for grace, again in ((0.3, False), (60.0, True)):
        async with serving(rig, artifacts["http_p2"], settings) as server:
            slow = asyncio.create_task(server.get("/sleep?50000"))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(server.stop(grace))
            await asyncio.sleep(0.1)
            if again:
                await server.stop(0)
            status = await stopping
            assert status is not None
            assert status.exit_code == 137
            with pytest.raises(aiohttp.ClientError):
                await slow


async def test_a_port_that_is_taken_is_named(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        port = int(server.url.rpartition(":")[2])
        config = rig.config(artifacts["http_p2"], kind=GuestKind.COMPONENT, server=ServerSettings(port=port))
        with pytest.raises(StartError, match=f"^cannot listen on port {port}: Address already in use$"):
            await rig.client.start(config)


async def test_a_command_is_no_server_and_a_server_has_no_command(rig: Rig, artifacts: dict[str, str]) -> None:
    compiled = wasmtime_component.Component(make_engine(server=True), component_guest("(i32.const 0)"))
    path = rig.paths.compiled / "command-as-server"
    path.write_bytes(compiled.serialize())
    config = rig.config(str(path), kind=GuestKind.COMPONENT, server=ServerSettings(port=free_port()))
    with pytest.raises(StartError, match=r"exports no wasi:http/incoming-handler .* it exports wasi:cli/run@0.2.3"):
        await rig.client.start(config)
    async with serving(rig, artifacts["http_p2"]) as server:
        refused = await rig.client.exec(server.id, ["x"], timeout_seconds=5)
        assert "no command" in refused.error


async def test_outgoing_requests_reach_only_what_the_policy_names(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as other:
        policy = HttpPolicy(allowed_origins=(other.url,), local_origins=(other.url,))
        async with serving(rig, artifacts["http_p2"], http=policy) as server:
            assert await server.get(f"/fetch?{other.url}/hello") == (200, "200 6 hello\n")
            assert "HttpRequestDenied" in (await server.get("/fetch?http://127.0.0.1:1/"))[1]
            trace = {"traceparent": "00-abc"}
            assert await server.get(f"/fetch?{other.url}/header?traceparent", headers=trace) == (200, "200 6 00-abc")
            own = {**trace, "x-own-trace": "1"}
            assert await server.get(f"/fetch?{other.url}/header?traceparent", headers=own) == (200, "200 6 00-own")
        refused = HttpPolicy(allowed_origins=(other.url, other.url.replace("127.0.0.1", "localhost")))
        async with serving(rig, artifacts["http_p2"], http=refused) as server:
            assert "DestinationIpProhibited" in (await server.get(f"/fetch?{other.url}/hello"))[1]
            named = other.url.replace("127.0.0.1", "localhost")
            assert "DestinationIpProhibited" in (await server.get(f"/fetch?{named}/hello"))[1]
        async with serving(rig, artifacts["http_p2"]) as server:
            assert "HttpRequestDenied" in (await server.get(f"/fetch?{other.url}/hello"))[1]


async def test_a_server_is_counted(rig: Rig, artifacts: dict[str, str]) -> None:
    async with serving(rig, artifacts["http_p2"]) as server:
        for path in ("/hello", "/hello", "/nope", "/panic"):
            await server.get(path)
        counters = next(usage.http for usage in await rig.client.usage() if usage.id == server.id)
        assert counters is not None
        assert counters.statuses == {200: 2, 404: 1, 500: 1}
        assert (counters.in_flight, counters.instances, sum(counters.buckets)) == (0, 4, 4)
        assert counters.seconds > 0


def test_the_blob_of_a_config_holds_no_secret_in_its_errors(tmp_path: Path, data: Path) -> None:
    """The library prints why it cannot read a text, and that must not repeat the text."""
    library = locate.load()
    text = json.dumps({"version": 1, "env": [["PASSWORD", "hunter2"]], "surprise": 1}).encode()
    pid = os.fork()
    if pid == 0:
        with (tmp_path / "err").open("wb") as file:
            os.dup2(file.fileno(), 2)
            os._exit(library.run(text))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128
    printed = (tmp_path / "err").read_text(encoding="utf-8")
    assert "surprise" in printed
    assert "hunter2" not in printed
