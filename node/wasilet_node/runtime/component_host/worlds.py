"""What a component imports and exports, read from its binary without compiling it.

A component's top level is a list of sections; those of imports and exports name interfaces, as
``wasi:http/incoming-handler@0.2.3``. From the component model's binary format. The bytes are an image's, so nothing is
believed: every length is checked, and a section that is not understood ends the reading with an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_SECTION_BYTES = 1024 * 1024
"""Of imports and exports, which are names; the code is elsewhere and skipped."""

MAX_NAMES = 4096
_PREAMBLE_BYTES = 8
_IMPORTS, _EXPORTS = 10, 11
_MAX_LEB_BYTES = 5

HANDLERS = ("wasi:http/incoming-handler@0.2.", "wasi:http/handler@0.3.")
"""What a server exports, up to its version's last part."""

COMMANDS = ("wasi:cli/run@0.2.", "wasi:cli/run@0.3.")
_OFFERED_PACKAGES = frozenset({"wasi:cli", "wasi:clocks", "wasi:filesystem", "wasi:io", "wasi:random", "wasi:sockets"})
OFFERED = _OFFERED_PACKAGES | {"wasi:http", "wasi:config"}
"""Packages whose interfaces the component host offers; a further one goes into its ``worlds.rs`` and here."""


class WorldError(ValueError):
    """A binary whose imports and exports cannot be read."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Names at a component's top level, in its order."""

    imports: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()

    @property
    def is_server(self) -> bool:
        """Whether it answers HTTP requests. One that is a command too is run as a command."""
        return any(name.startswith(HANDLERS) for name in self.exports) and not self.is_command

    @property
    def is_command(self) -> bool:
        """Whether it runs and ends."""
        return any(name.startswith(COMMANDS) for name in self.exports)

    @property
    def needs_host(self) -> bool:
        """Whether wasmtime's Python bindings cannot run it: servers, WASI 0.3, ``wasi:http``, ``wasi:config``."""
        wanted = ("wasi:http/", "wasi:config/")
        newer = any("@0.3." in name for name in (*self.imports, *self.exports) if name.startswith("wasi:"))
        return self.is_server or newer or any(name.startswith(wanted) for name in self.imports)

    def missing(self) -> tuple[str, ...]:
        """Imported interfaces of packages that nobody offers."""
        return tuple(name for name in self.imports if ":" in name and name.partition("/")[0] not in OFFERED)


def read(path: Path) -> World:
    """The world of a component file. Raises WorldError, OSError."""
    imports: list[str] = []
    exports: list[str] = []
    with path.open("rb") as file:
        size = path.stat().st_size
        if file.read(_PREAMBLE_BYTES)[:4] != b"\0asm":
            raise WorldError("not a WebAssembly binary")
        while file.tell() < size:
            kind = file.read(1)[0]
            length = _length(file)
            end = file.tell() + length
            if end > size:
                raise WorldError("a section is longer than the file")
            if kind in {_IMPORTS, _EXPORTS}:
                if length > MAX_SECTION_BYTES:
                    raise WorldError(f"a section of names has {length} bytes")
                names = imports if kind == _IMPORTS else exports
                names.extend(_names(file.read(length), export=kind == _EXPORTS))
                if len(names) > MAX_NAMES:
                    raise WorldError(f"more than {MAX_NAMES} imports or exports")
            file.seek(end)
    return World(imports=tuple(imports), exports=tuple(exports))


def _length(file: BinaryIO) -> int:
    data = bytearray()
    while len(data) < _MAX_LEB_BYTES:
        data += file.read(1)
        if not data or data[-1] < 0x80:
            break
    return _Reader(bytes(data)).number()


class _Reader:
    """Takes a section apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise WorldError("a section ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = 0
        for shift in range(0, 7 * _MAX_LEB_BYTES, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise WorldError("a number is too long")

    def text(self) -> str:
        length = self.number()
        data = self.data[self.at : self.at + length]
        if len(data) != length:
            raise WorldError("a name is longer than its section")
        self.at += length
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise WorldError("a name is not UTF-8") from None

    def name(self) -> str:
        kind = self.byte()
        name = self.text()
        if kind == 2:  # options: an implementation's name, a version's last part
            for _ in range(self.number()):
                self.byte()
                self.text()
        elif kind not in {0, 1}:
            raise WorldError(f"a name of the unknown kind {kind}")
        return name

    def described(self) -> None:
        """Skip what an import or export is described as."""
        kind = self.byte()
        if kind == 0:
            self.byte()
            self.number()
        elif kind in {1, 4, 5}:
            self.number()
        elif kind == 2:
            self._value_bound()
        elif kind == 3:
            if self.byte() == 0:
                self.number()
        else:
            raise WorldError(f"an import of the unknown kind {kind}")

    def _value_bound(self) -> None:
        if self.byte() == 0:
            self.number()
        else:
            self.byte()

    def sort_and_index(self) -> None:
        if self.byte() == 0:
            self.byte()
        self.number()


def _names(section: bytes, *, export: bool) -> Iterator[str]:
    reader = _Reader(section)
    count = reader.number()
    if count > MAX_NAMES:
        raise WorldError(f"more than {MAX_NAMES} imports or exports")
    for _ in range(count):
        yield reader.name()
        if not export:
            reader.described()
            continue
        reader.sort_and_index()
        if reader.byte() != 0:
            reader.described()
