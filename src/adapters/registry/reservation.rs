//! Memory for a load: bytes and a place, by eviction if need be; and a queue when all is in use, in
//! which tenants take turns.
//!
//! Owns who gets memory next. Never reads or installs an adapter. The thing to know: a resident in
//! use is never evicted, but when somebody has waited for long, the one that came first takes no
//! new requests: it runs dry, and the memory goes round. Several contents that are needed together
//! get their memory together, so nobody holds one while waiting for another.

use super::Inner;
use super::guards::{Guard, Resident};
use super::rights::share_exceeded;
use super::state::{Promise, RegistryState, lock};
use crate::adapters::Digest;
use crate::adapters::actor::Tenant;
use crate::adapters::bank::Slot;
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
            let mut state = self.inner.state();
            state.reserved -= self.promise.bytes;
            state.arriving -= 1;
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

/// What is to be resident together, and since when it is wanted.
pub struct LoadRequest {
    /// Each content once, with its bytes.
    pub contents: Vec<(Digest, u64)>,
    pub arrived: Instant,
    /// Give up when no version has one of them any more: it was deleted meanwhile.
    pub stored: bool,
    /// Who wants it.
    pub tenant: Tenant,
}

impl LoadRequest {
    fn has(&self, digest: &Digest) -> bool {
        self.contents.iter().any(|(own, _)| own == digest)
    }

    fn bytes(&self) -> u64 {
        self.contents.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Refuses what its tenant's key could never have in memory. Errors: `tenant_share_exceeded`.
    fn check_bound(&self) -> Result<()> {
        let most = self.tenant.bounds.resident_bytes.filter(|_| !self.tenant.is_operator());
        match most.filter(|most| self.bytes() > *most) {
            None => Ok(()),
            Some(most) => Err(share_exceeded(format!(
                "{} bytes of memory are needed; its key allows your tenant {most}",
                self.bytes()
            ))),
        }
    }
}

/// Bytes and places.
pub type Size = (u64, usize);

/// What the state says to a request now.
enum Answer {
    /// Those to load are promised their room; the others are held.
    Found(Vec<Guard>, Vec<(Digest, u64)>),
    /// Others are to go first, or all is in use.
    Wait,
    /// This one must go before.
    Evict(Digest, Slot),
}

/// The first of the line. What it asked for ends with it.
struct First {
    state: Arc<Mutex<RegistryState>>,
    _place: Permit,
}

impl Drop for First {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.claimed = false;
        state.reopen();
    }
}

