//! The registry: names point to versions, versions are leased by requests, uploads publish whole or
//! not at all.
//!
//! Owns names, versions, states, leases and the byte budget of residency. Never touches the bank
//! itself: it sends `BankCommand`s. The thing to know: a name moves atomically; a request keeps the
//! version that it leased.

mod aliases;
mod guards;
mod keyed_mutex;
mod lease;
mod pinned_source;
mod publish;
mod remove;
mod reservation;
mod residency;
mod rights;
mod staging;
mod state;
mod versions;

use super::actor::{Actor, Tenant};
use super::alias::Alias;
use super::bank::BankSender;
use super::format::{bundle, files};
use super::ledger::Size;
use super::store::{Catalogue, Store};
use super::version::{Entry, Expected, Publish, Removal, Removed, Stats, Version};
use super::{BaseBias, BaseRows, BaseText, Digest};
use crate::database::Storage;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::shape::ModelShape;
use crate::share::Pool;
use guards::{Guard, Signals, VersionState, Versions};
use keyed_mutex::KeyedMutex;
pub use lease::Lease;
pub use pinned_source::PinnedSource;
use polylora_kernels::FactorDtype;
pub use remove::ALIASED;
pub use staging::Staging;
use state::{Found, RegistryState, lock};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::Instant;
use tracing::Instrument;

/// Names that could be taken for something else.
const RESERVED_NAMES: [&str; 5] = ["base", "default", "auto", "none", "null"];
const NAME_BYTES_MAX: usize = 128;
/// Between two looks for files that were set aside long ago.
const HOUSE_PERIOD: Duration = Duration::from_secs(3600);
/// Adapters that are read and prepared at once; each takes memory of its size.
const PREPARES_MAX: u64 = 2;

pub struct RegistryOptions {
    /// The data directory.
    pub storage: Storage,
    /// Served name of the base: refused as an adapter name.
    pub base_name: String,
    /// What the adapters are for; a directory that was used with another base is refused.
    pub base_digest: Digest,
    pub shape: Arc<ModelShape>,
    /// Storage of resident factors.
    pub factors: FactorDtype,
    /// What bundles are checked against.
    pub text: BaseText,
    /// Budget of resident bytes.
    pub resident_bytes_max: u64,
    /// Adapters resident at once; at most the bank's slots.
    pub residents_max: usize,
    /// How long a load waits for room when all that is resident is in use.
    pub load_wait_max: Duration,
    /// How long it waits before a resident that others use takes no new requests for its sake.
    pub load_patience: Duration,
    /// Largest upload.
    pub upload_bytes_max: u64,
    /// Versions of a name kept on disk, the current one included.
    pub versions_kept: usize,
    pub adapters_max: usize,
    /// Bytes on disk of a tenant (empty: the operator) that are no adapter's and share its bounds.
    pub other_bytes: Arc<dyn Fn(&str) -> u64 + Send + Sync>,
    /// Where loads and evictions are counted.
    pub metrics: Arc<Metrics>,
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
    state: Arc<Mutex<RegistryState>>,
    /// Whoever takes something out of the bank holds it until the engine has answered.
    gate: Arc<AsyncMutex<()>>,
    /// Loads that found no room: tenants in turns, those of one tenant in order of arrival.
    loads_queue: Arc<Pool>,
    /// Publishing, deleting and moving, one at a time per name. Taken before a digest's lock.
    name_locks: KeyedMutex<String>,
    /// Storing, loading and discarding, one at a time per content. Taken before the gate.
    digest_locks: KeyedMutex<Digest>,
    /// Held while a share is looked at and taken, so that two claims never see the same room. Taken
    /// after the locks of names and contents.
    claims: AsyncMutex<()>,
    /// Places by tenant: nobody's cold adapters keep another's waiting.
    prepares: Arc<Pool>,
    signals: Arc<Signals>,
    /// Counts what the reaper finished.
    swept: watch::Sender<u64>,
}

