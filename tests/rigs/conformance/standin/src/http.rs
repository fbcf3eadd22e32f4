//! HTTP/1.1 as far as the tests go: a request's parts, an answer's bytes, and a client's exchange.

use std::time::{Duration, Instant};

use crate::net::{self, Failure, Stream};

pub struct Request {
    pub method: String,
    pub path: String,
    pub query: Vec<(String, String)>,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub peer: String,
}

impl Request {
    /// A value of the query, or of a form in the body.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn keeps(&self) -> bool {
        !self.header("connection").map_or(false, |value| value.eq_ignore_ascii_case("close"))
    }

    pub fn of(method: &str, target: &str, peer: &str) -> Request {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let path = if path.starts_with('/') { decoded(path, false) } else { format!("/{}", decoded(path, false)) };
        let (method, peer) = (method.to_string(), peer.to_string());
        Request { method, path, query: pairs(query), headers: Vec::new(), body: Vec::new(), peer }
    }
}

pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// End the program with this code once the answer is sent.
    pub exit: Option<i32>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, headers: Vec::new(), body: body.into(), exit: None }
    }

    pub fn ok(body: impl Into<Vec<u8>>) -> Reply {
        Reply::new(200, body)
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }

    pub fn bytes(&self, request: &Request) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\nContent-Length: {}\r\n", self.status, words(self.status), self.body.len());
        if !self.headers.iter().any(|(name, _)| *name == "Content-Type") {
            let sort = if self.body.starts_with(b"<") { "text/html" } else { "text/plain" };
            head.push_str(&format!("Content-Type: {}; charset=utf-8\r\n", sort));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{}: {}\r\n", name, value));
        }
        head.push_str(if request.keeps() { "\r\n" } else { "Connection: close\r\n\r\n" });
        let mut bytes = head.into_bytes();
        if request.method != "HEAD" {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

pub fn words(status: u16) -> &'static str {
    match status {
        200 => "OK",
        301 => "Moved Permanently",
        302 => "Found",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        404 => "Not Found",
        412 => "Precondition Failed",
        417 => "Expectation Failed",
        500 => "Internal Server Error",
        _ => "Status",
    }
}

/// The head's lines and where the body begins; None: not all of it is there.
fn head(data: &[u8]) -> Option<(String, usize)> {
    let at = data.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((String::from_utf8_lossy(&data[..at]).into_owned(), at + 4))
}

fn fields(lines: &str) -> Vec<(String, String)> {
    let pairs = lines.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.trim().to_string(), value.trim().to_string())).collect()
}

/// A whole body at the beginning of `data` and its length there; None: not all of it is there.
fn body(headers: &[(String, String)], data: &[u8]) -> Option<(Vec<u8>, usize)> {
    let value = |name: &str| headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str());
    if value("transfer-encoding").map_or(false, |value| value.eq_ignore_ascii_case("chunked")) {
        return chunks(data);
    }
    let length: usize = value("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
    if data.len() < length { None } else { Some((data[..length].to_vec(), length)) }
}

fn chunks(data: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut at, mut whole) = (0, Vec::new());
    loop {
        let line = data[at..].windows(2).position(|window| window == b"\r\n")?;
        let size = String::from_utf8_lossy(&data[at..at + line]).into_owned();
        let size = usize::from_str_radix(size.split(';').next().unwrap_or("").trim(), 16).ok()?;
        let start = at + line + 2;
        let end = start.checked_add(size)?.checked_add(2)?;
        if data.len() < end {
            return None;
        }
        if size == 0 {
            return Some((whole, end));
        }
        whole.extend_from_slice(&data[start..start + size]);
        at = end;
    }
}

/// Whether the first line is whole and no request's, which is answered before anything more comes.
pub fn malformed(data: &[u8]) -> bool {
    let end = match data.iter().position(|byte| *byte == b'\n') {
        Some(end) => end,
        None => return false,
    };
    let line = String::from_utf8_lossy(&data[..end]).into_owned();
    let words: Vec<&str> = line.split_whitespace().collect();
    words.len() != 3 || !words[2].starts_with("HTTP/1.")
}

/// Take one whole request from the beginning of `data`.
pub fn take_request(data: &mut Vec<u8>, peer: &str) -> Option<Request> {
    let (lines, begin) = head(data)?;
    let headers = fields(&lines);
    let (content, length) = body(&headers, &data[begin..])?;
    data.drain(..begin + length);
    let mut first = lines.split(' ');
    let (method, target) = (first.next().unwrap_or(""), first.next().unwrap_or("/"));
    let mut request = Request::of(method, target, peer);
    request.headers = headers;
    if request.header("content-type").map_or(false, |sort| sort.starts_with("application/x-www-form-urlencoded")) {
        request.query.extend(pairs(&String::from_utf8_lossy(&content)));
    }
    request.body = content;
    Some(request)
}

fn pairs(query: &str) -> Vec<(String, String)> {
    let parts = query.split('&').filter(|part| !part.is_empty());
    parts
        .map(|part| part.split_once('=').unwrap_or((part, "")))
        .map(|(key, value)| (decoded(key, true), decoded(value, true)))
        .collect()
}

fn decoded(text: &str, plus: bool) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|two| std::str::from_utf8(two).ok());
        match (bytes[at], hex.and_then(|two| u8::from_str_radix(two, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) if plus => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

pub struct Ask<'a> {
    pub host: &'a str,
    pub port: u16,
    pub target: &'a str,
    pub method: &'a str,
    pub body: Option<&'a str>,
    pub from: Option<net::Ip>,
    pub connect: Option<Duration>,
    pub whole: Duration,
}

/// One request on a connection of its own.
pub fn ask(ask: &Ask) -> Result<Answer, Failure> {
    let until = Some(Instant::now() + ask.whole);
    let ip = net::lookup(ask.host)?;
    let stream = Stream::connect(ip, ask.port, ask.from, Some(ask.connect.unwrap_or(ask.whole)))?;
    let mut sent = format!("{} {} HTTP/1.1\r\nHost: {}:{}\r\n", ask.method, ask.target, ask.host, ask.port);
    sent.push_str("User-Agent: standin\r\nAccept: */*\r\nConnection: close\r\n");
    if let Some(body) = ask.body {
        sent.push_str(&format!("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n", body.len()));
    }
    sent.push_str("\r\n");
    sent.push_str(ask.body.unwrap_or(""));
    if !stream.write(sent.as_bytes()) {
        return Err(Failure::Other("the connection broke off".to_string()));
    }
    let mut data = Vec::new();
    while let Some(more) = stream.read(until)? {
        data.extend(more);
        if let Some(answer) = whole_answer(&data, ask.method == "HEAD") {
            return Ok(answer);
        }
    }
    let (lines, begin) = head(&data).ok_or_else(|| Failure::Other("Empty reply from server".to_string()))?;
    // Without a length the end of the connection is that of the body.
    let content = data[begin..].to_vec();
    Ok(Answer { status: status(&lines), head: lines, body: content })
}

fn whole_answer(data: &[u8], headless: bool) -> Option<Answer> {
    let (lines, begin) = head(data)?;
    let headers = fields(&lines);
    let sized = |name: &str| name.eq_ignore_ascii_case("content-length") || name.eq_ignore_ascii_case("transfer-encoding");
    let content = if headless {
        Vec::new()
    } else if headers.iter().any(|(name, _)| sized(name)) {
        body(&headers, &data[begin..])?.0
    } else {
        return None;
    };
    Some(Answer { status: status(&lines), head: lines, body: content })
}

fn status(lines: &str) -> u16 {
    lines.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if (c as u32) < 32 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
