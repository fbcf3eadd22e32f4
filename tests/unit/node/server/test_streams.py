"""exec, attach and port-forward over real connections, by WebSocket and by SPDY."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from wasilet_node.network.attachment import MachineNetwork
from wasilet_node.runtime.protocol import ContainerState, RuntimeUnavailableError
from wasilet_node.server.streams import frames, limits
from wasilet_node.server.streams.frames import ControlFrame, DataFrame, FrameDecoder, FrameEncoder
from wasilet_node.server.streams.portforward import MAX_PAIRS

from tests.unit.node.server.rig import NOT_YET, Rig, make_pod, make_status, running

pytestmark = pytest.mark.unit

TERMINAL = "/exec/default/web/main?output=1&input=1&tty=1"
EXEC = "/exec/default/web/main?output=1&error=1"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        rig.pods.add(make_pod())
        rig.runtime.statuses = [make_status()]
        yield rig


@asynccontextmanager
async def websocket(rig: Rig, path: str, *protocols: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(rig.url(path), ssl=rig.tls(rig.client), protocols=protocols, max_msg_size=0) as socket,
    ):
        yield socket


async def channels_of(socket: aiohttp.ClientWebSocketResponse) -> dict[int, bytes]:
    """All that comes, by channel, until the server closes."""
    seen: dict[int, bytes] = {}
    async with asyncio.timeout(5):
        async for message in socket:
            seen[message.data[0]] = seen.get(message.data[0], b"") + message.data[1:]
    return seen


class SpdyClient:
    """A client that speaks SPDY over TLS, as the API server does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.encoder = FrameEncoder()
        self.decoder = FrameDecoder()
        self.status = 0
        self.head = ""

    async def upgrade(self, path: str, *, protocol: str = "v4.channel.k8s.io", method: str = "POST") -> None:
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            f"X-Stream-Protocol-Version: {protocol}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        self.status = int(self.head.split()[1])

    def open(self, number: int, **headers: str) -> None:
        self.writer.write(self.encoder.syn_stream(number, headers))

    def data(self, number: int, data: bytes, *, fin: bool = False) -> None:
        self.writer.write(frames.data_frame(number, data, fin=fin))

    async def streams(self) -> tuple[dict[int, bytes], set[int]]:
        """(what came on each stream, the streams that were reset), until every stream ended or the server closed."""
        seen: dict[int, bytes] = {}
        opened: set[int] = set()
        ended: set[int] = set()
        reset: set[int] = set()
        async with asyncio.timeout(5):
            while not opened or opened != ended:
                data = await self.reader.read(65536)
                if not data:
                    break
                for frame in self.decoder.feed(data):
                    if isinstance(frame, DataFrame):
                        seen[frame.stream_id] = seen.get(frame.stream_id, b"") + frame.data
                        if frame.fin:
                            ended.add(frame.stream_id)
                    elif frame.type == frames.SYN_REPLY:
                        opened.add(frame.stream_id)
                    elif frame.type == frames.RST_STREAM:
                        reset.add(frame.stream_id)
                        ended.add(frame.stream_id)
        return seen, reset


@asynccontextmanager
async def spdy(rig: Rig) -> AsyncIterator[SpdyClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(rig.client))
    try:
        yield SpdyClient(reader, writer)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
async def test_exec_over_websocket_gives_output_and_outcome(rig: Rig, protocol: str) -> None:
    async with websocket(rig, f"{EXEC}&command=echo&command=a+b", protocol) as socket:
        assert socket.protocol == protocol
        seen = await channels_of(socket)
        assert socket.close_code == aiohttp.WSCloseCode.OK, "a client takes a connection that just ends for broken"
    assert (seen[1], seen[2]) == (b"a b\n", b"done\n")
    assert json.loads(seen[3]) == {"metadata": {}, "status": "Success"}
    assert rig.runtime.guest is not None
    assert rig.runtime.guest.container_id == "a0"
    assert rig.runtime.guest.closed.is_set()


