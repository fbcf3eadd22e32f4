//! Not built: the crate that is named in Cargo.toml carries the adapter as a file.
