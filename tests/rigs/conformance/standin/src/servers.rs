//! The servers among agnhost's subcommands, and the web servers of other images.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::agnhost::flag;
use crate::http::{self, quoted, Ask, Reply, Request};
use crate::net::{self, Datagrams, Failure, Stream};
use crate::serve::{log, Handler, Server, Speaks};
use crate::streams::Streams;

const DIAL: Duration = Duration::from_secs(5);
const FILES_PORT: u16 = 80;
const MOVE: &str = "/.standin/mv";
const REGISTER: Duration = Duration::from_secs(60);
const ALIVE_SECONDS: f64 = 10.0;

/// Serve as this subcommand or image does; None: it is none of them.
pub fn run(command: &str, words: &[String], streams: &Streams) -> Option<i32> {
    if words.iter().any(|word| word.starts_with("--tls-cert-file")) {
        streams.complain("the stand-in speaks no TLS");
        return Some(1);
    }
    let mut server = Server::default();
    let made = match command {
        "netexec" => netexec(&mut server, words),
        "serve-hostname" => serve_hostname(&mut server, words),
        "test-webserver" => {
            let certificate = Certificate::default();
            server.http(port(words, "--port", FILES_PORT), Rc::new(move |request| files(request, &certificate)))
        }
        "liveness" => liveness(&mut server),
        "porter" => porter(&mut server, words),
        "nettest" => nettest(&mut server),
        "guestbook" => guestbook(&mut server, words),
        "grpc-health-checking" => health(&mut server, words),
        "httpd" | "nginx" => server.http(80, Rc::new(|request| welcome(request))),
        "kitten" | "nautilus" => picture(&mut server, command),
        _ => return None,
    };
    match made {
        Ok(()) => server.run(),
        Err(why) => {
            streams.complain(&format!("{}: {}", command, why));
            Some(1)
        }
    }
}

fn hostname() -> String {
    env::var("HOSTNAME").unwrap_or_default()
}

fn port(words: &[String], name: &str, otherwise: u16) -> u16 {
    flag(words, &[name]).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn given(words: &[String], name: &str) -> bool {
    words.iter().any(|word| word == name || *word == format!("{}=true", name))
}

/// Of Go's `1m30s` what tests give: one number and one unit.
pub fn duration(text: &str) -> Option<Duration> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..at].parse().ok()?;
    let unit = match &text[at..] {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(number * unit))
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}", since.as_secs(), since.subsec_nanos())
}

fn netexec(server: &mut Server, words: &[String]) -> Result<(), Failure> {
    let (web, datagrams) = (port(words, "--http-port", 8080), flag(words, &["--udp-port"]).unwrap_or("8081"));
    let ready = datagrams != "-1";
    let forced = flag(words, &["--http-override"]).map(str::to_string);
    let handler: Handler = Rc::new(move |request| match &forced {
        Some(target) => exec_page(&Request::of("GET", target, &request.peer), web, ready),
        None => exec_page(request, web, ready),
    });
    server.http(web, handler)?;
    if let Ok(number) = datagrams.parse::<u16>() {
        server.udp(number, Rc::new(move |text, from| exec_datagram(text, from, number)))?;
        log(&format!("Started UDP server on port  {}", number));
    }
    log(&format!("Started HTTP server on port {}", web));
    Ok(())
}

