"""What this machine has of what Wasilet can use: where each prerequisite is, its version, or what installs it.

It reads only, and asks no network. A prerequisite is *needed* for what the README promises (`up` and the demos on the
``host`` provider), or *optional*: then the line names what it is for, and its absence is no failure.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet import process
from wasilet.build import apt
from wasilet.controlplane.acquire import locate
from wasilet.controlplane.binaries import HOST_PROVIDER, LATER
from wasilet.controlplane.gobuild import Go, find_go, minimum_go
from wasilet.errors import HarnessError
from wasilet.settings import Settings

FREE_BYTES_FOR_A_CLUSTER = 1 * 1024**3
FREE_BYTES_FOR_A_BUILD = 6 * 1024**3
_ASK_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One prerequisite."""

    name: str
    status: str
    """``ok``; ``will`` (missing, and `up` or `build` installs it by itself); ``missing``; ``optional`` (missing, and
    only what ``detail`` names needs it)."""

    detail: str
    """Where it was found and its version; or what it is for, and what is wrong."""

    hint: str = ""
    """The command that installs it."""

    def to_json(self) -> dict[str, Any]:
        """Its four fields."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "hint": self.hint}


def doctor(settings: Settings) -> list[Check]:
    """Every check, in the order in which a newcomer meets its subject."""
    go = find_go(settings.environ)
    return [
        *_machine(settings),
        *_binaries(settings, go),
        _go(go),
        _rust(settings.environ),
        *_other_compilers(settings.environ),
        _component_host(settings.environ),
        *_providers(settings),
    ]


def is_fit(checks: list[Check]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(check.status != "missing" for check in checks)


def check_lines(checks: list[Check]) -> Iterator[str]:
    """For people, one check per line and its hint below it."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{check.status:<8}  {check.name:<{width}}  {check.detail}"
        if check.hint:
            yield f"{'':<8}  {'':<{width}}  -> {check.hint}"


def _machine(settings: Settings) -> Iterator[Check]:
    yield Check(
        name="python",
        status="ok",
        detail=f"{platform.python_version()} at {sys.executable}",
    )
    for name, folder, needed in (
        ("cache folder", settings.cache, FREE_BYTES_FOR_A_BUILD),
        ("state folder", settings.state_root, FREE_BYTES_FOR_A_CLUSTER),
    ):
        yield _folder(name, folder, needed)
    yield _address(settings)
    yield _memory_limits()
    yield _pod_network(settings)
    yield from _fences(settings.environ)
    if apt.available(settings.environ):
        allowed = apt.may_install(settings.environ) and settings.install
        detail = "what is missing is installed, after saying so" if allowed else "not as this user; commands are shown"
        yield Check(name="apt", status="ok", detail=detail)


def _folder(name: str, folder: Path, needed: int) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Check(
            name=name, status="missing", detail=f"{existing} cannot be written to", hint="see docs/harness.md, Folders"
        )
    free = shutil.disk_usage(existing).free
    if free < needed:
        return Check(
            name=name,
            status="missing",
            detail=f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.0f} GB are needed",
            hint="make room, or move it by WASILET_CACHE or WASILET_STATE_HOME",
        )
    return Check(name=name, status="ok", detail=f"{folder}, {free / 1e9:.0f} GB free")


def _address(settings: Settings) -> Check:
    from wasilet.providers.host import node_address

    address = node_address(settings)
    if ipaddress.ip_address(address).is_loopback:
        return Check(
            name="node address",
            status="ok",
            detail=f"{address}: pods and their logs work; the API server's node and pod proxies refuse loopback",
        )
    return Check(name="node address", status="ok", detail=address)


def _pod_network(settings: Settings) -> Check:
    from wasilet.controlplane import pod_network

    absent = pod_network.obstacle(settings)
    if not absent:
        detail = "pods of a new cluster (host) get addresses of their own"
        if os.geteuid() != 0:
            detail += f", {pod_network.ROOTLESS}"
        return Check(name="pod network", status="ok", detail=detail)
    detail = f"pods share this machine's: {absent}"
    if pod_network.NFT_PACKAGE not in absent:
        return Check(name="pod network", status="optional", detail=detail)
    installs = settings.install and apt.may_install(settings.environ)
    return Check(
        name="pod network",
        status="will" if installs else "optional",
        detail=detail,
        hint="" if installs else apt.command([pod_network.NFT_PACKAGE]),
    )


def _fences(environ: Mapping[str, str]) -> Iterator[Check]:
    """Of sandboxes that a node of this user would start, tried by a process of its own, which leaves nothing."""
    answer = _answer([sys.executable, "-P", "-m", "wasilet_node.runtime.fences"], environ)
    hint = "see docs/security.md, What is not promised"
    if not answer:
        yield Check(name="sandbox fences", status="optional", detail="they could not be tried", hint=hint)
        return
    for fence in json.loads(answer):
        name = f"sandbox: {fence['name']}"
        if fence["holds"]:
            yield Check(name=name, status="ok", detail=fence["detail"])
        else:
            yield Check(name=name, status="optional", detail=fence["detail"], hint=hint)


def _memory_limits() -> Check:
    # The node finds out by itself; this only reports what it will find.
    root = Path("/sys/fs/cgroup")
    v1 = root / "memory"
    if os.access(v1, os.W_OK) and (v1 / "memory.limit_in_bytes").exists() | (v1 / "cgroup.procs").exists():
        return Check(name="memory limits", status="ok", detail="enforced by control groups, version 1")
    if (root / "cgroup.controllers").exists() and os.access(root, os.W_OK):
        return Check(name="memory limits", status="ok", detail="enforced by control groups, version 2")
    return Check(
        name="memory limits",
        status="ok",
        detail="no control group of this user's: the supervisor watches the resident size; no cpu limits",
    )


