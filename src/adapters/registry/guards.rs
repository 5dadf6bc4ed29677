//! What the state counts: guards of versions and of residents, and who is told when the last one
//! ends.
//!
//! Owns the two kinds of things that can be held. Never decides what goes. The thing to know:
//! counts rise only under the state's lock, and fall anywhere without it.

use crate::adapters::bank::Slot;
use crate::adapters::version::{Version, servable};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Who is told when a hold ends.
#[derive(Default)]
pub struct Signals {
    pub reaper: Notify,
    /// The first load in the line for room.
    pub room: Notify,
}

/// One of the holders of a version or a resident. Dropping the last one rings; it never blocks.
pub struct Guard {
    count: Arc<AtomicUsize>,
    signals: Arc<Signals>,
}

impl Guard {
    pub fn new(count: &Arc<AtomicUsize>, signals: &Arc<Signals>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self { count: count.clone(), signals: signals.clone() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.count.fetch_sub(1, Ordering::Release) == 1 {
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
    pub leases: Arc<AtomicUsize>,
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
            leases: Arc::default(),
            draining: false,
            pinned: false,
            pin: None,
            cut: Arc::default(),
        }
    }

    pub fn idle(&self) -> bool {
        self.leases.load(Ordering::Acquire) == 0
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

/// An adapter in the bank. Versions with one digest share it.
pub struct Resident {
    pub slot: Slot,
    pub bytes: u64,
    pub logit_change_max: f32,
    pub leases: Arc<AtomicUsize>,
    /// Clock of the last use, and whose it was.
    pub used: u64,
    pub tenant: Arc<str>,
    /// Clock of its coming.
    pub entered: u64,
    /// When it came.
    pub since: Instant,
    /// Its removal is under way: no new lease.
    pub leaving: bool,
    /// Somebody has waited long for its room: it takes no new leases but those of its loaders.
    pub closing: bool,
}

impl Resident {
    /// Whether it takes new leases.
    pub fn open(&self) -> bool {
        !self.leaving && !self.closing
    }

    pub fn idle(&self) -> bool {
        !self.leaving && self.leases.load(Ordering::Acquire) == 0
    }
}

impl Versions {
    /// The version that the bare name means, if requests may use it.
    pub fn current_servable(&self) -> bool {
        self.held.get(&self.current).is_some_and(|h| servable(&h.version))
    }
}
