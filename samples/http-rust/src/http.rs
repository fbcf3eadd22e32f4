//! What an app wants of HTTP, in terms of `wasi:http/types`.

use wasi::http::types::{
    ErrorCode, Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};
use wasi::io::streams::StreamError;

pub struct Answer {
    status: u16,
    text: String,
}

impl Answer {
    pub fn new(status: u16, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

/// The body as text, or the answer to a request whose body is none or too long.
pub fn body(request: IncomingRequest, most: usize) -> Result<String, Answer> {
    let unread = |_| Answer::new(400, "the body cannot be read\n");
    let body = request.consume().map_err(unread)?;
    let stream = body.stream().map_err(unread)?;
    let mut read = Vec::new();
    loop {
        match stream.blocking_read(4096) {
            Ok(piece) => read.extend(piece),
            Err(StreamError::Closed) => break,
            Err(StreamError::LastOperationFailed(_)) => return Err(unread(())),
        }
        if read.len() > most {
            return Err(Answer::new(413, format!("an entry has at most {most} bytes\n")));
        }
    }
    String::from_utf8(read).map_err(|_| Answer::new(400, "the body is not UTF-8\n"))
}

/// Send the answer. What fails here means that the client has gone, so there is no one to tell.
pub fn send(out: ResponseOutparam, answer: Answer) {
    let response = OutgoingResponse::new(headers(&answer));
    if response.set_status_code(answer.status).is_err() {
        return ResponseOutparam::set(out, Err(ErrorCode::InternalError(None)));
    }
    let Ok(body) = response.body() else { return };
    ResponseOutparam::set(out, Ok(response));
    if let Ok(stream) = body.write() {
        for piece in answer.text.as_bytes().chunks(4096) {
            if stream.blocking_write_and_flush(piece).is_err() {
                return;
            }
        }
    }
    let _ = OutgoingBody::finish(body, None);
}

fn headers(answer: &Answer) -> Fields {
    let headers = Fields::new();
    let values = [("content-type", "text/plain; charset=utf-8".to_string()), ("content-length", answer.text.len().to_string())];
    for (name, value) in values {
        // Both names are allowed and both values are valid, so this cannot fail.
        let _ = headers.set(&name.to_string(), &[value.into_bytes()]);
    }
    headers
}
