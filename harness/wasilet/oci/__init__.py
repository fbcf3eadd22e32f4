"""From a wasm module to a registry and back."""
