//! A guestbook over HTTP, without a server: the node accepts the connection and calls [`Guest::handle`] per request.
//!
//! `GET /` shows the book, `POST /` adds the body to it as a line, `GET /healthz` says that the book can be read. Each
//! request has an instance of its own, so nothing stays in memory: the book is a file, `BOOK` (default
//! `/data/book.txt`). `GREETING` is its title.

mod book;
mod http;

use wasi::exports::http::incoming_handler::Guest;
use wasi::http::types::{IncomingRequest, Method, ResponseOutparam};

use http::Answer;

struct Guestbook;

impl Guest for Guestbook {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        http::send(out, answer(request));
    }
}

fn answer(request: IncomingRequest) -> Answer {
    let target = request.path_with_query().unwrap_or_default();
    let path = target.split('?').next().unwrap_or_default();
    match (request.method(), path) {
        (Method::Get, "/") => show(),
        (Method::Post, "/") => sign(request),
        (Method::Get, "/healthz") => match book::entries() {
            Ok(_) => Answer::new(200, "ok\n"),
            Err(error) => Answer::new(503, format!("the book cannot be read: {error}\n")),
        },
        (_, "/") => Answer::new(405, "the guestbook takes GET and POST\n"),
        _ => Answer::new(404, format!("there is no {path}\n")),
    }
}

fn show() -> Answer {
    let title = std::env::var("GREETING").unwrap_or_else(|_| "A guestbook".to_string());
    match book::entries() {
        Ok(entries) => {
            let count = match entries.len() {
                1 => "1 entry".to_string(),
                count => format!("{count} entries"),
            };
            let lines: String = entries.iter().map(|entry| format!("- {entry}\n")).collect();
            Answer::new(200, format!("{title}, in Rust: {count}\n{lines}"))
        }
        Err(error) => failure(&error),
    }
}

fn sign(request: IncomingRequest) -> Answer {
    let entry = match http::body(request, book::MAX_ENTRY_BYTES) {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    match book::add(&entry) {
        Ok(true) => {
            println!("signed: {}", entry.trim());
            Answer::new(201, "thank you\n")
        }
        Ok(false) => Answer::new(400, "an entry is one line of text\n"),
        Err(error) => failure(&error),
    }
}

fn failure(error: &std::io::Error) -> Answer {
    eprintln!("{error}");
    Answer::new(500, "the book is not at hand\n")
}

wasi::http::proxy::export!(Guestbook);
