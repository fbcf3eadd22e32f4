"""A Rust application becomes a wasm module: cargo, in release, offline where its cargo cannot go online by itself
(``wasilet.build.cargo_vendor``), and with hints where it refuses (``wasilet.build.cargo_hints``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.build.cargo_hints import hint
from wasilet.build.cargo_vendor import PROGRESS, has_dependencies, read_toml, report_progress, vendor
from wasilet.build.toolchain import RustToolchain
from wasilet.errors import HarnessError

Say = Callable[[str], None]

_BUILD_TIMEOUT_SECONDS = 1800.0
_MODULE_KINDS = frozenset({"bin", "cdylib"})


def compile_module(
    folder: Path,
    *,
    toolchain: RustToolchain,
    target_dir: Path,
    vendor_root: Path,
    say: Say,
    binary: str | None = None,
    env: Mapping[str, str] = os.environ,
) -> Path:
    """Build the application in ``folder`` and return the module that cargo made, inside ``target_dir``.

    Raises HarnessError with cargo's and the compiler's own message when the build fails; UsageError-like messages when
    ``folder`` makes no program, or several and none is named by ``binary``.
    """

    def explain(output: str) -> str:
        return hint(output, folder=folder, toolchain=toolchain, env=env)

    offline: list[str] = []
    if not toolchain.reads_sparse_index and has_dependencies(folder):
        vendored = vendor(folder, toolchain=toolchain, root=vendor_root, say=say, env=env, explain=explain)
        offline = [
            "--offline",
            "--config",
            'source.crates-io.replace-with="vendored-sources"',
            "--config",
            f"source.vendored-sources.directory={json.dumps(str(vendored))}",
        ]
    argv = [
        str(toolchain.cargo),
        "build",
        "--release",
        "--target",
        toolchain.target,
        "--manifest-path",
        str(folder / "Cargo.toml"),
        "--target-dir",
        str(target_dir),
        "--message-format",
        "json-render-diagnostics",
        *offline,
    ]
    if binary is not None:
        argv += ["--bin", binary]
    else:
        argv += ["--lib" if is_library(folder) else "--bins"]
    done = process.run(
        argv,
        timeout_seconds=_BUILD_TIMEOUT_SECONDS,
        # Where cargo would be typed: what the app's .cargo/config.toml says counts.
        cwd=folder,
        env=toolchain.environment(env),
        check=False,
        on_line=lambda line: report_progress(line, say),
    )
    if done.returncode != 0:
        raise CompileError(folder.name, done.stderr, hint=explain(done.stderr))
    modules = _modules(done.stdout)
    if len(modules) == 1:
        return modules[0]
    if not modules:
        raise HarnessError(
            f"{folder} builds no program",
            hint='a crate needs src/main.rs, a [[bin]], or a [lib] with crate-type = ["cdylib"] to become a module',
        )
    names = ", ".join(sorted(module.stem for module in modules))
    raise HarnessError(
        f"{folder} builds several programs: {names}", hint="name one in demo.yaml: build: {binary: NAME}"
    )


def is_library(folder: Path) -> bool:
    """Whether the crate makes a module without ``main``: one that answers calls, as an HTTP service does. A crate that
    has a program too is built as one."""
    manifest = read_toml(folder / "Cargo.toml")
    kinds = manifest.get("lib", {}).get("crate-type") or ()
    return "cdylib" in kinds and not manifest.get("bin") and not (folder / "src" / "main.rs").exists()


class CompileError(HarnessError):
    """The compiler refused the program; the message is what the compiler printed."""

    def __init__(self, name: str, output: str, *, hint: str = "") -> None:
        super().__init__(f"{name} does not compile\n{_relevant(output)}", hint=hint)
        self.output = output


def _relevant(output: str) -> str:
    """Without cargo's progress, from the first diagnostic on."""
    lines = [line for line in output.splitlines() if not line.strip().startswith(PROGRESS)]
    return "\n".join(lines).strip()


def _modules(output: str) -> list[Path]:
    found: list[Path] = []
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or not _MODULE_KINDS.intersection(message["target"]["kind"]):
            continue
        found += [Path(name) for name in message["filenames"] if name.endswith(".wasm")]
    return found