fn exec_page(request: &Request, port: u16, ready: bool) -> Reply {
    let value = |name: &str| request.value(name).unwrap_or("").to_string();
    let note = |line: &str| log(&format!("GET {}", line));
    match request.path.as_str() {
        "/echo" => {
            note(&format!("/echo?msg={}&code={}", value("msg"), value("code")));
            match value("code").as_str() {
                "" => Reply::ok(value("msg")),
                code => Reply::new(code.parse().unwrap_or(200), value("msg")),
            }
        }
        "/clientip" => {
            note("/clientip");
            Reply::ok(request.peer.clone())
        }
        "/serverport" => {
            note("/serverport");
            Reply::ok(port.to_string())
        }
        "/header" => {
            note(&format!("/header?key={}", value("key")));
            match value("key").as_str() {
                "" => {
                    let all: Vec<String> =
                        request.headers.iter().map(|(name, text)| format!("{}:[{}]", quoted(name), quoted(text))).collect();
                    Reply::ok(format!("{{{}}}", all.join(",")))
                }
                key => Reply::ok(request.header(key).unwrap_or("")),
            }
        }
        "/dial" => dial(request),
        "/exit" => {
            let (wait, code) = (duration(&value("wait")).unwrap_or_default(), value("code").parse().unwrap_or(0));
            note(&format!("/exit?code={}&timeout={}&wait={}", code, value("timeout"), value("wait")));
            thread::sleep(wait);
            Reply { exit: Some(code), ..Reply::ok("") }
        }
        "/shutdown" => {
            note("/shutdown");
            Reply { exit: Some(0), ..Reply::ok("") }
        }
        "/healthz" | "/readyz" => {
            note(&request.path);
            Reply::new(if ready { 200 } else { 412 }, if request.path == "/readyz" && ready { "ok" } else { "" })
        }
        "/hostname" | "/hostName" => {
            note(&request.path);
            Reply::ok(hostname())
        }
        "/envvar" => match (value("var").as_str(), env::var(value("var"))) {
            ("", _) => Reply::new(400, "'var' query parameter is required\n"),
            (_, Ok(found)) => Reply::ok(found),
            (name, Err(_)) => Reply::new(500, format!("env var {} is not set\n", quoted(name))),
        },
        "/redirect" => {
            log(&format!("{} /redirect?msg={}&code={}", request.method, value("location"), value("code")));
            redirect(value("code").parse().unwrap_or(302), &value("location"))
        }
        "/shell" | "/upload" => Reply::ok("{\"error\":\"a wasm module starts no process and keeps no upload\"}"),
        _ => {
            note("/");
            Reply::ok(format!("NOW: {}", now()))
        }
    }
}

fn exec_datagram(text: &str, from: &str, port: u16) -> Option<String> {
    let lower = text.to_lowercase();
    match lower.split_once(' ').map_or((lower.as_str(), ""), |(word, rest)| (word, rest)) {
        ("hostname", _) => {
            log("Sending udp hostName response");
            Some(hostname())
        }
        ("echo", rest) => {
            log(&format!("Echoing {} to UDP client {}", rest, from));
            Some(rest.to_string())
        }
        ("envvar", _) => Some(env::var(text.split_once(' ').map_or("", |(_, name)| name.trim())).unwrap_or_default()),
        ("clientip", _) => {
            log(&format!("Sending clientip back to UDP client {}", from));
            Some(from.to_string())
        }
        ("serverport", _) => Some(port.to_string()),
        _ => {
            log(&format!("Unknown UDP command received from {}: {}", from, text));
            None
        }
    }
}

/// Ask others. Nobody is served meanwhile, so that asking this server itself times out, and says so.
fn dial(request: &Request) -> Reply {
    let value = |name: &str| request.value(name).unwrap_or("");
    let (host, target, protocol) = (value("host"), value("request"), value("protocol").to_lowercase());
    let (port, tries): (u16, u32) = match (value("port").parse(), value("tries").parse()) {
        (Ok(port), Ok(tries)) => (port, tries),
        (Ok(port), Err(_)) if value("tries").is_empty() => (port, 1),
        _ => return Reply::new(400, "host and/or port param are invalid\n"),
    };
    log(&format!("GET /dial?host={}&protocol={}&port={}&request={}&tries={}", host, protocol, port, target, tries));
    if target.is_empty() {
        return Reply::new(400, "request parameter not specified\n");
    }
    let (mut responses, mut errors) = (Vec::new(), Vec::new());
    for _ in 0..tries {
        let answer = match protocol.as_str() {
            "" | "http" => get(host, port, target),
            "udp" => ask_udp(host, port, target, Some(DIAL)),
            _ => return Reply::new(400, format!("unsupported protocol. {}\n", protocol)),
        };
        match answer {
            Ok(text) => responses.push(quoted(&text)),
            Err(why) => errors.push(quoted(&why.to_string())),
        }
    }
    let mut parts = Vec::new();
    for (name, all) in [("errors", errors), ("responses", responses)] {
        if !all.is_empty() {
            parts.push(format!("\"{}\":[{}]", name, all.join(",")));
        }
    }
    Reply::ok(format!("{{{}}}", parts.join(",")))
}

