"""TypeScript (AssemblyScript) becomes a wasm module: its compiler by npm, pinned by the folder's lock file.

npm writes ``node_modules`` beside the lock file, so both are copied into the cache and installed there: an app's own
folder stays as it is, and one install serves every build until the lock file changes. Install scripts are not run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from harness import process
from harness.build import Made
from harness.cargo import CompileError
from harness.errors import HarnessError, UsageError
from harness.samples import App
from harness.settings import cache_root

Say = Callable[[str], None]

_NODE_MAJOR = 20
_INSTALL_TIMEOUT_SECONDS = 600.0
_COMPILE_TIMEOUT_SECONDS = 300.0
_COMPILER = Path("node_modules/assemblyscript/bin/asc.js")
_SHIM = Path("node_modules/@assemblyscript/wasi-shim/asconfig.json")


def build_assemblyscript(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    """Compile ``assembly/index.ts``. Raises CompileError with the compiler's words, HarnessError without Node."""
    node = _node(environ)
    entry = app.folder / "assembly" / "index.ts"
    if not entry.is_file() or not (app.folder / "package-lock.json").is_file():
        raise UsageError(f"{app.folder} needs assembly/index.ts and package-lock.json to be built with AssemblyScript")
    tools = _install(app, say, environ)
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


def _node(environ: Mapping[str, str]) -> Path:
    found = shutil.which("node", path=environ.get("PATH"))
    hint = f"install Node.js {_NODE_MAJOR} or newer with npm, from https://nodejs.org or your distribution"
    if found is None or shutil.which("npm", path=environ.get("PATH")) is None:
        raise HarnessError("AssemblyScript's compiler needs Node.js and npm, which are not installed", hint=hint)
    version = process.run([found, "--version"], timeout_seconds=30, env=dict(environ), check=False).stdout.strip()
    match = re.match(r"v(\d+)", version)
    if match is None or int(match[1]) < _NODE_MAJOR:
        raise HarnessError(f"AssemblyScript's compiler needs a newer Node.js than {version or found}", hint=hint)
    return Path(found)


def _install(app: App, say: Say, environ: Mapping[str, str]) -> Path:
    """The folder that holds ``node_modules``: named by the lock file, renamed into place when it is complete."""
    files = [app.folder / "package.json", app.folder / "package-lock.json"]
    key = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:32]
    root = cache_root(environ) / "npm"
    installed = root / key
    if (installed / _COMPILER).is_file():
        return installed
    root.mkdir(parents=True, exist_ok=True)
    say("fetching the AssemblyScript compiler that package-lock.json names (npm ci)")
    with tempfile.TemporaryDirectory(dir=root, prefix=".installing-") as temporary:
        work = Path(temporary) / "tools"
        work.mkdir()
        for file in files:
            shutil.copyfile(file, work / file.name)
        npm = shutil.which("npm", path=environ.get("PATH")) or "npm"
        done = process.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"],
            timeout_seconds=_INSTALL_TIMEOUT_SECONDS,
            cwd=work,
            env=dict(environ),
            check=False,
        )
        if done.returncode != 0 or not (work / _COMPILER).is_file() or not (work / _SHIM).is_file():
            last = "\n".join(process.last_lines(done.stderr)) or "node_modules lacks assemblyscript or its wasi-shim"
            raise HarnessError(f"npm could not install AssemblyScript: {last}", hint="is there a network?")
        try:
            os.rename(work, installed)  # noqa: PTH104  (rename, not replace: whoever was first has won)
        except OSError:
            if not (installed / _COMPILER).is_file():
                raise
    return installed
