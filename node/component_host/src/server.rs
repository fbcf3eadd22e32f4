//! A component that exports a `wasi:http` handler is a server: it listens until it gets SIGTERM, then drains.
//!
//! One thread does everything. What can hold it up is bounded: guests give way at epochs, requests and connections have
//! time-outs, and their numbers have limits.

mod answer;
pub mod body;
mod connection;
mod exchange;
mod fresh;
mod listen;
mod request;
mod reused;

use crate::artifact;
use crate::counters::Counters;
use crate::engine;
use crate::epochs::Epochs;
use crate::ffi;
use crate::guest::{Guest, Maker};
use crate::report::{Outcome, Report};
use crate::spec::{self, Spec};
use crate::worlds;
pub use answer::log;
use request::Service;
use std::sync::Arc;
use std::time::Duration;
use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre};
use wasmtime_wasi_http::handler::ProxyPre;
use wasmtime_wasi_http::{p2, p3};

/// For name lookups of outgoing requests.
const MAX_BLOCKING_THREADS: usize = 8;
/// Requests that one instance answers where nothing is asked for, as `wasmtime serve` does. A 0.2 guest does not expect
/// to share its state between requests; a 0.3 guest does.
const REUSE_OF_P2: u32 = 1;
const REUSE_OF_P3: u32 = 128;
/// What a component of 0.3 exports, whichever its patch.
const P3_HANDLER: &str = "wasi:http/handler@0.3";

/// Its whole life.
pub fn run(spec: &Spec, settings: &spec::Server, counters: Counters, report: &Report) -> Result<Outcome, Outcome> {
    let (engine, component) = load(spec, settings)?;
    let linked = worlds::link(&component).map_err(|error| Outcome::start_error(worlds::why_not_linked(&error)))?;
    let pre = handler(linked).ok_or_else(|| not_a_server(&component))?;
    let maker = Maker::new(spec, &engine, true)?;
    let epochs = Epochs::start(&engine, Duration::from_millis(settings.epoch_ms)).map_err(Outcome::start_error)?;
    let listener =
        ffi::listener(settings.listener).map_err(|error| Outcome::start_error(format!("cannot listen: {error}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
        .map_err(Outcome::start_error)?;
    runtime.block_on(async {
        let service = Service::new(settings.clone(), counters, epochs, maker, pre);
        listen::until_drained(listener, Arc::new(service), report)
            .await
            .map_err(|error| Outcome::start_error(format!("cannot listen: {error}")))
    })?;
    runtime.shutdown_background();
    Ok(Outcome::Exit(0))
}

/// A component that makes an instance per request is loaded for a pool, unless it does not fit into one. Not so one of
/// 0.3: its instances may go on after their answers, so that their number has another bound than that of requests
/// (`reused.rs`), and a pool that is used up refuses what could wait.
fn load(spec: &Spec, settings: &spec::Server) -> Result<(Engine, Component), Outcome> {
    if settings.reuse.unwrap_or(REUSE_OF_P2) == 1
        && let Ok(engine) = engine::make(spec, true)
        && let Ok(component) = artifact::load(&engine, &spec.artifact)
        && !artifact::exports(&component).contains(P3_HANDLER)
    {
        return Ok((engine, component));
    }
    let engine = engine::make(spec, false).map_err(Outcome::start_error)?;
    let component = artifact::load(&engine, &spec.artifact)?;
    Ok((engine, component))
}

fn handler(linked: InstancePre<Guest>) -> Option<ProxyPre<Guest>> {
    if let Ok(pre) = p3::bindings::ServicePre::new(linked.clone()) {
        return Some(ProxyPre::P3(pre));
    }
    p2::bindings::ProxyPre::new(linked).ok().map(ProxyPre::P2)
}

fn not_a_server(component: &Component) -> Outcome {
    let exports = artifact::exports(component);
    let what = "no wasi:http/incoming-handler of WASI 0.2 and no wasi:http/handler of 0.3, so it is not a server";
    Outcome::start_error(format!("the component exports {what}; it exports {exports}"))
}
