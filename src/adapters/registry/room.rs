//! Room for a load: bytes and a place, by eviction if need be, and a line when all is in use, in
//! which tenants take turns.
//!
//! Owns who gets memory next. Never reads or installs an adapter. The thing to know: a resident in
//! use is never evicted, but when somebody has waited for long, the one that came first takes no
//! new requests: it runs dry, and the memory goes round. Several contents that are needed together
//! get their room together, so nobody holds one while waiting for another.

use super::book::Book;
use super::holds::{Hold, Resident};
use super::residency::lock;
use super::rights::share_exceeded;
use super::{Inner, Tenant};
use crate::adapters::Digest;
use crate::adapters::bank::Slot;
use crate::error::{Error, Kind, Result};
use crate::share::Permit;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A waiter looks again after so long even if nothing rang.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Bytes and a place promised to a load. Dropping it takes the promise back.
pub struct Room {
    inner: Arc<Inner>,
    pub digest: Digest,
    pub bytes: u64,
    /// Whose load it is.
    pub tenant: Arc<str>,
    /// What it was promised for has come: the book counts the resident instead.
    pub taken: bool,
}

impl Drop for Room {
    fn drop(&mut self) {
        if !self.taken {
            let mut book = self.inner.book();
            book.reserved -= self.bytes;
            book.arriving -= 1;
        }
        self.inner.bells.room.notify_one();
    }
}

/// What looking for room led to, for each content one of the two.
#[derive(Default)]
pub struct Sought {
    /// Of those that are resident after all.
    pub present: Vec<Hold>,
    pub rooms: Vec<Room>,
}

/// What is to be resident together, and since when it is wanted.
pub struct Need {
    /// Each content once, with its bytes.
    pub contents: Vec<(Digest, u64)>,
    pub arrived: Instant,
    /// Give up when no version has one of them any more: it was deleted meanwhile.
    pub stored: bool,
    /// Who wants it.
    pub tenant: Tenant,
}

impl Need {
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

/// What the book says to a need now.
enum Look {
    /// Those to load are promised their room; the others are held.
    Found(Vec<Hold>, Vec<(Digest, u64)>),
    /// Others are to go first, or all is in use.
    Wait,
    /// This one must go before.
    Evict(Digest, Slot),
}

/// The first of the line. What it asked for ends with it.
struct First {
    book: Arc<Mutex<Book>>,
    _place: Permit,
}

impl Drop for First {
    fn drop(&mut self) {
        let mut book = lock(&self.book);
        book.claimed = false;
        book.reopen();
    }
}

impl Inner {
    /// Room for every content that is not resident, and holds on those that are, all at once. May
    /// be dropped at any point. Errors: `insufficient_capacity` after `room_wait_max`.
    pub async fn find_room(self: &Arc<Self>, need: &Need) -> Result<Sought> {
        if let Some(sought) = self.try_room(need, false).await? {
            return Ok(sought);
        }
        let (bytes_max, places_max) = self.room_max();
        if need.bytes() > bytes_max || need.contents.len() > places_max {
            return Err(self.no_room(need));
        }
        need.check_bound()?;
        let _counted = Waiting::new(&self.book);
        let deadline = need.arrived + self.options.room_wait_max;
        let mut first = self.first(need, deadline).await?;
        loop {
            if let Some(sought) = self.try_room(need, true).await? {
                return Ok(sought);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.no_room(need));
            }
            let gone = |(digest, _): &&(Digest, u64)| need.stored && !self.book().wanted(*digest);
            if let Some((digest, _)) = need.contents.iter().find(gone) {
                let message = format!("adapter {digest} was deleted");
                return Err(Error::not_found("model_not_found", message).param("model"));
            }
            // Whoever waits for what is beyond its part holds nobody else up.
            if self.line.contended() && self.book().is_beyond(need, (bytes_max, places_max)) {
                drop(first);
                first = self.first(need, deadline).await?;
                if let Some(sought) = self.try_room(need, true).await? {
                    return Ok(sought);
                }
            }
            if now >= need.arrived + self.options.room_patience {
                let patience = self.options.room_patience;
                let mut book = self.book();
                book.claimed = true;
                book.close_for(need, self.room_max(), now - patience);
            }
            let again = deadline.min(now + LOOK_AGAIN);
            // Either is a reason to look again.
            let _ = timeout_at(again, self.bells.room.notified()).await;
        }
    }

