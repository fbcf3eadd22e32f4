//! One instance: it takes requests from the queue, answers several at once, and comes to an end.

use crate::guest::Guest;
use crate::server::answer::{log, one_line};
use crate::server::exchange::{Deadline, Exchange};
use crate::server::reused::Instances;
use crate::server::reused::queue::Seat;
use futures::channel::oneshot;
use futures::stream::{FuturesUnordered, StreamExt};
use http::{HeaderMap, Request, Response};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};
use wasmtime::component::Accessor;
use wasmtime::{AsContextMut, Store};
use wasmtime_wasi_http::handler::{Prepared, Proxy};
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

/// How long an instance without a request is kept.
const KEEP_IDLE: Duration = Duration::from_secs(2);

/// A request that waits for an instance.
pub struct Job {
    /// As it came.
    pub request: Request<WasiBody>,
    /// Its life.
    pub exchange: Arc<Exchange>,
    /// For the guest's own requests.
    pub trace: HeaderMap,
    /// Where the answer goes.
    pub answer: oneshot::Sender<wasmtime::Result<Response<WasiBody>>>,
}

/// How much one instance does.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Requests in its life.
    pub reuse: usize,
    /// Requests at the same time.
    pub at_once: usize,
    /// Of one request.
    pub request_timeout: Duration,
}

/// Where an instance stands; its guest's side and the queue's side share it.
struct Turn {
    limits: Limits,
    /// The instance came to look at the queue.
    reached: AtomicBool,
    /// Its guest waits for something: a further request would not wait for the guest.
    rests: AtomicBool,
    phase: Mutex<Phase>,
    /// Moved on by each piece of an answer's body.
    activity: Arc<Deadline>,
    current: Current,
}

#[derive(Clone, Copy)]
struct Phase {
    idle: bool,
    since: Instant,
}

impl Turn {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, idle: bool) {
        let since = Instant::now();
        *self.phase() = Phase { idle, since };
    }

    /// Until when it may go on without anything new.
    fn until(&self) -> Instant {
        let Phase { idle, since } = *self.phase();
        if idle {
            since + KEEP_IDLE
        } else {
            (since + self.limits.request_timeout).max(self.activity.at())
        }
    }

    /// It has done nothing for too long. The timer is moved only where it would come too late: this is asked at every turn.
    fn expired(&self, cx: &mut Context<'_>, sleep: &mut Option<Pin<Box<Sleep>>>) -> bool {
        let until = self.until();
        let sleep = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        if sleep.deadline() > until {
            sleep.as_mut().reset(until);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if sleep.deadline() >= until {
                return true;
            }
            sleep.as_mut().reset(until);
        }
        false
    }
}

/// Answer requests until the instance has had its number of them, was idle for long, fails, or goes on for too long.
pub async fn serve(store: Store<Guest>, proxy: Proxy, limits: Limits, instances: &Arc<Instances>, seat: &Arc<Seat>) {
    let turn = Turn {
        limits,
        reached: AtomicBool::new(false),
        rests: AtomicBool::new(true),
        phase: Mutex::new(Phase {
            idle: true,
            since: Instant::now(),
        }),
        activity: Deadline::new(Duration::ZERO),
        current: Current::default(),
    };
    let mut held = Held {
        current: &turn.current,
        store: Some(store),
    };
    let Some(store) = held.store.as_mut() else { return };
    let result = {
        let mut guest =
            pin!(store.run_concurrent(async |accessor| answer(accessor, &proxy, &turn, instances, seat).await));
        let mut sleep = None;
        poll_fn(|cx| {
            turn.reached.store(false, Ordering::Relaxed);
            let mut polled = guest.as_mut().poll(cx);
            if polled.is_pending() {
                if turn.expired(cx, &mut sleep) {
                    let idle = turn.phase().idle;
                    let why = || wasmtime::format_err!("guest timed out");
                    return Poll::Ready(if idle { Ok(Ok(())) } else { Err(why()) });
                }
                // What was taken waits: one more. A guest that computes does not come to the queue, so it takes none.
                while polled.is_pending() && !turn.rests.swap(true, Ordering::Relaxed) {
                    turn.reached.store(false, Ordering::Relaxed);
                    polled = guest.as_mut().poll(cx);
                }
            }
            if polled.is_pending() {
                instances.make_if(instances.queue.turn_ends(seat, turn.reached.load(Ordering::Relaxed)));
            }
            polled
        })
        .await
    };
    held.end(result.flatten());
}

