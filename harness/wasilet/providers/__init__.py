"""Providers by name. Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from wasilet.errors import UsageError

if TYPE_CHECKING:
    from wasilet.providers.base import Provider

PROVIDERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "host": ("wasilet.providers.host", "HostProvider"),
        "kind": ("wasilet.providers.kind", "KindProvider"),
        "k3d": ("wasilet.providers.k3d", "K3dProvider"),
        "minikube": ("wasilet.providers.minikube", "MinikubeProvider"),
        "existing": ("wasilet.providers.existing", "ExistingProvider"),
    }
)
"""Name to module and class."""


def by_name(name: str) -> Provider:
    """The provider of that name. Raises UsageError."""
    try:
        module, attribute = PROVIDERS[name]
    except KeyError:
        raise UsageError(f"unknown provider {name!r}", hint=f"known are: {', '.join(PROVIDERS)}") from None
    return cast("Provider", getattr(importlib.import_module(module), attribute)())