impl Inner {
    /// Memory for every content that is not resident, and guards of those that are, all at once.
    /// May be dropped at any point. Errors: `insufficient_capacity` after `load_wait_max`.
    pub async fn reserve(self: &Arc<Self>, need: &LoadRequest) -> Result<Reserved> {
        if let Some(sought) = self.try_reserve(need, false).await? {
            return Ok(sought);
        }
        let (bytes_max, places_max) = self.memory_max();
        if need.bytes() > bytes_max || need.contents.len() > places_max {
            return Err(self.no_memory(need));
        }
        need.check_bound()?;
        let _counted = Waiting::new(&self.state);
        let deadline = need.arrived + self.options.load_wait_max;
        let mut first = self.first(need, deadline).await?;
        loop {
            if let Some(sought) = self.try_reserve(need, true).await? {
                return Ok(sought);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.no_memory(need));
            }
            let gone = |(digest, _): &&(Digest, u64)| need.stored && !self.state().wanted(*digest);
            if let Some((digest, _)) = need.contents.iter().find(gone) {
                let message = format!("adapter {digest} was deleted");
                return Err(Error::not_found("model_not_found", message).param("model"));
            }
            // Whoever waits for what is beyond its part holds nobody else up.
            if self.loads_queue.contended() && self.state().is_beyond(need, (bytes_max, places_max))
            {
                drop(first);
                first = self.first(need, deadline).await?;
                if let Some(sought) = self.try_reserve(need, true).await? {
                    return Ok(sought);
                }
            }
            if now >= need.arrived + self.options.load_patience {
                let patience = self.options.load_patience;
                let mut state = self.state();
                state.claimed = true;
                state.close_for(need, self.memory_max(), now - patience);
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

    fn memory_max(&self) -> Size {
        (self.options.resident_bytes_max, self.options.residents_max)
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
            let look = self.state().look(need, first, self.memory_max());
            match look {
                Answer::Found(present, absent) => {
                    let room = |(digest, bytes)| Reservation {
                        inner: self.clone(),
                        promise: Promise { digest, bytes, tenant: need.tenant.name.clone() },
                        taken: false,
                    };
                    return Ok(Some(Reserved {
                        present,
                        rooms: absent.into_iter().map(room).collect(),
                    }));
                }
                Answer::Wait => return Ok(None),
                Answer::Evict(digest, slot) => self.evict(gate, digest, slot).await?,
            }
        }
    }

    fn no_memory(&self, need: &LoadRequest) -> Error {
        let (max, slots) = self.memory_max();
        let (unavailable, places) = self.state().unavailable();
        let (available, wanted) = (max.saturating_sub(unavailable), need.contents.len());
        let named: Vec<String> = need.contents.iter().map(|(d, _)| d.to_string()).collect();
        let (bytes, named) = (need.bytes(), named.join(" with "));
        let message = if wanted > slots {
            format!("{wanted} adapters at once need as many places; there are {slots}")
        } else if places >= slots && bytes <= available {
            format!("all {slots} places of resident adapters are in use")
        } else {
            format!(
                "adapter {named} needs {bytes} bytes of memory; {available} of {max} are available"
            )
        };
        Error::new(Kind::Capacity, "insufficient_capacity", message)
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

impl RegistryState {
    /// (bytes, places) that no eviction could free now: in use, or promised.
    fn unavailable(&self) -> Size {
        let busy = self.residents.values().filter(|r| !r.idle());
        let (bytes, places) = busy.fold((0, 0), |(b, n), r| (b + r.bytes, n + 1));
        (bytes + self.reserved, places + self.arriving)
    }

    /// Holds and promises all that is needed, or nothing.
    fn look(&mut self, need: &LoadRequest, first: bool, (bytes_max, places_max): Size) -> Answer {
        let (mut absent, mut stale) = (Vec::new(), None);
        // Idle ones that shall stay, beside those in use.
        let (mut bytes, mut places) = self.unavailable();
        for &(digest, size) in &need.contents {
            match self.residents.get(&digest) {
                None => absent.push((digest, size)),
                Some(r) if r.open() && !r.idle() => {}
                Some(r) if r.open() => (bytes, places) = (bytes + r.bytes, places + 1),
                // It takes no new requests, and two copies there shall not be.
                Some(r) if r.idle() => {
                    stale = Some(digest);
                    absent.push((digest, size));
                }
                Some(_) => return Answer::Wait,
            }
        }
        let wanted: u64 = absent.iter().map(|(_, size)| size).sum();
        if !absent.is_empty() {
            let others_first = self.claimed && !first;
            if others_first || bytes + wanted > bytes_max || places + absent.len() > places_max {
                return Answer::Wait;
            }
            let full = self.used_bytes() + wanted > bytes_max
                || self.residents.len() + self.arriving + absent.len() > places_max
                || self.is_bounded(&need.tenant, wanted);
            if stale.is_some() || full {
                let (size, max) = ((wanted, absent.len()), (bytes_max, places_max));
                let victim = match stale {
                    Some(stale) => self.evict_idle(|digest, _| *digest == stale),
                    None => self.choose_victim(&need.tenant, size, max, |d| !need.has(d)),
                };
                return victim.map_or(Answer::Wait, |(digest, slot)| Answer::Evict(digest, slot));
            }
        }
        self.reserved += wanted;
        self.arriving += absent.len();
        let resident = need.contents.iter().filter(|c| !absent.contains(c)).map(|(d, _)| *d);
        Answer::Found(resident.filter_map(|digest| self.pin(digest)).collect(), absent)
    }

    /// What of a need is not there, or not for new requests.
    fn absent(&self, need: &LoadRequest) -> Size {
        let open = |digest: &Digest| self.residents.get(digest).is_some_and(Resident::open);
        let absent = need.contents.iter().filter(|(digest, _)| !open(digest));
        absent.fold((0, 0), |(b, n), (_, bytes)| (b + bytes, n + 1))
    }

    /// Whether the tenant would be beyond its part with what it needs.
    fn is_beyond(&self, need: &LoadRequest, max: Size) -> bool {
        let wanted = self.absent(need);
        let parts = self.parts(&need.tenant, wanted, max);
        self.is_bounded(&need.tenant, wanted.0)
            || (!need.tenant.is_operator() && parts.is_over(&need.tenant.name))
    }

    /// Closes residents in use until what is left would give way to what is needed: of tenants
    /// beyond their part before those of others, the one that came first before the others. Not the
    /// needed ones, nor the pinned ones, nor those that came after `before`: each is used for a
    /// while before it goes; nor, for a tenant beyond its own part, those of one within.
    fn close_for(&mut self, need: &LoadRequest, max: Size, before: Instant) {
        let (bytes_max, places_max) = max;
        let pinned = self.pinned_contents();
        let (bytes, wanted) = self.absent(need);
        let parts = self.parts(&need.tenant, (bytes, wanted), max);
        let beyond = self.is_beyond(need, max);
        loop {
            let stays = |d: &Digest, r: &Resident| !r.closing && (!r.idle() || need.has(d));
            let staying = self.residents.iter().filter(|(d, r)| stays(d, r));
            let (kept, places) = staying.fold((0, 0), |(b, n), (_, r)| (b + r.bytes, n + 1));
            if kept + self.reserved + bytes <= bytes_max
                && places + self.arriving + wanted <= places_max
            {
                return;
            }
            let open = self.residents.iter_mut().filter(|(digest, r)| {
                let spared = pinned.contains(digest)
                    || need.has(digest)
                    || (beyond && r.tenant != need.tenant.name && !parts.is_over(&r.tenant));
                !r.closing && !r.idle() && r.since <= before && !spared
            });
            match open.min_by_key(|(_, r)| (!parts.is_over(&r.tenant), r.since)) {
                Some((_, resident)) => resident.closing = true,
                None => return,
            }
        }
    }

    fn reopen(&mut self) {
        self.residents.values_mut().for_each(|r| r.closing = false);
    }
}
