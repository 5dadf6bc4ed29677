//! The registry: names point to versions, versions are leased by requests, uploads publish whole or
//! not at all.
//!
//! Owns names, versions, states, leases and the byte budget of residency. Never touches the bank
//! itself: it sends `BankCommand`s. The thing to know: a name moves atomically; a request keeps the
//! version that it leased.

mod book;
mod publish;
mod residency;
mod turns;

use super::{
    BaseBias, BaseRows, BaseText, Digest,
    bank::{BankSender, Slot},
    format::{Summary, bundle, files},
    store::Store,
};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::shape::ModelShape;
use book::{Book, Found, Held, Hold, Versions};
use polylora_kernels::Dtype;
use residency::lock;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore};
use turns::Turns;

/// Names that could be taken for something else.
const RESERVED_NAMES: [&str; 5] = ["base", "default", "auto", "none", "null"];
const NAME_BYTES_MAX: usize = 128;
/// Adapters that are read and prepared at once; each takes memory of its size.
const PREPARES_MAX: usize = 2;

/// One immutable version of a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub name: String,
    /// 1, 2, 3 … per name; never used twice, not even after a delete.
    pub number: u64,
    pub digest: Digest,
    pub summary: Summary,
    /// Largest logit change over the probe's prompts.
    pub logit_change_max: f32,
    /// The uploader said to serve it even if the probe sees no change.
    pub forced: bool,
    /// Unix seconds.
    pub created: u64,
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Bytes when resident.
    pub resident_bytes: u64,
}

impl Version {
    /// `name@number`, as clients may ask for it.
    pub fn id(&self) -> String {
        format!("{}@{}", self.name, self.number)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    /// The probe saw no change at all; not servable unless forced.
    Ineffective,
    /// Replaced or deleted; running requests finish on it.
    Draining,
}

/// A version held in place while a request runs. Cheap to clone; the last drop lets the version go.
/// Dropping is safe on any thread: it never blocks and never sends to the engine.
#[derive(Clone)]
pub struct Lease {
    inner: Arc<LeaseInner>,
}

struct LeaseInner {
    version: Arc<Version>,
    slot: Slot,
    /// On the version and on the resident; `None` outside any registry.
    _holds: Option<[Hold; 2]>,
}

impl Lease {
    pub fn version(&self) -> &Arc<Version> {
        &self.inner.version
    }
    pub fn slot(&self) -> Slot {
        self.inner.slot
    }
    /// A lease outside any registry, for tests of the engine.
    pub fn detached(version: Version, slot: Slot) -> Self {
        Self { inner: Arc::new(LeaseInner { version: Arc::new(version), slot, _holds: None }) }
    }
}

pub struct RegistryOptions {
    pub data_dir: PathBuf,
    /// Served name of the base: refused as an adapter name.
    pub base_name: String,
    pub shape: Arc<ModelShape>,
    /// Storage of resident factors.
    pub dtype: Dtype,
    /// What bundles are checked against.
    pub text: BaseText,
    /// Budget of resident bytes.
    pub resident_bytes_max: u64,
    /// Largest upload.
    pub upload_bytes_max: u64,
    /// Versions of a name kept on disk, the current one included.
    pub versions_kept: usize,
    pub adapters_max: usize,
    /// Where loads and evictions are counted.
    pub metrics: Arc<Metrics>,
}

/// What a listing shows of one version.
#[derive(Debug, Clone)]
pub struct Entry {
    pub version: Arc<Version>,
    pub state: State,
    /// Whether it is the version that the bare name means.
    pub current: bool,
    pub resident: bool,
    pub leases: usize,
}

/// How an upload is meant.
#[derive(Debug, Clone, Default)]
pub struct Publish {
    /// Serve it even if the probe sees no change.
    pub force: bool,
}

/// Numbers for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub names: usize,
    pub versions: usize,
    pub residents: usize,
    pub resident_bytes: u64,
    /// Since the start.
    pub loads: u64,
    pub evictions: u64,
}

