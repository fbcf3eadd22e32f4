//! What a shell is to tests of container runtimes: does what its arguments say, one statement after another.
//!
//! Each argument is a script of statements, separated by `;`, each a command and its words. `argv[0]` is not looked at.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

fn say(text: &str) {
    println!("{}", text);
    let _ = io::stdout().flush();
}

/// What went wrong with a file, in the words of the standard library.
fn check<T>(result: io::Result<T>, what: &str) -> T {
    result.unwrap_or_else(|error| {
        eprintln!("{}: {}", what, error);
        process::exit(1)
    })
}

fn number(text: &str) -> f64 {
    text.parse().unwrap_or_else(|_| {
        eprintln!("not a number: {}", text);
        process::exit(2)
    })
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs_f64(number(text))
}

/// Fills memory with what no page can share, 1 MiB after another.
fn hog(mebibytes: usize) {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for count in 1..=mebibytes {
        let mut block = vec![0u8; 1 << 20];
        for page in block.chunks_mut(4096) {
            page[0] = count as u8 | 1;
        }
        held.push(block);
    }
    say(&format!("holding {} MiB", held.iter().filter(|block| block[0] != 0).count()));
}

fn flood(bytes: u64) {
    let line = [vec![b'x'; 99], vec![b'\n']].concat();
    let mut block = Vec::new();
    for _ in 0..600 {
        block.extend_from_slice(&line);
    }
    let mut left = bytes;
    let mut out = io::stdout().lock();
    while left > 0 {
        let part = left.min(block.len() as u64);
        if out.write_all(&block[..part as usize]).is_err() {
            return;
        }
        left -= part;
    }
    let _ = out.flush();
}

/// Deeper than any stack; the heap keeps the compiler from making a loop of it.
fn recurse(depth: u64) -> String {
    let deeper = if depth == u64::MAX { String::new() } else { recurse(depth + 1) };
    format!("{}{}", deeper.len(), depth)
}

/// Says what a file holds each time it changes, until the time is over.
fn follow(path: &str, limit: Duration) {
    let started = Instant::now();
    let mut before = String::new();
    while started.elapsed() < limit {
        let now = fs::read_to_string(path).unwrap_or_else(|_| "(missing)".to_string());
        if now != before {
            say(&format!("{}={}", path, now.trim_end()));
            before = now;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn statement(text: &str) {
    let (command, rest) = match text.split_once(' ') {
        Some((command, rest)) => (command, rest.trim_start()),
        None => (text, ""),
    };
    let (first, second) = match rest.split_once(' ') {
        Some((first, second)) => (first, second),
        None => (rest, ""),
    };
    match command {
        "" => {}
        "say" => say(rest),
        "err" => eprintln!("{}", rest),
        "exit" => process::exit(number(first) as i32),
        "sleep" => thread::sleep(seconds(first)),
        "forever" => loop {
            thread::sleep(Duration::from_secs(3600))
        },
        "spin" => {
            let started = Instant::now();
            while started.elapsed() < seconds(first) {}
        }
        #[cfg(target_arch = "wasm32")]
        "trap" => core::arch::wasm32::unreachable(),
        "panic" => panic!("{}", rest),
        "recurse" => say(&recurse(0)),
        "hog" => hog(number(first) as usize),
        "cat" => say(check(fs::read_to_string(first), first).trim_end_matches('\n')),
        // At once and whole: others wait for the file.
        "write" => {
            let beside = format!("{}.new", first);
            match fs::write(&beside, second).and_then(|_| fs::rename(&beside, first)) {
                Ok(()) => {}
                Err(_) => check(fs::write(first, second), first),
            }
        }
        "append" => {
            let opened = fs::OpenOptions::new().append(true).create(true).open(first);
            check(check(opened, first).write_all(second.as_bytes()), first);
        }
        "mkdir" => check(fs::create_dir_all(first), first),
        "rm" => check(fs::remove_file(first), first),
        "link" => check(
            #[allow(deprecated)]
            fs::soft_link(first, second),
            second,
        ),
        "ls" => {
            let mut names: Vec<String> = check(fs::read_dir(first), first)
                .map(|entry| check(entry, first).file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            say(&format!("{}: {}", first, names.join(" ")));
        }
        "size" => say(&format!("{} bytes", check(fs::metadata(first), first).len())),
        "exists" => {
            check(fs::metadata(first), first);
        }
        "missing" => {
            if fs::metadata(first).is_ok() {
                eprintln!("{} exists", first);
                process::exit(1)
            }
        }
        // The first runs fail, as many as the second word says; what counts them must outlive the container.
        "fail" => {
            let before = fs::read_to_string(first).map_or(0, |text| text.len());
            if before < number(second) as usize {
                check(fs::write(first, "x".repeat(before + 1)), first);
                eprintln!("failing, run {}", before + 1);
                process::exit(1)
            }
        }
        "await" => {
            while fs::metadata(first).is_err() {
                thread::sleep(Duration::from_millis(20));
            }
        }
        "follow" => follow(first, seconds(if second.is_empty() { "3600" } else { second })),
        "tick" => {
            let mut count = 0;
            loop {
                say(&format!("tick {}", count));
                count += 1;
                thread::sleep(seconds(first));
            }
        }
        "env" if first.is_empty() => {
            let mut all: Vec<String> = env::vars().map(|(name, value)| format!("{}={}", name, value)).collect();
            all.sort();
            say(&all.join("\n"));
        }
        "env" => match env::var(first) {
            Ok(value) => say(&format!("{}={}", first, value)),
            Err(_) => say(&format!("{} is not set", first)),
        },
        "args" => {
            for (index, word) in env::args().enumerate() {
                say(&format!("argv[{}]={}", index, word));
            }
        }
        "flood" => flood(number(first) as u64),
        "line" => say(&"l".repeat(number(first) as usize)),
        "bytes" => {
            let all: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').chain([b'\n']).collect();
            check(io::stdout().write_all(&all), "stdout");
            check(io::stdout().flush(), "stdout");
        }
        "partial" => {
            print!("{}", rest);
            check(io::stdout().flush(), "stdout");
        }
        "input" => {
            let mut text = String::new();
            check(io::stdin().read_to_string(&mut text), "stdin");
            say(&format!("read {} bytes", text.len()));
        }
        other => {
            eprintln!("unknown command: {}", other);
            process::exit(127)
        }
    }
}

fn main() {
    for script in env::args().skip(1) {
        for text in script.split(';') {
            statement(text.trim());
        }
    }
}
