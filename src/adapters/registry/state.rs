//! The state: names, versions, aliases, and the ledger of their memory, as plain data.
//!
//! Owns what a name means now and who leases it. Never waits, reads files or talks to the engine.
//! The thing to know: counts of leases rise only under the state's lock, so a zero seen under it
//! stays zero while it is held.

use super::guards::{Guard, Signals, VersionState, Versions};
use super::lease::{Lease, LeaseInner};
use crate::adapters::Digest;
use crate::adapters::alias::Alias;
use crate::adapters::bank::Slot;
use crate::adapters::ledger::{Answer, Ledger, LoadRequest, Promise, Size};
use crate::adapters::version::{
    Cold, Entry, State, Stats, Version, VersionRef, ineffective, model_not_found, servable,
};
use crate::error::Result;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

/// What the engine said of an adapter that it took in.
pub struct Installed {
    pub slot: Slot,
    pub logit_change_max: f32,
}

/// What a request's models led to.
pub enum Found {
    /// All of them.
    Leased(Vec<Lease>),
    /// Servable, but not all in the bank.
    Absent(Vec<Arc<Version>>),
}

/// The state, also after a panic elsewhere: each change to it is complete before anything can
/// panic.
pub fn lock(state: &Mutex<RegistryState>) -> MutexGuard<'_, RegistryState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct RegistryState {
    pub names: BTreeMap<String, Versions>,
    pub aliases: BTreeMap<String, Alias>,
    /// Versions of deleted names that requests still use.
    pub departing: Vec<VersionState>,
    pub ledger: Ledger<Installed>,
    pub loads_waiting: usize,
    /// Why contents that were resident are not.
    left: HashMap<Digest, Cold>,
    /// Something drains or must go: the reaper has work when a hold ends.
    pub unsettled: bool,
    signals: Arc<Signals>,
}

impl RegistryState {
    pub fn new(
        names: BTreeMap<String, Versions>,
        aliases: BTreeMap<String, Alias>,
        memory_max: Size,
        signals: Arc<Signals>,
    ) -> Self {
        Self {
            names,
            aliases,
            departing: Vec::new(),
            ledger: Ledger::new(memory_max),
            loads_waiting: 0,
            left: HashMap::new(),
            unsettled: true,
            signals,
        }
    }

    pub fn living(&self) -> impl Iterator<Item = &VersionState> {
        self.names.values().flat_map(|v| v.held.values())
    }

    /// Leases what `models` name, if all of it is resident. `held` are contents that the caller
    /// keeps resident: it brought them, and may use them even when they are closing. Errors:
    /// `model_not_found`, `adapter_ineffective`.
    pub fn lease_all(
        &mut self,
        models: &[&str],
        sticky: &str,
        held: &[Digest],
        tenant: &Arc<str>,
    ) -> Result<Found> {
        let found = models.iter().map(|model| self.lease(model, sticky, held, tenant));
        let found = found.collect::<Result<Vec<_>>>()?;
        let (versions, leases): (Vec<_>, Vec<Option<Lease>>) = found.into_iter().unzip();
        let all: Option<Vec<Lease>> = leases.into_iter().collect();
        Ok(all.map_or(Found::Absent(versions), Found::Leased))
    }

    /// What `model` names, leased if it is resident.
    fn lease(
        &mut self,
        model: &str,
        sticky: &str,
        held: &[Digest],
        tenant: &Arc<str>,
    ) -> Result<(Arc<Version>, Option<Lease>)> {
        let asked = VersionRef::parse(model).ok_or_else(|| model_not_found(model))?;
        let (name, number) = match (asked.number, self.aliases.get(asked.name)) {
            (None, Some(alias)) => {
                let target = alias.choose(sticky);
                (target.name.as_str(), Some(target.number))
            }
            (number, _) => (asked.name, number),
        };
        let versions = self.names.get_mut(name);
        let found = versions.and_then(|v| v.held.get_mut(&number.unwrap_or(v.current)));
        let found = found.ok_or_else(|| model_not_found(model))?;
        if !servable(&found.version) {
            return Err(ineffective(&found.version));
        }
        let digest = found.version.digest;
        let Some(resident) = self.ledger.lend(digest, held.contains(&digest), tenant) else {
            return Ok((found.version.clone(), None));
        };
        found.used = resident.used;
        let lease = LeaseInner {
            version: found.version.clone(),
            slot: resident.what.slot,
            _holds: Some([
                Guard::new(&found.leases, &self.signals),
                Guard::new(&resident.holders, &self.signals),
            ]),
            cut: found.cut.clone(),
        };
        Ok((found.version.clone(), Some(Lease { inner: Arc::new(lease) })))
    }

