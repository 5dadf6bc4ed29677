//! Into the bank and out of it: loads, evictions and removals.
//!
//! Owns the order of everything that changes the bank. Never decides what a name means, nor who
//! gets room. The thing to know: a load holds its content's lock from the look for room to the
//! slot, so there is one load per content; whatever leaves the bank passes one gate.

use super::guards::Guard;
use super::keyed_mutex::KeyedGuard;
use super::reservation::{Arrival, Reservation, Reserved};
use super::state::Installed;
use super::{Inner, detached};
use crate::adapters::Digest;
use crate::adapters::actor::Tenant;
use crate::adapters::bank::{BankCommand, Prepared, Probe, Slot};
use crate::adapters::format::{self, large};
use crate::adapters::ledger::LoadRequest;
use crate::adapters::version::Version;
use crate::blocking::blocking;
use crate::error::{Error, Kind, Result};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// What the catalogue knows of a content.
struct Stored {
    bytes: u64,
    logit_change_max: f32,
}

impl From<&Version> for Stored {
    fn from(version: &Version) -> Self {
        Self { bytes: version.resident_bytes, logit_change_max: version.logit_change_max }
    }
}

/// Compares stored files with the digest that names them. Blocking. Errors: `corrupt_adapter`.
pub fn check_stored(dir: &Path, digest: Digest) -> Result<()> {
    let corrupt = |why: String| {
        let message = format!("the stored files of adapter {digest} are damaged: {why}");
        Error::new(Kind::Fault, "corrupt_adapter", message)
    };
    let now = format::files::AdapterFiles::find(dir).and_then(|f| f.digest());
    let now = now.map_err(|e| corrupt(e.message))?;
    if now != digest {
        return Err(corrupt(format!("their digest is now {now}")));
    }
    Ok(())
}

/// What reading a stored content came to.
enum Loaded {
    In(Guard),
    /// The catalogue knew its bytes from a start with another storage type: look for that much
    /// room.
    Sized(Digest, u64),
}

impl Inner {
    /// Makes a stored version resident and keeps it there while the `Guard` lives.
    pub async fn bring(
        self: &Arc<Self>,
        version: &Version,
        arrived: Instant,
        tenant: &Tenant,
    ) -> Result<Guard> {
        let contents = BTreeMap::from([(version.digest, version.into())]);
        let hold = self.bring_contents(contents, arrived, tenant).await?.pop();
        hold.ok_or_else(|| Error::fault("nothing was brought"))
    }

    /// The same for several, all of them or none. Memory for all comes before reading, so that
    /// those who wait for it hold none. May be dropped at any point: who waits gives the place up,
    /// and loads that have begun run to their end.
    pub async fn bring_all(
        self: &Arc<Self>,
        versions: &[Arc<Version>],
        arrived: Instant,
        tenant: &Tenant,
    ) -> Result<Vec<Guard>> {
        let contents = versions.iter().map(|version| (version.digest, version.as_ref().into()));
        self.bring_contents(contents.collect(), arrived, tenant).await
    }

    async fn bring_contents(
        self: &Arc<Self>,
        mut contents: BTreeMap<Digest, Stored>,
        arrived: Instant,
        tenant: &Tenant,
    ) -> Result<Vec<Guard>> {
        loop {
            // In the order of contents, as everybody: nobody waits in a ring.
            let mut locks = BTreeMap::new();
            for digest in contents.keys() {
                locks.insert(*digest, self.digest_locks.take(*digest).await);
            }
            let sizes = contents.iter().map(|(digest, stored)| (*digest, stored.bytes));
            let need = LoadRequest { contents: sizes.collect(), tenant: tenant.clone() };
            let arrival = Arrival { at: arrived, stored: true };
            let Reserved { present: mut holds, rooms } = self.reserve(&need, arrival).await?;
            locks.retain(|digest, _| rooms.iter().any(|room| room.promise.digest == *digest));
            let loads = rooms.into_iter().map(|room| {
                let lock = locks.remove(&room.promise.digest);
                let known = contents[&room.promise.digest].logit_change_max;
                self.load(room, known, lock)
            });
            let mut sized = false;
            for loaded in join_all(loads.collect::<Vec<_>>()).await {
                match loaded? {
                    Loaded::In(hold) => holds.push(hold),
                    Loaded::Sized(digest, bytes) => {
                        contents.entry(digest).and_modify(|stored| stored.bytes = bytes);
                        sized = true;
                    }
                }
            }
            if !sized {
                return Ok(holds);
            }
        }
    }

