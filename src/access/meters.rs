//! Meters: what each key, and each adapter with limits, has used and may still use.
//!
//! Owns rates (by the clock that nobody sets), places and quotas (by the calendar). Never knows a
//! clock: [`Now`] comes with every call. The thing to know: a request takes its place before any
//! work is done for it, reserves its prompt and all that it may generate before it is queued,
//! everything or nothing, and settles to what it used when it ends; settled use of quotas is
//! written every few seconds, so a crash forgets so much, and never charges twice.

use super::key::{Caller, Limits};
use crate::clock::{Now, date};
use crate::error::{Error, Kind, Result};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A minute, in the milliseconds that buckets count in.
const MINUTE_MS: u64 = 60_000;

/// A rate: a bucket that holds a minute's worth and fills evenly.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// A minute's worth, and what is in it now in units of 1/60000.
    size: u64,
    level: u64,
    /// Monotonic milliseconds.
    at: u64,
}

impl Bucket {
    fn new(size: u64, now: u64) -> Self {
        Self { size, level: size * MINUTE_MS, at: now }
    }

    fn fill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.at).min(MINUTE_MS);
        self.level = (self.level + passed * self.size).min(self.size * MINUTE_MS);
        self.at = self.at.max(now);
    }

    /// Milliseconds until `amount` is there.
    fn wait(&self, amount: u64) -> u64 {
        (amount * MINUTE_MS).saturating_sub(self.level).div_ceil(self.size)
    }

    fn left(&self) -> u64 {
        self.level / MINUTE_MS
    }

    fn take(&mut self, amount: u64) {
        self.level -= amount * MINUTE_MS;
    }

    fn give(&mut self, amount: u64) {
        self.level = (self.level + amount * MINUTE_MS).min(self.size * MINUTE_MS);
    }
}

/// A quota's period and what was used of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Period {
    /// Days since 1970, or months since the year 0.
    pub number: u64,
    pub used: u64,
    reserved: u64,
}

impl Period {
    fn turn_to(&mut self, number: u64) {
        // What runs across the border is charged to where it began, which is over.
        match self.number.cmp(&number) {
            Ordering::Less => *self = Self { number, used: 0, reserved: 0 },
            Ordering::Equal => {}
            // The clock was ahead and is back: what was used stays used, but in the period that
            // ends when the calendar says so, not in one that is days away.
            Ordering::Greater => *self = Self { number, used: self.used, reserved: 0 },
        }
    }
}

fn day(now: Duration) -> u64 {
    now.as_secs() / 86_400
}

/// (months since the year 0, seconds until the next)
fn month(now: Duration) -> (u64, u64) {
    let date = date(now);
    let number = date.year() as u64 * 12 + u64::from(u8::from(date.month())) - 1;
    let left = u64::from(date.month().length(date.year()) - date.day());
    (number, (day(now) + left + 1) * 86_400 - now.as_secs())
}

struct Meter {
    limits: Limits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u64,
    day: Period,
    month: Period,
    /// Used since the store was last told.
    unwritten: bool,
}

impl Meter {
    fn new() -> Self {
        Self {
            limits: Limits::default(),
            requests: None,
            tokens: None,
            running: 0,
            day: Period::default(),
            month: Period::default(),
            unwritten: false,
        }
    }

    /// Takes new limits; a rate that changed begins with a full bucket.
    fn set(&mut self, limits: &Limits, now: u64) {
        let bucket = |size: Option<u64>, old: Option<Bucket>| {
            let kept = old.filter(|b| Some(b.size) == size);
            kept.or_else(|| size.map(|size| Bucket::new(size, now)))
        };
        self.requests = bucket(limits.requests_per_minute, self.requests);
        self.tokens = bucket(limits.tokens_per_minute, self.tokens);
        self.limits = limits.clone();
    }

    fn turn_to(&mut self, now: Now) {
        let ms = now.monotonic.as_millis() as u64;
        self.requests.iter_mut().chain(&mut self.tokens).for_each(|b| b.fill(ms));
        self.day.turn_to(day(now.wall));
        self.month.turn_to(month(now.wall).0);
    }

    /// Whether one more request may come in now. Errors: `rate_limit_exceeded`.
    fn check_place(&self, whose: &str) -> Result<()> {
        if let Some(most) = self.limits.concurrent_max.filter(|most| self.running >= *most) {
            let what = format!("{most} requests are being answered, which is its limit");
            return later("rate_limit_exceeded", whose, &what, 1000);
        }
        if let Some(bucket) = &self.requests
            && bucket.left() < 1
        {
            let what = format!("{} requests a minute are its limit", bucket.size);
            return later("rate_limit_exceeded", whose, &what, bucket.wait(1));
        }
        Ok(())
    }

