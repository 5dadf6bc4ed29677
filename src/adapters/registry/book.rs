//! The book: names, versions, residents and the byte ledger, as plain data.
//!
//! Owns what a name means now and who holds what. Never waits, reads files or talks to the engine.
//! The thing to know: counts of leases rise only under the book's lock, so a zero seen under it
//! stays zero while it is held.

use super::{Entry, Lease, LeaseInner, State, Version};
use crate::adapters::Digest;
use crate::adapters::bank::Slot;
use crate::error::{Error, Kind, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// One of the holders of a version or a resident. Dropping the last one wakes the reaper; it never
/// blocks.
pub struct Hold {
    count: Arc<AtomicUsize>,
    reaper: Arc<Notify>,
}

impl Hold {
    fn new(count: &Arc<AtomicUsize>, reaper: &Arc<Notify>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self { count: count.clone(), reaper: reaper.clone() }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.count.fetch_sub(1, Ordering::Release) == 1 {
            self.reaper.notify_one();
        }
    }
}

/// A version and who uses it.
pub struct Held {
    pub version: Arc<Version>,
    pub leases: Arc<AtomicUsize>,
    /// Replaced, and not yet out of the bank.
    pub draining: bool,
}

impl Held {
    pub fn new(version: Version) -> Self {
        Self { version: Arc::new(version), leases: Arc::default(), draining: false }
    }

    fn idle(&self) -> bool {
        self.leases.load(Ordering::Acquire) == 0
    }

    fn warm(&self) -> bool {
        !self.draining && servable(&self.version)
    }
}

/// Whether requests may use the version: its probe saw a finite change, or its uploader forced it.
pub fn servable(version: &Version) -> bool {
    let change = version.logit_change_max;
    version.forced || (change.is_finite() && change > 0.0)
}

/// The versions of one name.
#[derive(Default)]
pub struct Versions {
    pub current: u64,
    pub held: BTreeMap<u64, Held>,
}

/// An adapter in the bank. Versions with one digest share it.
pub struct Resident {
    pub slot: Slot,
    pub bytes: u64,
    pub logit_change_max: f32,
    pub leases: Arc<AtomicUsize>,
    /// Clock of the last use.
    pub used: u64,
    /// Its removal is under way: no new lease.
    pub leaving: bool,
}

impl Resident {
    fn idle(&self) -> bool {
        !self.leaving && self.leases.load(Ordering::Acquire) == 0
    }
}

/// What a request's `model` led to.
pub enum Found {
    Leased(Lease),
    /// Servable, but not in the bank.
    Absent(Arc<Version>),
}

pub struct Book {
    pub names: BTreeMap<String, Versions>,
    /// Versions of deleted names that requests still use.
    pub departing: Vec<Held>,
    pub residents: HashMap<Digest, Resident>,
    /// Bytes promised to loads under way.
    pub reserved: u64,
    pub loads: u64,
    pub evictions: u64,
    /// Contents that have been in the bank since the start.
    pub seen: HashSet<Digest>,
    /// Something drains or must go: the reaper has work when a hold ends.
    pub unsettled: bool,
    clock: u64,
    reaper: Arc<Notify>,
}

impl Book {
    pub fn new(names: BTreeMap<String, Versions>, reaper: Arc<Notify>) -> Self {
        Self {
            names,
            departing: Vec::new(),
            residents: HashMap::new(),
            reserved: 0,
            loads: 0,
            evictions: 0,
            seen: HashSet::new(),
            unsettled: true,
            clock: 0,
            reaper,
        }
    }

    /// Bytes of residents and of promises.
    pub fn used_bytes(&self) -> u64 {
        self.residents.values().map(|r| r.bytes).sum::<u64>() + self.reserved
    }

    /// Bytes that no eviction could free now.
    pub fn pinned_bytes(&self) -> u64 {
        let pinned = self.residents.values().filter(|r| !r.idle());
        pinned.map(|r| r.bytes).sum::<u64>() + self.reserved
    }

    /// Leases what `model` names, if it is resident. Errors: `model_not_found`,
    /// `adapter_ineffective`.
    pub fn lease(&mut self, model: &str) -> Result<Found> {
        let (name, number) = match model.split_once('@') {
            None => (model, None),
            Some((name, number)) => {
                // Only the way that versions are printed; no version has the number 0.
                let parsed = number.parse().ok().filter(|n: &u64| n.to_string() == number);
                (name, Some(parsed.unwrap_or(0)))
            }
        };
        let held = self.names.get(name).and_then(|v| v.held.get(&number.unwrap_or(v.current)));
        let Some(held) = held else {
            let model: String = model.chars().take(160).collect();
            return Err(Error::not_found(
                "model_not_found",
                format!("The model `{model}` does not exist."),
            )
            .param("model"));
        };
        if !servable(&held.version) {
            return Err(Error::new(
                Kind::Conflict,
                "adapter_ineffective",
                format!(
                    "Adapter `{}` is not served: its probe saw a logit change of {}. Publish it \
                     with force to serve it anyway.",
                    held.version.id(),
                    held.version.logit_change_max
                ),
            )
            .param("model"));
        }
        self.clock += 1;
        match self.residents.get_mut(&held.version.digest) {
            Some(resident) if !resident.leaving => {
                resident.used = self.clock;
                Ok(Found::Leased(Lease {
                    inner: Arc::new(LeaseInner {
                        version: held.version.clone(),
                        slot: resident.slot,
                        _holds: Some([
                            Hold::new(&held.leases, &self.reaper),
                            Hold::new(&resident.leases, &self.reaper),
                        ]),
                    }),
                }))
            }
            _ => Ok(Found::Absent(held.version.clone())),
        }
    }

    /// Enters a loaded adapter as the one used last; `bytes` are no longer a promise.
    pub fn admit(&mut self, digest: Digest, slot: Slot, bytes: u64, logit_change_max: f32) {
        self.reserved -= bytes;
        self.loads += 1;
        self.clock += 1;
        let resident = Resident {
            slot,
            bytes,
            logit_change_max,
            leases: Arc::default(),
            used: self.clock,
            leaving: false,
        };
        self.residents.insert(digest, resident);
        self.seen.insert(digest);
    }

    /// Keeps a resident from eviction while something is done with it.
    pub fn pin(&mut self, digest: Digest) -> Option<Hold> {
        let resident = self.residents.get(&digest).filter(|r| !r.leaving)?;
        Some(Hold::new(&resident.leases, &self.reaper))
    }

    /// Marks the least recently used idle resident as leaving.
    pub fn choose_victim(&mut self) -> Option<(Digest, Slot)> {
        let idle = self.residents.iter_mut().filter(|(_, r)| r.idle());
        let (digest, resident) = idle.min_by_key(|(_, r)| r.used)?;
        resident.leaving = true;
        self.evictions += 1;
        Some((*digest, resident.slot))
    }

    /// Contents that some version may be asked for, and that may therefore stay in the bank.
    fn warm(&self) -> HashSet<Digest> {
        let living = self.names.values().flat_map(|v| v.held.values());
        living.filter(|h| h.warm()).map(|h| h.version.digest).collect()
    }

    /// Digests in the bank that no live version wants and nobody uses.
    pub fn unwanted(&self) -> Vec<Digest> {
        let warm = self.warm();
        let idle = self.residents.iter().filter(|(_, r)| r.idle());
        idle.map(|(d, _)| *d).filter(|d| !warm.contains(d)).collect()
    }

    /// Marks a resident as leaving if it is still unwanted.
    pub fn let_go(&mut self, digest: Digest) -> Option<Slot> {
        if !self.unwanted().contains(&digest) {
            return None;
        }
        let resident = self.residents.get_mut(&digest)?;
        resident.leaving = true;
        Some(resident.slot)
    }

    /// Replaced versions that are out of the bank, or kept there by another version, have drained.
    pub fn settle_drained(&mut self) {
        let warm = self.warm();
        let residents = &self.residents;
        let gone = |d: &Digest| !residents.contains_key(d) || warm.contains(d);
        for held in self.names.values_mut().flat_map(|v| v.held.values_mut()) {
            if held.draining && held.idle() && gone(&held.version.digest) {
                held.draining = false;
            }
        }
    }

    /// Takes out idle versions beyond the newest `kept` of each name (the current one always
    /// stays), and deleted ones. Returns those of living names and the digests of all.
    pub fn take_surplus(&mut self, kept: usize) -> (Vec<Arc<Version>>, Vec<Digest>) {
        let mut pruned = Vec::new();
        for versions in self.names.values_mut() {
            let surplus = versions.held.len().saturating_sub(kept.max(1));
            let old: Vec<u64> = versions
                .held
                .iter()
                .filter(|(n, _)| **n != versions.current)
                .take(surplus)
                .filter(|(_, h)| h.idle() && !h.draining)
                .map(|(n, _)| *n)
                .collect();
            pruned.extend(old.iter().filter_map(|n| versions.held.remove(n)));
        }
        let gone = self.departing.extract_if(.., |h| h.idle());
        let mut digests: Vec<Digest> = gone.map(|h| h.version.digest).collect();
        digests.extend(pruned.iter().map(|h| h.version.digest));
        self.unsettled = !self.departing.is_empty()
            || !self.unwanted().is_empty()
            || self
                .names
                .values()
                .any(|v| v.held.len() > kept.max(1) || v.held.values().any(|h| h.draining));
        (pruned.into_iter().map(|h| h.version).collect(), digests)
    }

    /// Whether any version, living or departing, has this content.
    pub fn refers_to(&self, digest: Digest) -> bool {
        let living = self.names.values().flat_map(|v| v.held.values());
        living.chain(&self.departing).any(|h| h.version.digest == digest)
    }

    /// The probe's finding for a content that some version already has.
    pub fn known_change(&self, digest: Digest) -> Option<f32> {
        let living = self.names.values().flat_map(|v| v.held.values());
        let mut same = living.filter(|h| h.version.digest == digest);
        same.next().map(|h| h.version.logit_change_max)
    }

    /// Adds a version; the one it replaces drains.
    pub fn publish(&mut self, version: Version, current: bool) {
        let number = version.number;
        let versions = self.names.entry(version.name.clone()).or_default();
        versions.held.insert(number, Held::new(version));
        if current {
            versions.turn_to(number);
        }
    }

    /// Removes a name; its versions drain. `None` when there is no such name.
    pub fn remove(&mut self, name: &str) -> Option<Vec<Entry>> {
        let mut entries = self.entries_of(name);
        let mut versions = self.names.remove(name)?;
        for held in versions.held.values_mut() {
            held.draining = true;
        }
        for entry in &mut entries {
            entry.state = State::Draining;
            entry.current = false;
        }
        self.departing.extend(versions.held.into_values());
        Some(entries)
    }

    pub fn entries_of(&self, name: &str) -> Vec<Entry> {
        let versions = self.names.get(name);
        versions.map_or_else(Vec::new, |v| self.entries(v).collect())
    }

    pub fn entry(&self, name: &str, number: u64) -> Option<Entry> {
        let entries = self.entries_of(name);
        entries.into_iter().find(|e| e.version.number == number)
    }

    pub fn all_entries(&self) -> Vec<Entry> {
        self.names.values().flat_map(|v| self.entries(v)).collect()
    }

    fn entries<'a>(&'a self, versions: &'a Versions) -> impl Iterator<Item = Entry> + 'a {
        versions.held.iter().map(|(number, held)| {
            let resident = self.residents.get(&held.version.digest);
            Entry {
                version: held.version.clone(),
                state: match (held.draining, servable(&held.version)) {
                    (true, _) => State::Draining,
                    (false, false) => State::Ineffective,
                    (false, true) => State::Ready,
                },
                current: *number == versions.current,
                resident: resident.is_some_and(|r| !r.leaving),
                leases: held.leases.load(Ordering::Relaxed),
            }
        })
    }
}

impl Versions {
    /// Makes `number` the current version; the one before drains.
    pub fn turn_to(&mut self, number: u64) {
        let before = std::mem::replace(&mut self.current, number);
        if before != number
            && let Some(held) = self.held.get_mut(&before)
        {
            held.draining = servable(&held.version);
        }
        if let Some(held) = self.held.get_mut(&number) {
            held.draining = false;
        }
    }

    /// The version that the bare name means, if requests may use it.
    pub fn current_servable(&self) -> bool {
        self.held.get(&self.current).is_some_and(|h| servable(&h.version))
    }
}