async def test_an_exit_code_is_a_cause_of_the_status(rig: Rig) -> None:
    async with websocket(rig, f"{EXEC}&command=fail&command=7", "v4.channel.k8s.io") as socket:
        status = json.loads((await channels_of(socket))[3])
    assert status["reason"] == "NonZeroExitCode"
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]


async def test_before_v4_an_outcome_is_text(rig: Rig) -> None:
    async with websocket(rig, f"{EXEC}&command=fail&command=7", "channel.k8s.io") as socket:
        assert (await channels_of(socket))[3] == b"command terminated with non-zero exit code: exit status 7"
    async with websocket(rig, f"{EXEC}&command=echo", "channel.k8s.io") as socket:
        assert 3 not in await channels_of(socket)


async def test_base64_channels_are_text(rig: Rig) -> None:
    async with websocket(rig, f"{EXEC}&command=echo&command=hi", "v4.base64.channel.k8s.io") as socket:
        messages = [message.data async for message in socket]
    assert b"".join(base64.b64decode(message[1:]) for message in messages if message[0] == "1") == b"hi\n"


async def test_v5_can_end_stdin(rig: Rig) -> None:
    async with websocket(rig, f"{EXEC}&input=1&command=cat", "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00hello")
        await socket.send_bytes(b"\xff\x00")
        assert (await channels_of(socket))[1] == b"[hello]eof after 5\n"


async def test_a_terminal_echoes_edits_and_ends_lines(rig: Rig) -> None:
    async with websocket(rig, f"{TERMINAL}&command=cat", "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00hj\x7fi\r")
        await socket.send_bytes(b"\x00\x04")
        screen = (await channels_of(socket))[1]
    assert screen == b"hj\b \bi\r\n[hi\r\n]eof after 3\r\n"


async def test_ctrl_c_in_a_terminal_ends_the_guest(rig: Rig) -> None:
    async with websocket(rig, f"{TERMINAL}&command=hang", "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00\x03")
        status = json.loads((await channels_of(socket))[3])
    assert status["details"]["causes"][0]["message"] == "130"
    assert rig.runtime.guest is not None
    assert rig.runtime.guest.closed.is_set()


async def test_a_client_that_leaves_ends_the_guest(rig: Rig) -> None:
    async with websocket(rig, f"{EXEC}&command=hang", "v5.channel.k8s.io") as socket:
        await socket.receive()
        guest: Any = rig.runtime.guest
    async with asyncio.timeout(2):
        await guest.closed.wait()


async def test_a_runtime_that_is_away_is_an_internal_error(rig: Rig) -> None:
    rig.runtime.start_error = RuntimeUnavailableError("no supervisor")
    async with websocket(rig, f"{EXEC}&command=echo", "v4.channel.k8s.io") as socket:
        status = json.loads((await channels_of(socket))[3])
    assert status["message"] == "Internal error occurred: error executing command in container: no supervisor"


@pytest.mark.parametrize(
    ("path", "code", "text"),
    [
        ("/exec/default/web/main?command=x", 400, "you must specify at least 1 of stdin, stdout, stderr"),
        ("/exec/default/none/main?output=1&command=x", 404, "pod does not exist"),
        ("/exec/default/web/other-uid/main?output=1&command=x", 404, "pod not found"),
        ("/exec/default/web/none?output=1&command=x", 404, 'container not found ("none")'),
        ("/exec/default/web/main?output=1", 400, "you must specify at least one command for the container"),
        (f"{EXEC}&command=x", 400, "unable to upgrade: missing upgrade headers in request"),
        ("/portForward/default/web", 400, "unable to upgrade: missing upgrade headers in request"),
    ],
)
async def test_a_request_that_cannot_be_served_says_why(rig: Rig, path: str, code: int, text: str) -> None:
    assert await rig.get(path) == (code, text)


async def test_a_container_that_does_not_run_cannot_be_entered(rig: Rig) -> None:
    rig.runtime.statuses = [make_status(state=ContainerState.EXITED)]
    for verb in ("exec", "attach"):
        path = f"/{verb}/default/web/main?output=1&command=x"
        assert await rig.get(path) == (500, 'container "main" in pod "web" is not running')


