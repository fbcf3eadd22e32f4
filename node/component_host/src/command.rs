//! `wasi:cli/run` of WASI 0.2 and 0.3: once, to its end.

use crate::artifact;
use crate::engine;
use crate::guest::{Guest, Maker};
use crate::report::{Outcome, Report};
use crate::spec::Spec;
use crate::worlds;
use wasmtime::Store;
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, InstancePre, Type};
use wasmtime_wasi::{I32Exit, p2, p3};

/// Threads for name lookups, the only work of a guest that may not hold the process up.
const MAX_BLOCKING_THREADS: usize = 4;

enum Pre {
    P2(p2::bindings::CommandPre<Guest>),
    P3(p3::bindings::CommandPre<Guest>),
}

/// Its whole life.
pub fn run(spec: &Spec, report: &Report) -> Result<Outcome, Outcome> {
    let engine = engine::make(spec, false).map_err(Outcome::start_error)?;
    let component = artifact::load(&engine, &spec.artifact)?;
    let linked = worlds::link(&component).map_err(|error| Outcome::start_error(worlds::why_not_linked(&error)))?;
    let pre = command(linked)
        .filter(|_| has_wasis_type(&component))
        .ok_or_else(|| Outcome::start_error(why_no_command(&component)))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
        .map_err(Outcome::start_error)?;
    let maker = Maker::new(spec, &engine, false)?;
    let ended = runtime.block_on(async {
        let store = maker.store().map_err(Outcome::start_error)?;
        report.started();
        Ok(call(store, pre).await)
    })?;
    // A thread that still looks a name up must not hold the end up.
    runtime.shutdown_background();
    Ok(outcome(ended))
}

/// `func() -> result`, which wasmtime checks only when it makes an instance.
fn has_wasis_type(component: &Component) -> bool {
    let kind = component.component_type();
    let engine = component.engine();
    let run = kind.exports(engine).find_map(|(name, export)| match export.ty {
        ComponentItem::ComponentInstance(interface) if name.starts_with("wasi:cli/run@0.2.") => {
            interface.get_export(engine, "run").map(|run| run.ty)
        }
        _ => None,
    });
    match run {
        Some(ComponentItem::ComponentFunc(run)) => {
            let results: Vec<Type> = run.results().collect();
            run.params().len() == 0 && matches!(results[..], [Type::Result(_)])
        }
        Some(_) => false,
        // That of 0.3 is wasmtime's to check.
        None => true,
    }
}

fn command(linked: InstancePre<Guest>) -> Option<Pre> {
    if let Ok(pre) = p3::bindings::CommandPre::new(linked.clone()) {
        return Some(Pre::P3(pre));
    }
    p2::bindings::CommandPre::new(linked).ok().map(Pre::P2)
}

fn why_no_command(component: &Component) -> String {
    let exports = artifact::exports(component);
    if let Some(name) = exports.split(", ").find(|name| name.starts_with("wasi:cli/run@0.2.")) {
        return format!("the function run of the component's {name} is not of WASI's type: func() -> result");
    }
    let what = "no wasi:cli/run of WASI 0.2 or 0.3, so it is not a command";
    format!("the component exports {what}; it exports {exports}")
}

async fn call(mut store: Store<Guest>, pre: Pre) -> wasmtime::Result<Result<(), ()>> {
    match pre {
        Pre::P2(pre) => {
            let guest = pre.instantiate_async(&mut store).await?;
            guest.wasi_cli_run().call_run(&mut store).await
        }
        Pre::P3(pre) => {
            let guest = pre.instantiate_async(&mut store).await?;
            store
                .run_concurrent(async |access| guest.wasi_cli_run().call_run(access).await)
                .await?
        }
    }
}

fn outcome(ended: wasmtime::Result<Result<(), ()>>) -> Outcome {
    match ended {
        Ok(Ok(())) => Outcome::Exit(0),
        Ok(Err(())) => Outcome::Exit(1),
        Err(error) => match error.downcast_ref::<I32Exit>() {
            Some(exit) => Outcome::Exit(exit.0),
            None => Outcome::Trap(format!("{error:?}")),
        },
    }
}
