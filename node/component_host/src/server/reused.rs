//! Instances that answer several requests: always with WASI 0.3, by choice with 0.2.

use crate::counters::Counters;
use crate::epochs::{Epochs, Running};
use crate::guest::{Guest, Maker};
use crate::server::answer::{Failure, log, one_line};
use crate::server::exchange::{Deadline, Exchange};
use http::{HeaderMap, Request, Response};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use wasmtime::component::TaskGroupId;
use wasmtime::{Store, StoreContextMut};
use wasmtime_wasi_http::handler::{
    ExpirationError, HandlerState, Instance, InstantiationError, ProxyHandler, ProxyPre, ShouldAccept,
    TrapOrPanicError, WorkerExpiration, WorkerState, WorkerStatus,
};
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

/// How long an instance without a request is kept.
const KEEP_IDLE: Duration = Duration::from_secs(2);
/// Instances for each request that may be under way, besides `MORE_INSTANCES`: some go on after their answers, or wait for
/// a request.
const INSTANCES_PER_REQUEST: usize = 2;
const MORE_INSTANCES: usize = 16;
/// Requests that a 0.3 instance answers at the same time, as `wasmtime serve` does. One of 0.2 answers one.
const AT_ONCE_P3: usize = 16;

/// Answers requests.
pub struct Reused {
    handler: ProxyHandler<Host>,
}

impl Reused {
    /// `reuse`: requests per instance.
    pub fn new(
        pre: ProxyPre<Guest>,
        maker: Maker,
        epochs: Epochs,
        counters: Counters,
        reuse: usize,
        request_timeout: Duration,
        max_concurrent: usize,
    ) -> Self {
        let at_once = match pre {
            ProxyPre::P2(_) => 1,
            ProxyPre::P3(_) => AT_ONCE_P3,
        };
        Reused {
            handler: ProxyHandler::new(Host {
                pre,
                maker,
                epochs,
                counters,
                reuse,
                at_once,
                request_timeout,
                places: Arc::new(Semaphore::new(max_concurrent * INSTANCES_PER_REQUEST + MORE_INSTANCES)),
            }),
        }
    }

    /// The answer of whichever instance has time, or of a new one.
    pub async fn answer(
        &self,
        request: Request<WasiBody>,
        exchange: Arc<Exchange>,
    ) -> Result<Response<WasiBody>, Failure> {
        let data = RequestData {
            exchange: exchange.clone(),
            headers: request.headers().clone(),
        };
        let answer = self.handler.handle(data, request);
        let answer = tokio::select! {
            answer = answer => answer,
            // The second line of defence: an instance that is being made, or a guest that never gives way.
            () = exchange.deadline.passed() => return Err(Failure::TimedOut),
        };
        answer
            .inspect(|_| exchange.answered())
            .map_err(|error| why(&error, &exchange))
    }
}

fn why(error: &wasmtime::Error, exchange: &Exchange) -> Failure {
    if error.is::<ExpirationError>() {
        return Failure::TimedOut;
    }
    if let Some(reason) = exchange.failure.get() {
        return Failure::Failed(reason.clone());
    }
    if let Some(failed) = error.downcast_ref::<InstantiationError<RequestData>>() {
        return Failure::Failed(one_line(&failed.error));
    }
    if error.is::<TrapOrPanicError>() {
        return Failure::Failed("the instance that had it has ended".into());
    }
    if let Some(code) = error.downcast_ref::<wasmtime_wasi_http::p2::bindings::http::types::ErrorCode>() {
        return Failure::Code(code.clone().into());
    }
    if let Some(code) = error.downcast_ref::<wasmtime_wasi_http::p3::bindings::http::types::ErrorCode>() {
        return Failure::Code(code.clone().into());
    }
    Failure::Failed(one_line(error))
}

struct RequestData {
    exchange: Arc<Exchange>,
    headers: HeaderMap,
}

struct Host {
    pre: ProxyPre<Guest>,
    maker: Maker,
    epochs: Epochs,
    counters: Counters,
    reuse: usize,
    at_once: usize,
    request_timeout: Duration,
    places: Arc<Semaphore>,
}

