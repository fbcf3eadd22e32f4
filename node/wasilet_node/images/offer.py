"""What this node offers to components: what wasmtime's Python bindings do, and with the component host more.

Asked at each pull, since the host may have been built a moment ago; the Node's labels say the same for schedulers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from wasilet_common.components import HANDLERS, Interfaces

from wasilet_node.images.preflight import COMMAND_OFFER, refusal
from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError

HOST_OFFER: Final = COMMAND_OFFER | {
    *("wasi:cli@0.3", "wasi:clocks@0.3", "wasi:filesystem@0.3", "wasi:random@0.3", "wasi:sockets@0.3"),
    *("wasi:http@0.2", "wasi:http@0.3", "wasi:config@0.2.0-rc.1"),
}
"""What the crate's ``worlds.rs`` links; a further interface goes there and here."""


def world_labels(*, find: Callable[[], object] = locate.find) -> dict[str, str]:
    """The worlds that run here, each with ``true`` or ``false``: for a ``nodeSelector`` where nodes differ."""
    try:
        find()
        with_host = "true"
    except HostUnavailableError:
        with_host = "false"
    return {
        **dict.fromkeys(("wasilet.dev/wasi-cli-0.1", "wasilet.dev/wasi-cli-0.2"), "true"),
        **dict.fromkeys(
            ("wasilet.dev/wasi-cli-0.3", "wasilet.dev/wasi-http-0.2", "wasilet.dev/wasi-http-0.3"), with_host
        ),
    }


def offered(interfaces: Interfaces, *, find: Callable[[], object] = locate.find) -> str:
    """Why a component cannot run here, with what to do; empty: nothing is against it."""
    without = refusal(interfaces)
    newer = any(name.startswith(("wasi:cli/run@0.3.", *HANDLERS)) for name in interfaces.exports)
    if not without and not newer:
        return ""
    with_host = refusal(interfaces, HOST_OFFER)
    if with_host:
        return with_host
    try:
        find()
    except HostUnavailableError as error:
        return str(error)
    return ""
