"""The serving side of a WebSocket (RFC 6455) over any transport, without I/O of its own.

aiohttp has one, but it takes apart all that lies in the socket at once and answers every ping: one client that sends
empty frames holds the event loop up for seconds. Here frames are handled in turns (``turns``), answers are counted, and
reading stops while messages are not taken.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from wasilet_node.server.streams.turns import Allowance

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FIN = 0x80
_MASKED = 0x80

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_UNSENT_BYTES = 4 * 1024 * 1024
WAITING_MESSAGES = 64
WAITING_BYTES = 256 * 1024

NORMAL, PROTOCOL_ERROR, TOO_BIG, POLICY_VIOLATION = 1000, 1002, 1009, 1008


class WebSocketError(Exception):
    """The peer broke the protocol; ``code`` is that of the closing frame."""

    def __init__(self, message: str, *, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Message:
    """What the peer sent in one or more frames."""

    data: bytes
    text: bool = False


def handshake(request: web.Request, protocols: Sequence[str]) -> tuple[str, str]:
    """(the value of Sec-WebSocket-Accept, the subprotocol, empty for none). Raises HTTPBadRequest."""
    if request.headers.get("Sec-WebSocket-Version", "") not in {"13", "8", "7"}:
        raise web.HTTPBadRequest(text="unable to upgrade: unsupported WebSocket version")
    key = request.headers.get("Sec-WebSocket-Key", "")
    try:
        right = len(base64.b64decode(key, validate=True)) == 16
    except ValueError:  # that of binascii too; letters beyond ASCII are one of the plain kind
        right = False
    if not right:
        raise web.HTTPBadRequest(text="unable to upgrade: the WebSocket key is not 16 bytes in base64")
    offered = [each.strip() for each in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    protocol = next((each for each in offered if each in protocols), "")
    digest = hashlib.sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii"), protocol


class WebSocketConnection:
    """See the module. ``pause`` is told when to stop and to go on reading; ``wake`` is called when ``step`` has to be
    called again though nothing more came in."""

    def __init__(
        self,
        *,
        protocol: str,
        send: Callable[[bytes], None],
        drain: Callable[[], Awaitable[None]],
        pause: Callable[[bool], None],
        unsent: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self.protocol = protocol
        self._send = send
        self._drain = drain
        self._pause = pause
        self._unsent = unsent
        self._wake = wake
        self._buffer = bytearray()
        self._answers = Allowance()
        self._replies = bytearray()
        self._fragments = bytearray()
        self._fragment_kind = 0
        self._messages: deque[Message] = deque()
        self._waiting_bytes = 0
        self._stalled = False
        self._close_sent = False
        self._arrived = asyncio.Event()
        self.closed = asyncio.Event()
        """The peer closed, or is gone."""

    # --- in ---------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | bytearray) -> None:
        """Bytes of the peer."""
        self._buffer += data

    def step(self, until: float) -> float | None:
        """See ``turns.Connection``. Answers are sent together, at the end. Raises WebSocketError."""
        try:
            return self._step(until)
        finally:
            if self._replies and not self.closed.is_set():
                self._send(bytes(self._replies))
            self._replies.clear()

    def _step(self, until: float) -> float | None:
        while not self.closed.is_set():
            if len(self._messages) >= WAITING_MESSAGES or self._waiting_bytes > WAITING_BYTES:
                if not self._stalled:
                    self._stalled = True
                    self._pause(True)  # noqa: FBT003 - a callback with one meaning
                return None
            if (wait := self._answers.wait_seconds()) > 0:
                return wait
            if self._unsent() + len(self._replies) > MAX_UNSENT_BYTES:
                raise WebSocketError("the peer does not read what it is sent", code=POLICY_VIOLATION)
            if not self._frame():
                return None
            if time.monotonic() >= until:
                return 0.0
        return None

    def _frame(self) -> bool:
        """Handle the next frame; False: it is not here yet."""
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        first, second = buffer[0], buffer[1]
        opcode, length, offset = first & 0x0F, second & 0x7F, 2
        if first & 0x70:
            raise WebSocketError("a reserved bit is set")
        if not second & _MASKED:
            raise WebSocketError("a client's frame must be masked")
        if opcode >= _CLOSE and (length > 125 or not first & _FIN):
            raise WebSocketError("a control frame is long or in fragments")
        if length >= 126:
            size = 2 if length == 126 else 8
            if len(buffer) < offset + size:
                return False
            length = int.from_bytes(buffer[offset : offset + size], "big")
            offset += size
        if length + len(self._fragments) > MAX_MESSAGE_BYTES:
            raise WebSocketError("a message is too large", code=TOO_BIG)
        end = offset + 4 + length
        if len(buffer) < end:
            return False
        payload = _unmasked(buffer[offset + 4 : end], bytes(buffer[offset : offset + 4]))
        del buffer[:end]
        self._on_frame(opcode, payload, final=bool(first & _FIN))
        return True

    def _on_frame(self, opcode: int, payload: bytes, *, final: bool) -> None:
        if opcode == _PING:
            self._answers.spend()
            self._replies += bytes([_FIN | _PONG, len(payload)]) + payload
        elif opcode == _CLOSE:
            self._send_close(int.from_bytes(payload[:2], "big") if len(payload) >= 2 else NORMAL)
            self.lost()
        elif opcode in {_TEXT, _BINARY}:
            if self._fragment_kind:
                raise WebSocketError("a message begins before the last one ended")
            if final:
                self._put(Message(payload, text=opcode == _TEXT))
            else:
                self._fragment_kind = opcode
                self._fragments += payload
        elif opcode == _CONTINUATION:
            if not self._fragment_kind:
                raise WebSocketError("a continuation of nothing")
            self._fragments += payload
            if final:
                self._put(Message(bytes(self._fragments), text=self._fragment_kind == _TEXT))
                self._fragments.clear()
                self._fragment_kind = 0
        elif opcode != _PONG:
            raise WebSocketError(f"an unknown kind of frame: {opcode}")

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        self._waiting_bytes += len(message.data)
        self._arrived.set()

    async def messages(self) -> AsyncIterator[Message]:
        """What comes in, until the peer closes or is gone."""
        while True:
            while not self._messages:
                if self.closed.is_set():
                    return
                self._arrived.clear()
                await self._arrived.wait()
            message = self._messages.popleft()
            self._waiting_bytes -= len(message.data)
            if self._stalled and len(self._messages) <= WAITING_MESSAGES // 2:
                self._stalled = False
                self._pause(False)  # noqa: FBT003 - a callback with one meaning
                self._wake()
            yield message

    # --- out --------------------------------------------------------------------------------------------------------

    async def send(self, data: bytes, *, text: bool = False) -> None:
        """One message; waits while the peer does not read. Dropped when it is gone."""
        self.send_now(data, text=text)
        await self.drain()

    def send_now(self, data: bytes, *, text: bool = False) -> None:
        """One message, without waiting."""
        if not self._close_sent:
            self._send_frame(_TEXT if text else _BINARY, data)

    def unsent(self) -> int:
        """Bytes that the transport still holds."""
        return self._unsent()

    async def drain(self) -> None:
        """Wait while the transport's buffer is full."""
        if not self.closed.is_set():
            await self._drain()

    def send_last_frame(self, code: int = NORMAL) -> None:
        """The closing frame: after this nothing is sent."""
        self._send_close(code)

    def lost(self) -> None:
        """The peer is gone, or closed."""
        self.closed.set()
        self._arrived.set()

    def _send_close(self, code: int) -> None:
        if not self._close_sent:
            self._send_frame(_CLOSE, struct.pack("!H", code))
            self._close_sent = True

    def _send_frame(self, opcode: int, payload: bytes) -> None:
        if self.closed.is_set():
            return
        length = len(payload)
        if length < 126:
            head = struct.pack("!BB", _FIN | opcode, length)
        elif length < 65536:
            head = struct.pack("!BBH", _FIN | opcode, 126, length)
        else:
            head = struct.pack("!BBQ", _FIN | opcode, 127, length)
        self._send(head + payload)


def _unmasked(payload: bytearray, mask: bytes) -> bytes:
    length = len(payload)
    keys = (mask * (length // 4 + 1))[:length]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(keys, "little")).to_bytes(length, "little")
