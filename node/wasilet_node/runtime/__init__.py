"""The runtime: a supervisor process that forks one sandboxed wasm process a container, and its client."""
