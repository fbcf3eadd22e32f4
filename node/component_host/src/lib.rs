//! Runs one WebAssembly component inside a sandbox process that Wasilet's supervisor has forked and confined.
//!
//! Python enters through [`ffi`], the only module with `unsafe` code, with one JSON text ([`spec`]). What happens then
//! is a command's life ([`command`]) or a server's ([`server`]); both end with a line on the report pipe ([`report`]).
//! `README.md` beside this crate is the guide for maintainers.

mod artifact;
mod command;
mod counters;
mod engine;
mod epochs;
mod ffi;
mod guest;
mod outgoing;
mod policy;
mod report;
mod server;
mod spec;
mod worlds;

use crate::counters::Counters;
use crate::report::{Outcome, Report};
use crate::spec::{Role, Spec};

/// What `wasilet_component_host_abi` answers: changes with the C functions and with the meaning of the JSON text.
pub const ABI_VERSION: u32 = 1;

/// Run what a JSON text describes, to its end. Returns the exit code of the process; the reason is in the report.
pub fn run(text: &[u8]) -> i32 {
    let spec = match Spec::parse(text) {
        Ok(spec) => spec,
        // Without a spec there is no report pipe: Python reads the code and says that the two do not fit.
        Err(error) => {
            eprintln!("component host: the configuration cannot be read: {error}");
            return report::START_ERROR_EXIT_CODE;
        }
    };
    let report = Report::new(spec.report);
    let outcome = match &spec.role {
        Role::Command => command::run(&spec, &report),
        Role::Server(settings) => Counters::open(settings.counters)
            .map_err(Outcome::start_error)
            .and_then(|counters| server::run(&spec, settings, counters, &report)),
    };
    report.end(outcome.unwrap_or_else(|failed| failed))
}
