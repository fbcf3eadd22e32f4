//! One request: refused by name, or given to an instance, and always answered.

use crate::counters::Counters;
use crate::epochs::Epochs;
use crate::guest::{Guest, Maker};
use crate::server::answer::{Answer, Failure, Refusal};
use crate::server::body::Limited;
use crate::server::connection::{Connections, Watch};
use crate::server::exchange::Exchange;
use crate::server::fresh::Fresh;
use crate::server::reused::Reused;
use crate::server::{REUSE_OF_P2, REUSE_OF_P3};
use crate::spec;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use wasmtime_wasi_http::WasiBody;
use wasmtime_wasi_http::handler::ProxyPre;

const MAX_LOGGED_PATH_CHARACTERS: usize = 200;

/// What all connections share.
pub struct Service {
    /// As the pod asks.
    pub settings: spec::Server,
    /// For metrics.
    pub counters: Counters,
    /// For limits.
    pub connections: Connections,
    /// Requests at the same time.
    pub slots: Arc<Semaphore>,
    /// Answers end their connection from now on.
    pub lingering: AtomicBool,
    /// Connections end as soon as they can.
    pub closing: watch::Sender<bool>,
    handler: Handler,
}

enum Handler {
    Fresh(Fresh),
    Reused(Reused),
}

impl Service {
    /// For one component.
    pub fn new(settings: spec::Server, counters: Counters, epochs: Epochs, maker: Maker, pre: ProxyPre<Guest>) -> Self {
        let reuse = settings.reuse.unwrap_or(match pre {
            ProxyPre::P2(_) => REUSE_OF_P2,
            ProxyPre::P3(_) => REUSE_OF_P3,
        });
        let handler = match pre {
            ProxyPre::P2(pre) if reuse == 1 => Handler::Fresh(Fresh::new(pre, maker, epochs, counters)),
            pre => Handler::Reused(Reused::new(
                pre,
                maker,
                epochs,
                counters,
                reuse as usize,
                settings.request_timeout(),
                settings.max_concurrent as usize,
            )),
        };
        Service {
            counters,
            connections: Connections::new(settings.max_connections as usize),
            slots: Arc::new(Semaphore::new(settings.max_concurrent as usize)),
            lingering: AtomicBool::new(false),
            closing: watch::channel(false).0,
            handler,
            settings,
        }
    }

    /// Always an answer; what is not the guest's has a line in the log.
    pub async fn answer(&self, request: Request<Incoming>, connection: Arc<Watch>) -> Response<Answer> {
        let begin = Instant::now();
        self.counters.begin();
        connection.request_begun();
        let settings = &self.settings;
        let exchange = Exchange::new(describe(&request), settings.request_timeout(), settings.idle_timeout());
        let counted = Counted {
            counters: self.counters,
            connection: Some(connection),
            exchange: exchange.clone(),
            begin,
        };
        let version = request.version();
        let (mut response, slot) = match self.try_answer(request, exchange.clone()).await {
            Ok(answer) => answer,
            Err(refusal) => {
                let status = refusal.status.as_u16();
                exchange.log(&format!("{status}: {}", refusal.reason));
                (refusal.response(), None)
            }
        };
        // After 413 hyper ends the connection, since the rest of the body is still coming: the client should know.
        let unread = response.status() == StatusCode::PAYLOAD_TOO_LARGE;
        let ends = unread || self.lingering.load(Ordering::Relaxed);
        if ends && version < Version::HTTP_2 {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        let connection = counted.hand_over();
        Answer::new(response, exchange, begin, self.counters, connection, slot)
    }

    async fn try_answer(
        &self,
        request: Request<Incoming>,
        exchange: Arc<Exchange>,
    ) -> Result<(Response<WasiBody>, Option<OwnedSemaphorePermit>), Refusal> {
        check(&request, self.settings.max_body_bytes)?;
        let slot = tokio::select! {
            slot = self.slots.clone().acquire_owned() => slot.map_err(|_| busy())?,
            () = exchange.deadline.passed() => return Err(busy()),
        };
        let (max, idle) = (self.settings.max_body_bytes, self.settings.idle_timeout());
        let request = request.map(|body| Limited::new(body, max, Some(idle)).boxed_unsync());
        let answer = match &self.handler {
            Handler::Fresh(fresh) => fresh.answer(request, exchange, slot).await.map(|answer| (answer, None)),
            Handler::Reused(reused) => {
                let answer = reused.answer(request, exchange).await;
                answer.map(|answer| (answer, Some(slot)))
            }
        };
        answer.map_err(Failure::into)
    }
}

/// A request that is being looked at. hyper drops this when the client has gone before there is an answer.
struct Counted {
    counters: Counters,
    connection: Option<Arc<Watch>>,
    exchange: Arc<Exchange>,
    begin: Instant,
}

/// nginx' status for a client that closed its request: for the counters, no one reads the answer.
const CLIENT_GONE: u16 = 499;

impl Counted {
    /// From here the answer's body counts.
    fn hand_over(mut self) -> Arc<Watch> {
        self.connection.take().expect("it is there until now")
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.exchange.ended();
            self.counters.end(CLIENT_GONE, self.begin.elapsed());
            connection.request_ended();
        }
    }
}

