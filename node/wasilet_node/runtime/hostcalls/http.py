"""The host functions of wasi-experimental-http: module ``wasi_experimental_http``, the ABI of the crate's 0.7 to 0.10.

Every function returns 0 or one of the crate's error numbers; results go through pointers into the guest's memory named
``memory``. Requests block the guest, which has its own process, so no thread is needed. Bodies are streamed. What a
guest may reach is ``http_client``'s to judge.
"""

from __future__ import annotations

from typing import Any

import wasmtime

from wasilet_node.runtime.hostcalls.http_client import (
    MAX_REQUEST_BODY_BYTES,
    HttpCallError,
    HttpClient,
    HttpErrno,
    Response,
    is_method,
    parse_headers,
    parse_url,
)
from wasilet_node.runtime.protocol import HttpPolicy

MODULE = "wasi_experimental_http"
MAX_TEXT_BYTES = 64 * 1024
"""A URL, or all headers of a request."""

MAX_OPEN_RESPONSES = 256
"""Where the policy sets no limit: each holds a descriptor."""


class _Memory:
    """The guest's memory, with bounds checked here: Python slices would silently be shorter."""

    def __init__(self, caller: Any) -> None:
        memory = caller.get("memory")
        if not isinstance(memory, wasmtime.Memory):
            raise HttpCallError(HttpErrno.MEMORY_NOT_FOUND)
        self._memory = memory
        self._caller = caller

    def read(self, pointer: int, length: int, limit: int) -> bytes:
        """``length`` bytes; over ``limit`` or outside of memory: BUFFER_TOO_SMALL, as the crate has it."""
        start, size = pointer & 0xFFFFFFFF, length & 0xFFFFFFFF
        if size > limit or start + size > self._memory.data_len(self._caller):
            raise HttpCallError(HttpErrno.BUFFER_TOO_SMALL)
        return bytes(self._memory.read(self._caller, start, start + size)) if size else b""

    def text(self, pointer: int, length: int) -> str:
        """A string. Raises UTF_8_ERROR."""
        try:
            return self.read(pointer, length, MAX_TEXT_BYTES).decode()
        except UnicodeDecodeError as error:
            raise HttpCallError(HttpErrno.UTF_8_ERROR) from error

    def check(self, pointer: int, size: int) -> int:
        """The pointer, unsigned. Raises MEMORY_ACCESS_ERROR when ``size`` bytes do not fit there."""
        start = pointer & 0xFFFFFFFF
        if start + size > self._memory.data_len(self._caller):
            raise HttpCallError(HttpErrno.MEMORY_ACCESS_ERROR)
        return start

    def write(self, pointer: int, data: bytes) -> None:
        """Write all of ``data``."""
        start = self.check(pointer, len(data))
        if data:
            self._memory.write(self._caller, data, start)

    def write_u32(self, pointer: int, value: int) -> None:
        """A little-endian number."""
        self.write(pointer, value.to_bytes(4, "little"))


class HttpHost:
    """The five functions. Defined once on a linker; each child gives its own copy its container's policy."""

    def __init__(self) -> None:
        self._client = HttpClient(None)
        self._max_open = MAX_OPEN_RESPONSES
        self._responses: dict[int, Response] = {}
        self._next = 0

    def configure(self, policy: HttpPolicy | None) -> None:
        """Set what the guest may do; None: nothing."""
        self._client = HttpClient(policy)
        limit = policy.max_concurrent_requests if policy else None
        self._max_open = MAX_OPEN_RESPONSES if limit is None else min(limit, MAX_OPEN_RESPONSES)

    def define(self, linker: wasmtime.Linker) -> None:
        """Define the functions in ``linker``."""
        for name, function, count in (
            ("req", self._req, 10),
            ("close", self._close, 1),
            ("header_get", self._header_get, 6),
            ("headers_get_all", self._headers_get_all, 4),
            ("body_read", self._body_read, 4),
        ):
            signature = wasmtime.FuncType([wasmtime.ValType.i32()] * count, [wasmtime.ValType.i32()])
            linker.define_func(MODULE, name, signature, _guarded(function), access_caller=True)

    def _req(self, caller: Any, *numbers: int) -> None:
        url_at, url_len, method_at, method_len, head_at, head_len, body_at, body_len, status_at, handle_at = numbers
        if len(self._responses) >= self._max_open:
            raise HttpCallError(HttpErrno.TOO_MANY_SESSIONS)
        memory = _Memory(caller)
        target = parse_url(memory.text(url_at, url_len))
        self._client.check(target.origin)
        method = memory.text(method_at, method_len)
        if not is_method(method):
            raise HttpCallError(HttpErrno.INVALID_METHOD)
        body = memory.read(body_at, body_len, MAX_REQUEST_BODY_BYTES)
        headers = parse_headers(memory.text(head_at, head_len))
        memory.check(status_at, 2)
        memory.check(handle_at, 4)
        response = self._client.send(target, method, headers, body)
        while self._next in self._responses:
            self._next = (self._next + 1) & 0x7FFFFFFF
        self._responses[self._next] = response
        memory.write(status_at, response.status.to_bytes(2, "little"))
        memory.write_u32(handle_at, self._next)

    def _close(self, _caller: Any, handle: int) -> None:
        # An unknown handle is fine: the crate's Drop panics on anything but 0.
        response = self._responses.pop(handle, None)
        if response is not None:
            response.close()

    def _header_get(self, caller: Any, *numbers: int) -> None:
        handle, name_at, name_len, value_at, value_len, written_at = numbers
        response = self._response(handle)
        memory = _Memory(caller)
        wanted = memory.text(name_at, name_len).lower()
        value = next((value for name, value in response.headers if name == wanted), None)
        if value is None:
            raise HttpCallError(HttpErrno.HEADER_NOT_FOUND)
        self._give(memory, value, value_at, value_len, written_at)

    def _headers_get_all(self, caller: Any, handle: int, buffer_at: int, buffer_len: int, written_at: int) -> None:
        response = self._response(handle)
        text = b"".join(name.encode() + b":" + value + b"\n" for name, value in response.headers)
        self._give(_Memory(caller), text, buffer_at, buffer_len, written_at)

    def _body_read(self, caller: Any, handle: int, buffer_at: int, buffer_len: int, read_at: int) -> None:
        response = self._response(handle)
        memory = _Memory(caller)
        memory.check(read_at, 4)
        memory.check(buffer_at, buffer_len & 0xFFFFFFFF)
        data = response.read(buffer_len & 0xFFFFFFFF)
        memory.write(buffer_at, data)
        memory.write_u32(read_at, len(data))

    def _response(self, handle: int) -> Response:
        response = self._responses.get(handle)
        if response is None:
            raise HttpCallError(HttpErrno.INVALID_HANDLE)
        return response

    @staticmethod
    def _give(memory: _Memory, data: bytes, buffer_at: int, buffer_len: int, written_at: int) -> None:
        if len(data) > buffer_len & 0xFFFFFFFF:
            raise HttpCallError(HttpErrno.BUFFER_TOO_SMALL)
        memory.write(buffer_at, data)
        memory.write_u32(written_at, len(data))


def _guarded(function: Any) -> Any:
    """The error number instead of the exception; a defect of Wasilet's is RUNTIME_ERROR for the guest."""

    def call(caller: Any, *numbers: int) -> int:
        try:
            function(caller, *numbers)
        except HttpCallError as error:
            return int(error.errno)
        except Exception:  # noqa: BLE001 - the guest gets the crate's own number for it
            return int(HttpErrno.RUNTIME_ERROR)
        return int(HttpErrno.SUCCESS)

    return call
