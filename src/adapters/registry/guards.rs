//! Versions and who holds them: guards, and who is told when the last one ends.
//!
//! Owns a version's state. Never decides what goes. The thing to know: counts rise only under the
//! state's lock, and fall anywhere without it.

use crate::adapters::ledger::Holders;
use crate::adapters::version::{Version, servable};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::Notify;

/// Who is told when a hold ends.
#[derive(Default)]
pub struct Signals {
    pub reaper: Notify,
    /// The first load in the line for room.
    pub room: Notify,
}

/// One of the holders of a version or a resident. Dropping the last one rings; it never blocks.
pub struct Guard {
    holders: Holders,
    signals: Arc<Signals>,
}

impl Guard {
    pub fn new(holders: &Holders, signals: &Arc<Signals>) -> Self {
        holders.add();
        Self { holders: holders.clone(), signals: signals.clone() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.holders.remove() {
            self.signals.reaper.notify_one();
            self.signals.room.notify_one();
        }
    }
}

/// A version and who uses it.
pub struct VersionState {
    pub version: Arc<Version>,
    /// The name's.
    pub owner: Arc<str>,
    /// Clock of its last use, by whatever name for it.
    pub used: u64,
    pub leases: Holders,
    /// Replaced, and not yet out of the bank.
    pub draining: bool,
    pub pinned: bool,
    /// What keeps a pinned version resident; `None` while it could not be loaded.
    pub pin: Option<Guard>,
    /// Says true to the leases when the version was deleted and may no longer be used.
    pub cut: Arc<AtomicBool>,
}

impl VersionState {
    pub fn new(version: Version, owner: Arc<str>) -> Self {
        Self {
            version: Arc::new(version),
            owner,
            used: 0,
            leases: Holders::default(),
            draining: false,
            pinned: false,
            pin: None,
            cut: Arc::default(),
        }
    }

    pub fn idle(&self) -> bool {
        self.leases.count() == 0
    }

    /// Whether it may be asked for, and so may stay in the bank.
    pub fn warm(&self) -> bool {
        !self.draining && servable(&self.version)
    }
}

/// The versions of one name.
#[derive(Default)]
pub struct Versions {
    pub current: u64,
    pub held: BTreeMap<u64, VersionState>,
}

impl Versions {
    /// The version that the bare name means, if requests may use it.
    pub fn current_servable(&self) -> bool {
        self.held.get(&self.current).is_some_and(|h| servable(&h.version))
    }
}
