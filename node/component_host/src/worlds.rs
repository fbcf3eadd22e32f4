//! What components may import. A further interface (keyvalue, blobstore, nn, ...) is added to [`linker`] and its state
//! to [`crate::guest::Guest`]; the node's list of what it offers is `HOST_OFFER` in `images/offer.py`.

use crate::guest::Guest;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime::{Engine, Result};

/// All interfaces that this host offers.
fn linker(engine: &Engine) -> Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi::p3::add_to_linker(&mut linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
    wasmtime_wasi_http::p3::add_to_linker(&mut linker)?;
    wasmtime_wasi_config::add_to_linker(&mut linker, Guest::config)?;
    Ok(linker)
}

/// The component with its imports filled in; an error names the import that no one offers.
pub fn link(component: &Component) -> Result<InstancePre<Guest>> {
    linker(component.engine())?.instantiate_pre(component)
}

/// What a person reads of an error of [`link`].
pub fn why_not_linked(error: &wasmtime::Error) -> String {
    format!("the component imports what this node does not offer: {error:#}")
}
