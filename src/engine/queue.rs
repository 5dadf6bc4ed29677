//! The waiting queue as both sides see it: who may wait, and how the engine gets on.
//!
//! Owns the counters and the permits. Never holds a sequence: the scheduler does. The thing to
//! know: a permit comes back by its drop, however its sequence ends.

use super::options::EngineOptions;
use crate::error::{Error, Kind, Result};
use dashmap::DashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Sequences that wait, and their prompt tokens.
#[derive(Default)]
struct Waiting {
    sequences: AtomicUsize,
    tokens: AtomicUsize,
}

/// The permit of one sequence to wait: among all, and among its tenant's. Given back by its drop,
/// when it first runs or ends without.
pub struct QueuePermit {
    shared: Arc<Shared>,
    tenant: Option<Arc<Waiting>>,
    tokens: usize,
}

impl Drop for QueuePermit {
    fn drop(&mut self) {
        for waiting in [Some(&self.shared.queue), self.tenant.as_deref()].into_iter().flatten() {
            waiting.sequences.fetch_sub(1, Ordering::AcqRel);
            waiting.tokens.fetch_sub(self.tokens, Ordering::AcqRel);
        }
    }
}

/// Counters that both sides see.
pub struct Shared {
    accepting: AtomicBool,
    queue: Waiting,
    /// The part of each tenant in it.
    tenants: DashMap<String, Arc<Waiting>>,
    /// Sequences submitted and not yet ended.
    unfinished: AtomicUsize,
    next_id: AtomicU64,
    started: Instant,
    /// Milliseconds after `started` when the engine last woke up or finished a step; `u64::MAX`
    /// while it sleeps.
    heartbeat: AtomicU64,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            accepting: AtomicBool::new(true),
            queue: Waiting::default(),
            tenants: DashMap::new(),
            unfinished: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
            started: Instant::now(),
            heartbeat: AtomicU64::new(u64::MAX),
        }
    }
}

impl Shared {
    /// A sequence ended, however it did.
    pub fn end(&self) {
        self.unfinished.fetch_sub(1, Ordering::AcqRel);
    }

    /// The engine says that it got on with its work, or that it has none.
    pub fn beat(&self, asleep: bool) {
        let at = if asleep { u64::MAX } else { self.started.elapsed().as_millis() as u64 };
        self.heartbeat.store(at, Ordering::Release);
    }

    /// Whether `n` sequences of `tokens` prompt tokens each would get permits now. A named tenant
    /// may hold as many as are left free, and no more: so one that floods fills half of the queue,
    /// two fill two thirds, and somebody else's request always finds room. Errors: `queue_full`,
    /// `shutting_down`.
    pub fn check_room(
        &self,
        n: usize,
        tokens: usize,
        tenant: &str,
        o: &EngineOptions,
    ) -> Result<()> {
        if !self.accepting.load(Ordering::Acquire) {
            return Err(shutting_down());
        }
        let used = |counter: &AtomicUsize| counter.load(Ordering::Acquire);
        let all = &self.queue;
        if let Some(own) = self.tenants.get(tenant) {
            let left = |max: usize, all: &AtomicUsize| max.saturating_sub(used(all)).max(1);
            if used(&own.sequences) + n > left(o.waiting_max, &all.sequences) {
                return Err(full(" for your tenant", "requests", o.waiting_max));
            }
            let held = used(&own.tokens);
            if held > 0 && held + n * tokens > left(o.waiting_tokens_max, &all.tokens) {
                return Err(full(" for your tenant", "prompt tokens", o.waiting_tokens_max));
            }
        }
        if used(&all.sequences) + n > o.waiting_max {
            return Err(full("", "requests", o.waiting_max));
        }
        if used(&all.tokens) + n * tokens > o.waiting_tokens_max {
            return Err(full("", "prompt tokens", o.waiting_tokens_max));
        }
        Ok(())
    }

    /// Permits for `n` sequences to wait. Errors: those of [`check_room`](Self::check_room).
    pub fn reserve(
        self: &Arc<Self>,
        n: usize,
        tokens: usize,
        tenant: &str,
        o: &EngineOptions,
    ) -> Result<Vec<QueuePermit>> {
        let own = (!tenant.is_empty()).then(|| {
            let tenants = &self.tenants;
            let known = tenants.get(tenant).map(|own| own.value().clone());
            known.unwrap_or_else(|| tenants.entry(tenant.to_owned()).or_default().clone())
        });
        self.check_room(n, tokens, tenant, o)?;
        // Others may have come since.
        let all = &self.queue;
        let add = |counter: &AtomicUsize, by: usize, max: usize| {
            counter
                .try_update(Ordering::AcqRel, Ordering::Acquire, |x| {
                    (x + by <= max).then_some(x + by)
                })
                .is_ok()
        };
        if !add(&all.sequences, n, o.waiting_max) {
            return Err(full("", "requests", o.waiting_max));
        }
        if !add(&all.tokens, n * tokens, o.waiting_tokens_max) {
            all.sequences.fetch_sub(n, Ordering::AcqRel);
            return Err(full("", "prompt tokens", o.waiting_tokens_max));
        }
        if let Some(own) = &own {
            own.sequences.fetch_add(n, Ordering::AcqRel);
            own.tokens.fetch_add(n * tokens, Ordering::AcqRel);
        }
        self.unfinished.fetch_add(n, Ordering::AcqRel);
        let permit = || QueuePermit { shared: self.clone(), tenant: own.clone(), tokens };
        Ok((0..n).map(|_| permit()).collect())
    }

    /// Numbers a sequence.
    pub fn number(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// No sequence is let in any more.
    pub fn close(&self) {
        self.accepting.store(false, Ordering::Release);
    }

    /// Sequences submitted and not yet ended.
    pub fn unfinished(&self) -> usize {
        self.unfinished.load(Ordering::Acquire)
    }

    /// Whether the next request would be refused.
    pub fn is_full(&self, o: &EngineOptions) -> bool {
        self.queue.sequences.load(Ordering::Acquire) >= o.waiting_max
            || self.queue.tokens.load(Ordering::Acquire) >= o.waiting_tokens_max
    }

    /// How long the engine has had work without finishing a step; zero while it sleeps.
    pub fn stalled_for(&self) -> Duration {
        match self.heartbeat.load(Ordering::Acquire) {
            u64::MAX => Duration::ZERO,
            at => self.started.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}

fn full(whose: &str, what: &str, max: usize) -> Error {
    let message = format!("the waiting queue is full{whose} ({max} {what}); try again");
    Error::new(Kind::Busy, "queue_full", message)
}

/// The answer to whoever comes, or is still here, at the end.
pub fn shutting_down() -> Error {
    Error::new(Kind::Unavailable, "shutting_down", "the server is shutting down")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_sleeps_is_not_stalled_and_one_that_only_spins_is() {
        let long_ago = Instant::now().checked_sub(Duration::from_secs(100)).expect("an instant");
        let shared = Shared { started: long_ago, ..Shared::default() };
        assert_eq!(shared.stalled_for(), Duration::ZERO, "no work yet");
        shared.heartbeat.store(0, Ordering::Release);
        assert!(shared.stalled_for() >= Duration::from_secs(100));
        shared.beat(false);
        assert!(shared.stalled_for() < Duration::from_secs(10), "a step was finished");
        shared.beat(true);
        assert_eq!(shared.stalled_for(), Duration::ZERO);
    }
}
