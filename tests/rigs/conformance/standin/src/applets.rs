//! The commands that the tests' scripts call, each no further than they need it.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::streams::{self, describe, Streams};

/// Run a command by its name; None: it is not known.
pub fn program(argv: &[String], streams: &Streams) -> Option<i32> {
    let name = argv[0].rsplit('/').next().unwrap_or("").trim_end_matches(".wasm");
    let words: Vec<&str> = argv[1..].iter().map(String::as_str).collect();
    let flags: String = words.iter().filter(|w| w.starts_with('-') && w.len() > 1).map(|w| &w[1..]).collect();
    let operands: Vec<&str> = words.iter().filter(|w| !w.starts_with('-') || w.len() == 1).copied().collect();
    let first = operands.first().copied().unwrap_or("");
    Some(match name {
        "true" => 0,
        "false" => 1,
        "echo" => echo(&words, streams),
        "printf" => printf(&words, streams),
        "cat" => cat(&operands, streams),
        "env" | "printenv" if operands.is_empty() => {
            let mut all: Vec<String> = env::vars().map(|(name, value)| format!("{}={}", name, value)).collect();
            all.sort();
            streams.say(&all.join("\n"))
        }
        "printenv" => env::var(first).map_or(1, |value| streams.say(&value)),
        "sleep" => sleep(first, streams),
        "test" => i32::from(!test(&words)),
        "[" => i32::from(!test(&words[..words.len().saturating_sub(1)])),
        "[[" => i32::from(!test(&words[..words.len().saturating_sub(1)])),
        "expr" => expr(&words, streams),
        "seq" => {
            let bound = |index: usize| operands.get(index).and_then(|word| word.parse::<i64>().ok()).unwrap_or(0);
            let range = if operands.len() > 1 { bound(0)..=bound(1) } else { 1..=bound(0) };
            range.for_each(|number| {
                streams.say(&number.to_string());
            });
            0
        }
        "ls" => each(if operands.is_empty() { &["."] } else { &operands }, |path| ls(path, streams)),
        "mkdir" => each(&operands, |path| {
            let made = if flags.contains('p') { fs::create_dir_all(path) } else { fs::create_dir(path) };
            streams.report(name, &format!("can't create directory '{}'", path), made)
        }),
        "touch" => each(&operands, |path| {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            streams.report(name, path, opened.map(|_| ()))
        }),
        "rm" => each(&operands, |path| {
            let removed = match fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() && flags.contains('r') => fs::remove_dir_all(path),
                _ => fs::remove_file(path),
            };
            match removed {
                Err(_) if flags.contains('f') => 0,
                result => streams.report(name, &format!("can't remove '{}'", path), result),
            }
        }),
        "mv" if operands.len() == 2 => mv(first, operands[1], streams),
        "cp" if operands.len() == 2 => streams.report(name, first, fs::copy(first, operands[1]).map(|_| ())),
        "ln" if operands.len() == 2 && flags.contains('s') => {
            #[allow(deprecated)]
            let made = fs::soft_link(first, operands[1]);
            streams.report(name, first, made)
        }
        "wc" => wc(&flags, first, streams),
        "grep" => grep(&flags, &operands, streams),
        "head" | "tail" if flags.contains('f') => streams::sleep_for_ever(),
        "head" | "tail" => ends(name == "tail", &words, streams),
        "awk" => awk(&operands, streams),
        "hexdump" => hexdump(first, streams),
        "dd" => dd(&operands, streams),
        "stat" => each(&operands, |path| streams.report(name, path, fs::metadata(path).map(|_| ()))),
        "hostname" => streams.say(&env::var("HOSTNAME").unwrap_or_default()),
        "pwd" => streams.say(&env::var("PWD").unwrap_or_else(|_| "/".to_string())),
        "date" => {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            streams.say(&seconds.to_string())
        }
        "sync" => 0,
        #[cfg(feature = "network")]
        _ => return crate::clients::program(name, &words, streams),
        #[cfg(not(feature = "network"))]
        _ => return None,
    })
}

fn each(paths: &[&str], mut action: impl FnMut(&str) -> i32) -> i32 {
    paths.iter().map(|path| action(path)).fold(0, i32::max)
}

fn echo(words: &[&str], streams: &Streams) -> i32 {
    let options = words.iter().take_while(|word| ["-n", "-e", "-ne", "-en"].contains(word)).count();
    let flags = words[..options].concat();
    let mut text = words[options..].join(" ");
    if flags.contains('e') {
        text = unescape(&text);
    }
    if !flags.contains('n') {
        text.push('\n');
    }
    i32::from(!streams.out.write(text.as_bytes()))
}

fn unescape(text: &str) -> String {
    text.replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")
}

fn printf(words: &[&str], streams: &Streams) -> i32 {
    let mut text = unescape(words.first().unwrap_or(&""));
    for word in words.iter().skip(1) {
        for directive in ["%s", "%d"] {
            if text.contains(directive) {
                text = text.replacen(directive, word, 1);
                break;
            }
        }
    }
    i32::from(!streams.out.write(text.as_bytes()))
}

