//! Room for a load: bytes and a place, by eviction if need be, and a fair line when all is in use.
//!
//! Owns who gets memory next. Never reads or installs an adapter. The thing to know: a resident in
//! use is never evicted, but when somebody has waited for long, the one that came first takes no
//! new requests: it runs dry, and the memory goes round.

use super::Inner;
use super::book::Book;
use super::holds::Hold;
use super::residency::lock;
use crate::adapters::Digest;
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

/// What looking for room led to.
pub enum Sought {
    /// The content is resident after all.
    Resident(Hold),
    Room(Room),
}

/// What a load needs, and since when.
#[derive(Clone, Copy)]
pub struct Need {
    pub digest: Digest,
    pub bytes: u64,
    pub arrived: Instant,
    /// Give up when no version has the content any more: it was deleted meanwhile.
    pub stored: bool,
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
    /// Room for a content, or the content itself if it is there by then. May be dropped at any
    /// point. Errors: `insufficient_capacity` after `room_wait_max`.
    pub async fn find_room(self: &Arc<Self>, need: Need) -> Result<Sought> {
        if let Some(sought) = self.try_room(&need, false).await? {
            return Ok(sought);
        }
        if need.bytes > self.options.resident_bytes_max {
            return Err(self.no_room(&need));
        }
        let _counted = Waiting::new(&self.book);
        let deadline = need.arrived + self.options.room_wait_max;
        let Ok(place) = timeout_at(deadline, self.line.lock()).await else {
            return Err(self.no_room(&need));
        };
        let _first = First { book: self.book.clone(), _place: place };
        loop {
            if let Some(sought) = self.try_room(&need, true).await? {
                return Ok(sought);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.no_room(&need));
            }
            if need.stored && !self.book().wanted(need.digest) {
                let message = format!("adapter {} was deleted", need.digest);
                return Err(Error::not_found("model_not_found", message).param("model"));
            }
            if now >= need.arrived + self.options.room_patience {
                let patience = self.options.room_patience;
                let o = &self.options;
                let mut book = self.book();
                book.claimed = true;
                book.close_for(need.bytes, (o.resident_bytes_max, o.residents_max), now - patience);
            }
            let again = deadline.min(now + LOOK_AGAIN);
            // Either is a reason to look again.
            let _ = timeout_at(again, self.bells.room.notified()).await;
        }
    }

    /// Room now, evicting idle residents for it; `None` when others are to go first or all is in
    /// use.
    async fn try_room(self: &Arc<Self>, need: &Need, first: bool) -> Result<Option<Sought>> {
        let (bytes_max, residents_max) =
            (self.options.resident_bytes_max, self.options.residents_max);
        loop {
            let gate = self.gate.clone().lock_owned().await;
            let victim = {
                let mut book = self.book();
                if let Some(pin) = book.pin(need.digest) {
                    return Ok(Some(Sought::Resident(pin)));
                }
                // It takes no new requests, and two copies there shall not be.
                let itself = book.residents.get(&need.digest).map(|r| r.idle());
                if itself == Some(false) || (book.claimed && !first) {
                    return Ok(None);
                }
                let (bytes, places) = book.unavailable();
                if bytes + need.bytes > bytes_max || places >= residents_max {
                    return Ok(None);
                }
                let full = book.used_bytes() + need.bytes > bytes_max
                    || book.residents.len() + book.arriving >= residents_max;
                if itself.is_none() && !full {
                    book.reserved += need.bytes;
                    book.arriving += 1;
                    let room = Room { inner: self.clone(), bytes: need.bytes, taken: false };
                    return Ok(Some(Sought::Room(room)));
                }
                book.choose_victim(itself.map(|_| need.digest))
            };
            let Some((digest, slot)) = victim else { return Ok(None) };
            self.evict(gate, digest, slot).await?;
        }
    }

    fn no_room(&self, need: &Need) -> Error {
        let max = self.options.resident_bytes_max;
        let (unavailable, places) = self.book().unavailable();
        let available = max.saturating_sub(unavailable);
        let slots = self.options.residents_max;
        let message = match places >= slots && need.bytes <= available {
            true => format!("all {slots} places of resident adapters are in use"),
            false => format!(
                "adapter {} needs {} bytes of memory; {available} of {max} are available",
                need.digest, need.bytes
            ),
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
    fn unavailable(&self) -> (u64, usize) {
        let busy = self.residents.values().filter(|r| !r.idle());
        let (bytes, places) = busy.fold((0, 0), |(b, n), r| (b + r.bytes, n + 1));
        (bytes + self.reserved, places + self.arriving)
    }

    /// Closes residents in use, the one that came first before the others, until what is left would
    /// give way to `bytes`. Not the pinned ones, nor those that came after `before`: each is used
    /// for a while before it goes.
    fn close_for(&mut self, bytes: u64, (bytes_max, places_max): (u64, usize), before: Instant) {
        let pinned = self.pinned_contents();
        loop {
            let staying = self.residents.values().filter(|r| !r.closing && !r.idle());
            let (kept, places) = staying.fold((0, 0), |(b, n), r| (b + r.bytes, n + 1));
            if kept + self.reserved + bytes <= bytes_max && places + self.arriving < places_max {
                return;
            }
            let open = self.residents.iter_mut().filter(|(digest, r)| {
                !r.closing && !r.idle() && r.since <= before && !pinned.contains(digest)
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
