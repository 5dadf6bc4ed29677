//! The registry: names point to versions, versions are leased by requests, uploads publish whole or not at all.
//!
//! Owns names, versions, states, leases and the byte budget of residency. Never touches the bank itself: it sends
//! `BankCommand`s. The thing to know: a name moves atomically; a request keeps the version that it leased.

use super::{
    BaseBias, BaseRows, Digest,
    bank::{BankSender, Slot},
    format::Summary,
};
use crate::error::Result;
use crate::shape::ModelShape;
use polylora_kernels::Dtype;
use std::path::PathBuf;
use std::sync::Arc;

/// One immutable version of a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub name: String,
    /// 1, 2, 3 … per name.
    pub number: u64,
    pub digest: Digest,
    pub summary: Summary,
    /// Largest logit change over the probe's prompts.
    pub logit_change_max: f32,
    /// Served although the probe saw no change, because the uploader said so.
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
        Self {
            inner: Arc::new(LeaseInner {
                version: Arc::new(version),
                slot,
            }),
        }
    }
}

pub struct RegistryOptions {
    pub data_dir: PathBuf,
    /// Served name of the base: refused as an adapter name.
    pub base_name: String,
    pub shape: Arc<ModelShape>,
    /// Storage of resident factors.
    pub dtype: Dtype,
    /// Budget of resident bytes.
    pub resident_bytes_max: u64,
    /// Largest upload.
    pub upload_bytes_max: u64,
    /// Versions of a name kept on disk, the current one included.
    pub versions_kept: usize,
    pub adapters_max: usize,
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

/// Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    _inner: Arc<()>,
}

impl Registry {
    /// Opens the data directory, clears staging, restores names and versions; loads nothing yet.
    pub async fn open(
        _o: RegistryOptions,
        _rows: BaseRows,
        _bias: BaseBias,
        _bank: BankSender,
    ) -> Result<Self> {
        unimplemented!()
    }
    /// A fresh staging directory for an upload of `name`; removed on drop unless published.
    /// Checks the name first (`[A-Za-z0-9._-]{1,128}`, not the base's, not reserved).
    pub fn stage(&self, _name: &str) -> Result<Staging> {
        unimplemented!()
    }
    /// Checks, hashes, stores, loads, probes and then moves the name to the new version; all or nothing.
    /// Publishing content that is already the name's current version returns that version unchanged.
    pub async fn publish(&self, _staging: Staging, _how: Publish) -> Result<Entry> {
        unimplemented!()
    }
    /// Leases what `model` names: `name` or `name@version`. Loads it first when it is not resident (one load per digest,
    /// least recently used unleased adapters make room). Errors: model_not_found, adapter_ineffective, insufficient_capacity.
    pub async fn acquire(&self, _model: &str) -> Result<Lease> {
        unimplemented!()
    }
    /// Takes the name away: new requests get 404 at once, running ones finish. Returns the entries that were removed.
    pub async fn delete(&self, _name: &str) -> Result<Vec<Entry>> {
        unimplemented!()
    }
    /// Every version of every name, by name then number.
    pub fn list(&self) -> Vec<Entry> {
        unimplemented!()
    }
    /// The versions of one name, newest last; empty when there is none.
    pub fn versions(&self, _name: &str) -> Vec<Entry> {
        unimplemented!()
    }
    /// (resident bytes, budget)
    pub fn residency(&self) -> (u64, u64) {
        unimplemented!()
    }
}

/// An upload in progress: a directory below the store's staging area that only this upload knows.
pub struct Staging {
    pub name: String,
    pub dir: PathBuf,
}
