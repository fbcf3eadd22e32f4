//! What stands in for the Linux images of Kubernetes' end-to-end tests, as far as wasm can.
//!
//! `argv[0]` says who it is, as in busybox: a shell, one of its commands, or agnhost with a subcommand. Built twice: as a
//! module, which cannot listen, and with the feature `network` as a component, which really serves and connects. What
//! it cannot do it says; nothing here pretends.

mod agnhost;
mod applets;
#[cfg(feature = "network")]
mod clients;
mod expand;
#[cfg(feature = "network")]
mod grpc;
#[cfg(feature = "network")]
mod http;
#[cfg(feature = "network")]
mod net;
mod parse;
#[cfg(feature = "network")]
mod serve;
#[cfg(feature = "network")]
mod servers;
mod shell;
mod streams;

use std::env;

use streams::Streams;

const SERVERS: [&str; 6] = ["httpd", "nginx", "kitten", "nautilus", "perl", "resource-consumer"];

fn main() {
    let argv: Vec<String> = env::args().collect();
    let path = argv.first().map_or("", String::as_str);
    let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".wasm").to_string();
    let streams = Streams::real();
    let code = match name.as_str() {
        "sh" | "ash" | "bash" => shell::main(&argv[1..], &streams),
        "busybox" if argv.len() > 1 => applets::program(&argv[1..], &streams).unwrap_or_else(|| unknown(&argv[1])),
        "busybox" => shell::main(&[], &streams),
        "pause" => streams::sleep_for_ever(),
        _ if name.starts_with("agnhost") => agnhost::main(&argv, &streams),
        _ if SERVERS.contains(&name.as_str()) => {
            #[cfg(feature = "network")]
            if let Some(code) = servers::run(&name, &argv[1..], &streams) {
                streams::leave(code);
            }
            streams.complain(&format!("{} is not among what the stand-in serves: it only runs", name));
            streams::sleep_for_ever()
        }
        _ => applets::program(&argv, &streams).unwrap_or_else(|| unknown(path)),
    };
    streams::leave(code)
}

fn unknown(name: &str) -> i32 {
    eprintln!("{}: not found among the stand-ins", name);
    127
}
