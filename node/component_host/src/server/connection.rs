//! One client's connection: how long it may be idle, which of many must go, and when it ends.

use crate::server::request::Service;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What an HTTP/2 connection begins with; no method of HTTP/1 does.
const HTTP2_PREFACE: &[u8] = b"PRI";
const HTTP2_STREAMS: u32 = 128;
const MAX_HEADERS: usize = 128;
/// hyper's smallest buffer.
const MIN_BUFFER_BYTES: usize = 8192;
/// To say goodbye to a connection that ends for being idle.
const GOODBYE: Duration = Duration::from_secs(1);

/// How a connection is doing.
pub struct Watch {
    begin: Instant,
    in_flight: AtomicU32,
    /// Milliseconds from `begin` to when it became idle, or to the first byte of a head that is not whole yet.
    since: AtomicU64,
    head_begun: AtomicBool,
    http2: AtomicBool,
    first: AtomicBool,
    unwanted: Notify,
}

impl Watch {
    fn new() -> Arc<Self> {
        Arc::new(Watch {
            begin: Instant::now(),
            in_flight: AtomicU32::new(0),
            since: AtomicU64::new(0),
            head_begun: AtomicBool::new(false),
            http2: AtomicBool::new(false),
            first: AtomicBool::new(true),
            unwanted: Notify::new(),
        })
    }

    /// Bytes have come.
    fn received(&self, data: &[u8]) {
        if self.first.swap(false, Ordering::Relaxed) && data.starts_with(HTTP2_PREFACE) {
            self.http2.store(true, Ordering::Relaxed);
        }
        let idle = self.in_flight.load(Ordering::Relaxed) == 0;
        let counts = idle && !self.http2.load(Ordering::Relaxed);
        if counts && !self.head_begun.swap(true, Ordering::Relaxed) {
            self.touch();
        }
    }

    /// A request's head is whole.
    pub fn request_begun(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.head_begun.store(false, Ordering::Relaxed);
    }

    /// Its answer, too.
    pub fn request_ended(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.touch();
    }

    fn touch(&self) {
        let now = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(now, Ordering::Relaxed);
    }

    fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0
    }

    /// Until it was idle for `idle`, or a head took longer than `head`.
    async fn expired(&self, idle: Duration, head: Duration) {
        loop {
            let mut at = Instant::now() + idle.min(head);
            if self.is_idle() {
                let limit = if self.head_begun.load(Ordering::Relaxed) {
                    head
                } else {
                    idle
                };
                let since = Duration::from_millis(self.since.load(Ordering::Relaxed));
                let end = self.begin + since + limit;
                if end <= Instant::now() {
                    return;
                }
                at = at.min(end);
            }
            tokio::time::sleep_until(at).await;
        }
    }
}

/// All connections, at most so many.
pub struct Connections {
    all: Mutex<Vec<Arc<Watch>>>,
    max: usize,
    gone: Notify,
}

