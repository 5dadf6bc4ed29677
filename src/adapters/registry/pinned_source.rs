//! Versions kept for work that is no request: merging them into another.
//!
//! Owns the way from a version to its factors as they lie on disk, and what a name must be to take
//! a result. Never loads anything into the bank. The thing to know: a kept version may lose its
//! name, but its files stay while it is kept.

use super::Registry;
use super::aliases::name_taken;
use super::guards::Guard;
use crate::adapters::Digest;
use crate::adapters::actor::Actor;
use crate::adapters::format::factors::{self, OpenAdapter};
use crate::adapters::version::Version;
use crate::error::Result;
use std::path::PathBuf;
use std::sync::Arc;

/// A version whose files stay while this lives.
pub struct PinnedSource {
    version: Arc<Version>,
    _hold: Guard,
}

impl PinnedSource {
    pub fn version(&self) -> &Arc<Version> {
        &self.version
    }
}

impl Registry {
    /// Keeps a version of a name. Errors: `model_not_found`, `adapter_ineffective`.
    pub fn keep(&self, name: &str, number: u64) -> Result<PinnedSource> {
        let (version, hold) = self.inner.state().keep(name, number)?;
        Ok(PinnedSource { version, _hold: hold })
    }

    /// Keeps a living version with this content, be it called `id` or otherwise; `None` when there
    /// is none.
    pub fn keep_content(&self, digest: Digest, id: &str) -> Option<PinnedSource> {
        let (version, hold) = self.inner.state().keep_content(digest, id)?;
        Some(PinnedSource { version, _hold: hold })
    }

    /// Where a kept version's files are, after comparing them with its digest. Blocking. Errors:
    /// `corrupt_adapter`.
    pub fn files_of(&self, kept: &PinnedSource) -> Result<PathBuf> {
        let digest = kept.version.digest;
        let dir = self.inner.store.blob(digest);
        super::residency::check_stored(&dir, digest)?;
        Ok(dir)
    }

    /// Opens them. Blocking. Errors: `corrupt_adapter`.
    pub fn open_factors(&self, kept: &PinnedSource) -> Result<OpenAdapter> {
        factors::open(&self.files_of(kept)?, &self.inner.options.shape)
    }

    /// Refuses a name that `by` could publish no adapter under now. Errors: `invalid_name`,
    /// `name_taken`, `name_not_allowed`, `adapter_limit_reached`, `tenant_share_exceeded`.
    pub async fn check_free(&self, name: &str, by: &Actor) -> Result<()> {
        self.inner.check_name(name)?;
        if self.inner.state().aliases.contains_key(name) {
            return Err(name_taken(name, "an alias"));
        }
        self.inner.check_right(name, by).await?;
        self.inner.check_names(name, &by.tenant)
    }

    /// Largest adapter that can be published, in bytes of its files.
    pub fn upload_bytes_max(&self) -> u64 {
        self.inner.options.upload_bytes_max
    }
}
