"""An application's folder becomes one wasm module in the cache: ``invoke build``.

What the folder holds decides how: ``Cargo.toml`` (cargo), ``app.js`` or ``app.ts`` (componentize-js), ``package.json``
with AssemblyScript (npm), ``app.py`` (componentize-py), ``*.c`` (clang).
Nothing is ever written into the folder but what the tools themselves keep there (a missing ``Cargo.lock``).

A second build of unchanged sources starts no tool at all: a record beside the module names every file that went into
it by size and time, sources outside the folder (path dependencies) and the compiler itself included. Starting cargo
only to learn that it has nothing to do costs 0.2 s, and finding the toolchain as much again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wasilet.apps.samples import App
from wasilet.build.builder import Made
from wasilet.errors import HarnessError, UsageError
from wasilet.settings import cache_root
from wasilet.storage import storage_errors, write_json

Say = Callable[[str], None]

_RECORD_VERSION = 2
_IGNORED = frozenset({".git", "target", "node_modules", "__pycache__", ".venv", "build", "dist"})
_VARIABLES = ("RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "CFLAGS", "LDFLAGS", "WASILET_RUST_BIN", "RUSTUP_TOOLCHAIN")
_MODULE_PREAMBLE = b"\0asm\x01\x00\x00\x00"
_COMPONENT_PREAMBLE = b"\0asm\x0d\x00\x01\x00"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A module on disk."""

    name: str
    module: Path
    size_bytes: int
    digest: str
    """``sha256:...`` of the file."""

    target: str
    """``wasip1`` or ``wasip2``: the os of the CNCF artifact."""

    toolchain: str
    """What made it, for people."""

    seconds: float
    """How long the build took; that of the cached one when nothing had to be done."""

    cached: bool = False

    def __str__(self) -> str:
        """``hello-world.wasm, 63 KiB, built in 1.2 s by Rust ...``."""
        how = "unchanged" if self.cached else f"built in {self.seconds:.1f} s by {self.toolchain}"
        return f"{self.module.name}, {self.size_bytes / 1024:.0f} KiB, {how}"


Builder = Callable[[App, Path, Say, Mapping[str, str]], Made]
"""Of one language: makes an app's module in a folder."""


def build(
    app: App,
    *,
    say: Say,
    environ: Mapping[str, str] = os.environ,
    force: bool = False,
    builder: Builder | None = None,
) -> Built:
    """Build ``app`` in release, or find that nothing changed since the last time. ``builder``: by default the one of
    the app's language.

    Raises UsageError: the folder holds nothing that can be built; HarnessError: the compiler's own message, or a
    toolchain that is missing with what installs it; StateError: the cache cannot be written.
    """
    folder = workspace(app, environ)
    found = None if force else built_already(app, environ)
    if found is not None:
        return found
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    before = _stamps(_sources(app.folder))
    started = time.monotonic()
    made = (_builder(app) if builder is None else builder)(app, folder, say, environ)
    seconds = time.monotonic() - started
    module = folder / f"{app.name}.wasm"
    with storage_errors(module):
        _replace(made.module, module)
    built = Built(
        name=app.name,
        module=module,
        size_bytes=module.stat().st_size,
        digest=_digest(module),
        target=wasi_version(module),
        toolchain=made.toolchain,
        seconds=round(seconds, 2),
    )
    data: dict[str, Any] = {
        "version": _RECORD_VERSION,
        "built": {**asdict(built), "module": str(module)},
        # The stamps from before the build: a source edited while the compiler ran must not count as built.
        "sources": before,
        "inputs": _stamps([module, *made.inputs]),
        "environment": _chosen(environ),
    }
    write_json(folder / "build.json", data)
    return built


def built_already(app: App, environ: Mapping[str, str] = os.environ) -> Built | None:
    """The module of the build before, when nothing that went into it has changed since; else None."""
    return _unchanged(app, workspace(app, environ) / "build.json", environ)


def workspace(app: App, environ: Mapping[str, str] = os.environ) -> Path:
    """The app's folder in the cache: named by its path too, since two folders may have one name."""
    key = hashlib.sha256(os.fsencode(app.folder)).hexdigest()[:12]
    return cache_root(environ) / "apps" / f"{app.name}-{key}"


