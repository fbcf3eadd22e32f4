"""TypeScript (AssemblyScript) becomes a wasm module: its compiler by npm, pinned by the folder's lock file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.apps.samples import App
from wasilet.build import npm
from wasilet.build.builder import Made
from wasilet.build.cargo import CompileError
from wasilet.errors import UsageError

Say = Callable[[str], None]

_COMPILE_TIMEOUT_SECONDS = 300.0
_COMPILER = Path("node_modules/assemblyscript/bin/asc.js")
_SHIM = Path("node_modules/@assemblyscript/wasi-shim/asconfig.json")


def build_assemblyscript(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    """Compile ``assembly/index.ts``. Raises CompileError with the compiler's message, HarnessError without Node."""
    node = npm.find_node("AssemblyScript's compiler", environ)
    entry = app.folder / "assembly" / "index.ts"
    if not entry.is_file() or not (app.folder / "package-lock.json").is_file():
        raise UsageError(f"{app.folder} needs assembly/index.ts and package-lock.json to be built with AssemblyScript")
    tools = npm.install(app.folder, (_COMPILER, _SHIM), "the AssemblyScript compiler", say, environ)
    output = folder / "out.wasm"
    say(f"compiling {entry.relative_to(app.folder)}")
    done = process.run(
        [node, _COMPILER, os.path.relpath(entry, tools), "--config", _SHIM, "--optimize", "--outFile", output],
        timeout_seconds=_COMPILE_TIMEOUT_SECONDS,
        cwd=tools,
        env=dict(environ),
        check=False,
    )
    if done.returncode != 0:
        raise CompileError(app.name, done.stderr or done.stdout)
    version = json.loads((tools / "node_modules/assemblyscript/package.json").read_text())["version"]
    return Made(module=output, toolchain=f"AssemblyScript {version}", inputs=(tools / _COMPILER,))
