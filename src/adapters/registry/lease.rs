//! A version held in place while a request runs.
//!
//! Owns the hold. Never blocks: it may be dropped on any thread.

use super::guards::Guard;
use crate::adapters::Digest;
use crate::adapters::bank::Slot;
use crate::adapters::format::Summary;
use crate::adapters::version::{Lineage, Version};
use crate::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A version held in place while a request runs. Cheap to clone; the last drop lets the version go.
/// Dropping is safe on any thread: it never blocks and never sends to the engine.
#[derive(Clone)]
pub struct Lease {
    pub(super) inner: Arc<LeaseInner>,
}

pub struct LeaseInner {
    pub version: Arc<Version>,
    pub slot: Slot,
    /// On the version and on the resident; `None` outside any registry.
    pub _holds: Option<[Guard; 2]>,
    /// KeyedMutex true when the version was deleted and its time to drain is over.
    pub cut: Arc<AtomicBool>,
}

impl Lease {
    pub fn version(&self) -> &Arc<Version> {
        &self.inner.version
    }
    pub fn slot(&self) -> Slot {
        self.inner.slot
    }
    /// Says why when the lease is revoked: whoever runs on it ends with that. Cheap: asked in every
    /// step.
    pub fn revoked(&self) -> Option<Error> {
        self.inner.cut.load(Ordering::Relaxed).then(|| {
            let id = self.inner.version.id();
            let message = format!("adapter `{id}` was deleted while this request ran on it");
            Error::not_found("adapter_deleted", message).param("model")
        })
    }
    /// A lease outside any registry, for tests of the engine.
    pub fn detached(name: &str, digest: Digest, slot: Slot) -> Self {
        let version = Arc::new(Version {
            name: name.to_owned(),
            number: 1,
            digest,
            summary: Summary::default(),
            logit_change_max: 1.0,
            forced: false,
            created: 0,
            file_bytes: 0,
            resident_bytes: 0,
            lineage: Lineage::default(),
        });
        Self { inner: Arc::new(LeaseInner { version, slot, _holds: None, cut: Arc::default() }) }
    }
}
