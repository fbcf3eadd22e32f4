//! What the node's metrics read of a server: numbers in a page of memory that both map.
//!
//! The layout is read by `wasilet_node`'s `component_host/counters.py`. Nothing but numbers leave this way, so a guest
//! that broke out could write wrong ones and no more.

use crate::ffi;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LAYOUT: u64 = 1;
const AT_LAYOUT: usize = 0;
const AT_IN_FLIGHT: usize = 1;
const AT_CONNECTIONS: usize = 2;
const AT_INSTANCES: usize = 3;
const AT_DURATION_MICROSECONDS: usize = 4;
const AT_BUCKETS: usize = 16;
const AT_STATUS: usize = 32;
const STATUSES: std::ops::Range<u16> = 100..600;
/// 532 numbers: what `counters.py` maps.
const LENGTH: usize = AT_STATUS + (STATUSES.end - STATUSES.start) as usize;
/// Upper ends of the histogram's buckets, in microseconds; one more bucket has no end.
const BUCKETS: [u64; 13] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000, 30_000_000,
];

/// One per server.
#[derive(Clone, Copy)]
pub struct Counters(&'static [AtomicU64]);

impl Counters {
    /// In a file of `LENGTH` numbers; -1: in memory of this process.
    pub fn open(descriptor: i32) -> Result<Self, String> {
        let numbers = if descriptor < 0 {
            (0..LENGTH).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak()
        } else {
            ffi::map_counters(descriptor, LENGTH).map_err(|error| format!("cannot map the counters: {error}"))?
        };
        numbers[AT_LAYOUT].store(LAYOUT, Ordering::Relaxed);
        Ok(Counters(numbers))
    }

    /// A request begins.
    pub fn begin(&self) {
        self.0[AT_IN_FLIGHT].fetch_add(1, Ordering::Relaxed);
    }

    /// A request has its whole answer, or its client has gone.
    pub fn end(&self, status: u16, duration: Duration) {
        self.0[AT_IN_FLIGHT].fetch_sub(1, Ordering::Relaxed);
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.0[AT_DURATION_MICROSECONDS].fetch_add(microseconds, Ordering::Relaxed);
        let bucket = BUCKETS.partition_point(|end| *end < microseconds);
        self.0[AT_BUCKETS + bucket].fetch_add(1, Ordering::Relaxed);
        if STATUSES.contains(&status) {
            self.0[AT_STATUS + usize::from(status - STATUSES.start)].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection comes.
    pub fn connected(&self) {
        self.0[AT_CONNECTIONS].fetch_add(1, Ordering::Relaxed);
    }

    /// A connection goes.
    pub fn disconnected(&self) {
        self.0[AT_CONNECTIONS].fetch_sub(1, Ordering::Relaxed);
    }

    /// An instance was made.
    pub fn instance(&self) {
        self.0[AT_INSTANCES].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(counters: Counters, at: usize) -> u64 {
        counters.0[at].load(Ordering::Relaxed)
    }

    #[test]
    fn a_request_is_counted_by_status_and_duration() {
        let counters = Counters::open(-1).unwrap();
        counters.begin();
        assert_eq!(value(counters, AT_IN_FLIGHT), 1);
        counters.end(504, Duration::from_millis(1));
        counters.begin();
        counters.end(999, Duration::from_secs(3600));
        assert_eq!(value(counters, AT_IN_FLIGHT), 0);
        assert_eq!(value(counters, AT_STATUS + 404), 1);
        assert_eq!(value(counters, AT_BUCKETS + 1), 1);
        assert_eq!(value(counters, AT_BUCKETS + BUCKETS.len()), 1);
        assert_eq!(LENGTH, 532);
    }
}
