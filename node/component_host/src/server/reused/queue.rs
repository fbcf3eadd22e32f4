//! Which instance takes the next request.
//!
//! Requests wait in one queue, and an instance takes from it whenever it can take more. One instance at a time is called
//! to the queue: the one that was used last, whose memory is warm; only when none is free is one made. So a burst goes
//! to few instances, and one that never comes back to the queue (its guest computes) is given nothing: it is passed over
//! when its turn ends without it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// The requests, and who may take them.
pub struct Queue<J> {
    state: Mutex<State<J>>,
    max_instances: usize,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// The last was used last.
    free: Vec<Arc<Seat>>,
    /// One was called, and its turn has not come yet.
    called: bool,
    /// Instances that are being made, and those of them that have not had to wait yet.
    making: usize,
    making_now: usize,
    /// Being made and made.
    instances: usize,
}

/// What the queue knows of one instance.
#[derive(Default)]
pub struct Seat(Mutex<Standing>);

#[derive(Default)]
struct Standing {
    called: bool,
    free: bool,
    waker: Option<Waker>,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the caller has to make an instance now ([`Queue::made`], [`Queue::not_made`]).
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct Make(pub bool);

impl<J> Queue<J> {
    /// With at most so many instances at a time.
    pub fn new(max_instances: usize) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            free: Vec::new(),
            called: false,
            making: 0,
            making_now: 0,
            instances: 0,
        };
        Queue {
            state: Mutex::new(state),
            max_instances,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has come.
    pub fn push(&self, job: J) -> Make {
        let mut state = self.lock();
        state.jobs.push_back(job);
        self.call(&mut state)
    }

    /// The next request.
    pub fn take(&self) -> Option<J> {
        self.lock().jobs.pop_front()
    }

    /// An instance that is being made has to wait: the requests need not.
    pub fn making_waits(&self) -> Make {
        let mut state = self.lock();
        state.making_now -= 1;
        self.call(&mut state)
    }

    /// An instance that had to be made is there. `waited`: `making_waits` was called.
    pub fn made(&self, waited: bool) -> Arc<Seat> {
        let mut state = self.lock();
        state.making -= 1;
        state.making_now -= usize::from(!waited);
        // It looks at the queue in its first turn, like one that was called.
        let seat = Arc::new(Seat::default());
        if !state.called {
            state.called = true;
            seat.lock().called = true;
        }
        seat
    }

    /// It cannot be made.
    pub fn not_made(&self, waited: bool) -> Make {
        let mut state = self.lock();
        state.making -= 1;
        state.making_now -= usize::from(!waited);
        state.instances -= 1;
        self.call(&mut state)
    }

    /// An instance has found the queue empty, or can take no more (`able`).
    pub fn stand(&self, seat: &Arc<Seat>, able: bool, waker: &Waker) {
        let mut standing = seat.lock();
        if able && !standing.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            standing.waker = Some(waker.clone());
        }
        if standing.free == able {
            return;
        }
        standing.free = able;
        if !standing.called {
            drop(standing);
            self.list(seat, able);
        }
    }

    fn list(&self, seat: &Arc<Seat>, able: bool) {
        let mut state = self.lock();
        if able {
            state.free.push(seat.clone());
        } else {
            state.free.retain(|each| !Arc::ptr_eq(each, seat));
        }
    }

    /// The turn of an instance ends. Unless it `reached` the queue its guest computes, or waits and lets nothing else run.
    pub fn turn_ends(&self, seat: &Arc<Seat>, reached: bool) -> Make {
        let mut standing = seat.lock();
        let (called, was_free) = (std::mem::take(&mut standing.called), standing.free);
        standing.free = was_free && reached;
        let free = standing.free;
        drop(standing);
        if !called {
            if was_free && !free {
                self.list(seat, false);
            }
            return Make(false);
        }
        let mut state = self.lock();
        state.called = false;
        if free {
            state.free.push(seat.clone());
        }
        self.call(&mut state)
    }

    /// An instance has ended.
    pub fn leave(&self, seat: &Arc<Seat>) -> Make {
        let mut state = self.lock();
        state.instances -= 1;
        state.free.retain(|each| !Arc::ptr_eq(each, seat));
        if std::mem::take(&mut seat.lock().called) {
            state.called = false;
        }
        self.call(&mut state)
    }