@pytest.mark.parametrize("verb", ["exec", "attach"])
async def test_what_is_entered_is_what_the_runtime_runs_whatever_a_status_says(rig: Rig, verb: str) -> None:
    rig.pods.add(make_pod(containerID="wasmtime://of-another-pod", state={"waiting": {"reason": "CrashLoopBackOff"}}))
    rig.runtime.statuses = [
        make_status("of-another-pod", pod="other"),
        make_status("ended", attempt=3, state=ContainerState.EXITED),
        make_status("running", attempt=2),
    ]
    async with websocket(rig, f"/{verb}/default/web/main?output=1&command=echo", "v5.channel.k8s.io") as socket:
        assert json.loads((await channels_of(socket))[3])["status"] == "Success"
    assert rig.runtime.guest is not None
    assert rig.runtime.guest.container_id == "running"


@pytest.mark.parametrize("path", [EXEC, "/attach/default/web/main?output=1", "/portForward/default/web"])
async def test_before_the_pods_are_known_a_stream_is_to_be_tried_again(rig: Rig, path: str) -> None:
    rig.pods.known.clear()
    rig.pods.synced.clear()
    assert await rig.get(path) == (503, NOT_YET)


async def test_a_runtime_that_cannot_be_asked_is_said_to_be_away(rig: Rig) -> None:
    rig.runtime.error = RuntimeUnavailableError("no supervisor")
    assert await rig.get(f"{EXEC}&command=x") == (500, "the container runtime does not answer")


async def test_exec_over_spdy_takes_stdin_and_gives_each_stream(rig: Rig) -> None:
    async with spdy(rig) as client:
        await client.upgrade(f"{EXEC}&input=1&command=cat")
        assert client.status == 101
        assert "X-Stream-Protocol-Version: v4.channel.k8s.io" in client.head
        for number, kind in enumerate(("error", "stdin", "stdout", "stderr")):
            client.open(2 * number + 1, streamType=kind)
        client.writer.write(frames.data_frame(3, b"hello", fin=True))
        seen, _ = await client.streams()
    assert json.loads(seen[1])["status"] == "Success"
    assert seen[5] == b"[hello]eof after 5\n"
    assert rig.runtime.guest is not None
    assert rig.runtime.guest.closed.is_set()


async def test_spdy_without_a_known_subprotocol_is_refused(rig: Rig) -> None:
    async with spdy(rig) as client:
        await client.upgrade(f"{EXEC}&command=echo", protocol="v9.channel.k8s.io")
        assert client.status == 403
        assert "X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io" in client.head


async def test_garbage_after_the_upgrade_closes_the_connection(rig: Rig) -> None:
    async with spdy(rig) as client:
        await client.upgrade(f"{EXEC}&command=echo")
        client.writer.write(b"\xff" * 64)
        async with asyncio.timeout(3):
            await client.reader.read()
    async with asyncio.timeout(3):
        while rig.server._connections():  # noqa: ASYNC110 - there is nothing to wait on but the absence
            await asyncio.sleep(0.01)


