"""A core module becomes a component of world ``wasi:cli/command``, as most toolchains make theirs: by the adapter of
preview 1, which jco brings (``jco new --wasi-command``; ``tests/e2e/adapter``, by npm).

jco's own dependencies would take 150 MB: a JavaScript engine for components and binaryen. ``new`` uses neither, so the
overrides of ``package.json`` have a small package, which jco needs anyhow, in their place. Not older than jco 1.15: its
adapters showed a component only the first and the last of its folders (wasmtime's issue 10058).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from wasilet import process
from wasilet.build import npm
from wasilet.errors import HarnessError
from wasilet_node.runtime.engine import is_component

_FOLDER = Path(__file__).with_name("adapter")
_JCO = Path("node_modules/@bytecodealliance/jco/src/jco.js")
_WHAT = "the preview 1 adapter"
_TIMEOUT_SECONDS = 60.0
_MEMORY_SECTION = 5
_ROOM_PAGES = 2048
"""128 MiB: more than any guest fills that is not to be killed for it."""


def why_not() -> str:
    """Why this machine makes no components; empty when it does."""
    try:
        npm.find_node(_WHAT, os.environ)
    except HarnessError as error:
        return error.message
    return ""


def as_component(module: bytes) -> bytes:
    """The component; itself when it is one, as newer Rust targets make them. Raises HarnessError with npm's or jco's
    words."""
    if is_component(module):
        return module
    node = npm.find_node(_WHAT, os.environ)
    tools = npm.install(_FOLDER, (_JCO,), _WHAT, lambda _: None, os.environ)
    with tempfile.TemporaryDirectory() as folder:
        core, component = Path(folder) / "core.wasm", Path(folder) / "component.wasm"
        core.write_bytes(with_room(module))
        process.run(
            [node, tools / _JCO, "new", core, "--wasi-command", "-o", component], timeout_seconds=_TIMEOUT_SECONDS
        )
        return component.read_bytes()


def with_room(module: bytes) -> bytes:
    """The module with a large initial memory, of which no page costs anything until it is touched.

    wasi-libc from before 2023 (its pull request 377), which Debian 12's Rust has, takes all memory that is there at its
    first ``malloc`` for its heap, the page with the adapter's state at its end among it. So that end is put far away.
    """
    made, position = bytearray(module[:8]), 8
    while position < len(module):
        size, body = _number(module, position + 1)
        content = module[body : body + size]
        if module[position] == _MEMORY_SECTION:
            pages, rest = _number(content, 2)
            content = content[:2] + _encoded(max(pages, _ROOM_PAGES)) + content[rest:]
        made += module[position : position + 1] + _encoded(len(content)) + content
        position = body + size
    return bytes(made)


def _number(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned LEB128, and what comes after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _encoded(value: int) -> bytes:
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
