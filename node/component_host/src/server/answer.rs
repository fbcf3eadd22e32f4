//! What a client gets: the guest's answer, or one of the host's own with its line in the log.

use crate::counters::Counters;
use crate::server::connection::Watch;
use crate::server::exchange::Exchange;
use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use wasmtime_wasi_http::{Error, WasiBody};

/// Why the guest gave no answer.
#[derive(Debug)]
pub enum Failure {
    /// A trap, a refused import, an instance that could not be made: the text for the log.
    Failed(String),
    /// Not in time.
    TimedOut,
    /// The guest answered with an error code.
    Code(Error),
}

/// A host's answer: status, what the client reads, what the log says.
pub struct Refusal {
    /// Of HTTP.
    pub status: StatusCode,
    /// For the client: nothing about the inside.
    pub text: &'static str,
    /// For the log.
    pub reason: String,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let (status, text, reason) = match failure {
            Failure::TimedOut => (
                StatusCode::GATEWAY_TIMEOUT,
                "the application did not answer in time\n",
                "no answer in time".into(),
            ),
            Failure::Code(Error::HttpRequestBodySize(_)) => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "the request body is too large\n",
                "the request body is too large".into(),
            ),
            Failure::Code(code) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the application failed\n",
                format!("the guest answered with an error: {code}"),
            ),
            Failure::Failed(reason) => (StatusCode::INTERNAL_SERVER_ERROR, "the application failed\n", reason),
        };
        Refusal { status, text, reason }
    }
}

impl Refusal {
    /// As a response.
    pub fn response(&self) -> Response<WasiBody> {
        let body = Full::new(Bytes::from_static(self.text.as_bytes()));
        let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
        *response.status_mut() = self.status;
        let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, plain);
        response
    }
}

/// The first line of an error with its cause, in one line.
pub fn one_line(error: &wasmtime::Error) -> String {
    let mut text = format!("{:#}", error.root_cause());
    if let Some(trace) = error.downcast_ref::<wasmtime::WasmBacktrace>()
        && let Some(name) = trace.frames().first().and_then(|frame| frame.func_name())
    {
        text.push_str(" in ");
        text.push_str(name);
    }
    text
}

/// A line in the container's log. Whatever a client or guest wrote into it stays on the line.
pub fn log(what: &str, reason: &str) {
    eprintln!("{}", line(what, reason));
}

const MAX_LINE_CHARACTERS: usize = 1000;

fn line(what: &str, reason: &str) -> String {
    let text: String = format!("wasilet: {what}: {reason}")
        .chars()
        .map(|each| if each.is_control() { ' ' } else { each })
        .take(MAX_LINE_CHARACTERS)
        .collect();
    text.trim_end().to_owned()
}

/// The body on its way to the client. While it lives the request counts as being answered.
pub struct Answer {
    body: WasiBody,
    exchange: Arc<Exchange>,
    status: u16,
    begin: Instant,
    counters: Counters,
    connection: Arc<Watch>,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Answer {
    /// `slot`: given back when the answer is whole.
    pub fn new(
        response: Response<WasiBody>,
        exchange: Arc<Exchange>,
        begin: Instant,
        counters: Counters,
        connection: Arc<Watch>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Response<Self> {
        let status = response.status().as_u16();
        response.map(|body| Answer {
            body,
            exchange,
            status,
            begin,
            counters,
            connection,
            _slot: slot,
        })
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(_))) => self.exchange.moved(),
            Poll::Ready(Some(Err(error))) => {
                let reason = format!("the body of the answer ended early: {error}");
                self.exchange.log(&reason);
            }
            // A guest that is gone closes its body like one that has finished.
            Poll::Ready(None) => {
                if let Some(reason) = self.exchange.failure.get() {
                    self.exchange.broke(reason);
                    return Poll::Ready(Some(Err(Error::HttpResponseIncomplete)));
                }
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.exchange.ended();
        self.counters.end(self.status, self.begin.elapsed());
        self.connection.request_ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_is_one_line_and_bounded() {
        let text = line("GET \"/a\r\nb\"", &"x\n".repeat(5000));
        assert!(!text.contains('\n') && !text.contains('\r'));
        assert!(text.chars().count() <= MAX_LINE_CHARACTERS);
        assert!(text.starts_with("wasilet: GET"));
    }

    #[test]
    fn each_failure_has_its_status() {
        for (failure, status) in [
            (Failure::TimedOut, 504),
            (Failure::Failed("x".into()), 500),
            (Failure::Code(Error::HttpRequestBodySize(None)), 413),
            (Failure::Code(Error::ConnectionRefused), 500),
        ] {
            assert_eq!(Refusal::from(failure).response().status().as_u16(), status);
        }
    }
}
