//! One request and its answer: how long they may still take, and what has become of them.

use crate::server::answer::log;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// An instant that tasks share and move.
#[derive(Debug)]
pub struct Deadline(AtomicU64);

impl Deadline {
    /// `after` from now.
    pub fn new(after: Duration) -> Arc<Self> {
        let deadline = Deadline(AtomicU64::new(0));
        deadline.set(after);
        Arc::new(deadline)
    }

    /// Now it is `after` from now.
    pub fn set(&self, after: Duration) {
        let at = START.elapsed().saturating_add(after).as_millis();
        self.0.store(u64::try_from(at).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// When it is.
    pub fn at(&self) -> Instant {
        *START + Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// Until it has passed, wherever it is moved meanwhile.
    pub async fn passed(&self) {
        loop {
            let at = self.at();
            if at <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(at).await;
        }
    }
}

/// Shared by the connection, the guest's task and the answer's body.
#[derive(Debug)]
pub struct Exchange {
    /// Of the guest: to answer, then to go on with its body, then to come to an end.
    pub deadline: Arc<Deadline>,
    /// For messages: method and path.
    pub what: String,
    /// The head of the answer is there.
    pub answered: AtomicBool,
    /// Why the instance that had it has ended. A body that is under way then ends with an error, never as if whole.
    pub failure: OnceLock<String>,
    logged: AtomicBool,
    over: AtomicBool,
    /// Of the instance that answers, where it answers several.
    pub instance: OnceLock<Arc<Deadline>>,
    request_timeout: Duration,
    idle_timeout: Duration,
}

impl Exchange {
    /// A request has come.
    pub fn new(what: String, request_timeout: Duration, idle_timeout: Duration) -> Arc<Self> {
        Arc::new(Exchange {
            deadline: Deadline::new(request_timeout),
            what,
            answered: AtomicBool::new(false),
            failure: OnceLock::new(),
            logged: AtomicBool::new(false),
            over: AtomicBool::new(false),
            instance: OnceLock::new(),
            request_timeout,
            idle_timeout,
        })
    }

    /// One line in the log, whatever else goes wrong because of it.
    pub fn log(&self, reason: &str) {
        if !self.logged.swap(true, Ordering::Relaxed) {
            log(&self.what, reason);
        }
    }

    /// Nothing of it is under way any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Whether the log knows that something went wrong.
    pub fn is_logged(&self) -> bool {
        self.logged.load(Ordering::Relaxed)
    }

    /// The head of the answer is out, and no more will come. To be called before the guest's store is dropped.
    pub fn broke(&self, reason: &str) {
        self.log(&format!("after the head of the answer: {reason}"));
        let _ = self.failure.set(reason.to_owned());
    }

    /// Something of the answer came.
    pub fn moved(&self) {
        self.extend(self.idle_timeout);
    }

    /// The answer is whole or its reader has gone: what the guest still does is bounded as a request is.
    pub fn ended(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.extend(self.request_timeout);
    }

    /// The head of the answer is there.
    pub fn answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
        self.moved();
    }

    fn extend(&self, after: Duration) {
        self.deadline.set(after);
        if let Some(instance) = self.instance.get() {
            instance.set(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_moves_is_waited_for() {
        let deadline = Deadline::new(Duration::from_secs(1));
        let moved = deadline.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(900)).await;
            moved.set(Duration::from_secs(5));
        });
        let begin = Instant::now();
        deadline.passed().await;
        assert!(begin.elapsed() >= Duration::from_millis(5800));
    }
}
