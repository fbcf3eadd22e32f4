"""The serving side of a WebSocket: frames of an honest or a hostile client, without a network."""

from __future__ import annotations

import asyncio
import os

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.server.streams.turns import ANSWERS_AT_ONCE, Turns
from wasilet_node.server.streams.websocket import (
    MAX_MESSAGE_BYTES,
    MAX_UNSENT_BYTES,
    WAITING_MESSAGES,
    Message,
    WebSocketConnection,
    WebSocketError,
    handshake,
)

pytestmark = pytest.mark.unit

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    mask = os.urandom(4) if masked else b""
    length = len(payload)
    head = bytes([(0x80 if fin else 0) | reserved | opcode])
    bit = 0x80 if masked else 0
    if length < 126:
        head += bytes([bit | length])
    elif length < 65536:
        head += bytes([bit | 126]) + length.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + length.to_bytes(8, "big")
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if masked else payload
    return head + mask + body


class Peer:
    """A client, and what it was sent."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.woken = 0
        self.paused: list[bool] = []
        self.connection = WebSocketConnection(
            protocol="p",
            send=self.sent.extend,
            drain=self._drain,
            pause=self.paused.append,
            unsent=lambda: len(self.sent),
            wake=self._wake,
        )

    async def _drain(self) -> None:
        pass

    def _wake(self) -> None:
        self.woken += 1

    def feed(self, data: bytes) -> float | None:
        self.connection.receive(data)
        return self.connection.step(float("inf"))

    async def take(self, count: int) -> list[Message]:
        taken: list[Message] = []
        async with asyncio.timeout(2):
            async for message in self.connection.messages():
                taken.append(message)
                if len(taken) == count:
                    break
        return taken


@given(st.binary(max_size=70_000), st.booleans(), st.integers(min_value=1, max_value=4000))
def test_a_message_arrives_whole_however_it_is_cut(data: bytes, text: bool, step: int) -> None:  # noqa: FBT001
    async def check() -> None:
        peer = Peer()
        encoded = frame(TEXT if text else BINARY, data)
        for start in range(0, len(encoded), step):
            peer.feed(encoded[start : start + step])
        assert await peer.take(1) == [Message(data, text=text)]

    asyncio.run(check())


async def test_fragments_are_one_message_and_a_ping_between_them_is_answered() -> None:
    peer = Peer()
    peer.feed(frame(BINARY, b"a", fin=False) + frame(PING, b"hi") + frame(0, b"b", fin=False) + frame(0, b"c"))
    assert await peer.take(1) == [Message(b"abc")]
    assert bytes(peer.sent) == b"\x8a\x02hi"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame(BINARY, b"x", masked=False), "masked"),
        (frame(BINARY, b"x", reserved=0x40), "reserved"),
        (frame(PING, b"x" * 126), "control frame"),
        (frame(PING, b"x", fin=False), "control frame"),
        (frame(0, b"x"), "continuation"),
        (frame(BINARY, b"x", fin=False) + frame(TEXT, b"y"), "begins before"),
        (frame(5, b"x"), "unknown"),
        (b"\x82\xff" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"), "too large"),
        (b"\x02\xfe\xff\xff" + bytes(4 + 65535) + b"\x80\xff" + MAX_MESSAGE_BYTES.to_bytes(8, "big"), "too large"),
    ],
    ids=range(9),  # the masks are random, and so would be the names of the tests
)
async def test_what_breaks_the_protocol_ends_the_connection(data: bytes, words: str) -> None:
    with pytest.raises(WebSocketError, match=words):
        Peer().feed(data)


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_a_protocol_error(data: bytes) -> None:
    async def check() -> None:
        try:
            Peer().feed(data)
        except WebSocketError:
            pass

    asyncio.run(check())


async def test_a_close_is_answered_once_and_ends_the_messages() -> None:
    peer = Peer()
    peer.feed(frame(BINARY, b"last") + frame(CLOSE, (1001).to_bytes(2, "big")) + frame(BINARY, b"late"))
    assert await peer.take(9) == [Message(b"last")]
    assert bytes(peer.sent) == b"\x88\x02\x03\xe9"
    peer.connection.send_last_frame()
    await peer.connection.send(b"late")
    assert bytes(peer.sent) == b"\x88\x02\x03\xe9"


async def test_answers_to_pings_wait_once_there_were_too_many() -> None:
    peer = Peer()
    assert (peer.feed(frame(PING) * (ANSWERS_AT_ONCE + 100)) or 0) > 0
    assert len(peer.sent) < 2 * (ANSWERS_AT_ONCE + 100)


async def test_a_client_that_never_reads_is_hung_up_on() -> None:
    peer = Peer()
    peer.connection.send_now(b"x" * (MAX_UNSENT_BYTES + 1))
    with pytest.raises(WebSocketError, match="does not read"):
        peer.feed(frame(BINARY, b"x"))


async def test_messages_that_nobody_takes_stop_the_steps_and_taking_them_goes_on() -> None:
    peer = Peer()
    assert peer.feed(frame(BINARY, b"x") * (3 * WAITING_MESSAGES)) is None
    assert await peer.take(WAITING_MESSAGES // 2 - 1)
    assert (peer.woken, peer.paused) == (0, [True])
    await peer.take(1)
    assert (peer.woken, peer.paused) == (1, [True, False])
    assert peer.connection.step(float("inf")) is None
    assert len(await peer.take(WAITING_MESSAGES)) == WAITING_MESSAGES


async def test_turns_leave_the_loop_as_much_time_as_they_take() -> None:
    now = [0.0]
    turns = Turns(clock=lambda: now[0])
    loop = asyncio.get_running_loop()
    async with turns.turn() as until:
        assert until == pytest.approx(0.002)
        now[0] += 0.02
    began = loop.time()
    async with turns.turn():
        assert loop.time() - began >= 0.019, "the debt of the last turn was slept off"


@pytest.mark.parametrize("key", ["", "!!", "AAAA", "\u00e9" * 24])
def test_a_key_that_is_none_is_a_bad_request(key: str) -> None:
    request = make_mocked_request("GET", "/", {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key})
    with pytest.raises(web.HTTPBadRequest):
        handshake(request, ())
