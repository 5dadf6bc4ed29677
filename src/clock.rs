//! Time as calls bring it: what the wall says, and what has passed; and a time that can be trusted.
//!
//! Owns the two clocks and the doubt in one of them. Never sleeps. The thing to know: the wall's
//! clock may be set at any moment, so nothing is removed for being old, and no rate is reckoned, by
//! one look at it.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;

/// The two clocks may differ by so much between two looks; more, and one of them was set.
const JUMP: Duration = Duration::from_secs(60);
/// A clock that ran evenly for so long is believed, whatever was believed before.
const PROBATION: Duration = Duration::from_secs(24 * 3600);

/// The end of the year 9999.
const MAX_SECONDS: i64 = 253_402_300_799;

/// One moment on two clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since 1970. It may be set forth and back.
    pub wall: Duration,
    /// Since some moment before; it only ever goes on, evenly.
    pub monotonic: Duration,
}

/// The wall's clock in whole seconds since 1970.
pub fn unix_seconds() -> u64 {
    Now::read().wall.as_secs()
}

/// The day in the calendar, in UTC, of a time since 1970.
pub fn date(since: Duration) -> OffsetDateTime {
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    // What is beyond the year 9999 is its last moment.
    OffsetDateTime::from_unix_timestamp(seconds.min(MAX_SECONDS)).expect("within the calendar")
}

impl Now {
    pub fn read() -> Self {
        static START: OnceLock<Instant> = OnceLock::new();
        Self {
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            monotonic: START.get_or_init(Instant::now).elapsed(),
        }
    }
}

/// Where nobody sets a clock, one is both.
impl From<Duration> for Now {
    fn from(time: Duration) -> Self {
        Self { wall: time, monotonic: time }
    }
}

/// A time since 1970 that does not run ahead when the wall's clock does: the newest time that is
/// known from before, and what has passed since.
pub struct Trusted {
    known: Duration,
    /// When that was known, and since when the two clocks agree, both monotonic.
    at: Duration,
    even_since: Duration,
    seen: Now,
}

impl Trusted {
    /// Begins with the newest time that was written down; without one, with the wall's.
    pub fn new(newest: Option<Duration>, now: Now) -> Self {
        let known = newest.unwrap_or(now.wall).min(now.wall);
        Self { known, at: now.monotonic, even_since: now.monotonic, seen: now }
    }

    /// The time, never later than the wall's.
    pub fn look(&mut self, now: Now) -> Duration {
        let passed = now.monotonic.saturating_sub(self.seen.monotonic);
        if now.wall.abs_diff(self.seen.wall + passed) > JUMP {
            self.even_since = now.monotonic;
        }
        self.seen = now;
        if now.monotonic.saturating_sub(self.even_since) >= PROBATION {
            (self.known, self.at) = (now.wall, now.monotonic);
        }
        (self.known + now.monotonic.saturating_sub(self.at)).min(now.wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;

    fn at(wall: u64, monotonic: u64) -> Now {
        Now { wall: Duration::from_secs(wall), monotonic: Duration::from_secs(monotonic) }
    }

    fn seconds(trusted: &mut Trusted, now: Now) -> u64 {
        trusted.look(now).as_secs()
    }

    #[test]
    fn a_jump_of_less_than_a_day_moves_nothing() {
        let mut t = Trusted::new(None, at(1000 * DAY, 0));
        assert_eq!(seconds(&mut t, at(1000 * DAY + 60, 60)), 1000 * DAY + 60);
        // 200 days ahead, for an hour of looks that agree with each other.
        for minute in 2..62 {
            let time = seconds(&mut t, at(1200 * DAY + minute * 60, minute * 60));
            assert_eq!(time, 1000 * DAY + minute * 60);
        }
        assert_eq!(seconds(&mut t, at(1000 * DAY + 3720, 3720)), 1000 * DAY + 3720);
        // Behind: later than the wall's it never is.
        assert_eq!(seconds(&mut t, at(900 * DAY, 3780)), 900 * DAY);
    }

    #[test]
    fn a_start_with_a_wrong_clock_goes_on_from_what_was_written_down() {
        let newest = Some(Duration::from_secs(1000 * DAY));
        let mut t = Trusted::new(newest, at(1300 * DAY, 0));
        assert_eq!(seconds(&mut t, at(1300 * DAY + 60, 60)), 1000 * DAY + 60);
        // Put right after an hour.
        assert_eq!(seconds(&mut t, at(1001 * DAY, 3600)), 1000 * DAY + 3600);
        let mut future = Trusted::new(Some(Duration::from_secs(2000 * DAY)), at(1000 * DAY, 0));
        assert_eq!(seconds(&mut future, at(1000 * DAY, 0)), 1000 * DAY);
    }

    #[test]
    fn a_clock_that_ran_evenly_for_a_day_is_believed() {
        let newest = Some(Duration::from_secs(1000 * DAY));
        let mut t = Trusted::new(newest, at(1060 * DAY, 0));
        for hour in 1..24 {
            let time = seconds(&mut t, at(1060 * DAY + hour * 3600, hour * 3600));
            assert_eq!(time, 1000 * DAY + hour * 3600);
        }
        assert_eq!(seconds(&mut t, at(1061 * DAY, DAY)), 1061 * DAY);
    }
}