impl Registry {
    /// Opens the data directory, clears staging, restores names, versions and aliases; loads what
    /// is pinned and nothing else. Errors: `data_dir_locked`, `data_dir_unsupported`,
    /// `data_dir_other_base`.
    pub async fn open(
        options: RegistryOptions,
        rows: BaseRows,
        bias: BaseBias,
        bank: BankSender,
    ) -> Result<Self> {
        let (store, catalogue) = Store::open(&options.storage, options.base_digest).await?;
        let store = Arc::new(store);
        tokio::spawn(keep_house(Arc::downgrade(&store)));
        let signals = Arc::new(Signals::default());
        let memory = Size { bytes: options.resident_bytes_max, slots: options.residents_max };
        let inner = Arc::new(Inner {
            options,
            rows,
            bias,
            bank,
            store: store.clone(),
            state: Arc::new(Mutex::new(restored(catalogue, memory, signals.clone()))),
            gate: Arc::default(),
            loads_queue: Pool::new(1),
            name_locks: KeyedMutex::new(),
            digest_locks: KeyedMutex::new(),
            claims: AsyncMutex::default(),
            prepares: Pool::new(PREPARES_MAX),
            signals: signals.clone(),
            swept: watch::Sender::new(0),
        });
        inner.load_pinned().await;
        // The reaper holds no registry while it waits, so the last clone's drop ends both.
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            loop {
                signals.reaper.notified().await;
                match weak.upgrade() {
                    Some(inner) => inner.sweep().await,
                    None => return,
                }
            }
        });
        inner.signals.reaper.notify_one();
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
    /// that works. Errors: every code of `format::check`, `upload_too_large`, `version_conflict`,
    /// `name_taken`, `name_not_allowed`, `insufficient_capacity`, `adapter_limit_reached`,
    /// `tenant_share_exceeded`, `disk_nearly_full`.
    pub async fn publish(&self, staging: Staging, how: Publish) -> Result<Entry> {
        let inner = self.inner.clone();
        detached(async move { inner.publish(staging, how).await }).await
    }

    /// Leases what `model` names: `name`, `name@version`, or an alias. Loads it first when it is
    /// not resident (one load per digest; least recently used unleased adapters make room; when all
    /// are leased it waits its turn). Errors: `model_not_found`, `adapter_ineffective`,
    /// `insufficient_capacity`, `corrupt_adapter`.
    ///
    /// `sticky` is whose request it is: an alias leads the same caller to the same version. Without
    /// it every request is drawn anew.
    pub async fn acquire_for(&self, model: &str, sticky: Option<&str>) -> Result<Lease> {
        let lease = self.acquire_all(&[model], sticky, &Tenant::default()).await?.pop();
        lease.ok_or_else(|| Error::fault("no lease for a model"))
    }

    /// The same for several, in their order, for `tenant`: all of them are resident together, or
    /// none is leased.
    pub async fn acquire_all(
        &self,
        models: &[&str],
        sticky: Option<&str>,
        tenant: &Tenant,
    ) -> Result<Vec<Lease>> {
        let anyone: String;
        let sticky = match sticky {
            Some(sticky) => sticky,
            None => {
                anyone = format!("{:032x}", rand::random::<u128>());
                &anyone
            }
        };
        let arrived = Instant::now();
        let mut brought: Option<(Vec<Digest>, Vec<Guard>)> = None;
        loop {
            // Found again after a load: a name may have moved meanwhile.
            let held = brought.as_ref().map_or(&[][..], |(digests, _)| digests);
            let versions = match self.inner.state().lease_all(models, sticky, held, &tenant.name)? {
                Found::Leased(leases) => return Ok(leases),
                Found::Absent(versions) => versions,
            };
            // Who waits for room holds none: two that want each other's would wait for ever.
            drop(brought.take());
            match self.inner.bring_all(&versions, arrived, tenant).await {
                Ok(holds) => brought = Some((versions.iter().map(|v| v.digest).collect(), holds)),
                // Deleted meanwhile: the names say what there is now.
                Err(e) if e.code == "model_not_found" => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// `acquire_for` nobody in particular.
    pub async fn acquire(&self, model: &str) -> Result<Lease> {
        self.acquire_for(model, None).await
    }

    /// Takes the name away: new requests get 404 at once. With `drain`, waits for running ones so
    /// long, and then cuts them. Errors: `model_not_found`, `version_conflict`, `adapter_aliased`.
    pub async fn delete(&self, name: &str, how: Removal) -> Result<Removed> {
        let (inner, name) = (self.inner.clone(), name.to_owned());
        detached(async move { inner.delete(name, how).await }).await
    }

    /// Takes one version away, whatever else its name has; a name that meant it means the newest
    /// servable version before it, and is gone with its last version. False: there is no such
    /// version. Running requests finish on it. Who may ask is the caller's to know. Errors:
    /// `adapter_aliased`.
    pub async fn delete_version(&self, name: &str, number: u64) -> Result<bool> {
        let (inner, name) = (self.inner.clone(), name.to_owned());
        detached(async move { inner.delete_version(name, number).await }).await
    }

    /// Whether an alias keeps this version. Errors: `adapter_aliased`.
    pub fn check_alias(&self, entry: &Entry) -> Result<()> {
        self.inner.check_alias(entry)
    }

    /// Moves the name to another of its versions: `number`, or else the newest servable one before
    /// the current. It is loaded before the name moves. Errors: `model_not_found`,
    /// `nothing_to_roll_back`, `adapter_ineffective`, `version_conflict`, `corrupt_adapter`,
    /// `name_not_allowed`.
    pub async fn roll_back(
        &self,
        name: &str,
        number: Option<u64>,
        expected: Vec<Expected>,
        by: &Actor,
    ) -> Result<Entry> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        detached(async move { inner.roll_back(name, number, expected, by).await }).await
    }

    /// Keeps a version (the current one unless said) resident and on disk until it is unpinned,
    /// restarts included. Errors: `model_not_found`, `adapter_ineffective`,
    /// `insufficient_capacity`, `name_not_allowed`, `tenant_share_exceeded`.
    pub async fn pin(&self, name: &str, number: Option<u64>, by: &Actor) -> Result<Entry> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        detached(async move { inner.pin(name, number, by).await }).await
    }

    /// Undoes `pin`; a version that is not pinned stays as it is. Errors: `model_not_found`,
    /// `name_not_allowed`.
    pub async fn unpin(&self, name: &str, number: Option<u64>, by: &Actor) -> Result<Entry> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        detached(async move { inner.unpin(name, number, by).await }).await
    }

    /// Every version of every name, by name then number.
    pub fn list(&self) -> Vec<Entry> {
        self.inner.state().all_entries()
    }

    /// The versions of one name, newest last; empty when there is none.
    pub fn versions(&self, name: &str) -> Vec<Entry> {
        self.inner.state().entries_of(name)
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
        let state = self.inner.state();
        (state.ledger.used().bytes, state.ledger.max().bytes)
    }

    pub fn stats(&self) -> Stats {
        self.inner.state().stats()
    }
}

