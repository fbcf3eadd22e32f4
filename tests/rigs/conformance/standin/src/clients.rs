//! The commands that scripts of the tests reach the network with; each makes the connection that it speaks of.

use std::fs;
use std::time::{Duration, Instant};

use crate::http::{self, Ask};
use crate::net::{self, Failure, Stream};
use crate::servers::{ask_udp, duration};
use crate::streams::Streams;

const WHOLE: Duration = Duration::from_secs(60);

pub fn program(name: &str, words: &[&str], streams: &Streams) -> Option<i32> {
    Some(match name {
        "curl" => curl(words, streams),
        "wget" => wget(words, streams),
        "nc" => nc(words, streams),
        "nslookup" => nslookup(words, streams),
        "getent" => getent(words, streams),
        _ => return None,
    })
}

struct Url<'a> {
    host: &'a str,
    port: u16,
    target: String,
}

fn url(text: &str) -> Result<Url<'_>, String> {
    let rest = match text.split_once("://") {
        Some(("http", rest)) => rest,
        None => text,
        Some((scheme, _)) => return Err(format!("the stand-in speaks no {}", scheme)),
    };
    let at = rest.find(|c| c == '/' || c == '?').unwrap_or(rest.len());
    let (host, port) = match rest[..at].rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| format!("{} is no port", port))?),
        None => (&rest[..at], 80),
    };
    let target = if rest[at..].starts_with('/') { rest[at..].to_string() } else { format!("/{}", &rest[at..]) };
    Ok(Url { host, port, target })
}

/// curl's own exit codes, where a component can tell them.
fn code(why: &Failure) -> i32 {
    match why {
        Failure::Dns(_) => 6,
        Failure::Refused => 7,
        Failure::Timeout => 28,
        Failure::Other(_) => 56,
    }
}

fn curl(words: &[&str], streams: &Streams) -> i32 {
    let (mut place, mut output, mut told, mut method, mut body) = (None, None, None, None, None);
    let (mut head, mut fails, mut from, mut connect, mut whole) = (false, false, None, None, WHOLE);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().copied().unwrap_or("");
        match *word {
            "-o" | "--output" => output = Some(value()),
            "-w" | "--write-out" => told = Some(value()),
            "-X" | "--request" => method = Some(value()),
            "-d" | "--data" => body = Some(value()),
            "--interface" => from = net::parse_ip(value()),
            "--connect-timeout" => connect = duration(value()),
            "-m" | "--max-time" => whole = duration(value()).unwrap_or(WHOLE),
            "--head" => method = Some("HEAD"),
            "--include" => head = true,
            "--fail" => fails = true,
            "-H" | "-A" | "--header" | "--retry" | "--retry-delay" => {
                value();
            }
            flags if flags.starts_with('-') => {
                head |= !flags.starts_with("--") && flags.contains('i');
                fails |= !flags.starts_with("--") && flags.contains('f');
            }
            text => place = Some(text),
        }
    }
    let asked = match url(place.unwrap_or("")) {
        Ok(asked) => asked,
        Err(problem) => {
            streams.complain(&format!("curl: (1) {}", problem));
            return 1;
        }
    };
    let method = method.unwrap_or(if body.is_some() { "POST" } else { "GET" });
    let (host, port, target) = (asked.host, asked.port, asked.target.as_str());
    let answer = match http::ask(&Ask { host, port, target, method, body, from, connect, whole }) {
        Ok(answer) => answer,
        Err(why) => {
            if let Some(text) = told {
                streams.out.write(text.replace("%{http_code}", "000").as_bytes());
            }
            streams.complain(&format!("curl: ({}) {} port {}: {}", code(&why), host, port, why));
            return code(&why);
        }
    };
    let mut data = if head || method == "HEAD" { format!("{}\r\n\r\n", answer.head).into_bytes() } else { Vec::new() };
    data.extend(&answer.body);
    let failed = fails && answer.status >= 400;
    match output {
        _ if failed => streams.complain(&format!("curl: (22) The requested URL returned error: {}", answer.status)),
        Some("/dev/null") => {}
        Some(path) => {
            if streams.report("curl", path, fs::write(path, &data)) != 0 {
                return 23;
            }
        }
        None => {
            streams.out.write(&data);
        }
    }
    if let Some(text) = told {
        streams.out.write(text.replace("%{http_code}", &answer.status.to_string()).as_bytes());
    }
    if failed { 22 } else { 0 }
}

/// `wget [-q] [-O FILE] [-T SECONDS] [--post-data=TEXT] URL`; `-O -` is stdout.
fn wget(words: &[&str], streams: &Streams) -> i32 {
    let (mut place, mut output, mut body, mut whole) = ("", "-", None, WHOLE);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "-O" | "-qO" => output = words.next().copied().unwrap_or("-"),
            "-T" => whole = words.next().and_then(|text| duration(text)).unwrap_or(WHOLE),
            "--post-data" => body = words.next().copied(),
            word if word.starts_with("--post-data=") => body = word.split_once('=').map(|(_, text)| text),
            word if word.starts_with("-O") => output = &word[2..],
            word if word.starts_with("-qO") => output = &word[3..],
            word if word.starts_with('-') => {}
            word => place = word,
        }
    }
    let asked = match url(place) {
        Ok(asked) => asked,
        Err(problem) => {
            streams.complain(&format!("wget: {}", problem));
            return 1;
        }
    };
    let (host, port, target, from, connect) = (asked.host, asked.port, asked.target.as_str(), None, None);
    let method = if body.is_some() { "POST" } else { "GET" };
    match http::ask(&Ask { host, port, target, method, body, from, connect, whole }) {
        Ok(answer) if answer.status >= 400 => {
            streams.complain(&format!("wget: server returned error: HTTP/1.1 {}", answer.status));
            1
        }
        Ok(answer) if output == "-" => i32::from(!streams.out.write(&answer.body)),
        Ok(answer) => streams.report("wget", output, fs::write(output, &answer.body)),
        Err(why) => {
            streams.complain(&format!("wget: can't connect to remote host ({}): {}", host, why));
            1
        }
    }
}

