"""Kubernetes' own end-to-end tests ``e2e.test`` and ginkgo, built once per machine from the pinned modules.

Both are built with the flags of the control plane's own build, so that Go's cache serves most of the packages.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wasilet import process
from wasilet.controlplane.gobuild import BUILD_TIMEOUT_SECONDS, find_go
from wasilet.errors import HarnessError

HERE = Path(__file__).resolve().parent
_PIN = re.compile(r"^require k8s\.io/kubernetes v(\S+)", re.MULTILINE)


def _pinned() -> str:
    """The release whose tests ``go.mod`` names: not always that of the cluster."""
    found = _PIN.search((HERE / "go.mod").read_text(encoding="utf-8"))
    assert found is not None, "go.mod requires Kubernetes"
    return found.group(1)


VERSION = _pinned()
_TESTS = "k8s.io/kubernetes/test/e2e"
_GINKGO = "github.com/onsi/ginkgo/v2/ginkgo"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The two programs."""

    tests: Path
    ginkgo: Path


def acquire(*, cache: Path, say: Callable[[str], None]) -> Suite:
    """The programs, from the cache or built into it. Raises HarnessError."""
    pins = hashlib.sha256((HERE / "go.mod").read_bytes() + (HERE / "go.sum").read_bytes()).hexdigest()[:12]
    folder = cache / "rigs" / "conformance" / f"v{VERSION}-{pins}"
    suite = Suite(tests=folder / "e2e.test", ginkgo=folder / "ginkgo")
    folder.mkdir(parents=True, exist_ok=True)
    major, minor, _ = VERSION.split(".")
    flags = [f"gitVersion=v{VERSION}", f"gitMajor={major}", f"gitMinor={minor}"]
    linker = " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{flag}" for flag in flags)])
    _build(("build", "-ldflags", "-s -w"), _GINKGO, suite.ginkgo, say)
    _build(("test", "-vet=off", "-c", "-ldflags", linker), _TESTS, suite.tests, say)
    return suite


def _build(command: tuple[str, ...], package: str, output: Path, say: Callable[[str], None]) -> None:
    if output.exists():
        return
    go = find_go(os.environ)
    if go.path is None:
        raise HarnessError(f"the conformance tests are built with Go: {go.problem}")
    say(f"building {package} (minutes, once per machine)")
    making = output.with_name(f".{output.name}.{os.getpid()}")
    process.run(
        [
            *(str(go.path), *command, "-mod=readonly", "-trimpath", "-buildvcs=false"),
            *("-o", str(making), package),
        ],
        cwd=HERE,
        env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""},
        timeout_seconds=BUILD_TIMEOUT_SECONDS,
    )
    making.replace(output)
