//! Memory for a load, by eviction if need be; and a queue when all is in use, in which tenants take
//! turns.
//!
//! Owns the wait. Never says who makes room for whom: the ledger does. The thing to know: several
//! contents that are needed together get their memory together, so nobody holds one while waiting
//! for another; and a resident in use is never evicted, but when somebody has waited for long it
//! takes no new requests.

use super::Inner;
use super::guards::Guard;
use super::rights::share_exceeded;
use super::state::{RegistryState, lock};
use crate::adapters::Digest;
use crate::adapters::ledger::{Answer, LoadRequest, Promise};
use crate::error::{Error, Kind, Result};
use crate::share::Permit;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A waiter looks again after so long even if nothing rang.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Bytes and a place promised to a load. Dropping it takes the promise back.
pub struct Reservation {
    inner: Arc<Inner>,
    pub promise: Promise,
    /// What it was promised for has come: the state counts the resident instead.
    pub taken: bool,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.taken {
            self.inner.state().ledger.withdraw(&self.promise);
        }
        self.inner.signals.room.notify_one();
    }
}

/// What looking for room led to, for each content one of the two.
#[derive(Default)]
pub struct Reserved {
    /// Of those that are resident after all.
    pub present: Vec<Guard>,
    pub rooms: Vec<Reservation>,
}

/// Since when memory is wanted, and for what.
#[derive(Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
    /// For versions: give up when no version has one of the contents any more.
    pub stored: bool,
}

/// The first of the line. What it asked for ends with it.
struct First {
    state: Arc<Mutex<RegistryState>>,
    _place: Permit,
}

impl Drop for First {
    fn drop(&mut self) {
        lock(&self.state).ledger.end_claim();
    }
}

impl Inner {
    /// Memory for every content that is not resident, and guards of those that are, all at once.
    /// May be dropped at any point. Errors: `insufficient_capacity` after `load_wait_max`.
    pub async fn reserve(
        self: &Arc<Self>,
        need: &LoadRequest,
        arrival: Arrival,
    ) -> Result<Reserved> {
        if let Some(sought) = self.try_reserve(need, false).await? {
            return Ok(sought);
        }
        let max = self.state().ledger.max();
        if !need.size().fits(max) {
            return Err(self.no_memory(need));
        }
        check_bound(need)?;
        let _counted = Waiting::new(&self.state);
        let deadline = arrival.at + self.options.load_wait_max;
        let mut first = self.first(need, deadline).await?;
        loop {
            if let Some(sought) = self.try_reserve(need, true).await? {
                return Ok(sought);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.no_memory(need));
            }
            let gone =
                |(digest, _): &&(Digest, u64)| arrival.stored && !self.state().wanted(*digest);
            if let Some((digest, _)) = need.contents.iter().find(gone) {
                let message = format!("adapter {digest} was deleted");
                return Err(Error::not_found("model_not_found", message).param("model"));
            }
            // Whoever waits for what is beyond its part holds nobody else up.
            if self.loads_queue.contended() && self.state().ledger.is_beyond(need) {
                drop(first);
                first = self.first(need, deadline).await?;
                if let Some(sought) = self.try_reserve(need, true).await? {
                    return Ok(sought);
                }
            }
            let patience = self.options.load_patience;
            if now >= arrival.at + patience {
                let mut state = self.state();
                let pinned = state.pinned_contents();
                state.ledger.claim(need, now - patience, &pinned);
            }
            let again = deadline.min(now + LOOK_AGAIN);
            // Either is a reason to look again.
            let _ = timeout_at(again, self.signals.room.notified()).await;
        }
    }

    /// Waits to be the first of the line. Errors: `insufficient_capacity`.
    async fn first(&self, need: &LoadRequest, deadline: Instant) -> Result<First> {
        let place = timeout_at(deadline, self.loads_queue.take(&need.tenant.name)).await;
        let place = place.map_err(|_| self.no_memory(need))?;
        Ok(First { state: self.state.clone(), _place: place })
    }

    /// Memory now, evicting idle residents for it; `None` when others are to go first or all is in
    /// use.
    async fn try_reserve(
        self: &Arc<Self>,
        need: &LoadRequest,
        first: bool,
    ) -> Result<Option<Reserved>> {
        loop {
            let gate = self.gate.clone().lock_owned().await;
            let victim = {
                let mut state = self.state();
                match state.reserve(need, first) {
                    Answer::Reserved { present, promised } => {
                        let present = present.into_iter().filter_map(|d| state.pin(d)).collect();
                        let room =
                            |promise| Reservation { inner: self.clone(), promise, taken: false };
                        let rooms = promised.into_iter().map(room).collect();
                        return Ok(Some(Reserved { present, rooms }));
                    }
                    Answer::Wait => return Ok(None),
                    Answer::Evict(digest) => digest,
                }
            };
            self.evict(gate, victim).await?;
        }
    }

    fn no_memory(&self, need: &LoadRequest) -> Error {
        let (all, taken) = {
            let state = self.state();
            (state.ledger.max(), state.ledger.unavailable())
        };
        let (max, slots, wanted) = (all.bytes, all.slots, need.contents.len());
        let available = max.saturating_sub(taken.bytes);
        let named: Vec<String> = need.contents.iter().map(|(d, _)| d.to_string()).collect();
        let (bytes, named) = (need.size().bytes, named.join(" with "));
        let message = if wanted > slots {
            format!("{wanted} adapters at once need as many places; there are {slots}")
        } else if taken.slots >= slots && bytes <= available {
            format!("all {slots} places of resident adapters are in use")
        } else {
            format!(
                "adapter {named} needs {bytes} bytes of memory; {available} of {max} are available"
            )
        };
        Error::new(Kind::Capacity, "insufficient_capacity", message)
    }
}

/// Refuses what its tenant's key could never have in memory. Errors: `tenant_share_exceeded`.
fn check_bound(need: &LoadRequest) -> Result<()> {
    let bytes = need.size().bytes;
    match need.tenant.resident_bytes_max().filter(|most| bytes > *most) {
        None => Ok(()),
        Some(most) => Err(share_exceeded(format!(
            "{bytes} bytes of memory are needed; its key allows your tenant {most}"
        ))),
    }
}

/// Counts a load that waits for room.
struct Waiting(Arc<Mutex<RegistryState>>);

impl Waiting {
    fn new(state: &Arc<Mutex<RegistryState>>) -> Self {
        lock(state).loads_waiting += 1;
        Self(state.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.0).loads_waiting -= 1;
    }
}
