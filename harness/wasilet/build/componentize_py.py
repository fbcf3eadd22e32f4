"""Python becomes a component that answers HTTP requests: componentize-py, which brings CPython for WASI with it.

It is a wheel, pinned by digests, in a directory of the cache. The app's modules are copied there first, since importing
them leaves ``__pycache__``; the world is that of ``wit/app.wit``, whose packages are those of WASI 0.2.12 as the crate
``wasip2`` 2.0.1 carries them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.apps.samples import App
from wasilet.build import python_tools
from wasilet.build.builder import Made
from wasilet.build.cargo import CompileError

Say = Callable[[str], None]

ENTRY = "app.py"
WIT = Path(__file__).resolve().parent / "wit"
WORLD = "service"
LOCK = "componentize-py"
_TOOL = Path("componentize_py/componentize_py.abi3.so")
_START = "import sys; sys.argv[0] = 'componentize-py'; from componentize_py import script; script()"
_TIMEOUT_SECONDS = 600.0
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "test_*.py", ".*", "*.md", "*.j2", "demo.yaml")


def build_python(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    """Componentize ``app.py`` with the modules beside it. Raises CompileError with the tool's message, HarnessError
    without the tool."""
    tools = python_tools.install(LOCK, _TOOL, "componentize-py", say, environ)
    output = folder / "component.wasm"
    say(f"making a component of {ENTRY} (some 15 s: CPython is in it)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".python-") as temporary:
        sources, made = Path(temporary) / "sources", Path(temporary) / "out.wasm"
        shutil.copytree(app.folder, sources, ignore=_NOT_COPIED)
        done = process.run(
            [sys.executable, "-c", _START, "-d", WIT, "-w", WORLD, "componentize", "app", "-p", sources, "-o", made],
            timeout_seconds=_TIMEOUT_SECONDS,
            cwd=sources,
            env={**environ, "PYTHONPATH": str(tools), "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
        if done.returncode != 0 or not made.is_file():
            raise CompileError(app.name, done.stderr or done.stdout)
        made.replace(output)
    version = python_tools.version(LOCK)
    return Made(module=output, toolchain=f"componentize-py {version}", inputs=(tools / _TOOL,))