/// Cheap to clone. The last clone's drop ends the reaper and unlocks the data directory.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    options: RegistryOptions,
    rows: BaseRows,
    bias: BaseBias,
    bank: BankSender,
    store: Arc<Store>,
    /// A std lock, never held across an await: a name, its versions and the ledger change together
    /// or not at all, and every hold is a few map operations, so sharding would only make the
    /// invariants harder to see.
    book: Arc<Mutex<Book>>,
    /// Whoever changes the bank holds it until the engine has answered.
    gate: AsyncMutex<()>,
    /// Publishing and deleting, one at a time per name. Taken before a digest's turn.
    name_turns: Turns<String>,
    /// Storing, loading and discarding, one at a time per content. Taken before the gate.
    digest_turns: Turns<Digest>,
    prepares: Semaphore,
    reaper: Arc<Notify>,
}

impl Registry {
    /// Opens the data directory, clears staging, restores names and versions; loads nothing yet.
    /// Errors: `data_dir_locked`, `data_dir_unsupported`.
    pub async fn open(
        options: RegistryOptions,
        rows: BaseRows,
        bias: BaseBias,
        bank: BankSender,
    ) -> Result<Self> {
        let (store, catalogue) = Store::open(&options.data_dir).await?;
        let mut names: BTreeMap<String, Versions> = BTreeMap::new();
        for version in catalogue.versions {
            let versions = names.entry(version.name.clone()).or_default();
            versions.held.insert(version.number, Held::new(version));
        }
        for (name, current) in catalogue.current {
            names.entry(name).or_default().current = current;
        }
        let reaper = Arc::new(Notify::new());
        let inner = Arc::new(Inner {
            options,
            rows,
            bias,
            bank,
            store: Arc::new(store),
            book: Arc::new(Mutex::new(Book::new(names, reaper.clone()))),
            gate: AsyncMutex::new(()),
            name_turns: Turns::new(),
            digest_turns: Turns::new(),
            prepares: Semaphore::new(PREPARES_MAX),
            reaper: reaper.clone(),
        });
        // The reaper holds no registry while it waits, so the last clone's drop ends both.
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            loop {
                reaper.notified().await;
                match weak.upgrade() {
                    Some(inner) => inner.sweep().await,
                    None => return,
                }
            }
        });
        inner.reaper.notify_one();
        Ok(Self { inner })
    }

    /// A fresh staging directory for an upload of `name`; removed on drop unless published. Checks
    /// the name first (`[A-Za-z0-9._-]{1,128}`, not the base's, not reserved). Errors:
    /// `invalid_name`.
    pub fn stage(&self, name: &str) -> Result<Staging> {
        self.inner.check_name(name)?;
        Ok(Staging { name: name.to_owned(), dir: self.inner.store.stage()? })
    }

    /// Checks, hashes, stores, loads, probes and then moves the name to the new version; all or
    /// nothing. Publishing content that is already the name's current version returns that version
    /// unchanged. A version without effect is kept and listed, but does not take the name from one
    /// that works. Errors: every code of `format::check`, `upload_too_large`,
    /// `insufficient_capacity`, `adapter_limit_reached`.
    pub async fn publish(&self, staging: Staging, how: Publish) -> Result<Entry> {
        let inner = self.inner.clone();
        detached(async move { inner.publish(staging, how).await }).await
    }

    /// Leases what `model` names: `name` or `name@version`. Loads it first when it is not resident
    /// (one load per digest, least recently used unleased adapters make room). Errors:
    /// model_not_found, adapter_ineffective, insufficient_capacity, corrupt_adapter.
    pub async fn acquire(&self, model: &str) -> Result<Lease> {
        let mut pin: Option<Hold> = None;
        loop {
            // Found again after a load: the name may have moved meanwhile.
            let version = match self.inner.book().lease(model)? {
                Found::Leased(lease) => return Ok(lease),
                Found::Absent(version) => version,
            };
            drop(pin.take());
            let inner = self.inner.clone();
            let load = async move {
                let _turn = inner.digest_turns.take(version.digest).await;
                let known = Some(version.logit_change_max);
                inner.cold_start(version.digest, known).await
            };
            pin = Some(detached(load).await?);
        }
    }

    /// Takes the name away: new requests get 404 at once, running ones finish. Returns the entries
    /// that were removed. Errors: model_not_found.
    pub async fn delete(&self, name: &str) -> Result<Vec<Entry>> {
        let (inner, name) = (self.inner.clone(), name.to_owned());
        detached(async move { inner.delete(name).await }).await
    }

    /// Every version of every name, by name then number.
    pub fn list(&self) -> Vec<Entry> {
        self.inner.book().all_entries()
    }

    /// The versions of one name, newest last; empty when there is none.
    pub fn versions(&self, name: &str) -> Vec<Entry> {
        self.inner.book().entries_of(name)
    }

    /// The chat template that came with a version; `None`: it has none. Blocking.
    pub fn chat_template(&self, version: &Version) -> Result<Option<bundle::Template>> {
        if !version.summary.chat_template {
            return Ok(None);
        }
        bundle::template(&files::AdapterFiles::find(&self.inner.store.blob(version.digest))?)
    }

    /// (resident bytes, budget); bytes promised to loads under way included.
    pub fn residency(&self) -> (u64, u64) {
        let used = self.inner.book().used_bytes();
        (used, self.inner.options.resident_bytes_max)
    }

    pub fn stats(&self) -> Stats {
        let book = self.inner.book();
        Stats {
            names: book.names.len(),
            versions: book.names.values().map(|v| v.held.len()).sum(),
            residents: book.residents.len(),
            resident_bytes: book.used_bytes(),
            loads: book.loads,
            evictions: book.evictions,
        }
    }
}

