"""The pytest plugin: fixtures and assertions for wasm apps on a cluster."""
