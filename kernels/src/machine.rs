//! The state of the machine: how long a line takes from core to core and back, and how fast memory
//! is read.
//!
//! Owns a buffer that no cache holds. Never part of a step. The thing to know: on a shared host
//! both figures change within a minute, so figures of two moments are only compared beside them.

use std::fmt;
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use crate::buffer::Buffer;
use crate::device::part;
use crate::team::Apart;

/// Words read: 256 MiB.
const WORDS: usize = 64 << 20;
/// Words of a turn of the reading loop.
const TURN: usize = 128;
/// Passes of reading, of which the fastest counts.
const PASSES: usize = 3;
/// Round trips of a batch, and batches, of which the fastest counts: the system may start a thread
/// on the core of its partner.
const TRIPS: u32 = 2000;
const BATCHES: usize = 15;
/// Polls before a thread that waits lets others run: its partner may have no core.
const POLLS_MAX: u32 = 1000;

/// What is measured, as often as wanted.
pub struct Machine {
    words: Buffer<u32>,
    threads: usize,
}

/// The figures of one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct State {
    /// Nanoseconds until a line that a core wrote was read and written by another core and came
    /// back; `None` where there is one core.
    pub round_trip_ns: Option<f64>,
    /// Gigabytes a second that the threads read together.
    pub read_gbs: f64,
    pub threads: usize,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ns) = self.round_trip_ns {
            write!(f, "core to core and back {ns:.0} ns, ")?;
        }
        let plural = if self.threads == 1 { "" } else { "s" };
        write!(f, "read {:.1} GB/s ({} thread{plural})", self.read_gbs, self.threads)
    }
}

impl Machine {
    /// To be measured with `threads`.
    ///
    /// # Panics
    /// On no threads.
    pub fn new(threads: usize) -> Machine {
        assert!(threads > 0, "no threads");
        let mut words = Buffer::zeroed(WORDS);
        // A page that was never written may be one that all such pages share.
        words.fill(1);
        Machine { words, threads }
    }

    /// Measures, for some hundredths of a second. Whatever else runs is in the figures.
    pub fn state(&self) -> State {
        let fastest = |measure: &dyn Fn() -> f64, times: usize| {
            (0..times).map(|_| measure()).fold(f64::INFINITY, f64::min)
        };
        let trips = (self.threads > 1).then(|| fastest(&round_trip, BATCHES));
        let seconds = fastest(&|| self.read(), PASSES);
        State {
            round_trip_ns: trips,
            read_gbs: size_of_val::<[u32]>(&self.words) as f64 / seconds / 1e9,
            threads: self.threads,
        }
    }

    /// Seconds in which the threads read all words once.
    fn read(&self) -> f64 {
        let share = |index| {
            let turns = self.words[part(WORDS, self.threads, index)].chunks_exact(TURN);
            black_box(turns.fold([0u32; TURN], |mut sums, turn| {
                sums.iter_mut().zip(turn).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                sums
            }));
        };
        let start = Instant::now();
        thread::scope(|scope| {
            (1..self.threads).for_each(|index| {
                scope.spawn(move || share(index));
            });
            share(0);
        });
        start.elapsed().as_secs_f64()
    }
}

/// Nanoseconds of a round trip between two threads.
fn round_trip() -> f64 {
    let ball = Apart(AtomicU32::new(0));
    let wait = |value| {
        let mut polls = 0;
        while ball.0.load(Ordering::Acquire) != value {
            polls += 1;
            if polls % POLLS_MAX == 0 { thread::yield_now() } else { spin_loop() }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for trip in 0..=TRIPS {
                wait(2 * trip + 1);
                ball.0.store(2 * trip + 2, Ordering::Release);
            }
        });
        let play = |trip| {
            ball.0.store(2 * trip + 1, Ordering::Release);
            wait(2 * trip + 2);
        };
        // The first also waits for the thread to begin.
        play(0);
        let start = Instant::now();
        (1..=TRIPS).for_each(play);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(TRIPS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_the_figures_that_its_threads_can_give() {
        for threads in [1, 2] {
            let state = Machine::new(threads).state();
            assert!(state.read_gbs.is_finite() && state.read_gbs > 0.0, "{state:?}");
            assert_eq!(state.round_trip_ns.is_some(), threads > 1, "{state:?}");
            assert!(state.round_trip_ns.is_none_or(|ns| ns.is_finite() && ns > 1.0), "{state:?}");
        }
    }

    #[test]
    fn a_state_is_said_in_a_line() {
        let state = State { round_trip_ns: Some(71.6), read_gbs: 33.94, threads: 2 };
        assert_eq!(state.to_string(), "core to core and back 72 ns, read 33.9 GB/s (2 threads)");
        let state = State { round_trip_ns: None, threads: 1, ..state };
        assert_eq!(state.to_string(), "read 33.9 GB/s (1 thread)");
    }
}