fn contents(path: &str, streams: &Streams) -> io::Result<Vec<u8>> {
    if path.is_empty() || path == "-" || path == "/dev/stdin" {
        return Ok(streams.read());
    }
    fs::read(path)
}

fn mv(from: &str, to: &str, streams: &Streams) -> i32 {
    #[cfg(feature = "network")]
    if from.ends_with("/localhost.crt") && fs::metadata(from).is_err() {
        return match crate::servers::move_kept(from, to) {
            Ok(()) => 0,
            Err(why) => {
                streams.complain(&format!("mv: can't rename '{}': {}", from, why));
                1
            }
        };
    }
    streams.report("mv", from, fs::rename(from, to))
}

fn cat(paths: &[&str], streams: &Streams) -> i32 {
    if paths.is_empty() && streams.input.is_none() {
        return i32::from(io::copy(&mut io::stdin(), &mut Writer(streams)).is_err());
    }
    each(if paths.is_empty() { &["-"] } else { paths }, |path| match contents(path, streams) {
        Ok(data) => i32::from(!streams.out.write(&data)),
        Err(error) => {
            streams.complain(&format!("cat: can't open '{}': {}", path, describe(&error)));
            1
        }
    })
}

struct Writer<'a>(&'a Streams);

impl Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.out.write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn sleep(word: &str, streams: &Streams) -> i32 {
    let (number, unit) = match word.char_indices().last() {
        Some((at, 's')) => (&word[..at], 1.0),
        Some((at, 'm')) => (&word[..at], 60.0),
        Some((at, 'h')) => (&word[..at], 3600.0),
        Some((at, 'd')) => (&word[..at], 86400.0),
        _ => (word, 1.0),
    };
    match number.parse::<f64>() {
        Ok(seconds) => {
            thread::sleep(Duration::from_secs_f64(seconds * unit));
            0
        }
        Err(_) if word.starts_with("inf") => streams::sleep_for_ever(),
        Err(_) => {
            streams.complain(&format!("sleep: invalid number '{}'", word));
            1
        }
    }
}

/// `test`, with `!`, `-a`, `-o`, `&&`, `||` between primaries. Of a file's permissions a module learns by using it.
fn test(words: &[&str]) -> bool {
    for (symbols, any) in [(["-o", "||"], true), (["-a", "&&"], false)] {
        if let Some(at) = words.iter().position(|word| symbols.contains(word)) {
            let (left, right) = (test(&words[..at]), test(&words[at + 1..]));
            return if any { left || right } else { left && right };
        }
    }
    let number = |word: &str| word.trim().parse::<i64>().unwrap_or(0);
    match words {
        [] => false,
        ["!", rest @ ..] => !test(rest),
        [word] => !word.is_empty(),
        ["-n", word] => !word.is_empty(),
        ["-z", word] => word.is_empty(),
        ["-e", path] => fs::metadata(path).is_ok(),
        ["-f", path] => fs::metadata(path).map_or(false, |found| found.is_file()),
        ["-d", path] => fs::metadata(path).map_or(false, |found| found.is_dir()),
        ["-s", path] => fs::metadata(path).map_or(false, |found| found.len() > 0),
        ["-L", path] | ["-h", path] => fs::symlink_metadata(path).map_or(false, |found| found.file_type().is_symlink()),
        ["-r", path] => fs::File::open(path).is_ok(),
        ["-w", path] => OpenOptions::new().append(true).open(path).is_ok(),
        [left, "=", right] | [left, "==", right] => left == right,
        [left, "!=", right] => left != right,
        [left, "-eq", right] => number(left) == number(right),
        [left, "-ne", right] => number(left) != number(right),
        [left, "-lt", right] => number(left) < number(right),
        [left, "-le", right] => number(left) <= number(right),
        [left, "-gt", right] => number(left) > number(right),
        [left, "-ge", right] => number(left) >= number(right),
        _ => false,
    }
}

fn expr(words: &[&str], streams: &Streams) -> i32 {
    let number = |word: &str| word.parse::<i64>().unwrap_or(0);
    let result = match words {
        [left, "+", right] => number(left) + number(right),
        [left, "-", right] => number(left) - number(right),
        [left, "*", right] => number(left) * number(right),
        [left, "/", right] if number(right) != 0 => number(left) / number(right),
        [left, "%", right] if number(right) != 0 => number(left) % number(right),
        _ => {
            streams.complain("expr: syntax error");
            return 2;
        }
    };
    streams.say(&result.to_string());
    i32::from(result == 0)
}

fn ls(path: &str, streams: &Streams) -> i32 {
    let listed = fs::metadata(path).and_then(|found| if found.is_dir() { fs::read_dir(path).map(Some) } else { Ok(None) });
    match listed {
        Ok(None) => streams.say(path),
        Ok(Some(entries)) => {
            let mut names: Vec<String> =
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.retain(|name| !name.starts_with('.'));
            names.sort();
            names.iter().map(|name| streams.say(name)).fold(0, i32::max)
        }
        Err(error) => {
            streams.complain(&format!("ls: {}: {}", path, describe(&error)));
            1
        }
    }
}

