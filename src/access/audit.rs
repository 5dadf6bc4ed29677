//! The audit log: who did what to which name, and how it ended.
//!
//! Owns the record's fields, and which refusals are recorded one by one. Never forgets: the table
//! refuses updates and deletes by trigger, and only a rotation takes records out, into a file. The
//! thing to know: a record is written after the deed and before its answer, in one synced insert.

use super::key::{Caller, Scope};
use crate::error::{Error, Kind, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Refusals of one key that are recorded one by one in a minute; the rest is summed.
pub const RECORDED_MAX: u64 = 60;
/// Refusals of one key in a minute after which its changes are refused without a look.
pub const REFUSALS_MAX: u64 = 1200;
const MINUTE: Duration = Duration::from_secs(60);

/// One administrative action, done or refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Rises with time; 0 until it is written, so the line in the log, which comes first, has none.
    #[serde(skip)]
    pub id: u64,
    /// Unix milliseconds.
    pub at: u64,
    pub key: String,
    pub tenant: Option<String>,
    /// Method and path of the route, e.g. `PUT /v1/adapters/{name}`.
    pub action: String,
    /// The adapter, or the key, that it was done to.
    pub name: Option<String>,
    pub digest: Option<String>,
    /// `ok`, or the error's code.
    pub outcome: String,
    pub status: u16,
    pub request_id: String,
    /// More than 1: so many refusals of one key, of which this was the last.
    pub count: u64,
}

/// Which records are asked for.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only this tenant's.
    pub tenant: Option<String>,
    /// Only records before this one; `None` begins with the newest.
    pub before: Option<u64>,
    pub limit: u64,
}

/// Which records a rotation takes out of the table.
#[derive(Debug, Clone, Copy)]
pub enum Cut {
    /// Those with a smaller id.
    Before(u64),
    /// Those before the first that is younger than so long.
    Older(Duration),
}

/// What a rotation took out: into which file, and which records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archived {
    /// Below the data directory.
    pub file: String,
    pub first: u64,
    pub last: u64,
    pub records: u64,
}

/// Refused changes, by key. An operator's are not bounded: whoever may do everything floods
/// nothing that it could not delete.
#[derive(Default)]
pub struct Refusals {
    by_key: Mutex<HashMap<String, Minute>>,
}

#[derive(Default)]
struct Minute {
    begun: Duration,
    refused: u64,
    /// The last of those that are not recorded one by one, with their number.
    sum: Option<Record>,
}

impl Refusals {
    /// Whether `caller` may try to change something now. Errors: `rate_limit_exceeded`.
    pub fn check(&self, caller: &Caller, now: Duration) -> Result<()> {
        let mut by_key = self.lock();
        let Some(minute) = by_key.get_mut(caller.id()) else { return Ok(()) };
        if !minute.runs(now) || minute.refused < REFUSALS_MAX {
            return Ok(());
        }
        let left = (minute.begun + MINUTE).saturating_sub(now).as_secs().max(1);
        let message = format!(
            "{REFUSALS_MAX} changes by this key were refused within a minute; try again in {left} s"
        );
        let error = Error::new(Kind::Busy, "rate_limit_exceeded", message);
        Err(Error { retry_after: Some(left), ..error })
    }

    /// The record, if it is one to write down now; a refusal too many is only counted.
    pub fn sift(&self, caller: &Caller, record: Record, now: Duration) -> Option<Record> {
        let operator = caller.tenant().is_none() && caller.has(Scope::Admin);
        if operator || record.outcome == "ok" {
            return Some(record);
        }
        let mut by_key = self.lock();
        let minute = by_key.entry(caller.id().to_owned()).or_default();
        if !minute.runs(now) {
            (minute.begun, minute.refused) = (now, 0);
        }
        minute.refused += 1;
        if minute.refused <= RECORDED_MAX {
            return Some(record);
        }
        let before = minute.sum.as_ref().map_or(0, |sum| sum.count);
        minute.sum = Some(Record { count: before + record.count, ..record });
        None
    }

    /// One record for each key of what was only counted since the last call.
    pub fn take_sums(&self) -> Vec<Record> {
        let mut by_key = self.lock();
        let sums: Vec<Record> = by_key.values_mut().filter_map(|m| m.sum.take()).collect();
        let newest = by_key.values().map(|m| m.begun).max().unwrap_or_default();
        // What others have outlived by minutes is over by any clock.
        by_key.retain(|_, m| m.begun + 2 * MINUTE > newest);
        sums
    }

    /// Sums that could not be written, for the next try.
    pub fn put_back(&self, sums: Vec<Record>) {
        let mut by_key = self.lock();
        for record in sums {
            let minute = by_key.entry(record.key.clone()).or_default();
            let more = minute.sum.as_ref().map_or(0, |sum| sum.count);
            minute.sum = Some(Record { count: record.count + more, ..record });
        }
    }

    /// Also after a panic elsewhere: each change is a few map operations.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Minute>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Minute {
    /// Whether it lasts; one that began later than now is over: the clock was set back.
    fn runs(&self, now: Duration) -> bool {
        (self.begun..self.begun + MINUTE).contains(&now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::NewKey;
    use super::*;

    fn record(key: &Caller, outcome: &str) -> Record {
        Record {
            id: 0,
            at: 0,
            key: key.id().to_owned(),
            tenant: None,
            action: "DELETE /v1/adapters/{name}".to_owned(),
            name: None,
            digest: None,
            outcome: outcome.to_owned(),
            status: 403,
            request_id: String::new(),
            count: 1,
        }
    }

    #[test]
    fn a_flood_of_refusals_is_sixty_records_a_sum_and_then_refused_unseen() {
        let now = Duration::from_secs(1_800_000_000);
        let new = NewKey { scopes: vec![Scope::Inference], weight: 1, ..NewKey::default() };
        let key = Caller::of(new.check(now).expect("a key"));
        let refusals = Refusals::default();
        let written = |n: u64, outcome: &str, now| {
            let sifted = (0..n).filter_map(|_| refusals.sift(&key, record(&key, outcome), now));
            sifted.count() as u64
        };
        assert_eq!(written(1000, "insufficient_scope", now), RECORDED_MAX);
        assert_eq!(written(5, "ok", now), 5, "what was done is always recorded");
        assert!(refusals.check(&key, now).is_ok());
        assert_eq!(written(REFUSALS_MAX - 1000, "insufficient_scope", now), 0);
        let refused = refusals.check(&key, now).unwrap_err();
        assert_eq!((refused.code, refused.retry_after), ("rate_limit_exceeded", Some(60)));
        let sums = refusals.take_sums();
        assert_eq!(sums.iter().map(|r| r.count).collect::<Vec<_>>(), [REFUSALS_MAX - RECORDED_MAX]);
        refusals.put_back(sums);
        assert_eq!(refusals.take_sums()[0].count, REFUSALS_MAX - RECORDED_MAX);
        assert!(refusals.take_sums().is_empty());
        // The next minute, and a clock that was set back, begin anew.
        for now in [now + MINUTE, now - MINUTE] {
            assert!(refusals.check(&key, now).is_ok());
            assert_eq!(written(70, "insufficient_scope", now), RECORDED_MAX);
        }
        let operator = Caller::anonymous();
        let sifted = (0..2000)
            .filter_map(|_| refusals.sift(&operator, record(&operator, "adapter_not_found"), now));
        assert_eq!(sifted.count(), 2000);
        assert!(refusals.check(&operator, now).is_ok());
    }
}
