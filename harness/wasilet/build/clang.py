"""C files become a wasm module: clang with wasi-libc, as Debian and Ubuntu package them, or a WASI SDK.

``WASI_SDK_PATH`` (the name that the SDK's own documentation uses) goes first; then the clang on PATH, when it can
compile and link a program for WASI. Whether it can is asked of clang itself: libraries and the compiler's run-time are
packaged under different names from release to release.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.apps.samples import App
from wasilet.build import apt
from wasilet.build.builder import Made
from wasilet.build.cargo import CompileError
from wasilet.errors import HarnessError, UsageError

Say = Callable[[str], None]

DEBIAN_PACKAGES = ("clang", "lld", "wasi-libc", "libclang-rt-dev-wasm32")
TARGETS = ("wasm32-wasip1", "wasm32-wasi")
"""As for Rust; clang before 18 and Debian's library folders know the second name only."""

_COMPILE_TIMEOUT_SECONDS = 600.0
_PROBE = '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n'


def build_c(app: App, folder: Path, say: Say, environ: Mapping[str, str]) -> Made:
    """Compile and link every ``*.c`` of the app's folder. Raises CompileError with clang's message."""
    sources = sorted(app.folder.glob("*.c"))
    if not sources:
        raise UsageError(f"{app.folder} holds no *.c files")
    clang, target = ensure_clang(say=say, env=environ)
    output = folder / "out.wasm"
    say(f"compiling {', '.join(source.name for source in sources)}")
    flags = ["-O2", "-Wall", *environ.get("CFLAGS", "").split(), *app.demo.build.flags]
    done = process.run(
        [clang, f"--target={target}", *flags, "-o", output, *sources, *environ.get("LDFLAGS", "").split()],
        timeout_seconds=_COMPILE_TIMEOUT_SECONDS,
        cwd=app.folder,
        env=dict(environ),
        check=False,
    )
    if done.returncode != 0:
        raise CompileError(app.name, done.stderr)
    return Made(module=output, toolchain=f"{clang}, target {target}", inputs=(clang.resolve(),))


def ensure_clang(*, say: Say, env: Mapping[str, str] = os.environ) -> tuple[Path, str]:
    """A clang that links programs for WASI, and its target; installed by apt where that may be.

    Raises HarnessError (exit code 2) with what clang printed and what installs the missing part.
    """
    found, said = _find(env)
    if found is None and apt.may_install(env):
        apt.install(DEBIAN_PACKAGES, why="clang with wasi-libc builds C for WASI", say=say, env=env)
        found, said = _find(env)
    if found is None:
        how = (
            f"type: {apt.command(DEBIAN_PACKAGES)}"
            if apt.available(env)
            else "install the WASI SDK and set WASI_SDK_PATH"
        )
        raise HarnessError(f"no C compiler for WASI: {said}", hint=how)
    return found


def _find(env: Mapping[str, str]) -> tuple[tuple[Path, str] | None, str]:
    sdk = env.get("WASI_SDK_PATH")
    name = str(Path(sdk) / "bin" / "clang") if sdk else shutil.which("clang", path=env.get("PATH"))
    if name is None:
        return None, "clang is not installed"
    said = ""
    with tempfile.TemporaryDirectory(prefix="wasilet-clang-") as folder:
        for target in TARGETS:
            try:
                done = process.run(
                    [name, f"--target={target}", "-x", "c", "-", "-o", str(Path(folder) / "probe.wasm")],
                    timeout_seconds=60,
                    env=dict(env),
                    input=_PROBE,
                    check=False,
                )
            except HarnessError as error:
                return None, error.message
            if done.returncode == 0:
                return (Path(name), target), ""
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"{name} cannot link for WASI")
    return None, said.strip()
