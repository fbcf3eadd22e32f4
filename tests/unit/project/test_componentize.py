from __future__ import annotations

import pytest
import wasmtime

from tests.e2e.componentize import with_room

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("pages", "roomy"), [("17", 2048), ("3000", 3000), ("2 5000", 2048)])
def test_a_module_gets_a_large_initial_memory_and_is_the_same_otherwise(pages: str, roomy: int) -> None:
    text = f'(module (memory (export "memory") {pages}) (data (i32.const 8) "cats") (func (export "_start")))'
    made = with_room(bytes(wasmtime.wat2wasm(text)))
    assert made == wasmtime.wat2wasm(text.replace(f") {pages})", f") {' '.join([str(roomy), *pages.split()[1:]])})"))
    assert with_room(made) == made


def test_a_module_without_memory_stays_as_it_is() -> None:
    module = bytes(wasmtime.wat2wasm('(module (func (export "_start")))'))
    assert with_room(module) == module