impl Inner {
    fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let why = if name.is_empty() || name.len() > NAME_BYTES_MAX {
            "a name has 1 to 128 characters"
        } else if !name.chars().all(allowed) {
            "a name is made of A-Z, a-z, 0-9, '.', '_' and '-'"
        } else if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            "a name starts with a letter or digit"
        } else if RESERVED_NAMES.iter().any(|r| name.eq_ignore_ascii_case(r)) {
            "the name is reserved"
        } else if name.eq_ignore_ascii_case(&self.options.base_name) {
            "the name is that of the base model"
        } else {
            return Ok(());
        };
        let shown: String = name.chars().take(40).flat_map(char::escape_default).collect();
        Err(Error::invalid("invalid_name", format!("`{shown}` cannot name an adapter: {why}"))
            .param("name"))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reaper.notify_one();
    }
}

/// Runs to its end even if the caller stops waiting.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("a task failed: {e}"))))
}

/// An upload in progress: a directory below the store's staging area that only this upload knows.
/// Removed on drop.
pub struct Staging {
    pub name: String,
    pub dir: PathBuf,
}

impl Staging {
    /// Where an uploaded file goes; `None` for a file that is no part of an adapter (README.md, a
    /// tokenizer) and should be read over. Nothing of the uploaded name but its kind reaches the
    /// disk.
    pub fn file_path(&self, uploaded: &str) -> Option<PathBuf> {
        if let Some(name) = files::canonical_name(uploaded) {
            return Some(self.dir.join(name));
        }
        if files::is_pickle(uploaded) {
            // The pickle itself is not kept; an empty mark lets the check say why it does not
            // count.
            let mark = self.dir.join(files::PICKLE_MARK);
            if let Err(e) = std::fs::File::create(mark) {
                tracing::warn!(error = %e, "cannot mark an uploaded pickle");
            }
        }
        None
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(error = %e, "cannot remove a staging directory");
        }
    }
}
