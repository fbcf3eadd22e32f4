"""Which kind of guest a wasm binary is."""

from __future__ import annotations

from wasilet_common.oci.layouts import LayoutError

from wasilet_node.runtime.protocol import GuestKind


def detect_kind(preamble: bytes) -> GuestKind:
    """Module or component, by the first 8 bytes of the binary. Raises LayoutError when it is neither."""
    if len(preamble) < 8 or preamble[:4] != b"\0asm":
        raise LayoutError("the image's module is not WebAssembly: it does not begin with \\0asm")
    version, layer = int.from_bytes(preamble[4:6], "little"), int.from_bytes(preamble[6:8], "little")
    if (version, layer) == (1, 0):
        return GuestKind.MODULE
    if (version, layer) == (0x0D, 1):
        return GuestKind.COMPONENT
    what = "component" if layer == 1 else "module"
    raise LayoutError(f"the image holds a WebAssembly {what} of version {version}, which this runtime does not know")
