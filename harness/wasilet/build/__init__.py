"""From source to a wasm module: Rust, C, AssemblyScript, and the tools that each needs."""
