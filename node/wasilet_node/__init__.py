"""Wasilet's node agent: a kubelet for WebAssembly, in Python on wasmtime."""

from wasilet_common import VERSION

__version__ = VERSION
