//! Removal of a name: ready, draining, gone; and the sweep that makes things go.
//!
//! Owns what leaves memory and disk, and when. Never decides that something should go without a
//! lease being over. The thing to know: the name goes at once; its bytes go when the last request
//! on it ends, or is cut because the operator's patience did.

use super::Inner;
use crate::adapters::Digest;
use crate::adapters::store::Store;
use crate::adapters::version::model_not_found;
use crate::adapters::version::{Entry, Removal, Removed, Version};
use crate::blocking::blocking;
use crate::error::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// For what is no longer used to leave memory and disk: a step, and a few file operations.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(10);

/// Code of the refusal to delete what an alias leads to.
pub const ALIASED: &str = "adapter_aliased";

/// What a deleted name had: to be told what of it was freed.
struct Leaving {
    versions: Vec<Arc<Version>>,
    /// (bytes in the bank when the name went, bytes of files)
    contents: BTreeMap<Digest, (u64, u64)>,
}

impl Inner {
    /// See `Registry::delete`.
    pub async fn delete(self: &Arc<Self>, name: String, how: Removal) -> Result<Removed> {
        let lock = self.name_locks.take(name.clone()).await;
        if !self.state().has(&name) {
            return Err(model_not_found(&name));
        }
        self.check_right(&name, &how.by).await?;
        self.expect(&name, &how.expected)?;
        if let Some(alias) = self.state().alias_of(&name) {
            return Err(aliased(&alias.name, &name));
        }
        self.store.remove_name(&name).await?;
        let (leaving, entries) = {
            let mut state = self.state();
            let entries = state.entries_of(&name);
            let contents = entries.iter().map(|e| {
                let digest = e.version.digest;
                let resident = state.ledger.get(digest).map_or(0, |r| r.bytes);
                (digest, (resident, e.version.file_bytes))
            });
            let versions = entries.iter().map(|e| e.version.clone()).collect();
            let leaving = Leaving { versions, contents: contents.collect() };
            (leaving, state.remove(&name).ok_or_else(|| model_not_found(&name))?)
        };
        drop(lock);
        tracing::info!(adapter = %name, "deleted");
        let in_use = entries.iter().any(|e| e.leases > 0);
        let mut gone = false;
        let mut cut = 0;
        if let Some(drain) = how.drain {
            gone = self.settled(&leaving, drain).await;
            if !gone {
                cut = self.state().cut(&leaving.versions);
                tracing::warn!(adapter = %name, requests = cut, "cut what still ran on it");
            }
        }
        if how.drain.is_some() || !in_use {
            gone = gone || self.settled(&leaving, SETTLE_TIME_MAX).await;
        } else {
            self.wake_reaper();
        }
        let (resident_bytes_freed, file_bytes_freed) = self.freed(&leaving);
        Ok(Removed { entries, gone, cut, resident_bytes_freed, file_bytes_freed })
    }

    /// See `Registry::check_alias`.
    pub fn check_alias(&self, entry: &Entry) -> Result<()> {
        match self.state().alias_of_version(entry) {
            Some(alias) => Err(aliased(&alias, &entry.version.id())),
            None => Ok(()),
        }
    }

    /// See `Registry::delete_version`.
    pub async fn delete_version(self: &Arc<Self>, name: String, number: u64) -> Result<bool> {
        let lock = self.name_locks.take(name.clone()).await;
        let Some(entry) = self.state().entry(&name, number) else { return Ok(false) };
        self.check_alias(&entry)?;
        let last = self.state().entries_of(&name).len() == 1;
        // The name goes on to the version before, where it meant this one.
        let next = self.state().before_current(&name).filter(|_| entry.current);
        match last {
            true => self.store.remove_name(&name).await?,
            false => self.store.remove_version_and_move(&name, number, entry.current, next).await?,
        }
        let resident = self.state().ledger.get(entry.version.digest).map_or(0, |r| r.bytes);
        let contents =
            BTreeMap::from([(entry.version.digest, (resident, entry.version.file_bytes))]);
        {
            let mut state = self.state();
            match last {
                true => drop(state.remove(&name)),
                false => state.remove_version(&name, number, next),
            }
        }
        drop(lock);
        tracing::info!(adapter = entry.version.id(), "deleted");
        let leaving = Leaving { versions: vec![entry.version.clone()], contents };
        match entry.leases {
            0 => drop(self.settled(&leaving, SETTLE_TIME_MAX).await),
            _ => self.wake_reaper(),
        }
        Ok(true)
    }

    /// Waits until nobody uses the versions and their memory is free; false when it takes longer.
    async fn settled(&self, leaving: &Leaving, time_max: Duration) -> bool {
        let end = Instant::now() + time_max;
        let mut swept = self.swept.subscribe();
        self.wake_reaper();
        loop {
            if self.state().has_left(&leaving.versions) {
                return true;
            }
            if timeout_at(end, swept.changed()).await.is_err() {
                return self.state().has_left(&leaving.versions);
            }
        }
    }

    /// (resident bytes, file bytes) that are no longer taken.
    fn freed(&self, leaving: &Leaving) -> (u64, u64) {
        let state = self.state();
        let mut freed = (0, 0);
        for (digest, (resident, file)) in &leaving.contents {
            if state.ledger.get(*digest).is_none() {
                freed.0 += resident;
            }
            if !state.refers_to(*digest) {
                freed.1 += file;
            }
        }
        freed
    }

    /// What the reaper does when a hold ended: residents out of the bank, then old versions and
    /// their files.
    pub async fn sweep(self: &Arc<Self>) {
        if !self.state().unsettled {
            return;
        }
        self.remove_unwanted().await;
        let (pruned, mut digests) = {
            let mut state = self.state();
            state.settle_drained();
            state.take_surplus(self.options.versions_kept)
        };
        for version in pruned {
            let removed = self.store.remove_version(&version.name, version.number).await;
            if let Err(e) = removed {
                // It comes back with the next start, and is pruned again then.
                tracing::warn!(adapter = %version.id(), error = %e, "cannot prune a version");
                // Its row stays, and so do its files.
                digests.retain(|digest| *digest != version.digest);
            }
        }
        for digest in digests {
            let _turn = self.digest_locks.take(digest).await;
            if !self.state().refers_to(digest) {
                let store = self.store.clone();
                discard(store, digest).await;
            }
        }
        self.swept.send_modify(|n| *n += 1);
    }
}

/// 409 for what an alias leads to.
fn aliased(alias: &str, what: &str) -> Error {
    let message = format!("alias `{alias}` leads to `{what}`; change it first");
    Error::new(Kind::Conflict, ALIASED, message).param("name")
}

/// Removes a content's files off the async threads. A failure only leaves an orphan for the next
/// start.
pub async fn discard(store: Arc<Store>, digest: Digest) {
    let removed = blocking(move || {
        store.discard(digest);
        Ok(())
    });
    if let Err(e) = removed.await {
        tracing::warn!(%digest, error = %e, "cannot remove adapter files");
    }
}
