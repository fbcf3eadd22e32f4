"""The names of a component: what wasmtime's own reader finds, and nothing but an error for anything else."""

from __future__ import annotations

import random

import pytest
import wasmtime
import wasmtime.component
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.components import MAX_NAMES, PREAMBLE, ComponentError, Interfaces, interfaces_of

from tests.unit.node.runtime.component_guests import component_guest

pytestmark = pytest.mark.unit

TEXTS = {
    "empty": "(component)",
    "command": component_guest("(i32.const 0)"),
    "further imports": component_guest(
        "(i32.const 0)", imports='(import "wasi:http/outgoing-handler@0.2.3" (instance (export "handle" (func))))'
    ),
    "every kind": """(component
        (import "wasi:io/error@0.2.0" (instance $i (export "error" (type (sub resource)))))
        (import "plain" (func))
        (import "a-type" (type (sub resource)))
        (import "a-module" (core module))
        (type $t u32)
        (import "same" (type (eq $t)))
        (core module $m (func (export "run")))
        (core instance $c (instantiate $m))
        (func $run (canon lift (core func $c "run")))
        (instance $run-i (export "run" (func $run)))
        (export "wasi:cli/run@0.2.0" (instance $run-i))
        (export "again" (func $run))
        (export "typed" (func $run) (func))
        (export "inner" (core module $m)))""",
    "nested": """(component
        (component (import "hidden" (func)) (export "hidden-too" (func 0)))
        (import "seen" (func)))""",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_names_are_those_that_wasmtime_finds(text: str) -> None:
    data = bytes(wasmtime.wat2wasm(text))
    engine = wasmtime.Engine()
    kind = wasmtime.component.Component(engine, data).type
    found = interfaces_of(data)
    assert set(found.imports) == set(kind.imports(engine))
    assert set(found.exports) == set(kind.exports(engine))


@pytest.mark.parametrize(
    ("exports", "target"),
    [
        (("wasi:cli/run@0.2.3",), "wasi:cli/command@0.2.3"),
        (("x:y/z@1.0.0", "wasi:http/incoming-handler@0.2.0"), "wasi:http/proxy@0.2.0"),
        (("wasi:http/handler@0.3.0",), "wasi:http/service@0.3.0"),
        (("x:y/z@1.0.0",), ""),
        ((), ""),
    ],
)
def test_the_world_is_told_by_what_is_exported(exports: tuple[str, ...], target: str) -> None:
    assert Interfaces(exports=exports).target == target


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0asm",
        b"\0asm\x01\0\0\0",
        PREAMBLE + b"\x0a",
        PREAMBLE + b"\x0a\x05\x01",
        PREAMBLE + b"\x0a\xff\xff\xff\xff\xff\x01",
        PREAMBLE + b"\x0a\xff\xff\xff\xff\x1f",
        PREAMBLE + b"\x0a\x02\x01\x00",
        PREAMBLE + b"\x0a\x04\x01\x00\x05a",
        PREAMBLE + b"\x0a\x05\x01\x00\x01\xff\x01",
        PREAMBLE + b"\x0a\x06\x01\x00\x01a\x09\x00",
        PREAMBLE + b"\x0a\x06\x01\x07\x01a\x01\x00",
        PREAMBLE + b"\x0a\x03\xff\xff\x7f",
        PREAMBLE + b"\x0a\x07\x01\x00\x01a\x01\x00\x00",
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(ComponentError):
        interfaces_of(data)


def test_names_have_a_limit() -> None:
    one = b"\x00\x01a\x01\x00"
    count = MAX_NAMES // 2 + 1
    section = bytes([count & 0x7F | 0x80, count >> 7]) + one * count
    length = len(section)
    framed = b"\x0a" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + section
    assert len(interfaces_of(PREAMBLE + framed).imports) == count
    with pytest.raises(ComponentError, match="more than"):
        interfaces_of(PREAMBLE + framed * 2)


def test_options_of_a_name_are_skipped() -> None:
    section = b"\x01\x02\x01a\x01\x01\x03x.y\x01\x00"
    assert interfaces_of(PREAMBLE + b"\x0a" + bytes([len(section)]) + section).imports == ("a",)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for candidate in (data, PREAMBLE + data, PREAMBLE + b"\x0a" + bytes([min(len(data), 127)]) + data[:127]):
        try:
            interfaces_of(candidate)
        except ComponentError:
            pass


def test_damaged_components_are_read_or_refused() -> None:
    """20,000 real components with a few bytes changed, cut or doubled."""
    randomly = random.Random(20260102)
    sources = [bytes(wasmtime.wat2wasm(text)) for text in TEXTS.values()]
    refused = 0
    for _ in range(20_000):
        data = bytearray(randomly.choice(sources))
        for _ in range(randomly.randint(1, 4)):
            place = randomly.randrange(len(data) or 1)
            if randomly.random() < 0.5 and data:
                data[place % len(data)] = randomly.randrange(256)
            elif randomly.random() < 0.5:
                del data[place : place + randomly.randint(1, 20)]
            else:
                data[place:place] = data[place : place + 20]
        try:
            interfaces_of(bytes(data))
        except ComponentError:
            refused += 1
    assert 1000 < refused < 20_000