fn wc(flags: &str, path: &str, streams: &Streams) -> i32 {
    match contents(path, streams) {
        Ok(data) => {
            let lines = data.iter().filter(|byte| **byte == b'\n').count();
            let count = if flags.contains('c') { data.len() } else { lines };
            streams.say(format!("{} {}", count, path).trim_end())
        }
        Err(error) => streams.report("wc", path, Err(error)),
    }
}

/// Of regular expressions only `^` at the beginning and `$` at the end.
fn grep(flags: &str, operands: &[&str], streams: &Streams) -> i32 {
    let pattern = operands.first().copied().unwrap_or("");
    let text = match contents(operands.get(1).copied().unwrap_or(""), streams) {
        Ok(data) => String::from_utf8_lossy(&data).into_owned(),
        Err(error) => {
            streams.report("grep", operands[1], Err(error));
            return 2;
        }
    };
    let middle = pattern.trim_start_matches('^').trim_end_matches('$');
    let holds = |line: &str| match (pattern.starts_with('^'), pattern.ends_with('$')) {
        (true, true) => line == middle,
        (true, false) => line.starts_with(middle),
        (false, true) => line.ends_with(middle),
        (false, false) => line.contains(middle),
    };
    let found: Vec<&str> = text.lines().filter(|line| holds(line) != flags.contains('v')).collect();
    if flags.contains('c') {
        streams.say(&found.len().to_string());
    } else if !flags.contains('q') {
        found.iter().for_each(|line| {
            streams.say(line);
        });
    }
    i32::from(found.is_empty())
}

fn ends(last: bool, words: &[&str], streams: &Streams) -> i32 {
    let mut count = 10;
    let mut path = "";
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "-n" => count = words.next().and_then(|word| word.parse().ok()).unwrap_or(count),
            word if word.starts_with('-') => {
                count = word.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(count)
            }
            word => path = word,
        }
    }
    match contents(path, streams) {
        Ok(data) => {
            let text = String::from_utf8_lossy(&data).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let count = lines.len().min(count);
            let chosen = if last { &lines[lines.len() - count..] } else { &lines[..count] };
            chosen.iter().map(|line| streams.say(line)).fold(0, i32::max)
        }
        Err(error) => streams.report("tail", path, Err(error)),
    }
}

/// `awk '{print $NUMBER}' [FILE]`.
fn awk(operands: &[&str], streams: &Streams) -> i32 {
    let program: String = operands.first().unwrap_or(&"").chars().filter(|c| !c.is_whitespace()).collect();
    let number = program.strip_prefix("{print$").and_then(|rest| rest.strip_suffix('}'));
    let column: usize = match number.map(str::parse) {
        Some(Ok(column)) if column > 0 => column,
        _ => {
            streams.complain(&format!("awk: {} is not known here", program));
            return 2;
        }
    };
    match contents(operands.get(1).copied().unwrap_or(""), streams) {
        Ok(data) => {
            for line in String::from_utf8_lossy(&data).lines() {
                streams.say(line.split_whitespace().nth(column - 1).unwrap_or(""));
            }
            0
        }
        Err(error) => streams.report("awk", operands[1], Err(error)),
    }
}

fn hexdump(path: &str, streams: &Streams) -> i32 {
    let data = match contents(path, streams) {
        Ok(data) => data,
        Err(error) => return streams.report("hexdump", path, Err(error)),
    };
    for (index, row) in data.chunks(16).enumerate() {
        let mut hex = String::new();
        for (at, byte) in row.iter().enumerate() {
            hex.push_str(&format!("{:02x} ", byte));
            if at == 7 {
                hex.push(' ');
            }
        }
        let printable = |byte: &u8| if (32..127).contains(byte) { *byte as char } else { '.' };
        let text: String = row.iter().map(printable).collect();
        streams.say(&format!("{:08x}  {:<49} |{}|", index * 16, hex, text));
    }
    streams.say(&format!("{:08x}", data.len()))
}

/// `dd if=/dev/zero of=FILE bs=SIZE count=NUMBER`.
fn dd(operands: &[&str], streams: &Streams) -> i32 {
    let value = |name: &str| operands.iter().find_map(|word| word.strip_prefix(name)).unwrap_or("");
    let size = |text: &str| match text.strip_suffix('M') {
        Some(number) => number.parse::<usize>().unwrap_or(0) << 20,
        None => match text.strip_suffix('K') {
            Some(number) => number.parse::<usize>().unwrap_or(0) << 10,
            None => text.parse().unwrap_or(512),
        },
    };
    let written = fs::File::create(value("of=")).and_then(|mut file| {
        let block = vec![0; size(value("bs="))];
        (0..value("count=").parse().unwrap_or(1)).try_for_each(|_| file.write_all(&block))
    });
    streams.report("dd", value("of="), written)
}