/// Within the store: take requests while there is room, until there will be no more.
async fn answer(
    accessor: &Accessor<Guest>,
    proxy: &Proxy,
    turn: &Turn,
    instances: &Instances,
    seat: &Arc<Seat>,
) -> wasmtime::Result<()> {
    let handler = match proxy {
        Proxy::P2(guest) => *guest.wasi_http_incoming_handler().func_handle().func(),
        Proxy::P3(guest) => *guest.wasi_http_handler().func_handle().func(),
    };
    let mut answering = FuturesUnordered::new();
    let (mut taken, mut wanted) = (0, true);
    poll_fn(|cx| {
        loop {
            turn.reached.store(true, Ordering::Relaxed);
            // First: what has run out of time ends the instance, before it is given more.
            match answering.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(in_time))) => {
                    wanted = wanted && in_time;
                    if answering.is_empty() {
                        turn.enter(false);
                    }
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) | Poll::Pending => {}
            }
            let ready = accessor.poll_ready_for_concurrent_call(handler, cx).is_ready();
            wanted = wanted && taken < turn.limits.reuse;
            let room =
                answering.is_empty() || answering.len() < turn.limits.at_once && turn.rests.load(Ordering::Relaxed);
            let able = wanted && ready && room;
            if able && let Some(job) = instances.queue.take() {
                taken += 1;
                answering.push(turn.begin(accessor, proxy, job));
                continue;
            }
            instances.queue.stand(seat, able, cx.waker());
            if !answering.is_empty() || accessor.poll_no_interesting_tasks(cx).is_pending() {
                return Poll::Pending;
            }
            if !(wanted && ready) {
                return Poll::Ready(Ok(()));
            }
            if !turn.phase().idle {
                turn.enter(true);
            }
            return Poll::Pending;
        }
    })
    .await
}

impl Turn {
    /// The guest is called when this is polled; whether it answered in time.
    fn begin<'a>(
        &self,
        accessor: &'a Accessor<Guest>,
        proxy: &'a Proxy,
        job: Job,
    ) -> impl Future<Output = wasmtime::Result<bool>> + Send + use<'a> {
        // Taken for one that computes until it is seen to wait.
        self.rests.store(false, Ordering::Relaxed);
        self.enter(false);
        let exchange = job.exchange;
        let prepared = accessor.with(|mut access| {
            let prepared = Prepared::new(
                access.as_context_mut(),
                proxy,
                job.request,
                WasiHttpView::http,
                job.answer,
            )?;
            // With several requests at once the newest is followed: which of them a guest works for is not known here.
            access.data_mut().hooks.follow(job.trace);
            wasmtime::error::Ok(prepared)
        });
        let _ = exchange.instance.set(self.activity.clone());
        self.current.add(&exchange);
        async move { prepared?.run(accessor, exchange.deadline.passed()).await }
    }
}

/// The requests of one instance: those under way, and those that came to an end after the last began.
#[derive(Default)]
struct Current(Mutex<Vec<Arc<Exchange>>>);

impl Current {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Exchange>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, exchange: &Arc<Exchange>) {
        let mut all = self.lock();
        all.retain(|each| !each.is_over());
        all.push(exchange.clone());
    }

    /// They hear why. Whether somebody was told.
    fn failed(&self, reason: &str) -> bool {
        let mut told = false;
        for exchange in self.lock().drain(..) {
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
        told
    }
}

/// A store whose requests hear of its end before it is dropped: with it go the bodies of their answers.
struct Held<'a> {
    current: &'a Current,
    store: Option<Store<Guest>>,
}

impl Held<'_> {
    fn end(mut self, result: wasmtime::Result<()>) {
        if let Err(error) = result {
            let reason = one_line(&error);
            // If none is left that failed of it, the log hears.
            if !self.current.failed(&reason) {
                log("an instance ended", &reason);
            }
        }
        self.store = None;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.store.is_some() {
            // A panic of the host, or the end of the server.
            self.current.failed("the instance that had it has ended");
        }
    }
}
