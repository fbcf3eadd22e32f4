"""What a component imports and exports: the names at its top level, read without compiling it.

From the component model's binary format (``design/mvp/Binary.md``). A component is a list of sections; those of imports
and exports name interfaces, as ``wasi:cli/run@0.2.3``. All others are skipped unread, so a component of 18 MB costs a
few reads. The bytes are hostile: every length is checked against what is there, numbers and sums have limits, and
whatever is not understood is a ComponentError, nothing else.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final

PREAMBLE: Final = b"\0asm\x0d\0\x01\0"
MAX_NAMES: Final = 4096
MAX_SECTION_BYTES: Final = 1024 * 1024
"""Of one section with names; one of code is skipped, whatever its size."""

MAX_SECTIONS: Final = 100_000
HANDLERS: Final = ("wasi:http/incoming-handler@0.2.", "wasi:http/handler@0.3.")
"""How the names of exports begin that answer HTTP requests."""

_COMMANDS: Final = ("wasi:cli/run@0.2.", "wasi:cli/run@0.3.")
_MAX_LEB_BYTES: Final = 5
_IMPORTS, _EXPORTS = 10, 11


class ComponentError(ValueError):
    """Not a component, or one whose names cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Interfaces:
    """Names in a component's own order."""

    imports: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The world that the exports speak of, with the version of that export; empty for another one."""
        for name in self.exports:
            interface, _, version = name.partition("@")
            world = _WORLDS.get(interface)
            if world and version:
                return f"{world}@{version}"
        return ""

    @property
    def is_server(self) -> bool:
        """Whether the component answers HTTP requests. One that is a command too is run as a command."""
        return any(name.startswith(HANDLERS) for name in self.exports) and not any(
            name.startswith(_COMMANDS) for name in self.exports
        )


_WORLDS: Final = {
    "wasi:cli/run": "wasi:cli/command",
    "wasi:http/incoming-handler": "wasi:http/proxy",
    "wasi:http/handler": "wasi:http/service",
}


def read_interfaces(file: BinaryIO) -> Interfaces:
    """Of a seekable file, from its beginning. Raises ComponentError, OSError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(PREAMBLE)) != PREAMBLE:
        raise ComponentError("it does not begin as a component does")
    names: dict[int, list[str]] = {_IMPORTS: [], _EXPORTS: []}
    for _ in range(MAX_SECTIONS):
        if file.tell() >= size:
            return Interfaces(imports=tuple(names[_IMPORTS]), exports=tuple(names[_EXPORTS]))
        kind, length = _byte_of(file), _length(file)
        end = file.tell() + length
        if end > size:
            raise ComponentError("a section is longer than the file")
        if kind in names:
            if length > MAX_SECTION_BYTES:
                raise ComponentError(f"a section of names has {length} bytes, more than {MAX_SECTION_BYTES}")
            names[kind] += _Section(file.read(length)).names(exports=kind == _EXPORTS)
            if len(names[kind]) > MAX_NAMES:
                raise ComponentError(f"it has more than {MAX_NAMES} imports or exports")
        file.seek(end)
    raise ComponentError(f"it has more than {MAX_SECTIONS} sections")


def interfaces_of(data: bytes) -> Interfaces:
    """The same of bytes. Raises ComponentError."""
    return read_interfaces(io.BytesIO(data))


def _byte_of(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ComponentError("it ends within a section")
    return byte[0]


def _length(file: BinaryIO) -> int:
    return _leb(_byte_of(file) for _ in range(_MAX_LEB_BYTES))


def _leb(data: Iterable[int]) -> int:
    """An unsigned LEB128 of at most 32 bits."""
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >= 1 << 32:
                break
            return value
    raise ComponentError("a number has more than 32 bits")


class _Section:
    """A cursor over one section of names."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def names(self, *, exports: bool) -> list[str]:
        """All of them. Raises ComponentError."""
        count = self._number()
        if count > MAX_NAMES:
            raise ComponentError(f"it has more than {MAX_NAMES} imports or exports")
        found = []
        for _ in range(count):
            name = self._name()
            if exports:
                self._sort_index()
                if self._flag():
                    self._description()
                found.append(name)
            elif not self._description():
                found.append(name)
        if self._position != len(self._data):
            raise ComponentError("a section of names has something else at its end")
        return found

    def _byte(self) -> int:
        if self._position >= len(self._data):
            raise ComponentError("a section of names ends too early")
        self._position += 1
        return self._data[self._position - 1]

    def _flag(self) -> bool:
        value = self._byte()
        if value > 1:
            raise ComponentError("something is neither there nor not there")
        return bool(value)

    def _number(self) -> int:
        return _leb(self._byte() for _ in range(_MAX_LEB_BYTES))

    def _text(self) -> str:
        length = self._number()
        end = self._position + length
        if end > len(self._data):
            raise ComponentError("a name is longer than its section")
        data, self._position = self._data[self._position : end], end
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ComponentError("a name is not UTF-8") from None

    def _name(self) -> str:
        """A kind (0 and 1: nothing more; 2: options follow, as the part of a version that does not count), a text."""
        kind = self._byte()
        text = self._text()
        if kind == 2:
            for _ in range(min(self._number(), MAX_NAMES)):
                self._byte()
                self._text()
        elif kind > 2:
            raise ComponentError(f"a name is of the unknown kind {kind}")
        return text

    def _sort_index(self) -> None:
        """``sortidx``: the sort 0 (core) has a second byte."""
        if self._byte() == 0:
            self._byte()
        self._number()

    def _description(self) -> bool:
        """``externdesc``: core module, function, value, type, component or instance. Whether it is only another name
        for a type, which asks no one for anything."""
        kind = self._byte()
        if kind == 0:
            self._byte()
            self._number()
        elif kind == 2:
            self._value_bound()
        elif kind == 3:
            # A type's bound: equality names an index, "some resource" nothing.
            if not self._flag():
                self._number()
                return True
        elif kind in {1, 4, 5}:
            self._number()
        else:
            raise ComponentError(f"an import or export is of the unknown kind {kind}")
        return False

    def _value_bound(self) -> None:
        """Equality to an index, or a value type: a primitive's byte, or an index, each a LEB128 at most."""
        self._byte()
        self._number()