fn busy() -> Refusal {
    Refusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        text: "the application is busy\n",
        reason: "too many requests at the same time for too long".into(),
    }
}

/// What no guest could answer.
fn check<B: Body>(request: &Request<B>, max_body_bytes: u64) -> Result<(), Refusal> {
    let refuse = |status, text: &'static str| {
        let reason = text.trim_end().to_owned();
        Err(Refusal { status, text, reason })
    };
    if request.method() == Method::CONNECT {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "wasi:http has no CONNECT\n");
    }
    if let Some(protocol) = request.headers().get(header::UPGRADE)
        && protocol.as_bytes().eq_ignore_ascii_case(b"websocket")
    {
        return refuse(StatusCode::NOT_IMPLEMENTED, "wasi:http has no WebSocket\n");
    }
    let host = request.headers().get(header::HOST);
    let named = request.uri().authority().is_some()
        || host.is_some_and(|host| host.to_str().is_ok_and(|host| !host.is_empty()));
    if !named {
        return refuse(StatusCode::BAD_REQUEST, "the request names no host\n");
    }
    if request.body().size_hint().lower() > max_body_bytes {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the request body is too large\n");
    }
    Ok(())
}

fn describe<B>(request: &Request<B>) -> String {
    let path: String = request.uri().path().chars().take(MAX_LOGGED_PATH_CHARACTERS).collect();
    format!("{} {path}", request.method())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;

    fn refused(request: http::request::Builder, body: &'static [u8]) -> u16 {
        let request = request.body(Full::new(bytes::Bytes::from_static(body))).unwrap();
        check(&request, 4).err().map_or(200, |refusal| refusal.status.as_u16())
    }

    #[test]
    fn what_no_guest_could_answer_is_refused_by_name() {
        let get = || Request::get("/x").header("host", "a");
        assert_eq!(refused(get(), b"1234"), 200);
        assert_eq!(refused(get(), b"12345"), 413);
        assert_eq!(refused(get().header("upgrade", "WebSocket"), b""), 501);
        assert_eq!(refused(get().header("upgrade", "h2c"), b""), 200);
        assert_eq!(refused(Request::get("/x"), b""), 400);
        assert_eq!(refused(Request::get("http://a/x"), b""), 200);
        assert_eq!(refused(Request::connect("a:80"), b""), 405);
    }

    #[test]
    fn a_query_stays_out_of_the_log() {
        let request = Request::get("/a?token=secret").body(()).unwrap();
        assert_eq!(describe(&request), "GET /a");
    }
}
