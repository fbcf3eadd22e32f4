//! Loading the precompiled file.

use crate::ffi;
use crate::report::Outcome;
use std::path::Path;
use wasmtime::Engine;
use wasmtime::component::Component;

/// The component; an error asks for the file to be compiled again.
pub fn load(engine: &Engine, path: &Path) -> Result<Component, Outcome> {
    ffi::load(engine, path).map_err(|error| Outcome::Error {
        text: format!("cannot load the compiled component: {error:#}"),
        artifact: true,
    })
}

/// The names of what it exports, for messages.
pub fn exports(component: &Component) -> String {
    let kind = component.component_type();
    let names: Vec<&str> = kind.exports(component.engine()).map(|(name, _)| name).collect();
    if names.is_empty() {
        return "nothing".into();
    }
    names.join(", ")
}
