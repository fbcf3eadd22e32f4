"""The component host, fetched when something of the harness first needs it: found, or built once into the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet_common.components import ComponentError, read_interfaces
from wasilet_node.runtime.component_host import build, locate
from wasilet_node.runtime.component_host.library import HostUnavailableError

from wasilet.errors import HarnessError

Say = Callable[[str], None]


def found_component_host(environ: Mapping[str, str]) -> Path | None:
    """Where it is; None: it must be built."""
    try:
        return locate.find(environ)
    except HostUnavailableError:
        return None


def ensure_component_host(say: Say, environ: Mapping[str, str]) -> Path:
    """Where it is, built now if it must be. Raises HarnessError that names what is missing."""
    try:
        return build.ensure(say=say, env=environ)
    except HostUnavailableError as error:
        raise HarnessError(str(error), hint=f"see `invoke doctor`; type: {locate.COMMAND}") from error


def bring_component_host(module: Path, environ: Mapping[str, str], *, say: Say) -> None:
    """Have it where ``module`` is a component that answers HTTP requests. Raises HarnessError."""
    try:
        with module.open("rb") as file:
            needed = read_interfaces(file).is_server
    except (ComponentError, OSError):
        return  # it is run, and what is wrong with it is reported then
    if needed and found_component_host(environ) is None:
        ensure_component_host(say, environ)
