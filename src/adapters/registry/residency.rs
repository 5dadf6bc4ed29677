//! Into the bank and out of it: loads, evictions and removals.
//!
//! Owns the order of everything that changes the bank. Never decides what a name means. The thing
//! to know: one gate stands before the bank, so an eviction and a load never wait on each other;
//! reading and preparing happen outside it.

use super::Inner;
use super::book::{Book, Hold};
use crate::adapters::bank::{BankCommand, Prepared, Probe, Slot};
use crate::adapters::{Digest, format};
use crate::error::{Error, Kind, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes promised to a load. Dropping it takes the promise back.
struct Reservation {
    book: Arc<Mutex<Book>>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.book).reserved -= self.bytes;
    }
}

/// The book, also after a panic elsewhere: each change to it is complete before anything can panic.
pub fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs blocking work off the async threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("a task failed: {e}"))))
}

impl Inner {
    /// Makes the content resident and keeps it there while the `Hold` lives. `known` is the probe's
    /// finding from before; without it the probe runs. The caller holds the digest's turn: one load
    /// per digest.
    pub async fn load(&self, digest: Digest, known: Option<f32>) -> Result<Hold> {
        let begun = Instant::now();
        loop {
            if let Some(pin) = self.book().pin(digest) {
                return Ok(pin);
            }
            let prepared = self.prepare(digest).await?;
            let _gate = self.gate.lock().await;
            // A removal that was under way before the gate opened may have been refused.
            if let Some(pin) = self.book().pin(digest) {
                return Ok(pin);
            }
            let reservation = self.reserve(digest, prepared.bytes as u64).await?;
            match self.install(prepared, known.is_none()).await {
                Ok((slot, probe)) => {
                    let found = known.or(probe.map(|p| p.logit_change_max));
                    self.options.metrics.load_seconds.observe(begun.elapsed().as_secs_f64());
                    return self.admit(digest, slot, reservation, found);
                }
                // The bank has a bound of its own, on slots: make room and read the files again.
                Err(e) if e.kind == Kind::Capacity => {
                    drop(reservation);
                    if !self.evict_one().await? {
                        return Err(e);
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The same for a request that waits for it, counted by why it was not resident.
    pub async fn cold_start(&self, digest: Digest, known: Option<f32>) -> Result<Hold> {
        let reason = {
            let mut book = self.book();
            if let Some(pin) = book.pin(digest) {
                return Ok(pin);
            }
            if book.seen.contains(&digest) { "evicted" } else { "start" }
        };
        self.options.metrics.cold_starts.with_label_values(&[reason]).inc();
        self.load(digest, known).await
    }

    fn admit(
        &self,
        digest: Digest,
        slot: Slot,
        mut reservation: Reservation,
        found: Option<f32>,
    ) -> Result<Hold> {
        let bytes = std::mem::take(&mut reservation.bytes);
        let mut book = self.book();
        // An engine that did not probe when asked has shown no change.
        book.admit(digest, slot, bytes, found.unwrap_or(0.0));
        self.options.metrics.adapter_loads.inc();
        let pin = book.pin(digest);
        drop(book);
        pin.ok_or_else(|| Error::fault("a loaded adapter vanished"))
    }

    /// Reads the stored files again, checks that they are what they were, and makes the factors.
    async fn prepare(&self, digest: Digest) -> Result<Box<Prepared>> {
        let _permit = self.prepares.acquire().await.map_err(|e| Error::fault(e.to_string()))?;
        let dir = self.store.blob(digest);
        let (shape, dtype) = (self.options.shape.clone(), self.options.dtype);
        let (rows, bias) = (self.rows.clone(), self.bias.clone());
        blocking(move || {
            let corrupt = |why: String| {
                Error::new(
                    Kind::Fault,
                    "corrupt_adapter",
                    format!("the stored files of adapter {digest} are damaged: {why}"),
                )
            };
            let now = format::files::AdapterFiles::find(&dir).and_then(|f| f.digest());
            let now = now.map_err(|e| corrupt(e.message))?;
            if now != digest {
                return Err(corrupt(format!("their digest is now {now}")));
            }
            let (_, prepared) = format::prepare(&dir, &shape, dtype, &rows, &bias)?;
            Ok(Box::new(prepared))
        })
        .await
    }

    /// Promises bytes, evicting idle residents for them. The caller holds the gate.
    async fn reserve(&self, digest: Digest, bytes: u64) -> Result<Reservation> {
        let max = self.options.resident_bytes_max;
        loop {
            {
                let mut book = self.book();
                let available = max.saturating_sub(book.pinned_bytes());
                if bytes > available {
                    return Err(Error::new(
                        Kind::Capacity,
                        "insufficient_capacity",
                        format!(
                            "adapter {digest} needs {bytes} bytes of memory; {available} of {max} \
                             are available"
                        ),
                    ));
                }
                if book.used_bytes() + bytes <= max {
                    book.reserved += bytes;
                    return Ok(Reservation { book: self.book.clone(), bytes });
                }
            }
            self.evict_one().await?;
        }
    }

    /// Evicts the least recently used idle resident; false when there is none. The caller holds the
    /// gate.
    async fn evict_one(&self) -> Result<bool> {
        let victim = self.book().choose_victim();
        match victim {
            None => Ok(false),
            Some((digest, slot)) => {
                self.take_out(digest, slot).await?;
                self.options.metrics.adapter_evictions.inc();
                Ok(true)
            }
        }
    }

    /// Removes, one by one, the residents that nobody wants any more.
    pub async fn remove_unwanted(&self) {
        let unwanted = self.book().unwanted();
        for digest in unwanted {
            let _gate = self.gate.lock().await;
            let slot = self.book().let_go(digest);
            if let Some(slot) = slot
                && let Err(e) = self.take_out(digest, slot).await
            {
                tracing::warn!(%digest, error = %e, "cannot take an adapter out of the bank");
            }
        }
    }

    /// Takes a leaving resident out of the bank and its bytes off the ledger. If the engine
    /// refuses, it stays.
    async fn take_out(&self, digest: Digest, slot: Slot) -> Result<()> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let command = BankCommand::Remove { slot, digest, reply };
        let sent = (self.bank)(command);
        let outcome = match sent {
            Ok(()) => answer.await.unwrap_or_else(|_| Err(engine_gone())),
            Err(e) => Err(e),
        };
        let mut book = self.book();
        match &outcome {
            Ok(()) => drop(book.residents.remove(&digest)),
            Err(_) => {
                if let Some(resident) = book.residents.get_mut(&digest) {
                    resident.leaving = false;
                }
            }
        }
        outcome
    }

    async fn install(&self, prepared: Box<Prepared>, probe: bool) -> Result<(Slot, Option<Probe>)> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        (self.bank)(BankCommand::Install { prepared, probe, reply })?;
        answer.await.unwrap_or_else(|_| Err(engine_gone()))
    }
}

fn engine_gone() -> Error {
    Error::new(Kind::Unavailable, "engine_unavailable", "the engine has stopped")
}
