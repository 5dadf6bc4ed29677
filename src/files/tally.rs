//! How many files and bytes each tenant has, those on their way included.
//!
//! Owns the sums. Never refuses anything. The thing to know: bytes count from the moment they are
//! written, so two uploads at once never see the same room.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The sums. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tally {
    sums: Arc<Mutex<HashMap<String, Sum>>>,
}

/// What one tenant has; an operator's is under the empty name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    pub files: u64,
    pub bytes: u64,
}

/// Bytes of something that has no row yet; dropped, they are counted no more.
pub struct Counted {
    tally: Tally,
    tenant: String,
    bytes: u64,
}

impl Tally {
    pub fn of(&self, tenant: &str) -> Sum {
        self.sums().get(tenant).copied().unwrap_or_default()
    }

    /// Files of all tenants together.
    pub fn files(&self) -> u64 {
        self.sums().values().map(|sum| sum.files).sum()
    }

    pub fn add(&self, tenant: &str, files: u64, bytes: u64) {
        let mut sums = self.sums();
        let sum = sums.entry(tenant.to_owned()).or_default();
        sum.files += files;
        sum.bytes += bytes;
    }

    pub fn take(&self, tenant: &str, files: u64, bytes: u64) {
        let mut sums = self.sums();
        let Some(sum) = sums.get_mut(tenant) else { return };
        sum.files = sum.files.saturating_sub(files);
        sum.bytes = sum.bytes.saturating_sub(bytes);
        if *sum == Sum::default() {
            sums.remove(tenant);
        }
    }

    /// Nothing yet, to grow as bytes are written.
    pub fn begin(&self, tenant: &str) -> Counted {
        Counted { tally: self.clone(), tenant: tenant.to_owned(), bytes: 0 }
    }

    /// Also after a panic elsewhere: each change is a few map operations.
    fn sums(&self) -> MutexGuard<'_, HashMap<String, Sum>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    pub fn grow(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.tally.add(&self.tenant, 0, bytes);
    }

    /// A row has them now.
    pub fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.tally.take(&self.tenant, 0, self.bytes);
    }
}