fn get(host: &str, port: u16, target: &str) -> Result<String, Failure> {
    let target = format!("/{}", target.trim_start_matches('/'));
    let (method, body, from, connect) = ("GET", None, None, None);
    let answer = http::ask(&Ask { host, port, target: &target, method, body, from, connect, whole: DIAL })?;
    Ok(String::from_utf8_lossy(&answer.body).into_owned())
}

pub fn ask_udp(host: &str, port: u16, text: &str, limit: Option<Duration>) -> Result<String, Failure> {
    let socket = Datagrams::open(0, Some((net::lookup(host)?, port)))?;
    socket.send(text.as_bytes(), None)?;
    let data = socket.read(limit.map(|limit| Instant::now() + limit))?;
    Ok(String::from_utf8_lossy(&data).into_owned())
}

fn serve_hostname(server: &mut Server, words: &[String]) -> Result<(), Failure> {
    let number = port(words, "--port", 9376);
    if given(words, "--tcp") {
        server.tcp(number, Speaks::Bytes(hostname()))?;
    }
    if given(words, "--udp") {
        server.udp(number, Rc::new(|_, from| {
            log(&format!("UDP request from {}", from));
            Some(hostname())
        }))?;
    }
    if !words.iter().any(|word| word == "--http=false") {
        let closes = given(words, "--close");
        server.http(number, Rc::new(move |request| {
            log(&format!("HTTP request from {}", request.peer));
            let reply = Reply::ok(hostname());
            if closes { reply.with("Connection", "close") } else { reply }
        }))?;
    }
    log(&format!("Serving on port {}.", number));
    Ok(())
}

/// With the body that Go's `http.Redirect` writes, which a probe's event quotes.
fn redirect(code: u16, location: &str) -> Reply {
    let escaped = location.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
    let body = format!("<a href=\"{}\">{}</a>.\n\n", escaped, http::words(code));
    Reply::new(code, body).with("Location", location)
}

/// Where the one file of the image is that probes ask for. A module's image has no files, and a command that exec runs
/// has no memory in common with the server: so the server keeps it, and `mv` asks the server.
struct Certificate(RefCell<String>);

impl Default for Certificate {
    fn default() -> Certificate {
        Certificate(RefCell::new("/localhost.crt".to_string()))
    }
}

impl Certificate {
    fn moved(&self, from: &str, to: &str) -> Reply {
        if *self.0.borrow() != from {
            return Reply::new(404, "No such file or directory");
        }
        *self.0.borrow_mut() = if to.ends_with('/') { format!("{}localhost.crt", to) } else { to.to_string() };
        Reply::ok("")
    }
}

/// Move the file that the pod's server keeps; why not, else.
pub fn move_kept(from: &str, to: &str) -> Result<(), String> {
    let target = format!("{}?from={}&to={}", MOVE, from, to);
    let (host, port) = ("127.0.0.1", FILES_PORT);
    let ask = Ask { host, port, target: &target, method: "GET", body: None, from: None, connect: None, whole: DIAL };
    match http::ask(&ask) {
        Ok(answer) if answer.status == 200 => Ok(()),
        Ok(answer) => Err(String::from_utf8_lossy(&answer.body).into_owned()),
        Err(why) => Err(format!("No such file or directory, and no server that keeps it: {}", why)),
    }
}

/// The files that the module sees, below `/`.
fn files(request: &Request, certificate: &Certificate) -> Reply {
    if request.path == MOVE {
        return certificate.moved(request.value("from").unwrap_or(""), request.value("to").unwrap_or(""));
    }
    if request.path.split('/').any(|part| part == "..") {
        return Reply::new(400, "invalid URL path\n");
    }
    if request.path == "/" {
        return Reply::ok("<pre>\n</pre>\n");
    }
    match fs::read(&request.path) {
        Ok(data) => Reply::ok(data),
        Err(_) if request.path == *certificate.0.borrow() => Reply::ok("the stand-in has no certificate\n"),
        Err(_) if fs::metadata(&request.path).map_or(false, |found| found.is_dir()) => Reply::ok("<pre>\n</pre>\n"),
        Err(_) => Reply::new(404, "404 page not found\n"),
    }
}

