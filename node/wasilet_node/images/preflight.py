"""Whether a component asks for what this node offers, judged by its names before a layer is pulled or compiled.

The CNCF config lists them (``component.imports``); where it does not, they are read from the component. What is not
offered is named with what to do, rather than left to a linker's message after minutes of pulling and compiling. Only
interfaces of packages are judged, as ``wasi:http/types@0.2.0``: a name without a package may be a type, which asks for
nothing, and a config does not show it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from wasilet_common.components import Interfaces

COMMAND_OFFER: Final = frozenset(
    {"wasi:cli@0.2", "wasi:clocks@0.2", "wasi:filesystem@0.2", "wasi:io@0.2", "wasi:random@0.2", "wasi:sockets@0.2"}
)
"""Packages with the part of their version that must be equal (semver's, as wasmtime's linker has it)."""

_NAME = re.compile(r"(?P<package>[a-z0-9-]+:[a-z0-9-]+)/[^@]+(?:@(?P<version>[0-9][0-9A-Za-z.+-]*))?")
_MAX_SHOWN: Final = 5

_ADVICE: Final = {
    "wasi:http": "HTTP is for modules here, by wasi-experimental-http",
    "wasi:keyvalue": "store data in a volume, or run it where that store is (wasmCloud, Spin)",
    "wasi:blobstore": "store data in a volume, or run it where that store is (wasmCloud)",
    "wasi:config": "read environment variables instead",
    "wasi:logging": "write to standard output or error instead",
    "wasi:nn": "this node runs no inference",
    "fermyon:spin": "build it without that part of Spin's SDK, or run it by SpinKube",
    "spin:": "build it without that part of Spin's SDK, or run it by SpinKube",
    "wasmcloud:": "build it without wasmCloud's interfaces, or run it there",
}
_OLD: Final = "build it again with tools of this year, for WASI 0.2"
_NEWER: Final = "build it for WASI 0.2"
_OWN: Final = "compose it with a component that exports that (`wac plug`)"


def refusal(interfaces: Interfaces, offer: Collection[str] = COMMAND_OFFER) -> str:
    """Why the component cannot run here, with what to do; empty: nothing is against it."""
    missing = [name for name in interfaces.imports if ":" in name and not _is_offered(name, offer)]
    if not missing:
        return ""
    shown = ", ".join(_tame(name) for name in missing[:_MAX_SHOWN])
    more = f" and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
    return f"the component imports {shown}{more}, which this node does not offer: {_advice(missing, offer)}"


def _is_offered(name: str, offer: Collection[str]) -> bool:
    parts = _NAME.fullmatch(name)
    return parts is not None and f"{parts['package']}@{_compatible(parts['version'] or '')}" in offer


def _compatible(version: str) -> str:
    """``0.2`` of 0.2.3, ``1`` of 1.4.0; a pre-release is compatible with itself alone."""
    major, _, rest = version.partition("+")[0].partition(".")
    return version if "-" in version else f"{major}.{rest.partition('.')[0]}" if major == "0" else major


def _advice(missing: Sequence[str], offer: Collection[str]) -> str:
    packages = {entry.partition("@")[0] for entry in offer}
    name = missing[0]
    for prefix, advice in _ADVICE.items():
        if name.startswith(prefix):
            return advice
    package, _, version = name.partition("@")
    if package.partition("/")[0] in packages:
        return _OLD if "-" in version or version.startswith("0.1") else _NEWER
    return _OWN


def _tame(name: str) -> str:
    return "".join(c if c.isprintable() else " " for c in name[:120])
