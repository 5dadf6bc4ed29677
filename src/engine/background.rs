//! Work that the engine thread does when requests leave it time: training.
//!
//! Owns when a piece of it runs. Never knows what a piece computes. The thing to know: a request
//! waits for one piece at most, and pieces beside running requests follow `Pacing`.

use polylora_kernels::Device;
use std::collections::VecDeque;
use std::time::Duration;

/// A piece beside running requests makes a gap between two tokens longer. By so much of the step
/// before it, it may do so as often as the share allows.
const STRETCH_MAX: f64 = 0.2;
/// By more it may once in so many steps: rarer than what a 99th percentile sees.
const RARE_STEPS: u32 = 150;
/// Most of what is owed is paid back at once by so many seconds of work.
const OWED_MAX: f64 = 1.0;
/// How much of the longest piece is forgotten with each piece.
const FORGETS: f64 = 0.995;

/// Something to be done in pieces on the engine's device.
pub trait Background: Send {
    /// Does the next piece, a few milliseconds of work. False: it is over, and is dropped. Whoever
    /// waits for it holds the other end of a channel of its own.
    fn advance(&mut self, device: &Device) -> bool;
}

/// When pieces run beside steps. Pure: times come in, and decisions go out.
#[derive(Debug)]
pub struct Pacing {
    /// Of the device's time while requests run.
    share: f64,
    /// Seconds of work that the share still allows.
    owed: f64,
    /// Seconds of the longest piece lately.
    longest: f64,
    /// Steps since a piece was longer than `STRETCH_MAX` allows.
    steps: u32,
}

impl Pacing {
    /// `share` of the time, from 0 (only while no request runs) to below 1.
    pub fn new(share: f64) -> Self {
        Self { share, owed: 0.0, longest: 0.0, steps: 0 }
    }

    /// After a step that took so long: whether a piece may follow it.
    pub fn may_follow(&mut self, step: Duration) -> bool {
        let step = step.as_secs_f64();
        self.owed = (self.owed + step * self.share / (1.0 - self.share)).min(OWED_MAX);
        self.steps = self.steps.saturating_add(1);
        let gentle = self.longest <= step * STRETCH_MAX;
        self.share > 0.0 && self.owed >= self.longest && (gentle || self.steps >= RARE_STEPS)
    }

    /// A piece ran; `beside`: between two steps of running requests.
    pub fn ran(&mut self, piece: Duration, beside: bool) {
        let piece = piece.as_secs_f64();
        self.longest = piece.max(self.longest * FORGETS);
        if beside {
            self.owed -= piece;
            self.steps = 0;
        }
    }
}

/// What waits for the device, in order of arrival. One runs until it is over.
#[derive(Default)]
pub struct Waiting {
    works: VecDeque<Box<dyn Background>>,
}

impl Waiting {
    pub fn push(&mut self, work: Box<dyn Background>) {
        self.works.push_back(work);
    }

    pub fn is_empty(&self) -> bool {
        self.works.is_empty()
    }

    /// Runs a piece of the first.
    pub fn advance(&mut self, device: &Device) {
        // Taken out, so that one that panics is gone.
        let Some(mut work) = self.works.pop_front() else { return };
        if work.advance(device) {
            self.works.push_front(work);
        }
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.works.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: f64) -> Duration {
        Duration::from_secs_f64(ms / 1e3)
    }

    /// Steps of `step` with pieces of `piece` between them: (share of the time that pieces took,
    /// share of the gaps that a piece made longer).
    fn beside(share: f64, step: f64, piece: f64) -> (f64, f64) {
        let mut pacing = Pacing::new(share);
        pacing.ran(ms(piece), false);
        let steps = 30_000;
        let pieces = (0..steps).filter(|_| {
            let may = pacing.may_follow(ms(step));
            if may {
                pacing.ran(ms(piece), true);
            }
            may
        });
        let pieces = pieces.count() as f64;
        let busy = pieces * piece;
        (busy / (busy + f64::from(steps) * step), pieces / f64::from(steps))
    }

    #[test]
    fn short_pieces_use_the_whole_share() {
        let (share, _) = beside(0.05, 20.0, 3.0);
        assert!((0.049..=0.05).contains(&share), "{share}");
    }

    #[test]
    fn long_pieces_are_too_rare_for_a_99th_percentile_and_still_come() {
        let (share, gaps) = beside(0.05, 5.0, 4.0);
        assert!(share <= 0.05, "{share}");
        assert!((0.006..=0.007).contains(&gaps), "{gaps}");
    }

    #[test]
    fn a_piece_longer_than_what_is_owed_waits_until_it_is_owed() {
        // Three pieces of 400 ms of the 1.5 s that 150 s allow: a fourth is not owed yet.
        let (share, gaps) = beside(0.01, 5.0, 400.0);
        assert!((0.0075..=0.01).contains(&share), "{share}");
        assert!(gaps < 0.001, "{gaps}");
    }

    #[test]
    fn no_share_means_only_when_idle() {
        assert_eq!(beside(0.0, 5.0, 1.0), (0.0, 0.0));
    }
}