fn welcome(request: &Request) -> Reply {
    match request.path.as_str() {
        "/" | "/index.html" => Reply::ok("<html><body><h1>It works!</h1></body></html>\n"),
        _ => Reply::new(404, "<html><body>Not Found</body></html>\n"),
    }
}

fn picture(server: &mut Server, name: &str) -> Result<(), Failure> {
    let data = format!("{{\"image\": \"{}.jpg\"}}\n", name);
    server.http(80, Rc::new(move |request| match request.path.as_str() {
        "/data.json" => Reply::ok(data.clone()).with("Content-Type", "application/json"),
        _ => welcome(request),
    }))
}

fn liveness(server: &mut Server) -> Result<(), Failure> {
    let started = Instant::now();
    server.http(8080, Rc::new(move |request| {
        let seconds = started.elapsed().as_secs_f64();
        match request.path.as_str() {
            "/started" => Reply::ok(format!("{}s", seconds)),
            "/healthz" if seconds > ALIVE_SECONDS => Reply::new(500, format!("error: {}", seconds)),
            "/healthz" => Reply::ok("ok"),
            "/redirect" => redirect(302, request.value("loc").unwrap_or("")),
            _ => Reply::new(404, "404 page not found\n"),
        }
    }))
}

fn porter(server: &mut Server, words: &[String]) -> Result<(), Failure> {
    let json = given(words, "--json-response");
    for (name, value) in env::vars() {
        let number = name.rsplit('_').next().and_then(|text| text.parse().ok());
        let (prefix, number) = match (name.rsplit_once('_'), number) {
            (Some((prefix, _)), Some(number)) => (prefix, number),
            _ => continue,
        };
        match prefix {
            "SERVE_PORT" | "SERVE_TCP_PORT" => server.http(number, Rc::new(move |request| {
                if !json {
                    return Reply::ok(value.clone());
                }
                let body = format!("{{\"Method\":{},\"Body\":{}}}", quoted(&request.method), quoted(&value));
                Reply::ok(body).with("Content-Type", "application/json")
            }))?,
            "SERVE_UDP_PORT" => server.udp(number, Rc::new(move |_, _| Some(value.clone())))?,
            "SERVE_TLS_PORT" | "SERVE_SCTP_PORT" => log(&format!("{}: the stand-in speaks neither TLS nor SCTP", name)),
            _ => {}
        }
    }
    Ok(())
}

/// Of nettest what the tests of `preStop` ask: who wrote to it, and how often. It contacts no one.
fn nettest(server: &mut Server) -> Result<(), Failure> {
    let received: RefCell<BTreeMap<String, u32>> = RefCell::default();
    server.http(8080, Rc::new(move |request| match request.path.as_str() {
        "/write" => {
            let told = object(&String::from_utf8_lossy(&request.body));
            let source = told.get("Source").cloned().unwrap_or_default();
            *received.borrow_mut().entry(source).or_insert(0) += 1;
            Reply::ok(format!("{{\"Hostname\":{}}}", quoted(&hostname())))
        }
        "/read" => {
            let all: Vec<String> =
                received.borrow().iter().map(|(name, count)| format!("{}:{}", quoted(name), count)).collect();
            Reply::ok(format!(
                "{{\"Hostname\":{},\"Sent\":{{}},\"Received\":{{{}}},\"Errors\":null,\"Log\":[],\"StillContactingPeers\":false}}",
                quoted(&hostname()),
                all.join(",")
            ))
        }
        "/quit" => Reply { exit: Some(0), ..Reply::ok("") },
        _ => Reply::new(404, "404 page not found\n"),
    }))
}

/// A JSON object whose values are texts; what else is in it is not taken.
fn object(text: &str) -> BTreeMap<String, String> {
    let mut texts = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '"' {
            continue;
        }
        let mut found = String::new();
        while let Some(c) = chars.next().filter(|c| *c != '"') {
            found.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
        }
        texts.push(found);
    }
    texts.chunks(2).filter(|pair| pair.len() == 2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
}

fn shown(store: &BTreeMap<String, String>) -> String {
    let all: Vec<String> = store.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    format!("{{{}}}", all.join(","))
}