impl Connections {
    /// None yet.
    pub fn new(max: usize) -> Self {
        Connections {
            all: Mutex::new(Vec::new()),
            max,
            gone: Notify::new(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Watch>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until there is room for one more. While there is none, those that have been idle longest are ended: ten thousand
    /// clients that say nothing must not lock out one that does.
    pub async fn room(&self) {
        loop {
            let gone = self.gone.notified();
            {
                let all = self.lock();
                if all.len() < self.max {
                    return;
                }
                let idle = all.iter().filter(|watch| watch.is_idle());
                if let Some(oldest) =
                    idle.min_by_key(|watch| watch.begin + Duration::from_millis(watch.since.load(Ordering::Relaxed)))
                {
                    oldest.unwanted.notify_one();
                }
            }
            gone.await;
        }
    }

    /// Until none is left.
    pub async fn none(&self) {
        loop {
            let gone = self.gone.notified();
            if self.lock().is_empty() {
                return;
            }
            gone.await;
        }
    }

    fn add(&self, watch: Arc<Watch>) {
        self.lock().push(watch);
    }

    fn remove(&self, watch: &Arc<Watch>) {
        let mut all = self.lock();
        if let Some(at) = all.iter().position(|each| Arc::ptr_eq(each, watch)) {
            all.swap_remove(at);
        }
        drop(all);
        self.gone.notify_waiters();
        self.gone.notify_one();
    }
}

/// Takes a connection out of the list however its task ends.
struct Registered {
    service: Arc<Service>,
    watch: Arc<Watch>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.service.connections.remove(&self.watch);
        self.service.counters.disconnected();
    }
}

/// Serve a connection to its end, in a task of its own.
pub fn serve(service: Arc<Service>, stream: TcpStream) {
    let watch = Watch::new();
    service.connections.add(watch.clone());
    service.counters.connected();
    let registered = Registered {
        service: service.clone(),
        watch: watch.clone(),
    };
    tokio::spawn(async move {
        let _registered = registered;
        let _ = stream.set_nodelay(true);
        converse(service, watch, stream).await;
    });
}

async fn converse(service: Arc<Service>, watch: Arc<Watch>, stream: TcpStream) {
    let settings = &service.settings;
    let (idle, head) = (settings.idle_timeout(), settings.header_timeout());
    let mut closing = service.closing.subscribe();
    let builder = builder(settings.max_header_bytes);
    let io = TokioIo::new(Watched {
        stream,
        watch: watch.clone(),
    });
    let answering = {
        let (service, watch) = (service.clone(), watch.clone());
        hyper::service::service_fn(move |request| {
            let (service, watch) = (service.clone(), watch.clone());
            async move { Ok::<_, std::convert::Infallible>(service.answer(request, watch).await) }
        })
    };
    let mut connection = pin!(builder.serve_connection(io, answering));
    let told = async {
        tokio::select! {
            // Also when the sender is gone.
            _ = closing.wait_for(|closing| *closing) => false,
            () = watch.unwanted.notified() => true,
            () = watch.expired(idle, head) => true,
        }
    };
    let at_once = tokio::select! {
        // What ends a connection early is its client's business.
        _ = connection.as_mut() => return,
        at_once = told => at_once,
    };
    connection.as_mut().graceful_shutdown();
    if at_once {
        let _ = tokio::time::timeout(GOODBYE, connection).await;
    } else {
        // A request under way has time-outs of its own; a client that sends half a head has not.
        tokio::select! {
            _ = connection.as_mut() => {}
            () = watch.expired(idle, head) => {}
        }
    }
}

fn builder(max_header_bytes: u32) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .keep_alive(true)
        .max_headers(MAX_HEADERS)
        .max_buf_size((max_header_bytes as usize).max(MIN_BUFFER_BYTES));
    builder
        .http2()
        .max_header_list_size(max_header_bytes)
        .max_concurrent_streams(HTTP2_STREAMS);
    builder
}

/// A stream that says when bytes come.
struct Watched {
    stream: TcpStream,
    watch: Arc<Watch>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, into);
        if let Some(data) = into.filled().get(before..)
            && !data.is_empty()
        {
            self.watch.received(data);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(60);
    const HEAD: Duration = Duration::from_secs(10);

    async fn lives(watch: &Watch) -> Duration {
        let begin = Instant::now();
        watch.expired(IDLE, HEAD).await;
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_after_the_idle_time() {
        assert!(lives(&Watch::new()).await >= IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_head_ends_after_its_own_time() {
        let watch = Watch::new();
        watch.received(b"GET / HT");
        let lived = lives(&watch).await;
        assert!(lived >= HEAD && lived < IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_of_http2_is_no_head() {
        let watch = Watch::new();
        watch.received(b"PRI * HTTP/2.0");
        watch.received(b"ping");
        assert!(lives(&watch).await >= IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_under_way_keeps_it_alive() {
        let watch = Watch::new();
        watch.request_begun();
        let other = watch.clone();
        tokio::spawn(async move {
            tokio::time::sleep(5 * IDLE).await;
            other.request_ended();
        });
        assert!(lives(&watch).await >= 6 * IDLE);
    }

    #[tokio::test]
    async fn the_one_that_was_idle_longest_has_to_go() {
        let connections = Arc::new(Connections::new(2));
        let (busy, idle) = (Watch::new(), Watch::new());
        busy.request_begun();
        connections.add(busy);
        connections.add(idle.clone());
        let (ended, seen) = (connections.clone(), idle.clone());
        tokio::spawn(async move {
            seen.unwanted.notified().await;
            ended.remove(&seen);
        });
        connections.room().await;
        assert_eq!(connections.lock().len(), 1);
    }
}
