//! Uploads: how a name comes to mean something new.
//!
//! Owns the order of publishing: check, hash, store, load, probe, record, swap. Never half: what
//! fails leaves no trace. The thing to know: each runs as a task of its own, so a client that goes
//! away does not stop it in the middle.

use super::aliases::name_taken;
use super::remove::discard;
use super::{Inner, Staging};
use crate::adapters::Digest;
use crate::adapters::format::{self, Summary, files::AdapterFiles};
use crate::adapters::version::servable;
use crate::adapters::version::{Entry, Lineage, Publish, Version};
use crate::blocking::blocking;
use crate::clock::unix_seconds;
use crate::error::{Error, Kind, Result};
use std::sync::Arc;

/// What an upload turned out to hold.
struct Checked {
    summary: Summary,
    digest: Digest,
    bytes: u64,
}

impl Inner {
    /// See `Registry::publish`.
    pub async fn publish(self: &Arc<Self>, staging: Staging, how: Publish) -> Result<Entry> {
        let name = staging.name.clone();
        self.check_name(&name)?;
        let _turn = self.name_locks.take(name.clone()).await;
        if self.state().aliases.contains_key(&name) {
            return Err(name_taken(&name, "an alias"));
        }
        self.check_right(&name, &how.by).await?;
        self.expect(&name, &how.expected)?;
        let checked = self.inspect(&staging).await?;
        if let Some(entry) = self.published_since(&name, checked.digest, &how) {
            tracing::info!(id = entry.version.id(), "kept: it was published later");
            return Ok(entry);
        }
        if let Some(entry) = self.published_before(&staging, checked.digest, &how).await? {
            return Ok(entry);
        }
        self.check_names(&name, &how.by.tenant)?;
        self.check_disk(&name, &how.by.tenant, checked.bytes, checked.bytes)?;
        let digest = checked.digest;
        let _digest_turn = self.digest_locks.take(digest).await;
        let outcome = self.store_and_swap(&staging, checked, &how).await;
        let store = self.store.clone();
        if outcome.is_err() && !self.state().refers_to(digest) {
            discard(store, digest).await;
        } else {
            let settled = move || {
                store.settled(digest);
                Ok(())
            };
            blocking(settled).await?;
        }
        self.wake_reaper();
        outcome
    }

    async fn inspect(&self, staging: &Staging) -> Result<Checked> {
        let (dir, shape) = (staging.dir.clone(), self.options.shape.clone());
        let text = self.options.text.clone();
        let max = self.options.upload_bytes_max;
        blocking(move || {
            let files = AdapterFiles::find(&dir)?;
            let bytes = files.bytes()?;
            if bytes > max {
                return Err(Error::new(
                    Kind::TooLarge,
                    "upload_too_large",
                    format!("the adapter has {bytes} bytes; the limit is {max}"),
                ));
            }
            let check = || format::check_upload(&dir, &shape, &text);
            let (digest, summary) = format::large::beside(bytes, || files.digest(), check)?;
            Ok(Checked { summary, digest, bytes })
        })
        .await
    }

    /// The current version, where an upload that yields brings nothing new.
    fn published_since(&self, name: &str, digest: Digest, how: &Publish) -> Option<Entry> {
        let uploader = |lineage: &Lineage| match lineage {
            Lineage::Uploaded { by, .. } => by.clone(),
            _ => None,
        };
        let entries = self.state().entries_of(name);
        let later = |e: &&Entry| how.yields && e.current && e.version.digest != digest;
        let current = entries.iter().find(later)?;
        let by = uploader(&how.lineage);
        let mut brought = entries.iter().rev().filter(|e| uploader(&e.version.lineage) == by);
        // Where the version that it brought is no longer kept, others have come since.
        let same = brought.next().is_none_or(|e| e.version.digest == digest);
        same.then(|| current.clone())
    }

    /// The version that this upload repeats, if any: the current one, or the newest if its probe
    /// failed. Forcing such a version makes it servable and current.
    async fn published_before(
        &self,
        staging: &Staging,
        digest: Digest,
        how: &Publish,
    ) -> Result<Option<Entry>> {
        let name = &*staging.name;
        let entries = self.state().entries_of(name);
        let newest = entries.last().map(|e| e.version.number);
        let same = |e: &&Entry| {
            let repeats = e.current || (Some(e.version.number) == newest && !servable(&e.version));
            repeats && e.version.digest == digest
        };
        let Some(entry) = entries.iter().find(same) else {
            return Ok(None);
        };
        let number = entry.version.number;
        // What is repeated is sound: files that have rotted on disk are replaced.
        {
            let _digest_turn = self.digest_locks.take(digest).await;
            let (store, dir) = (self.store.clone(), staging.dir.clone());
            blocking(move || {
                store.keep(&dir, digest)?;
                store.settled(digest);
                Ok(())
            })
            .await?;
        }
        if how.force && !servable(&entry.version) {
            self.store.force(name, number).await?;
            let mut state = self.state();
            let versions = state.names.get_mut(name);
            if let Some(held) = versions.and_then(|v| v.held.get_mut(&number)) {
                let mut version = Version::clone(&held.version);
                version.forced = true;
                held.version = Arc::new(version);
            }
            state.set_current(name, number);
            drop(state);
            self.wake_reaper();
        }
        Ok(self.state().entry(name, number))
    }

    async fn store_and_swap(
        self: &Arc<Self>,
        staging: &Staging,
        checked: Checked,
        how: &Publish,
    ) -> Result<Entry> {
        let (name, digest) = (staging.name.clone(), checked.digest);
        let (store, dir) = (self.store.clone(), staging.dir.clone());
        blocking(move || store.keep(&dir, digest)).await?;
        let _pin = self.bring_new(digest, &how.by.tenant).await?;
        let (resident_bytes, logit_change_max) = {
            let state = self.state();
            let resident = state.ledger.get(digest);
            let resident = resident.ok_or_else(|| Error::fault("a pinned adapter vanished"))?;
            (resident.bytes, resident.what.logit_change_max)
        };
        let version = Version {
            number: self.store.next_number(&name).await?,
            name,
            digest,
            summary: checked.summary,
            logit_change_max,
            forced: how.force,
            created: unix_seconds(),
            file_bytes: checked.bytes,
            resident_bytes,
            lineage: how.lineage.clone(),
        };
        // An adapter without effect never takes the name from one that works.
        let (works, owner) = {
            let state = self.state();
            let versions = state.names.get(&version.name);
            (versions.is_some_and(|v| v.current_servable()), state.owner_of(&version.name))
        };
        let current = !how.candidate && (!works || servable(&version));
        let (new, owner) = (owner.is_none(), owner.unwrap_or(how.by.tenant.name.clone()));
        // Looked at again where no other claim comes between: uploads of one tenant run together.
        let _claim = self.claims.lock().await;
        if new {
            self.check_names(&version.name, &how.by.tenant)?;
        }
        self.check_disk(&version.name, &how.by.tenant, version.file_bytes, version.file_bytes)?;
        self.store.add(&version, current, new.then_some(&owner)).await?;
        let (name, number) = (version.name.clone(), version.number);
        tracing::info!(adapter = %version.id(), %digest, current, "published");
        let mut state = self.state();
        state.publish(version, current, owner);
        let entry = state.entry(&name, number);
        entry.ok_or_else(|| Error::fault("a published version vanished"))
    }
}
