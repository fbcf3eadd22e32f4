"""kubectl: no step of ``up`` needs it, so it is brought behind the first node, or here, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wasilet.controlplane.acquire import acquire
from wasilet.controlplane.versions import minor_of, versions
from wasilet.settings import Settings
from wasilet.state import State


def ensure_kubectl(settings: Settings, *, say: Callable[[str], None]) -> Path:
    """One of the cluster's minor version; of the newest where that is none of those that are brought. Raises
    AcquireError."""
    version = State.of(settings).cluster.kubernetes
    found = acquire(
        ["kubectl"],
        cache=settings.cache,
        environ=settings.environ,
        progress=say,
        mirror=settings.mirror,
        allow_download=settings.download,
        kubernetes=version if minor_of(version) in versions().kubernetes else "",
    )
    return found["kubectl"].path
