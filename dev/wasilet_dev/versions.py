"""``./run versions``: what is pinned, and what the Go module proxy has that is newer. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet import process
from wasilet.controlplane.binaries import binaries
from wasilet.controlplane.gobuild import find_go
from wasilet.controlplane.versions import minor_of, versions
from wasilet.errors import HarnessError

MINORS = 3
"""As many minors of Kubernetes are supported, as upstream supports."""

_LIST_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One line of ``versions.toml``."""

    name: str
    """``kubernetes 1.37``, ``etcd``."""

    pinned: str
    """Empty: a minor that is not supported yet."""

    newest: str
    """Empty: a minor that is no longer one of the newest."""

    def line(self) -> str:
        """For people."""
        if self.pinned == self.newest:
            return f"{self.name}: {self.pinned}, the newest"
        return f"{self.name}: {self.pinned or 'not brought'} -> {self.newest or 'to be dropped'}"


def proposals(environ: Mapping[str, str]) -> list[Proposal]:
    """By name. Raises HarnessError without Go or without its proxy."""
    known = versions()
    found = newest_by_minor(available("k8s.io/kubernetes", environ))
    newest = sorted(found, key=_number, reverse=True)[:MINORS]
    made = [
        Proposal(name=f"kubernetes {minor}", pinned=known.kubernetes.get(minor, ""), newest=found[minor])
        for minor in newest
    ]
    made += [
        Proposal(name=f"kubernetes {minor}", pinned=version, newest="")
        for minor, version in known.kubernetes.items()
        if minor not in newest
    ]
    modules = {binary.pin: binary.module for binary in binaries().values()}
    for pin, version in known.others.items():
        made.append(Proposal(name=pin, pinned=version, newest=max(available(modules[pin], environ), key=_number)))
    return made


def available(module: str, environ: Mapping[str, str]) -> list[str]:
    """The releases of a Go module that the proxy lists, without ``v``, pre-releases left out."""
    go = find_go(environ)
    if go.path is None:
        raise HarnessError(f"the versions are asked for with Go: {go.problem}")
    done = process.run(
        [str(go.path), "list", "-m", "-versions", f"{module}@latest"],
        timeout_seconds=_LIST_TIMEOUT_SECONDS,
        env={**environ, "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"},
        cwd=Path("/"),
    )
    found = [word.removeprefix("v") for word in done.stdout.split()[1:] if re.fullmatch(r"v\d+\.\d+\.\d+", word)]
    if not found:
        raise HarnessError(f"the Go module proxy lists no version of {module}")
    return found


def newest_by_minor(releases: Iterable[str]) -> dict[str, str]:
    """``{"1.37": "1.37.2"}`` of all releases. Pure."""
    newest: dict[str, str] = {}
    for version in releases:
        minor = minor_of(version)
        if minor not in newest or _number(version) > _number(newest[minor]):
            newest[minor] = version
    return newest


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