    /// Why a content is not resident.
    pub fn why_cold(&self, digest: Digest) -> Cold {
        self.left.get(&digest).copied().unwrap_or(Cold::Restart)
    }

    /// Enters a loaded adapter.
    pub fn admit(&mut self, promise: &Promise, what: Installed, since: Instant) {
        self.left.remove(&promise.digest);
        self.ledger.admit(promise, what, since);
    }

    /// Keeps a version from being pruned while something is done with it. Errors:
    /// `model_not_found`, `adapter_ineffective`.
    pub fn keep(&self, name: &str, number: u64) -> Result<(Arc<Version>, Guard)> {
        let held = self.names.get(name).and_then(|v| v.held.get(&number));
        let held = held.ok_or_else(|| model_not_found(&format!("{name}@{number}")))?;
        if !servable(&held.version) {
            return Err(ineffective(&held.version));
        }
        Ok((held.version.clone(), Guard::new(&held.leases, &self.signals)))
    }

    /// The same for a living version with this content, the one called `id` before others.
    pub fn keep_content(&self, digest: Digest, id: &str) -> Option<(Arc<Version>, Guard)> {
        let same = self.living().filter(|h| h.version.digest == digest);
        let held = same.max_by_key(|h| h.version.id() == id)?;
        Some((held.version.clone(), Guard::new(&held.leases, &self.signals)))
    }

    /// Keeps a resident from eviction while something is done with it.
    pub fn pin(&self, digest: Digest) -> Option<Guard> {
        Some(Guard::new(self.ledger.holders(digest)?, &self.signals))
    }

    /// Asks the ledger for memory; notes why what must go before is gone.
    pub fn reserve(&mut self, need: &LoadRequest, first: bool) -> Answer {
        let answer = self.ledger.reserve(need, first);
        if let Answer::Evict(digest) = answer {
            self.note_left(digest, Cold::Evicted);
        }
        answer
    }

    /// Remembers why a content is not resident, as long as some version has it.
    fn note_left(&mut self, digest: Digest, why: Cold) {
        if self.refers_to(digest) {
            self.left.insert(digest, why);
        }
    }

    /// Contents that some version may be asked for, and that may therefore stay in the bank.
    fn warm(&self) -> HashSet<Digest> {
        self.living().filter(|h| h.warm()).map(|h| h.version.digest).collect()
    }

    /// Digests in the bank that no live version wants and nobody uses.
    pub fn unwanted(&self) -> Vec<Digest> {
        let warm = self.warm();
        self.ledger.idle().filter(|d| !warm.contains(d)).collect()
    }

    /// Marks a resident as leaving if it is still unwanted.
    pub fn let_go(&mut self, digest: Digest) -> bool {
        let warm = self.living().any(|h| h.version.digest == digest && h.warm());
        let leaves = !warm && self.ledger.let_go(digest);
        if leaves {
            self.note_left(digest, Cold::Replaced);
        }
        leaves
    }

    /// Replaced versions that are out of the bank, or kept there by another version, have drained.
    pub fn settle_drained(&mut self) {
        let warm = self.warm();
        let ledger = &self.ledger;
        let gone = |d: Digest| ledger.get(d).is_none() || warm.contains(&d);
        for held in self.names.values_mut().flat_map(|v| v.held.values_mut()) {
            if held.draining && held.idle() && gone(held.version.digest) {
                held.draining = false;
            }
        }
    }