impl HandlerState for Host {
    type StoreData = Guest;
    type WorkerExpiration = Expiration;
    type WorkerState = Worker;

    async fn instantiate(&self) -> wasmtime::Result<Instance<Guest, Expiration, Worker>> {
        // Waited for: the request has a time-out, and instances come to an end.
        let place = self.places.clone().acquire_owned().await?;
        let running = self.epochs.run();
        let mut store = self.maker.store()?;
        let made = self.pre.instantiate_async(&mut store);
        let proxy = tokio::time::timeout(self.request_timeout, made)
            .await
            .map_err(|_| wasmtime::format_err!("the instance was not made in time"))??;
        self.counters.instance();
        let activity = Deadline::new(Duration::ZERO);
        Ok(Instance {
            store,
            proxy,
            view: WasiHttpView::http,
            expiration: Expiration {
                request_timeout: self.request_timeout,
                activity: activity.clone(),
                sleep: None,
            },
            state: Worker {
                reuse: self.reuse,
                at_once: self.at_once,
                activity,
                current: Mutex::default(),
                _running: running,
                _place: place,
            },
        })
    }
}

/// When an instance that does not come to an end is ended.
struct Expiration {
    request_timeout: Duration,
    /// Moved on by each piece of an answer's body.
    activity: Arc<Deadline>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl WorkerExpiration for Expiration {
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>, status: WorkerStatus, start: Instant) -> Poll<()> {
        let start = tokio::time::Instant::from_std(start);
        let at = match status {
            WorkerStatus::Idle => start + KEEP_IDLE,
            WorkerStatus::Requests | WorkerStatus::PostReturn => (start + self.request_timeout).max(self.activity.at()),
        };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        sleep.as_mut().reset(at);
        sleep.as_mut().poll(cx)
    }
}

/// One instance.
struct Worker {
    reuse: usize,
    at_once: usize,
    activity: Arc<Deadline>,
    /// Those under way, and those that came to an end after the last began.
    current: Mutex<Vec<Arc<Exchange>>>,
    /// For as long as the instance lives: it may compute after its answers, too.
    _running: Running,
    _place: OwnedSemaphorePermit,
}

impl Worker {
    /// Its requests hear why; if none is left that failed of it, the log does.
    fn failed(&self, reason: &str) {
        let mut told = false;
        for exchange in self.current().drain(..) {
            if exchange.is_over() {
                told = told || exchange.is_logged();
                continue;
            }
            told = true;
            if exchange.answered.load(Ordering::Relaxed) {
                exchange.broke(reason);
            } else {
                let _ = exchange.failure.set(reason.to_owned());
            }
        }
        // Idle ones that end with the server are dropped with its runtime, which wasmtime takes for a panic.
        if !told && reason != "worker panicked" {
            log("an instance ended", reason);
        }
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Exchange>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorkerState for Worker {
    type StoreData = Guest;
    type RequestData = RequestData;

    fn should_accept_request(&self, concurrent: usize, total: usize) -> ShouldAccept {
        if total >= self.reuse {
            ShouldAccept::Never
        } else if concurrent >= self.at_once {
            ShouldAccept::No
        } else {
            ShouldAccept::Yes
        }
    }

    fn on_request_start(
        &self,
        mut store: StoreContextMut<'_, Guest>,
        data: RequestData,
        _: TaskGroupId,
    ) -> Pin<Box<dyn Future<Output = ()> + 'static + Send + Sync>> {
        // With several requests at once the newest is followed: which of them a guest works for is not known here.
        store.data_mut().hooks.follow(&data.headers);
        let _ = data.exchange.instance.set(self.activity.clone());
        let mut current = self.current();
        current.retain(|each| !each.is_over());
        current.push(data.exchange.clone());
        let exchange = data.exchange;
        Box::pin(async move { exchange.deadline.passed().await })
    }

    fn drop(&self, store: Store<Guest>, result: wasmtime::Result<()>) {
        if let Err(error) = result {
            self.failed(&one_line(&error));
        }
        // After the requests know: with the store go the bodies of their answers.
        drop(store);
    }
}
