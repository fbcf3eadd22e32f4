"""JavaScript and TypeScript become a component that answers HTTP requests: rolldown makes one file of the modules (and
takes types away), componentize-js puts it into a component with the engine SpiderMonkey.

Both come by npm, pinned by digests in ``locks/componentize-js``. The app's modules are copied first, so that its folder
stays as it is; packages of its own are those of its ``package-lock.json``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.apps.samples import App
from wasilet.build import npm
from wasilet.build.builder import Made
from wasilet.build.cargo import CompileError
from wasilet.errors import UsageError

Say = Callable[[str], None]

ENTRIES = ("app.js", "app.mjs", "app.ts")
WIT = Path(__file__).resolve().parent / "wit"
WIT_VERSION = "0.2.12"
"""Of the packages in ``wit``."""

ENGINE_VERSION = "0.2.10"
"""The WASI that the engine of componentize-js 0.23.0 was compiled for: its ``fetch`` exports that handler, no newer."""

WORLD = "javascript-service"
LOCK = Path(__file__).resolve().parent / "locks" / "componentize-js"
_SCRIPT = Path(__file__).resolve().with_name("componentize.mjs")
_MODULES = Path("node_modules")
_TOOL = _MODULES / "@bytecodealliance/componentize-js/package.json"
_BUNDLER = _MODULES / "rolldown/package.json"
_TIMEOUT_SECONDS = 600.0
_NOT_COPIED = shutil.ignore_patterns("node_modules", "__pycache__", "test_*.py", ".*", "*.md", "*.j2", "demo.yaml")


def entry_of(folder: Path) -> str | None:
    """The module that such an app begins with; None: it is none."""
    return next((name for name in ENTRIES if (folder / name).is_file()), None)


def build_javascript(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    """Componentize ``app.js`` (``app.mjs``, ``app.ts``) with all that it imports.

    Raises CompileError with the tool's message; HarnessError without Node.js; UsageError: packages without a lock file.
    """
    entry = entry_of(app.folder)
    if entry is None:
        raise UsageError(f"{app.folder} needs one of {', '.join(ENTRIES)}")
    node = npm.find_node("componentize-js", environ)
    packages = _packages(app, say, environ)
    tools = npm.install(LOCK, (_TOOL, _BUNDLER), "componentize-js and rolldown (385 MB)", say, environ)
    output = folder / "component.wasm"
    say(f"making a component of {entry} (some 20 s: a JavaScript engine is in it)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".javascript-") as temporary:
        work = Path(temporary)
        sources, made = work / "app", work / "out.wasm"
        shutil.copytree(app.folder, sources, ignore=_NOT_COPIED)
        if packages is not None:
            (sources / _MODULES).symlink_to(packages)
        # Node.js looks for packages beside the script, and no app may find those of the tools.
        (work / "tools").mkdir()
        (work / "tools" / _MODULES).symlink_to(tools / _MODULES)
        script = shutil.copy(_SCRIPT, work / "tools")
        done = process.run(
            [node, script, sources / entry, _wit_of_engine(work), WORLD, made],
            timeout_seconds=_TIMEOUT_SECONDS,
            cwd=sources,
            env=dict(environ),
            check=False,
        )
        if done.returncode != 0 or not made.is_file():
            raise CompileError(app.name, (done.stderr or done.stdout).replace(f"{sources}/", ""))
        made.replace(output)
    version = json.loads((tools / _TOOL).read_text(encoding="utf-8"))["version"]
    return Made(module=output, toolchain=f"componentize-js {version}", inputs=(tools / _TOOL, tools / _BUNDLER))


def _packages(app: App, say: Say, environ: Mapping[str, str]) -> Path | None:
    """``node_modules`` of what the app's own lock file names; None where it names nothing."""
    package = app.folder / "package.json"
    if not package.is_file():
        return None
    try:
        named = json.loads(package.read_text(encoding="utf-8")).get("dependencies")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{package} is no description of an npm package: {error}") from error
    if not named:
        return None
    if not (app.folder / "package-lock.json").is_file():
        raise UsageError(
            f"{app.folder} has packages and no package-lock.json, so what is built would change by itself",
            hint=f"type: npm --prefix {app.folder} install --package-lock-only",
        )
    needed = [_MODULES / name / "package.json" for name in named]
    return npm.install(app.folder, needed, f"the packages of {app.name}", say, environ) / _MODULES


def _wit_of_engine(work: Path) -> Path:
    """The interfaces in the version that the engine has: later ones of WASI 0.2 only add to it. What they added must
    not be named as newer than its package; nothing of the engine calls it."""
    copied = work / "wit"
    shutil.copytree(WIT, copied)
    for file in copied.rglob("*.wit"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(WIT_VERSION, ENGINE_VERSION), encoding="utf-8")
    return copied