    /// Takes out idle versions beyond the newest `kept` of each name (those that are current,
    /// pinned or in an alias always stay), and deleted ones. Returns those of living names and the
    /// digests of all.
    pub fn take_surplus(&mut self, kept: usize) -> (Vec<Arc<Version>>, Vec<Digest>) {
        let mut pruned = Vec::new();
        let mut waiting = false;
        for (name, versions) in &mut self.names {
            if versions.held.len() <= kept.max(1) {
                continue;
            }
            let aliases = &self.aliases;
            let whole = |h: &VersionState| !h.version.lineage.is_checkpoint();
            // What was trained and not judged yet, or refused, until something newer comes.
            let newest = versions.held.iter().rev().find(|(_, h)| whole(h)).map(|(n, _)| *n);
            let candidate = newest
                .filter(|n| *n > versions.current && versions.held[n].version.lineage.is_trained());
            let free = |n: &u64, h: &VersionState| {
                let led_to = || aliases.values().any(|a| a.keeps(&h.owner) && a.leads_to(name, *n));
                *n != versions.current && Some(*n) != candidate && !h.pinned && !led_to()
            };
            // Checkpoints are counted apart: they push out no version that a rollback leads to.
            let old = |checkpoints: bool| -> Vec<u64> {
                let of = |h: &VersionState| h.version.lineage.is_checkpoint() == checkpoints;
                let all = versions.held.iter().filter(|(n, h)| of(h) && free(n, h));
                let mut numbers: Vec<u64> = all.map(|(n, _)| *n).collect();
                let most = if checkpoints { kept.max(1) } else { kept.max(1) - 1 };
                numbers.truncate(numbers.len().saturating_sub(most));
                numbers
            };
            for number in [old(false), old(true)].concat() {
                if versions.held[&number].idle() && !versions.held[&number].draining {
                    pruned.extend(versions.held.remove(&number));
                } else {
                    waiting = true;
                }
            }
        }
        let gone = self.departing.extract_if(.., |h| h.idle());
        let mut digests: Vec<Digest> = gone.map(|h| h.version.digest).collect();
        digests.extend(pruned.iter().map(|h| h.version.digest));
        for digest in &digests {
            self.left.remove(digest);
        }
        // A resident that nobody wants may still be held: by a lease whose end is under way (it
        // lets go of the version first), or by a load of what is deleted.
        let warm = self.warm();
        self.unsettled = waiting
            || !self.departing.is_empty()
            || self.ledger.digests().any(|digest| !warm.contains(&digest))
            || self.living().any(|h| h.draining);
        (pruned.into_iter().map(|h| h.version).collect(), digests)
    }

    /// Whether a living version has this content.
    pub fn wanted(&self, digest: Digest) -> bool {
        self.living().any(|h| h.version.digest == digest)
    }

    /// Whether any version, living or departing, has this content.
    pub fn refers_to(&self, digest: Digest) -> bool {
        self.living().chain(&self.departing).any(|h| h.version.digest == digest)
    }

    /// The probe's finding for a content that some version already has.
    pub fn known_change(&self, digest: Digest) -> Option<f32> {
        let mut same = self.living().filter(|h| h.version.digest == digest);
        same.next().map(|h| h.version.logit_change_max)
    }

    /// Adds a version; the one it replaces drains.
    pub fn publish(&mut self, version: Version, current: bool, owner: Arc<str>) {
        let (name, number) = (version.name.clone(), version.number);
        let versions = self.names.entry(name.clone()).or_default();
        let used = self.ledger.tick();
        versions.held.insert(number, VersionState { used, ..VersionState::new(version, owner) });
        if current {
            self.set_current(&name, number);
        }
    }

    /// Makes `number` the name's current version; the one before drains, unless it is pinned or an
    /// alias leads to it.
    pub fn set_current(&mut self, name: &str, number: u64) {
        let Some(versions) = self.names.get_mut(name) else { return };
        let before = std::mem::replace(&mut versions.current, number);
        if before != number
            && let Some(held) = versions.held.get_mut(&before)
        {
            let led_to = self.aliases.values().any(|a| a.leads_to(name, before));
            held.draining = servable(&held.version) && !held.pinned && !led_to;
        }
        if let Some(held) = versions.held.get_mut(&number) {
            held.draining = false;
            held.used = self.ledger.tick();
        }
    }

    /// Pins a version, or unpins it without a hold; an unpinned one that is not current drains.
    pub fn set_pin(&mut self, name: &str, number: u64, pin: Option<Guard>) {
        let Some(versions) = self.names.get_mut(name) else { return };
        let current = versions.current == number;
        let led_to = self.aliases.values().any(|a| a.leads_to(name, number));
        if let Some(held) = versions.held.get_mut(&number) {
            held.draining = pin.is_none() && held.pinned && !current && !led_to;
            held.pinned = pin.is_some();
            if pin.is_some() {
                held.used = self.ledger.tick();
            }
            held.pin = pin;
        }
    }

