//! A request's place at its key, from before its body is read to its end.
//!
//! Owns what becomes of the place: given back, counted for work that led to nothing, or settled.
//! Never knows a rate. The thing to know: it is dropped exactly once, whatever becomes of the
//! request, and that is when it is settled.

use super::key::{Caller, Limits};
use super::meters::{Meters, Reserved};
use crate::clock::Now;
use crate::error::Result;
use std::sync::Arc;

/// A request that was refused by its limits after so much work at most may try again for nothing.
const SMALL_TOKENS_MAX: u64 = 1024;

/// A request's place, and later its reservation. Dropping it gives back what was not used: all of
/// it before any work was done, everything but the request itself after that.
pub struct Ticket {
    meters: Arc<Meters>,
    /// The key's meter, if the key has limits.
    key: Option<String>,
    /// Tokens that were worked through for a request that is not admitted yet.
    work: Option<u64>,
    /// Whether more was done than encode a prompt.
    costly: bool,
    /// What it holds once it is admitted.
    reserved: Option<Reserved>,
    used: u64,
}

impl Ticket {
    /// Takes a place for a request of this key, before any work is done for it. Errors:
    /// `rate_limit_exceeded`.
    pub fn take(meters: &Arc<Meters>, caller: &Caller, now: Now) -> Result<Self> {
        let key = meters.take_place(caller, now)?;
        let meters = meters.clone();
        Ok(Self { meters, key, work: None, costly: false, reserved: None, used: 0 })
    }

    /// Work is done for the request from now on, perhaps as much as `tokens` of prompt are: should
    /// it be refused, that counts.
    pub fn worked(&mut self, tokens: u64) {
        self.work = Some(tokens.max(self.work.unwrap_or(0)));
    }

    /// The work is more than a prompt of its size is, whatever comes of it.
    pub fn worked_hard(&mut self) {
        self.worked(0);
        self.costly = true;
    }

    /// Reserves `tokens` of the key's and the adapters' limits (each name once), or nothing.
    /// Errors: `rate_limit_exceeded`, `quota_exceeded`, `request_exceeds_limit`.
    pub fn admit<'a>(
        &mut self,
        adapters: impl IntoIterator<Item = (&'a str, &'a Limits)>,
        tokens: u64,
        now: Now,
    ) -> Result<()> {
        let admitted = self.meters.admit(self.key.as_deref(), adapters, tokens, now);
        let small = !self.costly && self.work.is_some_and(|work| work <= SMALL_TOKENS_MAX);
        if admitted.is_err() && small {
            self.work = None;
        }
        self.reserved = Some(admitted?);
        Ok(())
    }

    /// What the request came to use, to be settled when the ticket goes.
    pub fn used(&mut self, tokens: u64) {
        self.used = tokens;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        match (&self.reserved, &self.key) {
            (Some(reserved), _) => self.meters.settle(reserved, self.used),
            (None, Some(key)) => self.meters.leave(key, self.work),
            (None, None) => {}
        }
    }
}