def wasi_version(module: Path) -> str:
    """``wasip1`` for a core module, ``wasip2`` for a component: their preambles differ. Raises HarnessError for
    anything else, because such a file would only fail once it is in the cluster."""
    with module.open("rb") as file:
        preamble = file.read(8)
    if preamble == _MODULE_PREAMBLE:
        return "wasip1"
    if preamble == _COMPONENT_PREAMBLE:
        return "wasip2"
    raise HarnessError(f"{module} is no WebAssembly module or component", hint="build it for a WASI target first")


def _builder(app: App) -> Builder:
    from wasilet.build.componentize_js import build_javascript, entry_of

    if (app.folder / "Cargo.toml").is_file():
        return _build_rust
    if entry_of(app.folder) is not None:
        return build_javascript
    if (app.folder / "package.json").is_file():
        from wasilet.build.assemblyscript import build_assemblyscript

        return build_assemblyscript
    if (app.folder / "app.py").is_file():
        from wasilet.build.componentize_py import build_python

        return build_python
    if any(app.folder.glob("*.c")):
        from wasilet.build.clang import build_c

        return build_c
    raise UsageError(
        f"{app.folder} holds nothing to build",
        hint="an app has a Cargo.toml (Rust), an app.js or app.ts (JavaScript, TypeScript), a package.json "
        "(AssemblyScript), an app.py (Python) or *.c files; `invoke new` makes one",
    )


def _build_rust(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    from wasilet.build.cargo import compile_module, is_library
    from wasilet.build.component import carries_world, make_component
    from wasilet.build.toolchain import ensure_rust

    toolchain = ensure_rust(say=say, env=environ)
    module = compile_module(
        app.folder,
        toolchain=toolchain,
        target_dir=folder / "target",
        vendor_root=cache_root(environ) / "crates",
        say=say,
        binary=app.demo.build.binary,
        env=environ,
    )
    inputs = (toolchain.rustc.resolve(), *listed_by_cargo(module, app.folder))
    if wasi_version(module) == "wasip1" and carries_world(module):
        module = make_component(
            module,
            folder / "component.wasm",
            is_library=is_library(app.folder),
            toolchain=toolchain,
            vendor_root=cache_root(environ) / "crates",
            say=say,
            environ=environ,
        )
    return Made(module=module, toolchain=str(toolchain), inputs=inputs)


def listed_by_cargo(module: Path, folder: Path) -> Iterable[Path]:
    """Sources outside ``folder`` (path dependencies, files included by ``include!``) from cargo's dep-info file."""
    try:
        text = module.with_suffix(".d").read_text()
    except OSError:
        return
    _, _, sources = text.replace("\\ ", "\0").partition(":")
    for name in sources.split():
        # Cargo writes `folder/../shared/x.rs` as it stands in Cargo.toml.
        path = Path(os.path.normpath(name.replace("\0", " ")))
        if path.is_absolute() and not path.is_relative_to(folder):
            yield path


def _unchanged(app: App, record: Path, environ: Mapping[str, str]) -> Built | None:
    try:
        data = json.loads(record.read_text())
        if data["version"] != _RECORD_VERSION or data["environment"] != _chosen(environ):
            return None
        if data["sources"] != _stamps(_sources(app.folder)):
            return None
        if data["inputs"] != _stamps(Path(name) for name in data["inputs"]):
            return None
        built = data["built"]
        return Built(**{**built, "module": Path(built["module"]), "cached": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sources(folder: Path) -> Iterable[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _IGNORED)
        for name in sorted(files):
            # Not what is only applied, read or asserted: editing a manifest builds nothing.
            if not name.endswith((".md", ".j2")) and name != "demo.yaml":
                yield Path(root, name)


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    stamps: dict[str, list[int]] = {}
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            stamps[str(file)] = [-1, -1]
            continue
        stamps[str(file)] = [status.st_size, status.st_mtime_ns]
    return stamps


def _chosen(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _VARIABLES if name in environ}


def _replace(source: Path, target: Path) -> None:
    """A copy, whole or not at all: a push may be reading the module of the build before."""
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(fd)
    try:
        shutil.copyfile(source, temporary)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