    /// Versions that are pinned, in no order that matters.
    pub fn pinned(&self) -> Vec<Arc<Version>> {
        self.living().filter(|h| h.pinned).map(|h| h.version.clone()).collect()
    }

    pub fn pinned_contents(&self) -> HashSet<Digest> {
        self.pinned().iter().map(|v| v.digest).collect()
    }

    /// Whether there are versions of this name, whatever it means.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// What the bare name means; nothing while all its versions are candidates.
    pub fn current(&self, name: &str) -> Option<Arc<Version>> {
        let versions = self.names.get(name)?;
        versions.held.get(&versions.current).map(|h| h.version.clone())
    }

    /// The newest servable version before the current one, checkpoints left out.
    pub fn before_current(&self, name: &str) -> Option<u64> {
        let versions = self.names.get(name)?;
        let older = versions.held.range(..versions.current).rev();
        let meant = |h: &VersionState| servable(&h.version) && !h.version.lineage.is_checkpoint();
        older.filter(|(_, h)| meant(h)).map(|(n, _)| *n).next()
    }

    /// Revokes the leases on deleted versions; how many there were.
    pub fn cut(&mut self, versions: &[Arc<Version>]) -> usize {
        let theirs = |h: &&VersionState| versions.iter().any(|v| Arc::ptr_eq(v, &h.version));
        let mut leases = 0;
        for held in self.departing.iter().filter(theirs) {
            leases += held.leases.count();
            held.cut.store(true, Ordering::Relaxed);
        }
        leases
    }

    /// Whether none of these deleted versions is in use, nor in the bank but for others' sake.
    pub fn has_left(&self, versions: &[Arc<Version>]) -> bool {
        versions.iter().all(|v| {
            let used = self.departing.iter().any(|h| Arc::ptr_eq(v, &h.version));
            !used && (self.ledger.get(v.digest).is_none() || self.wanted(v.digest))
        })
    }

    /// Removes a name; its versions drain. `None` when there is no such name.
    pub fn remove(&mut self, name: &str) -> Option<Vec<Entry>> {
        let mut entries = self.entries_of(name);
        let mut versions = self.names.remove(name)?;
        for held in versions.held.values_mut() {
            held.draining = true;
            held.pinned = false;
            held.pin = None;
        }
        for entry in &mut entries {
            entry.state = State::Draining;
            entry.current = false;
            entry.pinned = false;
        }
        self.departing.extend(versions.held.into_values());
        Some(entries)
    }

    /// Removes a version of a name that has others, and moves the name to `next` where that is one.
    pub fn remove_version(&mut self, name: &str, number: u64, next: Option<u64>) {
        let Some(versions) = self.names.get_mut(name) else { return };
        let Some(mut held) = versions.held.remove(&number) else { return };
        (held.draining, held.pinned, held.pin) = (true, false, None);
        if versions.current == number {
            versions.current = 0;
        }
        self.departing.push(held);
        if let Some(next) = next {
            self.set_current(name, next);
        }
    }

    pub fn stats(&self) -> Stats {
        Stats {
            names: self.names.len(),
            versions: self.living().count(),
            departing: self.departing.len(),
            pinned: self.living().filter(|h| h.pinned).count(),
            aliases: self.aliases.len(),
            residents: self.ledger.len(),
            resident_bytes: self.ledger.used().bytes,
            loads: self.ledger.loads,
            evictions: self.ledger.evictions,
            loads_waiting: self.loads_waiting,
        }
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
            let resident = self.ledger.get(held.version.digest);
            Entry {
                version: held.version.clone(),
                owner: held.owner.clone(),
                state: match (held.draining, servable(&held.version)) {
                    (true, _) => State::Draining,
                    (false, false) => State::Ineffective,
                    (false, true) => State::Ready,
                },
                current: *number == versions.current,
                pinned: held.pinned,
                resident: resident.is_some_and(|r| !r.leaving() && held.used >= r.entered),
                leases: held.leases.count(),
            }
        })
    }
}