fn guestbook(server: &mut Server, words: &[String]) -> Result<(), Failure> {
    let (web, backend) = (port(words, "--http-port", 80), port(words, "--backend-port", 6379));
    let store = RefCell::new(match flag(words, &["--replicaof"]) {
        Some(primary) => register(primary, backend)?,
        None => BTreeMap::new(),
    });
    let replicas: RefCell<Vec<String>> = RefCell::default();
    server.http(web, Rc::new(move |request| {
        let value = |name: &str| request.value(name).unwrap_or("").to_string();
        let (key, entry) = (value("key"), value("value"));
        log(&format!("GET {}?host={}&cmd={}&key={}&value={}", request.path, value("host"), value("cmd"), key, entry));
        match request.path.as_str() {
            "/register" => {
                replicas.borrow_mut().push(value("host"));
                Reply::ok(format!("{{\"data\":{}}}", shown(&store.borrow())))
            }
            "/get" if key.is_empty() => Reply::ok(format!("{{\"data\":{}}}", shown(&store.borrow()))),
            "/get" => {
                let found = store.borrow().get(&key).cloned().unwrap_or_default();
                Reply::ok(format!("{{\"data\":{}}}", quoted(&found)))
            }
            "/set" if key.is_empty() => Reply::new(400, "cannot set with empty key.\n"),
            "/set" => {
                store.borrow_mut().insert(key.clone(), entry.clone());
                for replica in replicas.borrow().iter() {
                    if let Err(why) = get(replica, backend, &format!("set?key={}&value={}", key, entry)) {
                        let text = format!("encountered error while propagating to replica '{}': {}\n", replica, why);
                        return Reply::new(417, text);
                    }
                }
                Reply::ok("{\"message\":\"Updated\"}")
            }
            "/guestbook" => {
                let command = value("cmd").to_lowercase();
                let host = match command.as_str() {
                    "get" => "agnhost-replica",
                    "set" => "agnhost-primary",
                    _ => return Reply::new(400, format!("unsupported cmd: '{}'\n", command)),
                };
                match get(host, backend, &format!("{}?key={}&value={}", command, key, entry)) {
                    Ok(answer) => Reply::ok(answer),
                    Err(why) => Reply::new(417, format!("encountered error: {}\n", why)),
                }
            }
            _ => Reply::new(404, "404 page not found\n"),
        }
    }))
}

/// Tell the primary this pod's address, and take over what it holds.
fn register(primary: &str, port: u16) -> Result<BTreeMap<String, String>, Failure> {
    let started = Instant::now();
    loop {
        let tried = net::lookup(primary)
            .and_then(|ip| Stream::connect(ip, port, None, Some(DIAL)))
            .and_then(|stream| get(primary, port, &format!("register?host={}", stream.own_ip())));
        match tried {
            Ok(answer) => {
                log(&format!("Registered to node: {}", primary));
                return Ok(object(answer.trim_start_matches("{\"data\":")));
            }
            Err(why) if started.elapsed() > REGISTER => return Err(why),
            Err(why) => log(&format!("unable to register at {}: {}. Retrying in 1s.", primary, why)),
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn health(server: &mut Server, words: &[String]) -> Result<(), Failure> {
    let started = Instant::now();
    let forced: Rc<Cell<Option<bool>>> = Rc::default();
    let limit = flag(words, &["--delay-unhealthy-sec"]).and_then(|text| text.parse::<f64>().ok()).unwrap_or(-1.0);
    let known = flag(words, &["--service"]).unwrap_or("").to_string();
    let said = Rc::clone(&forced);
    server.http(port(words, "--http-port", 8080), Rc::new(move |request| {
        match request.path.as_str() {
            "/make-not-serving" => said.set(Some(false)),
            "/make-serving" => said.set(Some(true)),
            _ => return Reply::new(404, "404 page not found\n"),
        }
        Reply::ok(format!("{}s", started.elapsed().as_secs_f64()))
    }))?;
    let state = move |service: &str| {
        let ill = forced.get() == Some(false) || (limit >= 0.0 && started.elapsed().as_secs_f64() >= limit);
        if service == known { Some(!ill) } else { None }
    };
    server.tcp(port(words, "--port", 5000), Speaks::Health(Rc::new(state)))
}
