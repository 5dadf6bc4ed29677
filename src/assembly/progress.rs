//! How far the loading of a model is: a bar on a terminal, lines in a log.
//!
//! Owns what is shown and how often. Never reads a file. The thing to know: it is told of every
//! piece by several threads, so most calls end at one look at an atomic number.

use crate::config::human;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Between two lines of a log.
const LINE_SECONDS: u64 = 5;

/// See the module page.
pub struct Progress {
    bar: ProgressBar,
    begun: Instant,
    /// Seconds since then when the next line is due.
    due: AtomicU64,
}

impl Progress {
    /// A bar if stderr is a terminal.
    pub fn begin() -> Self {
        let style = ProgressStyle::with_template(
            "loading {bar:30} {binary_bytes} of {binary_total_bytes}, {eta} left",
        );
        let bar = ProgressBar::new(0).with_style(style.expect("a fixed template"));
        Self { bar, begun: Instant::now(), due: AtomicU64::new(LINE_SECONDS) }
    }

    /// So many bytes are done of so many.
    pub fn show(&self, done: u64, total: u64) {
        if !self.bar.is_hidden() {
            self.bar.set_length(total);
            self.bar.set_position(done);
            return;
        }
        let seconds = self.begun.elapsed().as_secs();
        let due = self.due.load(Relaxed);
        let next = seconds + LINE_SECONDS;
        let mine = || self.due.compare_exchange(due, next, Relaxed, Relaxed).is_ok();
        if seconds >= due && mine() {
            let left = seconds_left(seconds, done, total);
            let (done, of) = (human(done), human(total));
            tracing::info!(done, of, seconds_left = left, "loading the model");
        }
    }

    /// Takes the bar away and says how long it took.
    pub fn end(self) {
        self.bar.finish_and_clear();
        let seconds = format!("{:.1}", self.begun.elapsed().as_secs_f64());
        tracing::info!(seconds, "the model is loaded");
    }
}

/// If it goes on as it went.
fn seconds_left(seconds: u64, done: u64, total: u64) -> u64 {
    let left = u128::from(seconds) * u128::from(total.saturating_sub(done));
    u64::try_from(left.div_ceil(u128::from(done.max(1)))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_takes_as_long_as_what_is_done() {
        assert_eq!(seconds_left(10, 1 << 30, 3 << 30), 20);
        assert_eq!(seconds_left(10, 7, 7), 0);
        assert_eq!(seconds_left(5, 8, 7), 0);
        assert_eq!(seconds_left(0, 0, 7), 0);
    }
}
