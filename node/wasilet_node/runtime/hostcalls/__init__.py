"""Host calls offered to guests beside WASI."""
