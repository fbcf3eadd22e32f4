"""The versions of everything that is installed: ``versions.toml``, read once."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet.errors import UsageError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Versions:
    """``kubernetes``: version by minor, newest first, as ``{"1.37": "1.37.2"}``. ``others``: by name of the pin."""

    kubernetes: Mapping[str, str]
    others: Mapping[str, str]


@functools.cache
def versions() -> Versions:
    """What ``versions.toml`` holds."""
    data = tomllib.loads((HERE / "versions.toml").read_text(encoding="utf-8"))
    return Versions(kubernetes=data["kubernetes"], others=data["others"])


def default_kubernetes() -> str:
    """The newest, as ``1.37.2``."""
    return next(iter(versions().kubernetes.values()))


def minor_of(version: str) -> str:
    """``1.37`` of ``1.37.2`` or ``v1.37.2``."""
    return ".".join(version.removeprefix("v").split(".")[:2])


def supported_kubernetes(asked: str) -> str:
    """The version that is installed for what a user asked for: a minor (``1.36``), a version (``1.36.3``), or nothing.

    Raises UsageError for one that is not among those of ``versions.toml``."""
    if not asked:
        return default_kubernetes()
    known = versions().kubernetes
    brought = known.get(minor_of(asked))
    if brought is None or (re.fullmatch(r"v?\d+\.\d+\.\d+", asked) and asked.removeprefix("v") != brought):
        raise UsageError(
            f"Kubernetes {asked} is not brought by the host provider",
            hint=f"there are {', '.join(known.values())}; kind, k3d and minikube take any",
        )
    return brought
