//! Uploads and deletes: how a name comes to mean something else.
//!
//! Owns the order of publishing: check, hash, store, load, probe, record, swap. Never half: what
//! fails leaves no trace. The thing to know: each runs as a task of its own, so a client that goes
//! away does not stop it in the middle.

use super::book::servable;
use super::residency::blocking;
use super::{Entry, Inner, Publish, Staging, Version};
use crate::adapters::Digest;
use crate::adapters::format::{self, Summary, files::AdapterFiles};
use crate::adapters::store::Store;
use crate::error::{Error, Kind, Result};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What an upload turned out to hold.
struct Checked {
    summary: Summary,
    digest: Digest,
    bytes: u64,
}

impl Inner {
    /// See `Registry::publish`.
    pub async fn publish(&self, staging: Staging, how: Publish) -> Result<Entry> {
        let name = staging.name.clone();
        self.check_name(&name)?;
        let _turn = self.name_turns.take(name.clone()).await;
        let checked = self.inspect(&staging).await?;
        if let Some(entry) = self.published_before(&name, checked.digest, &how).await? {
            return Ok(entry);
        }
        self.check_room(&name)?;
        let digest = checked.digest;
        let _digest_turn = self.digest_turns.take(digest).await;
        let outcome = self.store_and_swap(&staging, checked, &how).await;
        if outcome.is_err() && !self.book().refers_to(digest) {
            let store = self.store.clone();
            discard(store, digest).await;
        }
        self.wake_reaper();
        outcome
    }

    fn wake_reaper(&self) {
        self.book().unsettled = true;
        self.reaper.notify_one();
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
            let summary = format::check_upload(&dir, &shape, &text)?;
            Ok(Checked { summary, digest: files.digest()?, bytes })
        })
        .await
    }

    /// The version that this upload repeats, if any: the current one, or the newest if its probe
    /// failed. Forcing such a version makes it servable and current.
    async fn published_before(
        &self,
        name: &str,
        digest: Digest,
        how: &Publish,
    ) -> Result<Option<Entry>> {
        let entries = self.book().entries_of(name);
        let newest = entries.last().map(|e| e.version.number);
        let same = |e: &&Entry| {
            let repeats = e.current || (Some(e.version.number) == newest && !servable(&e.version));
            repeats && e.version.digest == digest
        };
        let Some(entry) = entries.iter().find(same) else {
            return Ok(None);
        };
        let number = entry.version.number;
        if how.force && !servable(&entry.version) {
            self.store.force(name, number).await?;
            let mut book = self.book();
            if let Some(versions) = book.names.get_mut(name) {
                if let Some(held) = versions.held.get_mut(&number) {
                    let mut version = Version::clone(&held.version);
                    version.forced = true;
                    held.version = Arc::new(version);
                }
                versions.turn_to(number);
            }
            drop(book);
            self.wake_reaper();
        }
        Ok(self.book().entry(name, number))
    }

    fn check_room(&self, name: &str) -> Result<()> {
        let book = self.book();
        let max = self.options.adapters_max;
        if book.names.contains_key(name) || book.names.len() < max {
            return Ok(());
        }
        Err(Error::new(
            Kind::Capacity,
            "adapter_limit_reached",
            format!("{max} adapters are published, which is the limit; delete one first"),
        ))
    }

    async fn store_and_swap(
        &self,
        staging: &Staging,
        checked: Checked,
        how: &Publish,
    ) -> Result<Entry> {
        let (name, digest) = (staging.name.clone(), checked.digest);
        let (store, dir) = (self.store.clone(), staging.dir.clone());
        blocking(move || store.keep(&dir, digest)).await?;
        let known = self.book().known_change(digest);
        let _pin = self.load(digest, known).await?;
        let (resident_bytes, logit_change_max) = {
            let book = self.book();
            let resident = book.residents.get(&digest);
            let resident = resident.ok_or_else(|| Error::fault("a pinned adapter vanished"))?;
            (resident.bytes, resident.logit_change_max)
        };
        let version = Version {
            number: self.store.next_number(&name).await?,
            name,
            digest,
            summary: checked.summary,
            logit_change_max,
            forced: how.force,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            file_bytes: checked.bytes,
            resident_bytes,
        };
        // An adapter without effect never takes the name from one that works.
        let works = {
            let book = self.book();
            let versions = book.names.get(&version.name);
            versions.is_some_and(|v| v.current_servable())
        };
        let current = servable(&version) || !works;
        self.store.add(&version, current).await?;
        let (name, number) = (version.name.clone(), version.number);
        tracing::info!(adapter = %version.id(), %digest, current, "published");
        let mut book = self.book();
        book.publish(version, current);
        let entry = book.entry(&name, number);
        entry.ok_or_else(|| Error::fault("a published version vanished"))
    }

    /// See `Registry::delete`.
    pub async fn delete(&self, name: String) -> Result<Vec<Entry>> {
        let _turn = self.name_turns.take(name.clone()).await;
        if !self.book().names.contains_key(&name) {
            return Err(not_found(&name));
        }
        self.store.remove_name(&name).await?;
        let removed = self.book().remove(&name);
        self.wake_reaper();
        tracing::info!(adapter = %name, "deleted");
        removed.ok_or_else(|| not_found(&name))
    }

    /// What the reaper does when a hold ended: residents out of the bank, then old versions and
    /// their files.
    pub async fn sweep(&self) {
        if !self.book().unsettled {
            return;
        }
        self.remove_unwanted().await;
        let (pruned, digests) = {
            let mut book = self.book();
            book.settle_drained();
            book.take_surplus(self.options.versions_kept)
        };
        for version in pruned {
            let removed = self.store.remove_version(&version.name, version.number).await;
            if let Err(e) = removed {
                // It comes back with the next start, and is pruned again then.
                tracing::warn!(adapter = %version.id(), error = %e, "cannot prune a version");
            }
        }
        for digest in digests {
            let _turn = self.digest_turns.take(digest).await;
            if !self.book().refers_to(digest) {
                let store = self.store.clone();
                discard(store, digest).await;
            }
        }
    }
}

/// Removes a content's files off the async threads. A failure only leaves an orphan for the next
/// start.
async fn discard(store: Arc<Store>, digest: Digest) {
    let removed = blocking(move || {
        store.discard(digest);
        Ok(())
    });
    if let Err(e) = removed.await {
        tracing::warn!(%digest, error = %e, "cannot remove adapter files");
    }
}

fn not_found(name: &str) -> Error {
    let name: String = name.chars().take(160).collect();
    Error::not_found("model_not_found", format!("The adapter `{name}` does not exist."))
        .param("model")
}