def _binaries(settings: Settings, go: Go) -> Iterator[Check]:
    for name in (*HOST_PROVIDER, *LATER):
        found = locate(name, cache=settings.cache, environ=settings.environ)
        if found is not None:
            yield Check(name=name, status="ok", detail=f"{found.version}, {found.source}: {found.path}")
        elif settings.download or go.path is not None:
            ways = [*(["downloaded"] if settings.download else []), *(["built by Go"] if go.path else [])]
            when = "after the first `up`" if name in LATER else "by the first `up`"
            yield Check(name=name, status="will", detail=f"will be {' or '.join(ways)} {when}")
        else:
            yield Check(
                name=name,
                status="missing",
                detail="downloads are off, and it cannot be built",
                hint="install Go, or name a folder that has it in KUBEBUILDER_ASSETS",
            )


def _go(go: Go) -> Check:
    if go.path is not None:
        return Check(name="go", status="ok", detail=f"{go.version} at {go.path}")
    return Check(
        name="go",
        status="optional",
        detail=f"{go.problem}; only for building the binaries where they cannot be downloaded",
        hint=f"install Go {'.'.join(map(str, minimum_go()))} or newer (Debian 12's own is too old)",
    )


def _rust(environ: Mapping[str, str]) -> Check:
    from wasilet.build.toolchain import DEBIAN_PACKAGES, find_rust

    found = find_rust(environ)
    if found is not None:
        version = ".".join(map(str, found.rustc_version))
        return Check(name="rust for WASI", status="ok", detail=f"{version}, target {found.target}: {found.origin}")
    if shutil.which("rustup", path=environ.get("PATH")):
        return Check(name="rust for WASI", status="will", detail="`build` adds the target by rustup")
    if apt.may_install(environ):
        return Check(name="rust for WASI", status="will", detail="`build` installs Debian's packages")
    return Check(
        name="rust for WASI",
        status="missing",
        detail="no Rust with a WASI target",
        hint=f"{apt.command(DEBIAN_PACKAGES)}; or, with rustup: rustup target add wasm32-wasip1",
    )


def _other_compilers(environ: Mapping[str, str]) -> Iterator[Check]:
    from wasilet.build.clang import DEBIAN_PACKAGES as CLANG_PACKAGES

    path = environ.get("PATH")
    for name, purpose, hint in (
        ("clang", "the sample in C", apt.command(CLANG_PACKAGES)),
        ("npm", "apps in JavaScript and TypeScript", "install Node.js 20 or newer"),
    ):
        found = shutil.which(name, path=path)
        if found:
            yield Check(name=name, status="ok", detail=found)
        else:
            yield Check(name=name, status="optional", detail=f"only for {purpose}", hint=hint)


def _component_host(environ: Mapping[str, str]) -> Check:
    from wasilet_node.runtime.component_host import build, locate
    from wasilet_node.runtime.component_host.library import HostUnavailableError

    name = "component host"
    try:
        return Check(name=name, status="ok", detail=str(locate.load(environ).path))
    except HostUnavailableError as error:
        reason = str(error)
    if environ.get(locate.VARIABLE):
        return Check(name=name, status="optional", detail=reason, hint=f"unset {locate.VARIABLE}, or name a library")
    purpose = "only for components that serve HTTP, open sockets or use WASI 0.3"
    try:
        detail = f"{purpose}; {build.find_rust(environ)} can build it"
    except HostUnavailableError as error:
        detail = f"{purpose}; {error}"
    return Check(name=name, status="optional", detail=detail, hint=locate.COMMAND)


def _providers(settings: Settings) -> Iterator[Check]:
    environ = settings.environ
    docker = _answer(["docker", "version", "--format", "{{.Client.Version}}"], environ)
    engine = _answer(["docker", "version", "--format", "{{.Server.Version}}"], environ)
    purpose = "only for the providers kind, k3d and minikube"
    if engine:
        yield Check(name="docker", status="ok", detail=f"engine {engine}")
    elif docker or shutil.which("docker", path=environ.get("PATH")):
        yield Check(
            name="docker",
            status="optional",
            detail=f"the client is there, but no engine answers; {purpose}",
            hint="start Docker, and be a member of the group docker",
        )
    else:
        yield Check(name="docker", status="optional", detail=purpose, hint="install Docker Engine")
    tools: tuple[tuple[str, list[str], Callable[[str], str]], ...] = (
        ("kind", ["kind", "version", "--quiet"], str.strip),
        ("k3d", ["k3d", "version"], lambda text: text.splitlines()[0]),
        ("minikube", ["minikube", "version", "--short"], str.strip),
    )
    for name, argv, first in tools:
        answer = _answer(argv, environ)
        if answer:
            yield Check(
                name=name, status="ok", detail=f"{first(answer)} at {shutil.which(name, path=environ.get('PATH'))}"
            )
        elif name == "kind":
            yield Check(name=name, status="will", detail="`up --provider kind` brings a pinned one")
        else:
            yield Check(name=name, status="optional", detail=f"only for `up --provider {name}`", hint=f"install {name}")


def _answer(argv: list[str], environ: Mapping[str, str]) -> str:
    try:
        return process.run(argv, timeout_seconds=_ASK_TIMEOUT_SECONDS, env=environ, check=False).stdout.strip()
    except HarnessError:
        return ""
