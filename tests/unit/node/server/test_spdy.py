"""SPDY/3.1: frames of a hostile or an honest peer, and the streams made of them."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.server.streams import frames
from wasilet_node.server.streams.frames import ControlFrame, DataFrame, Frame, FrameDecoder, FrameEncoder, SpdyError
from wasilet_node.server.streams.spdy import MAX_STREAMS, MAX_UNSENT_BYTES, READ_AHEAD_BYTES, SpdyConnection, Stream
from wasilet_node.server.streams.turns import ANSWERS_AT_ONCE, ANSWERS_PER_SECOND, Allowance

pytestmark = pytest.mark.unit


def decode(data: bytes) -> list[Frame]:
    return list(FrameDecoder().feed(data))


def test_the_dictionary_is_the_one_of_the_draft() -> None:
    assert len(frames.DICTIONARY) == 1423
    assert zlib.adler32(frames.DICTIONARY) == 0xE3C6A7C2


def test_a_stream_is_opened_with_headers_in_one_compression_context() -> None:
    encoder, decoder = FrameEncoder(), FrameDecoder()
    for number in (1, 3, 5):
        headers = {"streamType": "stdout", "Port": str(number)}
        [frame] = decoder.feed(encoder.syn_stream(number, headers))
        assert frame == ControlFrame(
            type=frames.SYN_STREAM, stream_id=number, headers={"streamtype": "stdout", "port": str(number)}
        )


def test_small_control_frames_survive() -> None:
    assert decode(frames.ping(7)) == [ControlFrame(type=frames.PING, value=7)]
    assert decode(frames.rst_stream(3, frames.CANCEL)) == [ControlFrame(type=frames.RST_STREAM, stream_id=3, value=5)]
    assert decode(frames.goaway(9)) == [ControlFrame(type=frames.GOAWAY, stream_id=9)]
    assert decode(frames.window_update(1, 100)) == [ControlFrame(type=frames.WINDOW_UPDATE, stream_id=1, value=100)]


def test_frames_of_unknown_type_are_passed_over() -> None:
    unknown = struct.pack("!HHI", 0x8003, 99, 3) + b"abc"
    assert decode(unknown + frames.ping(1)) == [ControlFrame(type=frames.PING, value=1)]


@given(st.binary(max_size=200), st.booleans(), st.integers(min_value=1, max_value=50))
def test_data_arrives_whole_however_it_is_cut(data: bytes, fin: bool, step: int) -> None:  # noqa: FBT001
    encoded = frames.data_frame(5, data, fin=fin) + frames.ping(1)
    decoder = FrameDecoder()
    seen = [frame for start in range(0, len(encoded), step) for frame in decoder.feed(encoded[start : start + step])]
    assert seen.pop() == ControlFrame(type=frames.PING, value=1)
    pieces = [frame for frame in seen if isinstance(frame, DataFrame)]
    assert b"".join(piece.data for piece in pieces) == data
    assert [piece.fin for piece in pieces] == [False] * (len(pieces) - 1) + [fin]


@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_a_protocol_error(data: bytes) -> None:
    try:
        decode(data)
    except SpdyError:
        pass


@given(st.binary(max_size=300), st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9]))
def test_any_body_of_a_control_frame_is_read_or_a_protocol_error(body: bytes, kind: int) -> None:
    try:
        decode(struct.pack("!HHI", 0x8003, kind, len(body)) + body)
    except SpdyError:
        pass


def test_a_bomb_of_headers_is_a_protocol_error() -> None:
    deflate = zlib.compressobj(zdict=frames.DICTIONARY)
    block = deflate.compress(struct.pack("!III", 1, 1, 1 << 20) + b"a" * (1 << 20)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    body = struct.pack("!IIH", 1, 0, 0) + block
    with pytest.raises(SpdyError, match="too large"):
        decode(struct.pack("!HHI", 0x8003, frames.SYN_STREAM, len(body)) + body)


def test_a_large_control_frame_is_refused_before_it_arrives() -> None:
    with pytest.raises(SpdyError, match="too large"):
        decode(struct.pack("!HHI", 0x8003, frames.SYN_STREAM, 1 << 20))


class Peer:
    """A client, and what it saw of the server."""

    def __init__(self, accept: Callable[[Stream], str | None] | None = None) -> None:
        self.streams: list[Stream] = []
        self.paused: list[bool] = []
        self.encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._sent = bytearray()
        self.waited_seconds = 0.0
        self.connection = SpdyConnection(
            send=self._sent.extend,
            drain=self._drain,
            pause=self.paused.append,
            accept=accept or self._accept,
            unsent=lambda: len(self._sent),
            answers=Allowance(clock=lambda: self.waited_seconds),
        )

    def _accept(self, stream: Stream) -> str | None:
        self.streams.append(stream)
        return None

    async def _drain(self) -> None:
        pass

    def feed(self, data: bytes) -> None:
        """As the turns do, but without waiting where an answer has to wait."""
        self.connection.receive(data)
        while (pause := self.connection.step(float("inf"))) is not None:
            self.waited_seconds += pause + 1e-6  # or rounding leaves a wait of no seconds

    def seen(self) -> list[Frame]:
        data = bytes(self._sent)
        self._sent.clear()
        return list(self._decoder.feed(data))

    def open(self, number: int = 1) -> Stream:
        self.feed(self.encoder.syn_stream(number, {"streamtype": "stdin"}))
        return self.streams[-1]


async def test_an_accepted_stream_is_replied_to_and_carries_data_both_ways() -> None:
    peer = Peer()
    stream = peer.open()
    assert peer.seen() == [ControlFrame(type=frames.SYN_REPLY, stream_id=1)]
    peer.feed(frames.data_frame(1, b"hello", fin=True))
    assert await stream.read() == b"hello"
    assert await stream.read() == b""
    await stream.write(b"x" * 40_000)
    stream.close()
    await stream.write(b"too late")
    sent = [frame for frame in peer.seen() if isinstance(frame, DataFrame)]
    assert b"".join(frame.data for frame in sent) == b"x" * 40_000
    assert [frame.fin for frame in sent] == [False, False, True]
    assert stream.finished


async def test_a_reader_waits_for_data_and_learns_of_the_end() -> None:
    peer = Peer()
    reading = asyncio.create_task(peer.open().read())
    await asyncio.sleep(0)
    peer.feed(frames.data_frame(1, b"late"))
    assert await reading == b"late"
    reading = asyncio.create_task(peer.streams[0].read())
    await asyncio.sleep(0)
    peer.connection.lost()
    assert await reading == b""
    assert peer.connection.closed.is_set()


async def test_a_refused_stream_is_reset() -> None:
    peer = Peer(accept=lambda _: "no")
    peer.feed(peer.encoder.syn_stream(1, {}))
    assert peer.seen() == [ControlFrame(type=frames.RST_STREAM, stream_id=1, value=frames.REFUSED_STREAM)]


async def test_streams_are_limited_and_those_that_ended_do_not_count() -> None:
    peer = Peer()
    for number in range(MAX_STREAMS):
        peer.open(2 * number + 1)
    peer.seen()
    peer.feed(peer.encoder.syn_stream(2 * MAX_STREAMS + 1, {}))
    assert [frame.type for frame in peer.seen() if isinstance(frame, ControlFrame)] == [frames.RST_STREAM]
    peer.feed(frames.rst_stream(1, frames.CANCEL))
    peer.feed(peer.encoder.syn_stream(2 * MAX_STREAMS + 3, {}))
    assert [frame.type for frame in peer.seen() if isinstance(frame, ControlFrame)] == [frames.SYN_REPLY]


@pytest.mark.parametrize("number", [0, 2, 1])
async def test_stream_numbers_must_be_odd_and_grow(number: int) -> None:
    peer = Peer()
    peer.open(1)
    with pytest.raises(SpdyError):
        peer.feed(peer.encoder.syn_stream(number, {}))


async def test_a_ping_is_answered_and_an_answer_is_not() -> None:
    peer = Peer()
    peer.feed(frames.ping(3) + frames.ping(4))
    assert peer.seen() == [ControlFrame(type=frames.PING, value=3)]


async def test_a_peer_that_pings_and_never_reads_is_hung_up_on() -> None:
    peer = Peer()
    peer.feed(frames.ping(3) * (MAX_UNSENT_BYTES // len(frames.ping(3))))
    with pytest.raises(SpdyError, match="does not read"):
        peer.feed(frames.ping(3) * 2)


async def test_a_reader_that_is_slow_stops_the_socket_and_one_that_catches_up_starts_it() -> None:
    peer = Peer()
    stream = peer.open()
    peer.feed(frames.data_frame(1, b"x" * (READ_AHEAD_BYTES + 1)))
    assert peer.paused == [True]
    read = 0
    while read < READ_AHEAD_BYTES // 2:
        assert peer.paused == [True]
        read += len(await stream.read())
    while read < READ_AHEAD_BYTES + 1:
        read += len(await stream.read())
    assert peer.paused == [True, False]
    announced = [f.value for f in peer.seen() if isinstance(f, ControlFrame) and f.type == frames.WINDOW_UPDATE]
    assert sum(announced) == READ_AHEAD_BYTES


async def test_data_of_a_stream_that_was_reset_does_not_stop_the_socket() -> None:
    peer = Peer()
    stream = peer.open()
    stream.reset()
    for _ in range(4):
        peer.feed(frames.data_frame(1, b"x" * READ_AHEAD_BYTES))
    assert peer.paused == []


@pytest.mark.parametrize("number", [0, 2, 3, 7])
async def test_data_of_a_stream_that_never_was_ends_the_connection(number: int) -> None:
    peer = Peer()
    peer.open(1)
    peer.seen()
    with pytest.raises(SpdyError, match="never opened"):
        peer.feed(frames.data_frame(number, b"x") * 1000)
    assert peer.seen() == []


async def test_data_of_a_stream_that_ended_is_passed_over_without_an_answer() -> None:
    peer = Peer(accept=lambda _: "no")
    peer.feed(peer.encoder.syn_stream(1, {}))
    peer.seen()
    peer.feed(frames.data_frame(1, b"x") * 1000)
    assert peer.seen() == []


async def test_a_peer_that_never_reads_is_hung_up_on_whatever_it_sends() -> None:
    peer = Peer()
    stream = peer.open()
    await stream.write(b"x" * (MAX_UNSENT_BYTES + 1))
    with pytest.raises(SpdyError, match="does not read"):
        peer.feed(frames.data_frame(1, b"x"))


@pytest.mark.parametrize("kind", ["ping", "open"])
async def test_answers_wait_once_a_peer_has_had_too_many(kind: str) -> None:
    peer = Peer(accept=lambda _: "no")
    data = b"".join(
        frames.ping(2 * n + 1) if kind == "ping" else peer.encoder.syn_stream(2 * n + 1, {})
        for n in range(2 * ANSWERS_AT_ONCE)
    )
    peer.connection.receive(data)
    pause = peer.connection.step(float("inf"))
    assert pause is not None
    assert 0 < pause <= 1 / ANSWERS_PER_SECOND
    assert len(peer.seen()) < 2 * ANSWERS_AT_ONCE


async def test_a_step_ends_in_time_and_the_next_one_goes_on() -> None:
    peer = Peer()
    stream = peer.open()
    peer.connection.receive(frames.data_frame(1, b"x") * 3)
    assert [peer.connection.step(0.0) for _ in range(4)] == [0.0, 0.0, 0.0, None]
    assert await stream.read() == b"xxx"
