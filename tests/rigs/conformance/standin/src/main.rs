//! One module that stands in for the Linux images of Kubernetes' end-to-end tests, as far as a wasm module can.
//!
//! `argv[0]` says who it is, as in busybox: a shell, one of its commands, or agnhost with a subcommand. Whoever would
//! listen on a port runs and says that it cannot: nothing here pretends to be a server.

mod agnhost;
mod applets;
mod expand;
mod parse;
mod shell;
mod streams;

use std::env;
use std::process;

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
            streams.complain(&format!("{} would listen on a port, which a module cannot: it only runs", name));
            streams::sleep_for_ever()
        }
        _ => applets::program(&argv, &streams).unwrap_or_else(|| unknown(path)),
    };
    process::exit(code)
}

fn unknown(name: &str) -> i32 {
    eprintln!("{}: not found among the stand-ins", name);
    127
}
