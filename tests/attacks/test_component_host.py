"""The component host's two entries under mutated input: connections of clients, and the text that Python hands it.

Seeds are valid; mutations are drawn from a random generator whose seed is in the failure's message. ``WASILET_FUZZ=50``
makes fifty times as many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import random
import re
import signal
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from wasilet_node.runtime.component_host import entry, locate
from wasilet_node.runtime.component_host.library import HostUnavailableError
from wasilet_node.runtime.engine import make_engine
from wasilet_node.runtime.protocol import GuestKind, HttpPolicy, ServerSettings
from wasilet_node.settings import NodePaths
from wasmtime import component as wasmtime_component

from tests.attacks.tally import Tally
from tests.unit.node.runtime.guests import Rig, connected, end_supervisors
from tests.unit.node.runtime.test_component_host import GUESTS, Server, serving

pytestmark = pytest.mark.unit

SCALE = int(os.environ.get("WASILET_FUZZ", "1"))
CONNECTIONS = 300 * SCALE
TEXTS = 3000 * SCALE
AT_ONCE = 16
ANSWER_SECONDS = 0.2
CHILD_SECONDS = 120 * SCALE
START_ERROR = 128
SETTINGS = ServerSettings(
    request_timeout_seconds=1.0,
    idle_timeout_seconds=0.5,
    header_timeout_seconds=0.5,
    max_body_bytes=65536,
    linger_seconds=0.1,
)

H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


REQUESTS = (
    b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /length HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
    b"POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\nGET /nope HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    b"POST /length HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\nabc",
    b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    b"GET http://other/hello?a=%00 HTTP/1.0\r\nx-a: \xff\xfe\r\n\r\n",
    H2_PREFACE
    + frame(4, 0, 0, struct.pack(">HI", 3, 100))
    # HPACK: GET, http, /, authority "a"
    + frame(1, 5, 1, b"\x82\x86\x84\x41\x01a")
    + frame(6, 0, 0, b"12345678")
    + frame(0, 1, 3, b"x" * 20)
    + frame(8, 0, 0, struct.pack(">I", 1000)),
)
TOKENS = (
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\0", b" ", b":", b"content-length: 99999999999999999999\r\n", b"%", b"\xff" * 40),
    *(b"transfer-encoding: chunked\r\n", b"content-length: -1\r\n", b"host: b\r\n", b"FFFFFFFFFFFFFFFF\r\n"),
    *(
        b"a" * 40_000,
        b"x: y\r\n" * 200,
        H2_PREFACE,
        frame(3, 0, 1, b"\0\0\0\0"),
        frame(9, 0, 1, b"\x82"),
        frame(7, 0, 0),
    ),
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, cuts, copies, and what a parser may stumble over."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes((data[at] ^ (1 << chance.randrange(8)),)) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + chance.randrange(1, 8) :]
        elif kind == 3:
            data = data[:at] + data[at // 2 :]
        else:
            data = data[:at] + chance.choice(TOKENS) + data[at:]
    return data


# --- the HTTP entry --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        locate.load()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("attacked") / "data"
    yield path
    asyncio.run(end_supervisors(NodePaths(data=path)))


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    async with connected(data) as running:
        yield running


@pytest.mark.parametrize("name", ["http_p2", "http_p3"])
async def test_mutated_connections_harm_neither_server_nor_neighbours(rig: Rig, tally: Tally, name: str) -> None:
    folder = rig.paths.compiled
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    artifact = folder / name
    guest = (GUESTS / f"{name}.wasm").read_bytes()
    artifact.write_bytes(wasmtime_component.Component(make_engine(server=True), guest).serialize())
    async with serving(rig, str(artifact), SETTINGS) as server:
        assert await server.get("/hello") == (200, "hello\n")
        (status,) = [found for found in await rig.client.list() if found.id == server.id]
        assert status.pid is not None
        sandbox = psutil.Process(status.pid)
        before = sandbox.num_fds()
        for seed in range(0, CONNECTIONS, AT_ONCE):
            await asyncio.gather(*(_attack(server, seed + number, tally) for number in range(AT_ONCE)))
            assert await server.get("/hello") == (200, "hello\n"), f"after seeds {seed} to {seed + AT_ONCE}"
        await _descriptors_fall_to(sandbox, before)
        assert sandbox.is_running()
        # The guest's own file is lib.rs: it may panic, which is its request's failure.
        panics = [line for line in server.lines() if "panicked" in line and "src/lib.rs:" not in line]
        assert not [*panics, *(line for line in server.lines() if "the host failed" in line)]


async def _attack(server: Server, seed: int, tally: Tally) -> None:
    """Send, read for a moment, hang up. What came back is HTTP."""
    chance = random.Random(seed)
    sent = mutated(chance.choice(REQUESTS), chance)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    answer = b""
    try:
        writer.write(sent)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(ANSWER_SECONDS):
                while piece := await reader.read(65536):
                    answer += piece
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    line = re.match(rb"HTTP/1\.[01] ([1-5]\d\d) ", answer)
    # HTTP/2 begins with settings.
    assert line or not answer or answer[3:4] == b"\x04", f"seed {seed}: {sent[:200]!r} got {answer[:200]!r}"
    tally.count(line[1].decode() if line else "HTTP/2 frames" if answer else "no answer")


async def _descriptors_fall_to(process: psutil.Process, before: int) -> None:
    async with asyncio.timeout(10):
        while process.num_fds() > before:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.05)


# --- the C entry -----------------------------------------------------------------------------------------------------


WRONG: tuple[Any, ...] = (
    *(None, True, -1, 2**31, 2**63, 2**64, 1e308, "", "\0", "x" * 100_000, [], {}, [[]], {"server": {}}),
    *("command", ["10.0.0.0/33"], ["::/0"], [["a", "b", "c"]], [{"host": "/", "guest": "", "read_only": 1}]),
)


def _changed(text: Any, chance: random.Random) -> Any:
    """The structure with one value, somewhere, that is another one, missing, or one too many."""
    if isinstance(text, dict) and text and chance.random() < 0.8:
        key = chance.choice(list(text))
        kind = chance.randrange(6)
        if kind == 0:
            return {name: value for name, value in text.items() if name != key}
        if kind == 1:
            return {**text, "surprise": chance.choice(WRONG)}
        return {**text, key: _changed(text[key], chance)}
    if isinstance(text, list) and text and chance.random() < 0.7:
        at = chance.randrange(len(text))
        return [*text[:at], _changed(text[at], chance), *text[at + 1 :]]
    return chance.choice(WRONG)


def _texts(rig: Rig) -> list[Any]:
    """Of a command and of a server, both of an artifact that is not there: no text is ever served."""
    policy = HttpPolicy(allowed_origins=("https://a.example",), local_origins=("http://127.0.0.1:1",))
    command = rig.config("/no/such", kind=GuestKind.COMPONENT, env=(("A", "b"),), http=policy)
    made = []
    for config in (command, replace(command, server=SETTINGS, http=None)):
        with entry.spec(config, report=-1, stdin=True, memory_bytes=2**20) as text:
            made.append(json.loads(text))
    return made


async def test_mutated_texts_are_refused_and_never_crash(rig: Rig, tally: Tally) -> None:
    """In a child: the library takes the descriptors that a text names for its own."""
    texts = _texts(rig)
    with mmap.mmap(-1, 16) as progress:
        pid = os.fork()
        if pid == 0:
            _refuse_all(texts, progress)
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222  # nothing else runs, and the child has an alarm
        seed, accepted = struct.unpack("<QQ", progress[:16])
    assert (os.waitstatus_to_exitcode(status), seed + 1) == (0, TEXTS), f"seed {seed}"
    assert accepted == 0
    tally.count("text refused", TEXTS)


def _refuse_all(texts: list[Any], progress: mmap.mmap) -> None:
    """Does not return."""
    code = 1
    try:
        signal.alarm(CHILD_SECONDS)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        library = locate.load()
        accepted = 0
        for seed in range(TEXTS):
            chance = random.Random(seed)
            data = json.dumps(_changed(chance.choice(texts), chance)).encode()
            if chance.random() < 0.3:
                data = mutated(data, chance)
            progress[:16] = struct.pack("<QQ", seed, accepted)
            accepted += library.run(data) != START_ERROR
            progress[:16] = struct.pack("<QQ", seed, accepted)
        code = 0
    finally:
        os._exit(code)
