"""The agent's side of ``wasilet_node.runtime.pod_namespaces``: blocking, for the network's own thread."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from wasilet_node.network.errors import NetworkAbsentError, NetworkError
from wasilet_node.runtime import supervisor_registry, unix_sockets, wire
from wasilet_node.runtime.protocol import PROTOCOL_VERSION

TIMEOUT_SECONDS = 10.0
"""For each answer of a supervisor."""

_RECEIVE_BYTES = 65536


class NamespaceChannel:
    """A connection to one supervisor, for namespaces only. Every method raises NetworkError."""

    def __init__(self, pointer: supervisor_registry.Pointer, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Connects. Raises NetworkError; NetworkAbsentError when that supervisor may keep none."""
        self.pointer = pointer
        self._buffer = b""
        try:
            self._socket = unix_sockets.connect(Path(pointer.socket), timeout_seconds=timeout_seconds)
        except OSError as error:
            raise NetworkError(f"cannot connect to supervisor {pointer.pid}: {error}") from error
        try:
            self._greet()
        except NetworkError:
            self._socket.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether it is still open. A call that fails closes it: what comes next could be its answer, late."""
        return self._socket.fileno() >= 0

    def close(self) -> None:
        """Idempotent; what is kept stays."""
        self._socket.close()

    def make(self, key: str) -> int:
        """A new network namespace, kept under ``key``; the descriptor is the caller's to close."""
        return self._descriptor({"op": "make", "key": key})

    def get(self, key: str) -> int:
        """The namespace that is kept under ``key``; the descriptor is the caller's to close."""
        return self._descriptor({"op": "get", "key": key})

    def hold(self, key: str, descriptor: int) -> None:
        """Have a namespace kept under ``key``."""
        self._call({"op": "hold", "key": key}, descriptor)

    def drop(self, keys: list[str]) -> None:
        """Have namespaces forgotten."""
        self._call({"op": "drop", "keys": keys})

    def kept(self) -> list[str]:
        """Of all that are kept."""
        answer, _ = self._call({"op": "list"})
        return [str(key) for key in answer["keys"]]

    def _greet(self) -> None:
        """The supervisor's usual first two messages; from the answer to the second on, lines."""
        hello = {"op": "hello", "seq": 1, "versions": [PROTOCOL_VERSION], "secret": self.pointer.secret}
        try:
            self._socket.sendall(wire.encode(hello))
            self._check(self._frame())
            self._socket.sendall(wire.encode({"op": "namespaces", "seq": 2}))
            self._check(self._frame())
            self._line()
        except (OSError, wire.WireError, ValueError) as error:
            raise NetworkError(f"supervisor {self.pointer.pid} does not answer: {error}") from error

    @staticmethod
    def _check(answer: dict[str, Any]) -> None:
        if "error" in answer:
            raise NetworkAbsentError(str(answer["error"].get("message")))

    def _frame(self) -> dict[str, Any]:
        (length,) = wire.HEADER.unpack(self._exactly(wire.HEADER.size))
        return wire.decode_body(self._exactly(length))

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise ValueError("it closed the connection")
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _descriptor(self, request: dict[str, Any]) -> int:
        answer, descriptor = self._call(request)
        if descriptor < 0:
            raise NetworkError(f"{request['op']} {request['key']}: {answer.get('error', 'no descriptor came')}")
        return descriptor

    def _call(self, request: dict[str, Any], descriptor: int = -1) -> tuple[dict[str, Any], int]:
        try:
            data = json.dumps(request).encode()
            sent = socket.send_fds(self._socket, [data], [descriptor] if descriptor >= 0 else [])
            if sent != len(data):
                self._socket.sendall(data[sent:])
            return self._line()
        except (OSError, ValueError, wire.WireError) as error:
            self._socket.close()
            raise NetworkError(f"supervisor {self.pointer.pid} does not answer {request['op']}: {error}") from error

    def _line(self) -> tuple[dict[str, Any], int]:
        descriptor = -1
        while b"\n" not in self._buffer:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _RECEIVE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
            for found in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor = found
            if not data:
                raise ValueError("it closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise wire.WireError("its answer is no object")
        return answer, descriptor