/// `nc [-uvtz] [-w SECONDS] HOST PORT`, which sends what it is given and prints what comes until there is silence.
fn nc(words: &[&str], streams: &Streams) -> i32 {
    let (mut limit, mut operands, mut flags) = (None, Vec::new(), String::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "-w" => limit = words.next().and_then(|text| duration(text)),
            word if word.starts_with('-') => flags.push_str(&word[1..]),
            word => operands.push(word),
        }
    }
    let (host, port) = match operands.as_slice() {
        [host, port] => (*host, port.parse().unwrap_or(0)),
        _ => {
            streams.complain("nc: a host and a port are needed");
            return 1;
        }
    };
    let tried = if flags.contains('u') {
        let sent = String::from_utf8_lossy(&streams.read()).into_owned();
        ask_udp(host, port, &sent, limit.or(Some(WHOLE))).map(String::into_bytes)
    } else {
        talk(host, port, limit, flags.contains('z'), streams)
    };
    match tried {
        Ok(data) => {
            if flags.contains('v') {
                streams.complain(&format!("Connection to {} {} port succeeded!", host, port));
            }
            i32::from(!streams.out.write(&data))
        }
        // As netcat: silence over UDP is no failure.
        Err(Failure::Timeout) if flags.contains('u') => 0,
        Err(why) => {
            streams.complain(&format!("nc: connect to {} port {} failed: {}", host, port, why));
            1
        }
    }
}

fn talk(host: &str, port: u16, limit: Option<Duration>, only: bool, streams: &Streams) -> Result<Vec<u8>, Failure> {
    let stream = Stream::connect(net::lookup(host)?, port, None, limit.or(Some(WHOLE)))?;
    let mut found = Vec::new();
    if only {
        return Ok(found);
    }
    stream.write(&streams.read());
    loop {
        match stream.read(limit.map(|limit| Instant::now() + limit)) {
            Ok(Some(data)) => found.extend(data),
            Ok(None) | Err(Failure::Timeout) => return Ok(found),
            Err(why) => return Err(why),
        }
    }
}

/// By the pod's resolver, as all that a component looks up; the server cannot be chosen.
fn nslookup(words: &[&str], streams: &Streams) -> i32 {
    let name = words.iter().find(|word| !word.starts_with('-')).copied().unwrap_or("");
    match net::lookup_all(name) {
        Ok(found) => {
            streams.say(&format!("Name:\t{}", name));
            found.iter().map(|ip| streams.say(&format!("Address: {}", net::text(*ip)))).fold(0, i32::max)
        }
        Err(why) => {
            streams.complain(&format!("** server can't find {}: {}", name, why));
            1
        }
    }
}

/// `getent hosts NAME`: of the file first, then by the pod's resolver.
fn getent(words: &[&str], streams: &Streams) -> i32 {
    let name = match words {
        ["hosts", name] => *name,
        _ => {
            streams.complain("getent: only `getent hosts NAME` is known here");
            return 1;
        }
    };
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or(""));
    if let Some(line) = lines.into_iter().find(|line| line.split_whitespace().skip(1).any(|word| word == name)) {
        return streams.say(line);
    }
    match net::lookup(name) {
        Ok(ip) => streams.say(&format!("{}  {}", net::text(ip), name)),
        Err(_) => 2,
    }
}

/// `agnhost connect HOST:PORT [--timeout DURATION] [--protocol tcp|udp]`, with its words for what went wrong.
pub fn connect(words: &[String], streams: &Streams) -> i32 {
    let flag = |name: &str| crate::agnhost::flag(words, &[name]);
    let limit = flag("--timeout").and_then(duration).filter(|limit| !limit.is_zero());
    let place = words.iter().find(|word| word.contains(':') && !word.starts_with('-')).map_or("", String::as_str);
    let (host, port) = match place.rsplit_once(':').map(|(host, port)| (host, port.parse())) {
        Some((host, Ok(port))) => (host, port),
        _ => {
            streams.complain(&format!("UNKNOWN: address {}: missing port in address", place));
            return 1;
        }
    };
    let tried = match flag("--protocol").unwrap_or("tcp") {
        "udp" => ask_udp(host, port, flag("--udp-data").unwrap_or("hostname"), limit).map(|_| ()),
        "tcp" => net::lookup(host).and_then(|ip| Stream::connect(ip, port, None, limit)).map(|_| ()),
        other => Err(Failure::Other(format!("the stand-in speaks no {}", other))),
    };
    match tried {
        Ok(()) => 0,
        Err(why) => {
            streams.complain(&why.to_string());
            1
        }
    }
}
