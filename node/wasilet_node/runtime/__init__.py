"""The runtime: a supervisor process that forks one sandboxed wasm process per container, and its client."""