    /// Whether a request may take so many tokens now. Errors: `rate_limit_exceeded`,
    /// `quota_exceeded`, `request_exceeds_limit`.
    fn check_tokens(&self, whose: &str, tokens: u64, now: Duration) -> Result<()> {
        if let Some(bucket) = &self.tokens {
            if tokens > bucket.size {
                let message = format!(
                    "{whose}: the request may take {tokens} tokens, and {} a minute are its limit; \
                     shorten it or set a smaller `max_tokens`",
                    bucket.size
                );
                return Err(Error::invalid("request_exceeds_limit", message));
            }
            if bucket.left() < tokens {
                let what = format!("{} tokens a minute are its limit", bucket.size);
                return later("rate_limit_exceeded", whose, &what, bucket.wait(tokens));
            }
        }
        let (_, month_left) = month(now);
        let day_left = 86_400 - now.as_secs() % 86_400;
        for (quota, period, name, left) in [
            (self.limits.tokens_per_day, &self.day, "day", day_left),
            (self.limits.tokens_per_month, &self.month, "month", month_left),
        ] {
            if quota.is_some_and(|quota| period.used + period.reserved + tokens > quota) {
                let quota = quota.unwrap_or_default();
                let what = format!("{quota} tokens a {name} are its quota");
                return later("quota_exceeded", whose, &what, left * 1000);
            }
        }
        Ok(())
    }

    fn take_place(&mut self) {
        self.running += 1;
        if let Some(bucket) = &mut self.requests {
            bucket.take(1);
        }
    }

    fn take_tokens(&mut self, tokens: u64) {
        if let Some(bucket) = &mut self.tokens {
            bucket.take(tokens);
        }
        self.day.reserved += tokens;
        self.month.reserved += tokens;
    }

    /// The end of a request that was never admitted: work that was done for it counts, as far as
    /// there is something to take it from.
    fn leave(&mut self, work: Option<u64>) {
        self.running -= 1;
        match (work, &mut self.requests, &mut self.tokens) {
            (None, Some(requests), _) => requests.give(1),
            (Some(tokens), _, Some(bucket)) => bucket.take(tokens.min(bucket.left())),
            _ => {}
        }
    }

    fn settle(&mut self, reserved: &Reserved, used: u64) {
        self.running -= 1;
        if let Some(bucket) = &mut self.tokens {
            bucket.give(reserved.tokens.saturating_sub(used));
        }
        for (period, number) in [(&mut self.day, reserved.day), (&mut self.month, reserved.month)] {
            if period.number == number {
                period.reserved = period.reserved.saturating_sub(reserved.tokens);
                period.used += used;
                self.unwritten = true;
            }
        }
    }
}

fn later<T>(code: &'static str, whose: &str, what: &str, wait_ms: u64) -> Result<T> {
    let after = wait_ms.div_ceil(1000).max(1);
    let message = format!("{whose}: {what}; try again in {after} s");
    Err(Error { retry_after: Some(after), ..busy(code, message) })
}

fn busy(code: &'static str, message: String) -> Error {
    // Two codes, spelled out where tests of the documentation look for them.
    match code {
        "quota_exceeded" => Error::new(Kind::Busy, "quota_exceeded", message),
        _ => Error::new(Kind::Busy, "rate_limit_exceeded", message),
    }
}

/// Use of one subject, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRow {
    pub subject: String,
    pub day: Period,
    pub month: Period,
}

impl Period {
    pub fn of(number: u64, used: u64) -> Self {
        Self { number, used, reserved: 0 }
    }
}

/// What is left to a key: of requests and of tokens in a minute, where it has such limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub requests: Option<Left>,
    pub tokens: Option<Left>,
}

/// One rate's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    pub limit: u64,
    pub remaining: u64,
    /// Until the rate is whole again.
    pub reset_ms: u64,
}

/// All meters. Those of keys are named `key:<id>`, those of adapters `adapter:<name>`.
#[derive(Default)]
pub struct Meters {
    book: Mutex<HashMap<String, Meter>>,
}

/// What an admitted request holds: meters, and tokens of each in a day and a month.
pub(super) struct Reserved {
    subjects: Vec<String>,
    tokens: u64,
    day: u64,
    month: u64,
}

impl Meters {
    /// Meters that go on from what was kept.
    pub fn new(rows: Vec<UsageRow>) -> Self {
        let meter = |row: UsageRow| {
            let meter = Meter { day: row.day, month: row.month, ..Meter::new() };
            (row.subject, meter)
        };
        Self { book: Mutex::new(rows.into_iter().map(meter).collect()) }
    }

    fn book(&self) -> MutexGuard<'_, HashMap<String, Meter>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place at this key's meter, if it has limits; the meter's subject. Errors:
    /// `rate_limit_exceeded`.
    pub fn take_place(&self, caller: &Caller, now: Now) -> Result<Option<String>> {
        let limits = caller.limits();
        if limits.is_empty() {
            return Ok(None);
        }
        let subject = format!("key:{}", caller.id());
        let mut book = self.book();
        let meter = Self::meter(&mut book, &subject, limits, now);
        meter.check_place(&format!("key {}", caller.id()))?;
        meter.take_place();
        drop(book);
        Ok(Some(subject))
    }

