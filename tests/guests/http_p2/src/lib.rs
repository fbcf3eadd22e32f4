//! A wasi:http 0.2 guest for the component host's tests: one behaviour per path, the bad ones included.
use std::sync::atomic::{AtomicU32, Ordering};
use wasip2::http::outgoing_handler;
use wasip2::http::types::*;
use wasip2::io::streams::StreamError;

struct Handler;
wasip2::http::proxy::export!(Handler);

static ANSWERED: AtomicU32 = AtomicU32::new(0);

impl wasip2::exports::http::incoming_handler::Guest for Handler {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let count = ANSWERED.fetch_add(1, Ordering::Relaxed) + 1;
        match path {
            "/hello" => text(out, 200, "hello\n"),
            "/count" => text(out, 200, &format!("{count}\n")),
            "/status" => text(out, query.parse().unwrap_or(200), "status\n"),
            "/env" => text(out, 200, &std::env::var(query).unwrap_or_default()),
            "/args" => text(out, 200, &std::env::args().collect::<Vec<_>>().join(" ")),
            "/read" => text(out, 200, &std::fs::read_to_string(query).unwrap_or_else(|error| error.to_string())),
            "/header" => text(out, 200, &header(&request, query)),
            "/echo" => echo(request, out),
            "/length" => length(request, out),
            "/trailers" => trailers(out),
            "/stream" => stream(out, query.parse().unwrap_or(3)),
            "/fetch" => fetch(out, query, &request),
            "/loop" => spin(),
            "/panic" => panic!("asked to"),
            "/allocate" => allocate(),
            "/recurse" => text(out, 200, &recurse(1).to_string()),
            "/never" => (),
            "/sleep" => {
                std::thread::sleep(std::time::Duration::from_millis(query.parse().unwrap_or(1000)));
                text(out, 200, "slept\n");
            }
            "/twice" => {
                let again = unsafe { ResponseOutparam::from_handle(out.handle()) };
                text(out, 200, "once\n");
                text(again, 200, "twice\n");
            }
            "/half" => drop(begin(out, 200, &[("content-length", "100")])),
            "/body-first" => {
                let response = OutgoingResponse::new(Fields::new());
                let body = response.body().unwrap();
                write(&body, &vec![b'x'; query.parse().unwrap_or(1)]);
                ResponseOutparam::set(out, Ok(response));
                let _ = OutgoingBody::finish(body, None);
            }
            "/then-loop" => {
                let body = begin(out, 200, &[]);
                write(&body, b"a piece\n");
                spin()
            }
            "/then-panic" => {
                let body = begin(out, 200, &[]);
                write(&body, b"a piece\n");
                panic!("asked to, late");
            }
            "/after" => {
                text(out, 200, "done\n");
                spin()
            }
            "/bad-status" => {
                let response = OutgoingResponse::new(Fields::new());
                response.set_status_code(7).expect("a status of 7");
                ResponseOutparam::set(out, Ok(response));
            }
            "/error-code" => ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("asked to".into())))),
            "/print" => {
                println!("to stdout");
                eprintln!("to stderr");
                text(out, 200, "printed\n");
            }
            _ => text(out, 404, "no such path\n"),
        }
    }
}

fn begin(out: ResponseOutparam, status: u16, headers: &[(&str, &str)]) -> OutgoingBody {
    let fields = Fields::new();
    for (name, value) in headers {
        fields.set(name, &[value.as_bytes().to_vec()]).unwrap();
    }
    let response = OutgoingResponse::new(fields);
    response.set_status_code(status).unwrap();
    let body = response.body().unwrap();
    ResponseOutparam::set(out, Ok(response));
    body
}

fn write(body: &OutgoingBody, mut data: &[u8]) {
    let stream = body.write().unwrap();
    while !data.is_empty() {
        let piece = data.len().min(4096);
        stream.blocking_write_and_flush(&data[..piece]).unwrap();
        data = &data[piece..];
    }
}

fn text(out: ResponseOutparam, status: u16, text: &str) {
    let body = begin(out, status, &[("content-type", "text/plain"), ("content-length", &text.len().to_string())]);
    write(&body, text.as_bytes());
    let _ = OutgoingBody::finish(body, None);
}

