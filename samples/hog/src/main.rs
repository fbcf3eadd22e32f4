//! Takes as much as it gets of one thing: `hog memory` or `hog cpu`.
//!
//! `memory`: 1 MiB after another, each written to, until it has `MEBIBYTES` (default 256) or is stopped; says so every
//! 8 MiB. `cpu`: counts for `SECONDS` (default 5) and says each second how far it came.

use std::io::{self, Write};
use std::time::{Duration, Instant};
use std::{env, process, thread};

const MEBIBYTE: usize = 1024 * 1024;

fn number(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Err(_) => default,
        Ok(text) => text.parse().unwrap_or_else(|_| {
            eprintln!("{} must be a number", name);
            process::exit(2)
        }),
    }
}

fn say(line: String) {
    println!("{}", line);
    let _ = io::stdout().flush();
}

fn memory() {
    let wanted = number("MEBIBYTES", 256) as usize;
    let mut held: Vec<Vec<u8>> = Vec::new();
    while held.len() < wanted {
        // Memory that is only promised costs nothing: every page must be written to.
        let mut block = vec![0u8; MEBIBYTE];
        for page in block.chunks_mut(4096) {
            page[0] = held.len() as u8 | 1;
        }
        held.push(block);
        if held.len() % 8 == 0 {
            say(format!("holding {} MiB", held.len()));
            // Not so fast that no one can watch, and no limit can be seen to act.
            thread::sleep(Duration::from_millis(20));
        }
    }
    say(format!("got all of {} MiB", held.iter().filter(|block| block[0] != 0).count()));
}

fn cpu() {
    let seconds = number("SECONDS", 5);
    let start = Instant::now();
    let mut rounds: u64 = 0;
    let mut value: u64 = 0x9e37_79b9_7f4a_7c15;
    for second in 1..=seconds {
        while start.elapsed() < Duration::from_secs(second) {
            for _ in 0..100_000 {
                value ^= value << 13;
                value ^= value >> 7;
                value ^= value << 17;
            }
            rounds += 1;
        }
        say(format!("second {}: {} rounds", second, rounds));
    }
    say(format!("done after {} s ({:x})", seconds, value));
}

fn main() {
    match env::args().nth(1).as_deref() {
        Some("memory") => memory(),
        Some("cpu") => cpu(),
        _ => {
            eprintln!("usage: hog memory|cpu");
            process::exit(2);
        }
    }
}