async def test_a_server_that_ends_does_not_wait_for_streams(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        async with running(tmp_path) as rig:
            rig.pods.add(make_pod())
            rig.runtime.statuses = [make_status()]
            client = await asyncio.open_connection("127.0.0.1", rig.server.port, ssl=rig.tls(rig.client))
            spdy_client = SpdyClient(*client)
            await spdy_client.upgrade(f"{EXEC}&command=hang")
            for number, kind in enumerate(("error", "stdout", "stderr")):
                spdy_client.open(2 * number + 1, streamType=kind)
            await asyncio.sleep(0.05)
    client[1].close()
    await asyncio.gather(client[1].wait_closed(), return_exceptions=True)
    assert rig.runtime.guest is not None
    assert rig.runtime.guest.closed.is_set()


async def test_a_forward_to_a_pod_without_a_network_is_told_so(rig: Rig) -> None:
    async with spdy(rig) as client:
        await client.upgrade("/portForward/default/web", protocol="portforward.k8s.io")
        client.open(1, streamType="error", port="8080", requestID="0")
        client.open(3, streamType="data", port="8080", requestID="0")
        seen, reset = await client.streams()
    assert b"error forwarding port 8080 to pod web, uid uid-web: " in seen[1]
    assert b"has no network of its own" in seen[1]
    assert reset == {3}


class PodAtLoopback(MachineNetwork):
    """A pod whose own loopback is this machine's."""

    def addresses(self, pod: object) -> tuple[str, ...] | None:
        return ("127.0.0.1",)

    async def connect_inside(self, pod: object, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port)


@asynccontextmanager
async def upper_case_server() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_connections_are_forwarded_both_ways_and_end_with_their_client(rig: Rig) -> None:
    rig.networks.inner = PodAtLoopback()
    async with upper_case_server() as port, spdy(rig) as client:
        await client.upgrade("/portForward/default/web", protocol="portforward.k8s.io")
        for number in range(10):
            client.open(4 * number + 1, streamType="error", port=str(port), requestID=str(number))
            client.open(4 * number + 3, streamType="data", port=str(port), requestID=str(number))
            client.data(4 * number + 3, b"hello %d" % number, fin=True)
        seen, reset = await client.streams()
    assert {seen[4 * number + 3] for number in range(10)} == {b"HELLO %d" % number for number in range(10)}
    assert not reset
    assert not any(seen.get(4 * number + 1) for number in range(10))


async def test_a_forward_to_a_port_where_nobody_listens_is_told_so(rig: Rig) -> None:
    rig.networks.inner = PodAtLoopback()
    async with upper_case_server() as port:
        pass
    async with spdy(rig) as client:
        await client.upgrade("/portForward/default/web", protocol="portforward.k8s.io")
        client.open(1, streamType="error", port=str(port), requestID="0")
        client.open(3, streamType="data", port=str(port), requestID="0")
        seen, reset = await client.streams()
    assert b"inside the pod's network: connection refused" in seen[1]
    assert reset == {3}


async def test_a_forward_tunnelled_in_a_websocket_is_told_too(rig: Rig) -> None:
    async with websocket(rig, "/portForward/default/web", "SPDY/3.1+portforward.k8s.io") as socket:
        encoder, decoder = FrameEncoder(), FrameDecoder()
        await socket.send_bytes(encoder.syn_stream(1, {"streamType": "error", "port": "80"}))
        await socket.send_bytes(encoder.syn_stream(3, {"streamType": "data", "port": "80"}))
        text = b""
        while b"no network of its own" not in text:
            message = await asyncio.wait_for(socket.receive(), 3)
            for frame in decoder.feed(message.data):
                text += frame.data if isinstance(frame, DataFrame) else b""


@pytest.mark.parametrize("port", ["0", "65536", "", "web", "9" * 5000])
async def test_a_stream_for_no_port_is_refused(rig: Rig, port: str) -> None:
    async with spdy(rig) as client:
        await client.upgrade("/portForward/default/web", protocol="portforward.k8s.io")
        client.open(1, streamType="error", port=port)
        async with asyncio.timeout(3):
            [frame] = client.decoder.feed(await client.reader.read(1024))
    assert frame == ControlFrame(type=frames.RST_STREAM, stream_id=1, value=frames.REFUSED_STREAM)


async def test_half_open_pairs_are_limited_though_their_streams_were_reset(rig: Rig) -> None:
    async with spdy(rig) as client:
        await client.upgrade("/portForward/default/web", protocol="portforward.k8s.io")
        for number in range(1, 2 * MAX_PAIRS + 2, 2):
            client.open(number, streamType="error", port="80", requestID=str(number))
            client.writer.write(frames.rst_stream(number, frames.CANCEL))
        client.writer.write(frames.ping(1))
        seen: list[frames.Frame] = []
        async with asyncio.timeout(5):
            while ControlFrame(type=frames.PING, value=1) not in seen:
                seen += client.decoder.feed(await client.reader.read(65536))
    refused = [frame for frame in seen if isinstance(frame, ControlFrame) and frame.type == frames.RST_STREAM]
    assert [frame.stream_id for frame in refused] == [2 * MAX_PAIRS + 1]


async def test_a_forward_by_websocket_channels_names_the_port_first(rig: Rig) -> None:
    async with websocket(rig, "/portForward/default/web?port=80", "v4.channel.k8s.io") as socket:
        seen = await channels_of(socket)
    assert seen[0] == struct.pack("<H", 80)
    assert seen[1].startswith(struct.pack("<H", 80))
    assert b"has no network of its own" in seen[1]


async def test_attach_to_a_container_without_stdin_shows_output_and_takes_no_input(rig: Rig) -> None:
    async with websocket(rig, "/attach/default/web/main?output=1&input=1", "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00typed in vain")
        seen = await channels_of(socket)
    assert seen[1] == b"from now on\n"
    assert json.loads(seen[3])["status"] == "Success"


def interactive(rig: Rig, **fields: bool) -> None:
    rig.pods.known["default", "web"]["spec"]["containers"][0] |= {"stdin": True, **fields}


async def test_attach_feeds_a_container_that_asks_for_stdin(rig: Rig) -> None:
    interactive(rig, stdinOnce=True)
    async with websocket(rig, "/attach/default/web/main?output=1&input=1", "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00typed")
        await socket.send_bytes(b"\xff\x00")
        seen = await channels_of(socket)
    assert seen[1] == b"[typed]eof after 5\n"
    assert json.loads(seen[3])["status"] == "Success"


async def test_attach_without_input_leaves_stdin_alone(rig: Rig) -> None:
    interactive(rig)
    async with websocket(rig, "/attach/default/web/main?output=1", "v5.channel.k8s.io") as socket:
        seen = await channels_of(socket)
    assert seen[1] == b"from now on\n"


@pytest.mark.parametrize(
    ("once", "keys", "shown"),
    [
        (True, b"hi\r\x04", b"hi\r\n[hi\r\n]eof after 3\r\n"),
        (False, b"hi\r\x04", b"hi\r\n[hi\r\n]"),
        (False, b"\x03", b"^C\r\n"),
    ],
    ids=["Ctrl-D ends an input that ends", "Ctrl-D leaves one that does not", "Ctrl-C interrupts the guest"],
)
async def test_an_attached_terminal(rig: Rig, *, once: bool, keys: bytes, shown: bytes) -> None:
    interactive(rig, stdinOnce=once, tty=True)
    path = "/attach/default/web/main?output=1&input=1&tty=1"
    seen: dict[int, bytes] = {}
    async with websocket(rig, path, "v5.channel.k8s.io") as socket:
        await socket.send_bytes(b"\x00" + keys)
        async with asyncio.timeout(5):
            async for message in socket:
                seen[message.data[0]] = seen.get(message.data[0], b"") + message.data[1:]
                if seen.get(1) == shown and keys[-1:] == b"\x04" and not once:
                    await socket.send_bytes(b"\x00\x03")  # it is still read: this ends the guest
    assert seen[1].removesuffix(b"^C\r\n") == shown.removesuffix(b"^C\r\n")
    assert json.loads(seen[3])["status"] == "Success"


@pytest.mark.parametrize("path", [f"{EXEC}&command=x", "/portForward/default/web"])
async def test_a_pod_has_so_many_streams_and_no_more(rig: Rig, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_OPEN", 1)
    async with websocket(rig, f"{EXEC}&command=hang", "v5.channel.k8s.io") as socket:
        await socket.receive()
        assert await rig.get(path) == (429, "1 streams of this pod are open already: end one first")
    async with asyncio.timeout(5):
        while (await rig.get(path))[0] == 429:  # noqa: ASYNC110 - the end of a stream is reported by nothing else
            await asyncio.sleep(0.01)


async def test_streams_of_a_pod_begin_no_faster_than_allowed_and_other_pods_do_not_notice() -> None:
    known = limits.StreamLimits()
    for _ in range(limits.OPENED_AT_ONCE):
        with known.stream("a"):
            pass
    with pytest.raises(web.HTTPTooManyRequests, match="Too Many"), known.stream("a"):
        pass
    with known.stream("b"):
        pass