    /// Waits to be the first of the line. Errors: `insufficient_capacity`.
    async fn first(&self, need: &Need, deadline: Instant) -> Result<First> {
        let place = timeout_at(deadline, self.line.take(&need.tenant.name)).await;
        let place = place.map_err(|_| self.no_room(need))?;
        Ok(First { book: self.book.clone(), _place: place })
    }

    fn room_max(&self) -> Size {
        (self.options.resident_bytes_max, self.options.residents_max)
    }

    /// Room now, evicting idle residents for it; `None` when others are to go first or all is in
    /// use.
    async fn try_room(self: &Arc<Self>, need: &Need, first: bool) -> Result<Option<Sought>> {
        loop {
            let gate = self.gate.clone().lock_owned().await;
            let look = self.book().look(need, first, self.room_max());
            match look {
                Look::Found(present, absent) => {
                    let room = |(digest, bytes)| Room {
                        inner: self.clone(),
                        digest,
                        bytes,
                        tenant: need.tenant.name.clone(),
                        taken: false,
                    };
                    return Ok(Some(Sought {
                        present,
                        rooms: absent.into_iter().map(room).collect(),
                    }));
                }
                Look::Wait => return Ok(None),
                Look::Evict(digest, slot) => self.evict(gate, digest, slot).await?,
            }
        }
    }

    fn no_room(&self, need: &Need) -> Error {
        let (max, slots) = self.room_max();
        let (unavailable, places) = self.book().unavailable();
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
struct Waiting(Arc<Mutex<Book>>);

impl Waiting {
    fn new(book: &Arc<Mutex<Book>>) -> Self {
        lock(book).room_waiting += 1;
        Self(book.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.0).room_waiting -= 1;
    }
}

impl Book {
    /// (bytes, places) that no eviction could free now: in use, or promised.
    fn unavailable(&self) -> Size {
        let busy = self.residents.values().filter(|r| !r.idle());
        let (bytes, places) = busy.fold((0, 0), |(b, n), r| (b + r.bytes, n + 1));
        (bytes + self.reserved, places + self.arriving)
    }

    /// Holds and promises all that is needed, or nothing.
    fn look(&mut self, need: &Need, first: bool, (bytes_max, places_max): Size) -> Look {
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
                Some(_) => return Look::Wait,
            }
        }
        let wanted: u64 = absent.iter().map(|(_, size)| size).sum();
        if !absent.is_empty() {
            let others_first = self.claimed && !first;
            if others_first || bytes + wanted > bytes_max || places + absent.len() > places_max {
                return Look::Wait;
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
                return victim.map_or(Look::Wait, |(digest, slot)| Look::Evict(digest, slot));
            }
        }
        self.reserved += wanted;
        self.arriving += absent.len();
        let resident = need.contents.iter().filter(|c| !absent.contains(c)).map(|(d, _)| *d);
        Look::Found(resident.filter_map(|digest| self.pin(digest)).collect(), absent)
    }

    /// What of a need is not there, or not for new requests.
    fn absent(&self, need: &Need) -> Size {
        let open = |digest: &Digest| self.residents.get(digest).is_some_and(Resident::open);
        let absent = need.contents.iter().filter(|(digest, _)| !open(digest));
        absent.fold((0, 0), |(b, n), (_, bytes)| (b + bytes, n + 1))
    }

    /// Whether the tenant would be beyond its part with what it needs.
    fn is_beyond(&self, need: &Need, max: Size) -> bool {
        let wanted = self.absent(need);
        let parts = self.parts(&need.tenant, wanted, max);
        self.is_bounded(&need.tenant, wanted.0)
            || (!need.tenant.is_operator() && parts.is_over(&need.tenant.name))
    }

    /// Closes residents in use until what is left would give way to what is needed: of tenants
    /// beyond their part before those of others, the one that came first before the others. Not the
    /// needed ones, nor the pinned ones, nor those that came after `before`: each is used for a
    /// while before it goes; nor, for a tenant beyond its own part, those of one within.
    fn close_for(&mut self, need: &Need, max: Size, before: Instant) {
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
