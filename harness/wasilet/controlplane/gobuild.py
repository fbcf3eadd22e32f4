"""Building the control plane from the Go modules pinned beside this module.

All binaries of one module are built by one ``go build``, so that their common packages are compiled once. Go checks
every module against go.sum; nothing here is fetched by any other road.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Self

from wasilet.controlplane.binaries import BINARIES, Binary
from wasilet.controlplane.versions import HERE
from wasilet.errors import CommandError, HarnessError
from wasilet.process import run

BUILD_TIMEOUT_SECONDS = 3600.0
COMPILER_FLAGS = ("-gcflags=all=-dwarf=false",)
"""The linker would throw the debugging information away (``-s -w``): not making it saves a tenth of the time."""
COMPILER_SETTINGS = {"GOGC": "400"}
"""Collect garbage less often than by default (100): compilers live for seconds. Less time for some 40 MB more each."""
_BUILD_SETTINGS = {"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
FREE_BYTES_NEEDED = 3 * 1024**3
"""Go's build cache of all four components takes 2.1 GB."""


@dataclass(frozen=True, kw_only=True)
class Go:
    """A Go toolchain: its path and its version, or why it can't be used."""

    path: Path | None
    version: str = ""
    problem: str = ""


class BuildError(Exception):
    """``go build`` did not end well; the message holds its last lines."""


def minimum_go() -> tuple[int, int]:
    """What is needed to build all that is pinned."""
    return max(binary.minimum_go for binary in BINARIES.values())


def find_go(environ: Mapping[str, str]) -> Go:
    """The Go toolchain of PATH, else of its usual folder; says what is wrong with it when it can't be used."""
    found = shutil.which("go", path=environ.get("PATH")) or shutil.which("go", path="/usr/local/go/bin:/snap/bin")
    if found is None:
        return Go(path=None, problem="Go is not installed")
    try:
        output = run([found, "version"], timeout_seconds=30, env={**environ, "GOTOOLCHAIN": "local"}).stdout
    except HarnessError as error:
        return Go(path=None, problem=f"{found} does not run ({error})")
    match = re.search(r"go(\d+)\.(\d+)(\.\d+)?", output)
    if match is None:
        return Go(path=None, problem=f"{found} tells no version")
    version = match.group(0).removeprefix("go")
    if (int(match.group(1)), int(match.group(2))) < (minimum := minimum_go()):
        wanted = ".".join(map(str, minimum))
        return Go(
            path=None, version=version, problem=f"Go {version} at {found} is too old: {wanted} or newer is needed"
        )
    return Go(path=Path(found), version=version)


def build(
    binaries: Sequence[Binary],
    *,
    go: Path,
    output: Path,
    architecture: str,
    environ: Mapping[str, str],
    progress: Callable[[str], None],
) -> None:
    """Build ``binaries``, all of one pinned module, into the folder ``output``. Raises BuildError."""
    (pin,) = {binary.pin for binary in binaries}
    free = shutil.disk_usage(output).free
    if free < FREE_BYTES_NEEDED:
        raise BuildError(f"{output} has {free / 1e9:.1f} GB free; a build needs {FREE_BYTES_NEEDED / 1e9:.0f} GB")
    variables: list[str] = []
    for binary in binaries:
        fields = binary.fields(binary.version, architecture)
        variables += [template.format(**fields) for template in binary.linker_variables]
    flags = " ".join(["-s", "-w", *(f"-X {variable}" for variable in dict.fromkeys(variables))])
    argv = [
        *(str(go), "build", "-v", "-mod=readonly", "-trimpath", "-buildvcs=false", *COMPILER_FLAGS, "-ldflags", flags),
        *("-o", f"{output}{os.sep}", *(binary.package for binary in binaries)),
    ]
    names = ", ".join(f"{binary.name} v{binary.version}" for binary in binaries)
    with _Ticker(names, progress) as ticker:
        try:
            run(
                argv,
                cwd=HERE / pin,
                env={**COMPILER_SETTINGS, **environ, **_BUILD_SETTINGS},
                timeout_seconds=BUILD_TIMEOUT_SECONDS,
                on_line=ticker.line,
            )
        except CommandError as error:
            raise BuildError(f"building {names} failed: {error}") from error
    for binary in binaries:
        built = output / binary.package.rsplit("/", 1)[-1]
        if re.fullmatch(r"v\d+", built.name):
            # go build names a command by the last element of its path that is not a major version
            built = output / binary.package.rsplit("/", 2)[-2]
        if built.name != binary.name:
            built.rename(output / binary.name)


class _Ticker:
    """Says every few seconds what is being built, how far it is and for how long: a link step prints nothing."""

    interval_seconds = 5.0

    def __init__(self, names: str, progress: Callable[[str], None]) -> None:
        self._names = names
        self._progress = progress
        self._packages = 0
        self._done = Event()
        self._started = time.monotonic()
        self._thread = Thread(target=self._tick, name="build progress", daemon=True)

    def line(self, text: str) -> None:
        """Count a line of ``go build -v``: each names a package that was compiled."""
        self._packages += not text.startswith(("go: ", "#"))

    def __enter__(self) -> Self:
        self._progress(f"building {self._names} from source (minutes, once per machine)")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._done.wait(self.interval_seconds):
            seconds = time.monotonic() - self._started
            self._progress(f"building {self._names}: {self._packages} packages compiled, {seconds:.0f} s")