fn header(request: &IncomingRequest, name: &str) -> String {
    let values = request.headers().get(name);
    values.iter().map(|value| String::from_utf8_lossy(value).into_owned()).collect::<Vec<_>>().join(",")
}

fn echo(request: IncomingRequest, out: ResponseOutparam) {
    let incoming = request.consume().unwrap();
    let input = incoming.stream().unwrap();
    let body = begin(out, 200, &[]);
    {
        let output = body.write().unwrap();
        loop {
            match input.blocking_read(4096) {
                Ok(data) => output.blocking_write_and_flush(&data).unwrap(),
                Err(StreamError::Closed) => break,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    OutgoingBody::finish(body, None).unwrap();
}

fn length(request: IncomingRequest, out: ResponseOutparam) {
    let incoming = request.consume().unwrap();
    let input = incoming.stream().unwrap();
    let mut total = 0;
    let ended = loop {
        match input.blocking_read(65536) {
            Ok(data) => total += data.len(),
            Err(StreamError::Closed) => break String::new(),
            Err(StreamError::LastOperationFailed(error)) => break format!(" then {}", error.to_debug_string()),
        }
    };
    text(out, 200, &format!("{total}{ended}\n"));
}

fn trailers(out: ResponseOutparam) {
    let body = begin(out, 200, &[("trailer", "x-sum")]);
    write(&body, b"summed\n");
    let fields = Fields::new();
    fields.set("x-sum", &[b"42".to_vec()]).unwrap();
    OutgoingBody::finish(body, Some(fields)).unwrap();
}

fn stream(out: ResponseOutparam, pieces: u32) {
    let body = begin(out, 200, &[]);
    {
        let output = body.write().unwrap();
        for number in 0..pieces {
            output.blocking_write_and_flush(format!("piece {number}\n").as_bytes()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    OutgoingBody::finish(body, None).unwrap();
}

fn fetch(out: ResponseOutparam, url: &str, incoming: &IncomingRequest) {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let fields = Fields::new();
    if header(incoming, "x-own-trace") == "1" {
        fields.set("traceparent", &[b"00-own".to_vec()]).unwrap();
    }
    let request = OutgoingRequest::new(fields);
    let scheme = if scheme == "https" { Scheme::Https } else { Scheme::Http };
    request.set_scheme(Some(&scheme)).unwrap();
    request.set_authority(Some(authority)).unwrap();
    request.set_path_with_query(Some(if path.is_empty() { "/" } else { path })).unwrap();
    let pending = match outgoing_handler::handle(request, None) {
        Ok(pending) => pending,
        Err(code) => return text(out, 502, &format!("{code:?}\n")),
    };
    pending.subscribe().block();
    match pending.get().unwrap().unwrap() {
        Err(code) => text(out, 502, &format!("{code:?}\n")),
        Ok(response) => {
            let body = response.consume().unwrap();
            let input = body.stream().unwrap();
            let mut data = Vec::new();
            let ended = loop {
                match input.blocking_read(65536) {
                    Ok(piece) => data.extend(piece),
                    Err(StreamError::Closed) => break String::new(),
                    Err(StreamError::LastOperationFailed(error)) => break format!(" then {}", error.to_debug_string()),
                }
            };
            let begin: String = String::from_utf8_lossy(&data).chars().take(2000).collect();
            text(out, 200, &format!("{} {} {begin}{ended}", response.status(), data.len()));
        }
    }
}

fn spin() -> ! {
    let mut number = 0u64;
    loop {
        number = std::hint::black_box(number.wrapping_mul(6364136223846793005).wrapping_add(1));
    }
}

fn allocate() {
    let mut all: Vec<Vec<u8>> = Vec::new();
    loop {
        all.push(std::hint::black_box(vec![1; 1 << 20]));
    }
}

#[allow(unconditional_recursion)]
fn recurse(depth: u64) -> u64 {
    std::hint::black_box(recurse(std::hint::black_box(depth + 1))) + 1
}
