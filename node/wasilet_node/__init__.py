"""Wasilet's node agent: a kubelet for WebAssembly, in Python on wasmtime."""

__version__ = "0.1.0"