    /// Somebody for the queue, unless somebody comes anyway.
    fn call(&self, state: &mut State<J>) -> Make {
        if state.jobs.is_empty() || state.called {
            return Make(false);
        }
        if let Some(seat) = state.free.pop() {
            state.called = true;
            let mut standing = seat.lock();
            standing.called = true;
            if let Some(waker) = &standing.waker {
                waker.wake_by_ref();
            }
            return Make(false);
        }
        let more = state.making_now == 0 && state.making < state.jobs.len() && state.instances < self.max_instances;
        if more {
            state.making += 1;
            state.making_now += 1;
            state.instances += 1;
        }
        Make(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Woken {
        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// An instance that has had its first turn and is free.
    fn free(queue: &Queue<u32>) -> (Arc<Seat>, Arc<Woken>) {
        assert_eq!(queue.push(0), Make(true));
        let seat = queue.made(false);
        assert_eq!(queue.take(), Some(0));
        let woken = Arc::new(Woken::default());
        turn(queue, &seat, &woken);
        (seat, woken)
    }

    /// It finds the queue empty.
    fn turn(queue: &Queue<u32>, seat: &Arc<Seat>, woken: &Arc<Woken>) {
        queue.stand(seat, true, &woken.clone().into());
        assert_eq!(queue.turn_ends(seat, true), Make(false));
    }

    #[test]
    fn a_burst_is_one_instance_while_one_is_on_its_way() {
        let queue = Queue::new(9);
        assert_eq!(queue.push(1), Make(true));
        assert_eq!(queue.push(2), Make(false));
        let seat = queue.made(false);
        assert_eq!(queue.push(3), Make(false));
        assert_eq!((queue.take(), queue.take()), (Some(1), Some(2)));
        // It cannot take the third.
        queue.stand(&seat, false, Waker::noop());
        assert_eq!(queue.turn_ends(&seat, true), Make(true));
    }

    #[test]
    fn the_one_that_was_used_last_is_called_and_only_that_one() {
        let queue = Queue::new(9);
        let (busy, first) = free(&queue);
        queue.stand(&busy, false, &first.clone().into());
        let (_last, second) = free(&queue);
        turn(&queue, &busy, &first);
        queue.stand(&busy, false, &first.clone().into());
        turn(&queue, &busy, &first);
        assert_eq!(queue.push(1), Make(false));
        assert_eq!(queue.push(2), Make(false));
        assert_eq!((first.count(), second.count()), (1, 0));
    }

    #[test]
    fn one_that_does_not_come_to_the_queue_is_passed_over_and_given_nothing_more() {
        let queue = Queue::new(9);
        let (looping, woken) = free(&queue);
        assert_eq!(queue.push(1), Make(false));
        assert_eq!(woken.count(), 1);
        assert_eq!(queue.turn_ends(&looping, false), Make(true));
        let other = queue.made(false);
        assert_eq!(queue.take(), Some(1));
        let second = Arc::new(Woken::default());
        turn(&queue, &other, &second);
        for number in 1..4 {
            assert_eq!(queue.push(9), Make(false));
            assert_eq!((woken.count(), second.count()), (1, number));
            assert_eq!(queue.take(), Some(9));
            turn(&queue, &other, &second);
        }
        // It is back.
        turn(&queue, &looping, &woken);
        assert_eq!(queue.push(1), Make(false));
        assert_eq!(woken.count(), 2);
    }

    #[test]
    fn instances_are_bounded_by_their_number_and_by_the_requests_that_wait() {
        let queue = Queue::new(2);
        assert_eq!(queue.push(1), Make(true));
        // One request needs no second instance, however long the first takes.
        assert_eq!(queue.making_waits(), Make(false));
        assert_eq!(queue.push(2), Make(true));
        assert_eq!(queue.making_waits(), Make(false));
        assert_eq!(queue.push(3), Make(false));
        assert_eq!(queue.take(), Some(1));
        assert_eq!(queue.not_made(true), Make(true));
    }

    #[test]
    fn the_end_of_one_that_was_called_calls_another() {
        let queue = Queue::new(1);
        let (seat, woken) = free(&queue);
        assert_eq!(queue.push(1), Make(false));
        assert_eq!(woken.count(), 1);
        assert_eq!(queue.leave(&seat), Make(true));
        let seat = queue.made(false);
        assert_eq!(queue.leave(&seat), Make(true));
    }
}