    /// Reads a stored content into the room it was given. It runs to its end, the content's lock
    /// with it.
    fn load(
        self: &Arc<Self>,
        room: Reservation,
        known: f32,
        lock: Option<KeyedGuard<Digest>>,
    ) -> impl Future<Output = Result<Loaded>> + use<> {
        let inner = self.clone();
        detached(async move {
            // Dropped in reverse: nobody gets the lock while the memory is still promised.
            let (_lock, room) = (lock, room);
            let (digest, begun) = (room.promise.digest, Instant::now());
            let prepared = inner.prepare(digest, &room.promise.tenant).await?;
            let bytes = prepared.bytes as u64;
            if bytes != room.promise.bytes {
                return Ok(Loaded::Sized(digest, bytes));
            }
            let why = inner.state().why_cold(digest).name();
            inner.options.metrics.cold_starts.with_label_values(&[why]).inc();
            inner.enter(prepared, Some(known), room, begun).await.map(Loaded::In)
        })
    }

    /// The same for a content that no version has yet, and so was never probed. The caller holds
    /// its lock, and runs detached.
    pub async fn bring_new(self: &Arc<Self>, digest: Digest, tenant: &Tenant) -> Result<Guard> {
        if let Some(pin) = self.state().pin(digest) {
            return Ok(pin);
        }
        let known = self.state().known_change(digest);
        let begun = Instant::now();
        let prepared = self.prepare(digest, &tenant.name).await?;
        let contents = vec![(digest, prepared.bytes as u64)];
        let need = LoadRequest { contents, tenant: tenant.clone() };
        let arrival = Arrival { at: begun, stored: false };
        let Reserved { mut present, mut rooms } = self.reserve(&need, arrival).await?;
        match (present.pop(), rooms.pop()) {
            (Some(pin), _) => Ok(pin),
            (None, Some(room)) => self.enter(prepared, known, room, begun).await,
            (None, None) => Err(Error::fault("neither room nor resident")),
        }
    }

    /// Into a slot and into the state. `known` is the probe's finding from before; without it the
    /// probe runs.
    async fn enter(
        &self,
        prepared: Box<Prepared>,
        known: Option<f32>,
        mut room: Reservation,
        begun: Instant,
    ) -> Result<Guard> {
        let digest = prepared.digest;
        let (slot, probe) = self.install(prepared, known.is_none()).await?;
        // An engine that did not probe when asked has shown no change.
        let change = known.or(probe.map(|p| p.logit_change_max)).unwrap_or(0.0);
        let now = Instant::now();
        let metrics = &self.options.metrics;
        metrics.load_seconds.observe((now - begun).as_secs_f64());
        metrics.adapter_loads.inc();
        let mut state = self.state();
        state.admit(&room.promise, Installed { slot, logit_change_max: change }, now);
        room.taken = true;
        let pin = state.pin(digest);
        drop(state);
        pin.ok_or_else(|| Error::fault("a loaded adapter vanished"))
    }

    /// Reads the stored files again, checks that they are what they were, and makes the factors.
    async fn prepare(&self, digest: Digest, tenant: &str) -> Result<Box<Prepared>> {
        let _permit = self.prepares.take(tenant).await;
        let dir = self.store.blob(digest);
        let (shape, dtype) = (self.options.shape.clone(), self.options.factors);
        let (rows, bias) = (self.rows.clone(), self.bias.clone());
        blocking(move || {
            let files = format::files::AdapterFiles::find(&dir);
            let bytes = files.and_then(|files| files.bytes()).unwrap_or(0);
            let read = || format::prepare_as(digest, &dir, &shape, dtype, &rows, &bias);
            let (_, (_, prepared)) = large::beside(bytes, || check_stored(&dir, digest), read)?;
            Ok(Box::new(prepared))
        })
        .await
    }

    /// Takes a resident that was marked as leaving out of the bank. The gate goes with it: should
    /// the caller be dropped, nobody passes before the engine has answered.
    pub async fn evict(self: &Arc<Self>, gate: OwnedMutexGuard<()>, digest: Digest) -> Result<()> {
        let inner = self.clone();
        detached(async move {
            let _gate = gate;
            inner.take_out(digest).await?;
            inner.options.metrics.adapter_evictions.inc();
            Ok(())
        })
        .await
    }

    /// Removes, one by one, the residents that nobody wants any more.
    pub async fn remove_unwanted(&self) {
        let unwanted = self.state().unwanted();
        for digest in unwanted {
            let _gate = self.gate.lock().await;
            let leaves = self.state().let_go(digest);
            if leaves && let Err(e) = self.take_out(digest).await {
                tracing::warn!(%digest, error = %e, "cannot take an adapter out of the bank");
            }
        }
    }

    /// Takes a leaving resident out of the bank and its bytes off the ledger. If the engine
    /// refuses, it stays.
    async fn take_out(&self, digest: Digest) -> Result<()> {
        let slot = self.state().ledger.get(digest).map(|r| r.what.slot);
        let slot = slot.ok_or_else(|| Error::fault("a leaving adapter vanished"))?;
        let (reply, answer) = tokio::sync::oneshot::channel();
        let command = BankCommand::Remove { slot, digest, reply };
        let sent = (self.bank)(command);
        let outcome = match sent {
            Ok(()) => answer.await.unwrap_or_else(|_| Err(engine_gone())),
            Err(e) => Err(e),
        };
        self.state().ledger.settle(digest, outcome.is_ok());
        self.signals.room.notify_one();
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
