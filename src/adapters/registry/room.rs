//! Room for a load: bytes and a place, by eviction if need be, and a fair line when all is in use.
//!
//! Owns who gets memory next. Never reads or installs an adapter. The thing to know: a resident in
//! use is never evicted, but when somebody has waited for long, the one that came first takes no
//! new requests: it runs dry, and the memory goes round. Several contents that are needed together
//! get their room together, so nobody holds one while waiting for another.

use super::Inner;
use super::book::Book;
use super::holds::{Hold, Resident};
use super::residency::lock;
use crate::adapters::Digest;
use crate::adapters::bank::Slot;
use crate::error::{Error, Kind, Result};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::MutexGuard as AsyncGuard;
use tokio::time::{Instant, timeout_at};

/// A waiter looks again after so long even if nothing rang.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Bytes and a place promised to a load. Dropping it takes the promise back.
pub struct Room {
    inner: Arc<Inner>,
    pub digest: Digest,
    pub bytes: u64,
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
}

impl Need {
    fn has(&self, digest: &Digest) -> bool {
        self.contents.iter().any(|(own, _)| own == digest)
    }

    fn bytes(&self) -> u64 {
        self.contents.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes and places.
type Size = (u64, usize);

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
struct First<'a> {
    book: Arc<Mutex<Book>>,
    _place: AsyncGuard<'a, ()>,
}

impl Drop for First<'_> {
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
        let _counted = Waiting::new(&self.book);
        let deadline = need.arrived + self.options.room_wait_max;
        let Ok(place) = timeout_at(deadline, self.line.lock()).await else {
            return Err(self.no_room(need));
        };
        let _first = First { book: self.book.clone(), _place: place };
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
                    let room =
                        |(digest, bytes)| Room { inner: self.clone(), digest, bytes, taken: false };
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
                || self.residents.len() + self.arriving + absent.len() > places_max;
            if stale.is_some() || full {
                let may = |d: &Digest| stale.map_or(!need.has(d), |stale| stale == *d);
                let victim = self.choose_victim(may);
                return victim.map_or(Look::Wait, |(digest, slot)| Look::Evict(digest, slot));
            }
        }
        self.reserved += wanted;
        self.arriving += absent.len();
        let resident = need.contents.iter().filter(|c| !absent.contains(c)).map(|(d, _)| *d);
        Look::Found(resident.filter_map(|digest| self.pin(digest)).collect(), absent)
    }

    /// Closes residents in use, the one that came first before the others, until what is left would
    /// give way to what is needed. Not the needed ones, nor the pinned ones, nor those that came
    /// after `before`: each is used for a while before it goes.
    fn close_for(&mut self, need: &Need, (bytes_max, places_max): Size, before: Instant) {
        let pinned = self.pinned_contents();
        let open = |digest: &Digest| self.residents.get(digest).is_some_and(Resident::open);
        let absent = need.contents.iter().filter(|(digest, _)| !open(digest));
        let (bytes, wanted) = absent.fold((0, 0), |(b, n), (_, bytes)| (b + bytes, n + 1));
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
                let spared = pinned.contains(digest) || need.has(digest);
                !r.closing && !r.idle() && r.since <= before && !spared
            });
            match open.min_by_key(|(_, r)| r.since) {
                Some((_, resident)) => resident.closing = true,
                None => return,
            }
        }
    }

    fn reopen(&mut self) {
        self.residents.values_mut().for_each(|r| r.closing = false);
    }
}
