//! Instances that answer several requests: always with WASI 0.3, by choice with 0.2.
//!
//! wasmtime has a handler for the same (`wasmtime_wasi_http::handler::ProxyHandler`), made for many threads. Here there is
//! one, so the queue is another: requests go to few instances, whose memory is warm, and never wait for one whose guest
//! computes after its answer.

mod instance;
mod queue;

use crate::counters::Counters;
use crate::epochs::Epochs;
use crate::guest::{Guest, Maker};
use crate::outgoing::trace_of;
use crate::server::answer::{Failure, one_line};
use crate::server::exchange::Exchange;
use futures::channel::oneshot;
use http::{Request, Response};
use instance::{Job, Limits};
use queue::{Make, Queue, Seat};
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use wasmtime::Store;
use wasmtime_wasi_http::WasiBody;
use wasmtime_wasi_http::handler::{ExpirationError, Proxy, ProxyPre};

/// Instances for each request that may be under way, besides `MORE_INSTANCES`: some go on after their answers, or wait for
/// a request.
const INSTANCES_PER_REQUEST: usize = 2;
const MORE_INSTANCES: usize = 16;
/// Requests that a 0.3 instance answers at the same time, as `wasmtime serve` does. One of 0.2 answers one.
const AT_ONCE_P3: usize = 16;

/// Answers requests.
pub struct Reused(Arc<Instances>);

/// The instances, and what makes them.
struct Instances {
    queue: Queue<Job>,
    limits: Limits,
    pre: ProxyPre<Guest>,
    maker: Maker,
    epochs: Epochs,
    counters: Counters,
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
        Reused(Arc::new(Instances {
            queue: Queue::new(max_concurrent * INSTANCES_PER_REQUEST + MORE_INSTANCES),
            limits: Limits {
                reuse,
                at_once,
                request_timeout,
            },
            pre,
            maker,
            epochs,
            counters,
        }))
    }

    /// The answer of whichever instance has time, or of a new one.
    pub async fn answer(
        &self,
        request: Request<WasiBody>,
        exchange: Arc<Exchange>,
    ) -> Result<Response<WasiBody>, Failure> {
        let (sender, answer) = oneshot::channel();
        let job = Job {
            trace: trace_of(request.headers()),
            request,
            exchange: exchange.clone(),
            answer: sender,
        };
        self.0.make_if(self.0.queue.push(job));
        let answer = tokio::select! {
            answer = answer => answer,
            // The second line of defence: an instance that is being made, or a guest that never gives way.
            () = exchange.deadline.passed() => return Err(Failure::TimedOut),
        };
        match answer {
            Ok(Ok(answer)) => {
                exchange.answered();
                Ok(answer)
            }
            Ok(Err(error)) => Err(why(&error, &exchange)),
            // It was dropped with the instance.
            Err(oneshot::Canceled) => Err(Failure::Failed(match exchange.failure.get() {
                Some(reason) => reason.clone(),
                None => "the instance that had it has ended".into(),
            })),
        }
    }
}

fn why(error: &wasmtime::Error, exchange: &Exchange) -> Failure {
    if error.is::<ExpirationError>() {
        return Failure::TimedOut;
    }
    if let Some(reason) = exchange.failure.get() {
        return Failure::Failed(reason.clone());
    }
    if let Some(code) = error.downcast_ref::<wasmtime_wasi_http::p2::bindings::http::types::ErrorCode>() {
        return Failure::Code(code.clone().into());
    }
    if let Some(code) = error.downcast_ref::<wasmtime_wasi_http::p3::bindings::http::types::ErrorCode>() {
        return Failure::Code(code.clone().into());
    }
    Failure::Failed(one_line(error))
}

impl Instances {
    fn make_if(self: &Arc<Self>, make: Make) {
        if make.0 {
            tokio::spawn(self.clone().live());
        }
    }

    /// One instance's life.
    async fn live(self: Arc<Self>) {
        // Dropped after the instance, which may compute after its answers.
        let _running = self.epochs.run();
        let mut being = Being {
            instances: &self,
            waited: false,
            made: None,
        };
        let made = {
            let mut made = pin!(self.make());
            poll_fn(|cx| {
                let polled = made.as_mut().poll(cx);
                if polled.is_pending() {
                    being.waits();
                }
                polled
            })
            .await
        };
        match made {
            Ok((store, proxy)) => {
                let seat = being.made();
                instance::serve(store, proxy, self.limits, &self, &seat).await;
            }
            Err(error) => being.failed(&error),
        }
    }

    async fn make(&self) -> wasmtime::Result<(Store<Guest>, Proxy)> {
        let mut store = self.maker.store()?;
        let made = self.pre.instantiate_async(&mut store);
        let proxy = tokio::time::timeout(self.limits.request_timeout, made)
            .await
            .map_err(|_| wasmtime::format_err!("the instance was not made in time"))??;
        self.counters.instance();
        Ok((store, proxy))
    }
}

/// Tells the queue how an instance is doing, and of its end however it comes.
struct Being<'a> {
    instances: &'a Arc<Instances>,
    waited: bool,
    made: Option<Arc<Seat>>,
}

impl Being<'_> {
    fn waits(&mut self) {
        if !self.waited {
            self.waited = true;
            self.instances.make_if(self.instances.queue.making_waits());
        }
    }

    fn made(&mut self) -> Arc<Seat> {
        self.made.insert(self.instances.queue.made(self.waited)).clone()
    }

    /// The request that waits longest hears why.
    fn failed(self, error: &wasmtime::Error) {
        if let Some(job) = self.instances.queue.take() {
            let _ = job.answer.send(Err(wasmtime::format_err!("{}", one_line(error))));
        }
    }
}

impl Drop for Being<'_> {
    fn drop(&mut self) {
        let make = match &self.made {
            Some(seat) => self.instances.queue.leave(seat),
            None => self.instances.queue.not_made(self.waited),
        };
        // Not while the server ends: its runtime takes no more tasks.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.instances.make_if(make);
        }
    }
}