/// Looks now and then for what was set aside long ago, while there is a store.
async fn keep_house(store: Weak<Store>) {
    while let Some(store) = store.upgrade() {
        let looked = tokio::task::spawn_blocking(move || store.orphans.remove_old());
        if looked.await.is_err() {
            return;
        }
        tokio::time::sleep(HOUSE_PERIOD).await;
    }
}

/// The state as the catalogue has it.
fn restored(catalogue: Catalogue, memory_max: Size, signals: Arc<Signals>) -> RegistryState {
    let mut names: BTreeMap<String, Versions> = BTreeMap::new();
    let owners: HashMap<String, Arc<str>> =
        catalogue.owners.into_iter().map(|(name, tenant)| (name, tenant.into())).collect();
    let owner = |name: &str| owners.get(name).cloned().unwrap_or_default();
    for version in catalogue.versions {
        let versions = names.entry(version.name.clone()).or_default();
        let owner = owner(&version.name);
        versions.held.insert(version.number, VersionState::new(version, owner));
    }
    for (name, current) in catalogue.current {
        names.entry(name).or_default().current = current;
    }
    for (name, number) in catalogue.pinned {
        let versions = names.get_mut(&name);
        if let Some(held) = versions.and_then(|v| v.held.get_mut(&number)) {
            held.pinned = true;
        }
    }
    let aliases = catalogue.aliases.into_iter();
    let aliases = aliases.map(|a| (a.name.clone(), Alias { owner: owner(&a.name), ..a }));
    RegistryState::new(names, aliases.collect(), memory_max, signals)
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, RegistryState> {
        lock(&self.state)
    }

    fn wake_reaper(&self) {
        self.state().unsettled = true;
        self.signals.reaper.notify_one();
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
        self.signals.reaper.notify_one();
    }
}

/// Runs to its end even if the caller stops waiting.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = tokio::spawn(work.in_current_span()).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("a task failed: {e}"))))
}
