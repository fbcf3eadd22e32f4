"""Kubernetes' own end-to-end tests ``e2e.test`` and ginkgo, built once per machine from the modules pinned per minor.

Both are built with the flags of the control plane's own build, so that Go's cache serves most of the packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from wasilet import process
from wasilet.controlplane.gobuild import BUILD_TIMEOUT_SECONDS, find_go
from wasilet.errors import HarnessError

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[2] / "docs"
DOWNLOAD_TIMEOUT_SECONDS = 600.0
_BEFORE_ALL = "1.34.4"
"""Of the minor before the oldest whose tests can be run."""

_REQUIRED = re.compile(r"^require k8s\.io/kubernetes v(\S+)", re.MULTILINE)
_TESTS = "k8s.io/kubernetes/test/e2e"
_GINKGO = "github.com/onsi/ginkgo/v2/ginkgo"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A release whose tests are run: ``go.mod`` of the folder that has the minor's name."""

    minor: str
    """``1.37``"""
    version: str
    """``1.37.2``: not always the patch of the cluster."""

    @property
    def folder(self) -> Path:
        """Where ``go.mod`` and ``go.sum`` are."""
        return HERE / self.minor

    @property
    def page(self) -> Path:
        """Of ``docs``: what a run of these tests showed."""
        newest = self.minor == minors()[0]
        return DOCS / ("conformance.md" if newest else f"conformance-{self.minor}.md")

    @property
    def before(self) -> str:
        """A release of the minor before."""
        known = minors()
        at = known.index(self.minor) + 1
        return pin(known[at]).version if at < len(known) else _BEFORE_ALL


def minors() -> list[str]:
    """Those whose tests can be run, the newest first."""
    found = [file.parent.name for file in HERE.glob("*/go.mod")]
    return sorted(found, key=lambda minor: [int(part) for part in minor.split(".")], reverse=True)


def pin(minor: str = "") -> Pin:
    """The release of a minor, or of the newest. Raises HarnessError."""
    known = minors()
    minor = minor or known[0]
    if minor not in known:
        raise HarnessError(f"no tests of Kubernetes {minor} are pinned", hint=f"there are {', '.join(known)}")
    found = _REQUIRED.search((HERE / minor / "go.mod").read_text(encoding="utf-8"))
    assert found is not None, "go.mod requires Kubernetes"
    return Pin(minor=minor, version=found.group(1))


def conformance_names(version: str) -> list[str]:
    """The full names of a release's Conformance tests, from the list that it keeps of them in its sources (downloaded
    if need be). NodeConformance is not listed there. Raises HarnessError."""
    found = process.run(
        [_go(), "mod", "download", "-json", f"k8s.io/kubernetes@v{version}"],
        cwd=HERE,
        env=_environment(),
        timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS,
    )
    sources = Path(json.loads(found.stdout)["Dir"])
    listed = yaml.safe_load((sources / "test" / "conformance" / "testdata" / "conformance.yaml").read_text())
    return [str(entry["codename"]) for entry in listed]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The two programs."""

    tests: Path
    ginkgo: Path


def acquire(pinned: Pin, *, cache: Path, say: Callable[[str], None]) -> Suite:
    """The programs, from the cache or built into it. Raises HarnessError."""
    pins = hashlib.sha256(b"".join((pinned.folder / name).read_bytes() for name in ("go.mod", "go.sum"))).hexdigest()[
        :12
    ]
    folder = cache / "rigs" / "conformance" / f"v{pinned.version}-{pins}"
    suite = Suite(tests=folder / "e2e.test", ginkgo=folder / "ginkgo")
    folder.mkdir(parents=True, exist_ok=True)
    major, minor, _ = pinned.version.split(".")
    flags = [f"gitVersion=v{pinned.version}", f"gitMajor={major}", f"gitMinor={minor}"]
    linker = " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{flag}" for flag in flags)])
    _build(pinned, ("build", "-ldflags", "-s -w"), _GINKGO, suite.ginkgo, say)
    _build(pinned, ("test", "-vet=off", "-c", "-ldflags", linker), _TESTS, suite.tests, say)
    return suite


def _build(pinned: Pin, command: tuple[str, ...], package: str, output: Path, say: Callable[[str], None]) -> None:
    if output.exists():
        return
    say(f"building {package} (minutes, once per machine)")
    making = output.with_name(f".{output.name}.{os.getpid()}")
    process.run(
        [
            *(_go(), *command, "-mod=readonly", "-trimpath", "-buildvcs=false"),
            *("-o", str(making), package),
        ],
        cwd=pinned.folder,
        env=_environment(),
        timeout_seconds=BUILD_TIMEOUT_SECONDS,
    )
    making.replace(output)


def _go() -> str:
    go = find_go(os.environ)
    if go.path is None:
        raise HarnessError(f"the conformance tests are built with Go: {go.problem}")
    return str(go.path)


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