    /// The meter of `subject` under these limits, as it stands now.
    fn meter<'a>(
        book: &'a mut HashMap<String, Meter>,
        subject: &str,
        limits: &Limits,
        now: Now,
    ) -> &'a mut Meter {
        let meter = book.entry(subject.to_owned()).or_insert_with(Meter::new);
        if meter.limits != *limits {
            meter.set(limits, now.monotonic.as_millis() as u64);
        }
        meter.turn_to(now);
        meter
    }

    /// Reserves for a request that has its place at `key`; returns the meters.
    pub(super) fn admit<'a>(
        &self,
        key: Option<&str>,
        adapters: impl IntoIterator<Item = (&'a str, &'a Limits)>,
        tokens: u64,
        now: Now,
    ) -> Result<Reserved> {
        let mut book = self.book();
        let mut subjects = Vec::new();
        if let Some(key) = key
            && let Some(meter) = book.get_mut(key)
        {
            meter.turn_to(now);
            meter.check_tokens(&key.replacen(':', " ", 1), tokens, now.wall)?;
            subjects.push(key.to_owned());
        }
        for (name, limits) in adapters.into_iter().filter(|(_, limits)| !limits.is_empty()) {
            let subject = format!("adapter:{name}");
            let meter = Self::meter(&mut book, &subject, limits, now);
            let whose = format!("adapter {name}");
            meter.check_place(&whose)?;
            meter.check_tokens(&whose, tokens, now.wall)?;
            subjects.push(subject);
        }
        for subject in &subjects {
            if let Some(meter) = book.get_mut(subject) {
                if key != Some(subject) {
                    meter.take_place();
                }
                meter.take_tokens(tokens);
            }
        }
        Ok(Reserved { subjects, tokens, day: day(now.wall), month: month(now.wall).0 })
    }

    /// The end of a request at `key` that was never admitted.
    pub(super) fn leave(&self, key: &str, work: Option<u64>) {
        if let Some(meter) = self.book().get_mut(key) {
            meter.leave(work);
        }
    }

    /// The end of a request that came to use so many tokens.
    pub(super) fn settle(&self, reserved: &Reserved, used: u64) {
        let mut book = self.book();
        for subject in &reserved.subjects {
            if let Some(meter) = book.get_mut(subject) {
                meter.settle(reserved, used);
            }
        }
    }

    /// What is left to the caller's key.
    pub fn standing(&self, caller: &Caller, now: Now) -> Standing {
        let limits = caller.limits();
        let mut book = self.book();
        let meter = book.get_mut(&format!("key:{}", caller.id()));
        let left = |size: Option<u64>, bucket: Option<Bucket>| {
            let bucket = bucket.filter(|b| Some(b.size) == size);
            size.map(|limit| Left {
                limit,
                remaining: bucket.map_or(limit, |b| b.left()),
                reset_ms: bucket.map_or(0, |b| b.wait(b.size)),
            })
        };
        let (requests, tokens) = match meter {
            Some(meter) => {
                meter.turn_to(now);
                (meter.requests, meter.tokens)
            }
            None => (None, None),
        };
        Standing {
            requests: left(limits.requests_per_minute, requests),
            tokens: left(limits.tokens_per_minute, tokens),
        }
    }

    /// Use that the store was not told of; it is as good as told.
    pub fn take_unwritten(&self) -> Vec<UsageRow> {
        let mut book = self.book();
        let told = book.iter_mut().filter(|(_, meter)| meter.unwritten);
        let row = |(subject, meter): (&String, &mut Meter)| {
            meter.unwritten = false;
            UsageRow { subject: subject.clone(), day: meter.day, month: meter.month }
        };
        told.map(row).collect()
    }

    /// The store could not take them: they are to be told again.
    pub fn not_written(&self, rows: &[UsageRow]) {
        let mut book = self.book();
        for row in rows {
            if let Some(meter) = book.get_mut(&row.subject) {
                meter.unwritten = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_knows_leap_years_and_the_ends_of_months() {
        for (day, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (20_513, (2026, 3, 1)),
            (20_788, (2026, 12, 1)),
        ] {
            let at = crate::clock::date(Duration::from_secs(day * 86_400));
            assert_eq!((at.year(), u8::from(at.month()), at.day()), date);
        }
        let noon = |day: u64| Duration::from_secs(day * 86_400 + 43_200);
        // 28 February 2026, at noon: half a day is left of the month.
        assert_eq!(month(noon(20_512)), (2026 * 12 + 1, 43_200));
        assert_eq!(month(noon(20_787)), (2026 * 12 + 10, 43_200));
    }
}
