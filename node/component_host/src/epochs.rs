//! The clock that interrupts guests that compute.
//!
//! A server is one thread: a guest that loops would hold it. So its code looks at a counter, the epoch, and gives way
//! when it has changed. A thread advances it, and sleeps while no request is being answered: five hundred idle pods
//! must not wake a processor a hundred times a second each.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::Duration;
use wasmtime::Engine;

/// Counts who needs the clock.
#[derive(Clone)]
pub struct Epochs {
    active: Arc<AtomicUsize>,
    thread: Thread,
}

/// The clock runs while one of these is alive.
pub struct Running(Epochs);

impl Epochs {
    /// Start the thread, asleep.
    pub fn start(engine: &Engine, length: Duration) -> std::io::Result<Self> {
        let engine = engine.clone();
        Self::with_tick(length, move || engine.increment_epoch())
    }

    fn with_tick(length: Duration, tick: impl Fn() + Send + 'static) -> std::io::Result<Self> {
        let active = Arc::new(AtomicUsize::new(0));
        let seen = active.clone();
        let thread = std::thread::Builder::new()
            .name("epochs".into())
            .stack_size(64 * 1024)
            .spawn(move || {
                loop {
                    if seen.load(Ordering::SeqCst) == 0 {
                        // Returns at once when `run` came in between.
                        std::thread::park();
                    }
                    std::thread::sleep(length);
                    tick();
                }
            })?
            .thread()
            .clone();
        Ok(Epochs { active, thread })
    }

    /// Keep the clock running.
    pub fn run(&self) -> Running {
        if self.active.fetch_add(1, Ordering::SeqCst) == 0 {
            self.thread.unpark();
        }
        Running(self.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn it_ticks_while_somebody_needs_it() {
        let (sender, ticks) = channel();
        let epochs = Epochs::with_tick(Duration::from_millis(1), move || _ = sender.send(())).unwrap();
        assert!(ticks.recv_timeout(Duration::from_millis(50)).is_err());
        let running = epochs.run();
        for _ in 0..3 {
            ticks.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(running);
        // The one under way, and then none.
        std::thread::sleep(Duration::from_millis(20));
        while ticks.try_recv().is_ok() {}
        assert!(ticks.recv_timeout(Duration::from_millis(50)).is_err());
    }
}
