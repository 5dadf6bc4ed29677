//! The ledger of memory for adapters: which contents are resident or promised memory, who uses
//! them, and who makes room for whom.
//!
//! Integers only: never waits, reads a clock, or touches an adapter. The thing to know: residents
//! and promises together never exceed the budget; while it is full, a tenant within an equal part
//! is not pushed out by one beyond, and a resident counts for the tenant that used it last.

use super::Digest;
use super::actor::Tenant;
use std::collections::{HashMap, HashSet};
use std::iter::Sum;
use std::ops::Add;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;

/// An amount of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    pub bytes: u64,
    /// Of the bank: one an adapter.
    pub slots: usize,
}

impl Size {
    pub fn fits(self, max: Self) -> bool {
        self.bytes <= max.bytes && self.slots <= max.slots
    }
}

impl Add for Size {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, slots: self.slots + other.slots }
    }
}

impl Sum for Size {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::add)
    }
}

/// Of an adapter.
fn one(bytes: u64) -> Size {
    Size { bytes, slots: 1 }
}

fn sum(bytes: impl Iterator<Item = u64>) -> Size {
    bytes.map(one).sum()
}

/// How many hold something. The count rises only where the ledger is at hand and falls anywhere, so
/// a zero seen there stays zero until somebody is let in.
#[derive(Debug, Clone, Default)]
pub struct Holders(Arc<AtomicUsize>);

impl Holders {
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    /// True when that was the last one.
    pub fn remove(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Release) == 1
    }
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

/// What is to be resident together.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    /// Each content once, with its bytes.
    pub contents: Vec<(Digest, u64)>,
    /// Who wants it.
    pub tenant: Tenant,
}

impl LoadRequest {
    pub fn size(&self) -> Size {
        sum(self.contents.iter().map(|(_, bytes)| *bytes))
    }

    fn has(&self, digest: &Digest) -> bool {
        self.contents.iter().any(|(own, _)| own == digest)
    }
}

/// Memory for a content that is being loaded: it ends when the content comes, or is withdrawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    pub digest: Digest,
    pub bytes: u64,
    /// Whose load it is.
    pub tenant: Arc<str>,
}

/// What a load is told.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Each content is resident and may be held, or is promised its memory.
    Reserved { present: Vec<Digest>, promised: Vec<Promise> },
    /// Others are to go first, or all is in use.
    Wait,
    /// This one must go before; it is marked as leaving.
    Evict(Digest),
}

/// A content in memory. Versions with one digest share it.
pub struct Resident<T> {
    /// What the owner of the ledger knows of it.
    pub what: T,
    pub bytes: u64,
    pub holders: Holders,
    /// Clock of the last use, and whose it was.
    pub used: u64,
    tenant: Arc<str>,
    /// Clock of its coming.
    pub entered: u64,
    /// When it came.
    since: Instant,
    /// Its removal is under way: no new holder.
    leaving: bool,
    /// Somebody has waited long for its memory: no new holders but those who brought it.
    closing: bool,
}

impl<T> Resident<T> {
    pub fn leaving(&self) -> bool {
        self.leaving
    }

    /// Whether it takes new holders.
    fn open(&self) -> bool {
        !self.leaving && !self.closing
    }

    /// Whether it may go.
    fn idle(&self) -> bool {
        !self.leaving && self.holders.count() == 0
    }
}

/// What tenants hold of what is short, bytes or slots, once one has got what it wants.
struct Parts {
    held: HashMap<Arc<str>, u64>,
    /// An equal part.
    part: u64,
}

impl Parts {
    fn is_over(&self, tenant: &str) -> bool {
        self.held.get(tenant).is_some_and(|held| *held > self.part)
    }

    /// Those that hold more than their part, the one with most first.
    fn over(&self) -> Vec<Arc<str>> {
        let mut over: Vec<_> = self.held.iter().filter(|(_, held)| **held > self.part).collect();
        over.sort_by(|a, b| (b.1, a.0).cmp(&(a.1, b.0)));
        over.into_iter().map(|(tenant, _)| tenant.clone()).collect()
    }
}

/// The ledger. `T` is what its owner knows of a resident.
pub struct Ledger<T> {
    max: Size,
    residents: HashMap<Digest, Resident<T>>,
    /// Contents on their way, with the bytes that they are promised.
    promised: HashMap<Digest, u64>,
    /// The first of those who wait has waited long: nobody goes before it.
    claimed: bool,
    /// Counts uses and arrivals.
    clock: u64,
    pub loads: u64,
    pub evictions: u64,
}

impl<T> Ledger<T> {
    pub fn new(max: Size) -> Self {
        Self {
            max,
            residents: HashMap::new(),
            promised: HashMap::new(),
            claimed: false,
            clock: 0,
            loads: 0,
            evictions: 0,
        }
    }

    pub fn max(&self) -> Size {
        self.max
    }
    pub fn get(&self, digest: Digest) -> Option<&Resident<T>> {
        self.residents.get(&digest)
    }
    pub fn len(&self) -> usize {
        self.residents.len()
    }
    pub fn is_empty(&self) -> bool {
        self.residents.is_empty()
    }
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.residents.keys().copied()
    }

    /// A new moment of the clock.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Of residents and of promises.
    pub fn used(&self) -> Size {
        sum(self.residents.values().map(|r| r.bytes)) + self.reserved()
    }

    fn reserved(&self) -> Size {
        sum(self.promised.values().copied())
    }

    /// What no eviction could free now: in use, or promised.
    pub fn unavailable(&self) -> Size {
        let busy = self.residents.values().filter(|r| !r.idle());
        sum(busy.map(|r| r.bytes)) + self.reserved()
    }

    /// A resident for a request of `tenant`, who uses it from now on. One that is closing takes
    /// only those who `brought` it.
    pub fn lend(
        &mut self,
        digest: Digest,
        brought: bool,
        tenant: &Arc<str>,
    ) -> Option<&Resident<T>> {
        let used = self.tick();
        let resident = self.residents.get_mut(&digest)?;
        if resident.leaving || (resident.closing && !brought) {
            return None;
        }
        (resident.used, resident.tenant) = (used, tenant.clone());
        Some(resident)
    }

    /// The holders of a resident that takes new ones.
    pub fn holders(&self, digest: Digest) -> Option<&Holders> {
        self.residents.get(&digest).filter(|r| r.open()).map(|r| &r.holders)
    }

    /// Memory for all that is wanted, or for nothing. Only the `first` of those who wait may take
    /// what is claimed: it is who claimed it.
    pub fn reserve(&mut self, need: &LoadRequest, first: bool) -> Answer {
        let (mut absent, mut present) = (Vec::new(), Vec::new());
        // Idle ones that shall stay, beside those in use.
        let mut kept = self.unavailable();
        for &(digest, bytes) in &need.contents {
            match self.residents.get(&digest) {
                None => absent.push((digest, bytes)),
                Some(r) if r.open() => {
                    present.push(digest);
                    if r.idle() {
                        kept = kept + one(r.bytes);
                    }
                }
                // On its way out, or closing for somebody else.
                Some(_) => return Answer::Wait,
            }
        }
        let wanted = sum(absent.iter().map(|(_, bytes)| *bytes));
        if !absent.is_empty() {
            if (self.claimed && !first) || !(kept + wanted).fits(self.max) {
                return Answer::Wait;
            }
            let full = !(self.used() + wanted).fits(self.max)
                || self.is_bounded(&need.tenant, wanted.bytes);
            if full {
                return self.evict_for(need, wanted).map_or(Answer::Wait, Answer::Evict);
            }
        }
        let tenant = &need.tenant.name;
        let promise = |(digest, bytes)| Promise { digest, bytes, tenant: tenant.clone() };
        let promised: Vec<Promise> = absent.into_iter().map(promise).collect();
        for promise in &promised {
            let before = self.promised.insert(promise.digest, promise.bytes);
            assert_eq!(before, None, "{} is on its way already", promise.digest);
        }
        Answer::Reserved { present, promised }
    }

    /// Enters a loaded content as the one used last; its memory is no longer a promise.
    pub fn admit(&mut self, promise: &Promise, what: T, since: Instant) {
        self.withdraw(promise);
        self.loads += 1;
        let now = self.tick();
        let resident = Resident {
            what,
            bytes: promise.bytes,
            holders: Holders::default(),
            used: now,
            tenant: promise.tenant.clone(),
            entered: now,
            since,
            leaving: false,
            closing: false,
        };
        self.residents.insert(promise.digest, resident);
    }

    /// Takes a promise back.
    pub fn withdraw(&mut self, promise: &Promise) {
        let bytes = self.promised.remove(&promise.digest);
        assert_eq!(bytes, Some(promise.bytes), "{} was not promised that", promise.digest);
    }

    /// Marks the least recently used idle resident that `may` go as leaving; asked with the tenant
    /// that used it last.
    fn evict_idle(&mut self, may: impl Fn(&Digest, &str) -> bool) -> Option<Digest> {
        let idle = self.residents.iter_mut().filter(|(d, r)| r.idle() && may(d, &r.tenant));
        let (digest, resident) = idle.min_by_key(|(_, r)| r.used)?;
        resident.leaving = true;
        self.evictions += 1;
        Some(*digest)
    }

    /// Marks the idle resident that is to make room for what is wanted as leaving: the least
    /// recently used of the tenant that is most beyond its part; if nobody beyond has an idle one,
    /// of all, unless the tenant is beyond itself and holds something that it does not need.
    fn evict_for(&mut self, need: &LoadRequest, wanted: Size) -> Option<Digest> {
        let tenant = &need.tenant;
        if self.is_bounded(tenant, wanted.bytes) {
            return self.evict_idle(|digest, of| !need.has(digest) && *of == *tenant.name);
        }
        let parts = self.parts(tenant, wanted);
        for over in parts.over() {
            let victim = self.evict_idle(|digest, of| !need.has(digest) && *of == *over);
            if victim.is_some() {
                return victim;
            }
        }
        let own = |(d, r): (&Digest, &Resident<T>)| {
            *r.tenant == *tenant.name && !r.leaving && !need.has(d)
        };
        let only = !self.residents.iter().any(own);
        let entitled = tenant.is_operator() || only || !parts.is_over(&tenant.name);
        if entitled { self.evict_idle(|digest, _| !need.has(digest)) } else { None }
    }

    /// Residents that may go.
    pub fn idle(&self) -> impl Iterator<Item = Digest> + '_ {
        self.residents.iter().filter(|(_, r)| r.idle()).map(|(digest, _)| *digest)
    }

    /// Marks a resident as leaving; false while it is in use, or on its way out already.
    pub fn let_go(&mut self, digest: Digest) -> bool {
        let resident = self.residents.get_mut(&digest).filter(|r| r.idle());
        resident.map(|r| r.leaving = true).is_some()
    }

    /// One that was leaving has left, or has to stay after all.
    pub fn settle(&mut self, digest: Digest, left: bool) {
        if left {
            self.residents.remove(&digest);
        } else if let Some(resident) = self.residents.get_mut(&digest) {
            resident.leaving = false;
        }
    }

    /// Whether a tenant would be beyond its part, or what its key allows, with what it needs.
    pub fn is_beyond(&self, need: &LoadRequest) -> bool {
        let wanted = self.absent(need);
        let over = || self.parts(&need.tenant, wanted).is_over(&need.tenant.name);
        self.is_bounded(&need.tenant, wanted.bytes) || (!need.tenant.is_operator() && over())
    }

    /// Until the claim is given up nobody goes before `need`. Closes residents in use until what is
    /// left would give way to it: of tenants beyond their part before those of others, the one that
    /// came first before the others. Not the needed ones, nor the `pinned` ones, nor those that
    /// came after `before`: each is used for a while before it goes; nor, for a tenant beyond its
    /// own part, those of one within.
    pub fn claim(&mut self, need: &LoadRequest, before: Instant, pinned: &HashSet<Digest>) {
        self.claimed = true;
        let wanted = self.absent(need);
        let parts = self.parts(&need.tenant, wanted);
        let beyond = self.is_beyond(need);
        loop {
            let stays = |d: &Digest, r: &Resident<T>| !r.closing && (!r.idle() || need.has(d));
            let staying = self.residents.iter().filter(|(d, r)| stays(d, r));
            let kept = sum(staying.map(|(_, r)| r.bytes)) + self.reserved();
            if (kept + wanted).fits(self.max) {
                return;
            }
            let open = self.residents.iter_mut().filter(|(digest, r)| {
                let spared = pinned.contains(digest)
                    || need.has(digest)
                    || (beyond && r.tenant != need.tenant.name && !parts.is_over(&r.tenant));
                !r.closing && !r.idle() && r.since <= before && !spared
            });
            match open.min_by_key(|(_, r)| (!parts.is_over(&r.tenant), r.since, r.entered)) {
                Some((_, resident)) => resident.closing = true,
                None => return,
            }
        }
    }

    /// Whoever claimed memory has got it, or has given up.
    pub fn end_claim(&mut self) {
        self.claimed = false;
        self.residents.values_mut().for_each(|r| r.closing = false);
    }

    /// What of a need is not there, or not for new holders.
    fn absent(&self, need: &LoadRequest) -> Size {
        let open = |digest: &Digest| self.residents.get(digest).is_some_and(Resident::open);
        sum(need.contents.iter().filter(|(digest, _)| !open(digest)).map(|(_, bytes)| *bytes))
    }

    /// Bytes in memory that a tenant used last.
    fn bytes_of(&self, tenant: &str) -> u64 {
        let own = self.residents.values().filter(|r| *r.tenant == *tenant && !r.leaving);
        own.map(|r| r.bytes).sum()
    }

    /// The parts as they are when `tenant` has got `wanted` more.
    fn parts(&self, tenant: &Tenant, wanted: Size) -> Parts {
        let by_bytes = self.used().bytes + wanted.bytes > self.max.bytes;
        let amount = |size: Size| if by_bytes { size.bytes } else { size.slots as u64 };
        let mut held = HashMap::from([(tenant.name.clone(), amount(wanted))]);
        for resident in self.residents.values().filter(|r| !r.leaving) {
            *held.entry(resident.tenant.clone()).or_default() += amount(one(resident.bytes));
        }
        Parts { part: amount(self.max) / held.len() as u64, held }
    }

    /// Whether so many bytes more are beyond what the tenant's key allows it.
    fn is_bounded(&self, tenant: &Tenant, wanted: u64) -> bool {
        let most = tenant.resident_bytes_max();
        most.is_some_and(|most| self.bytes_of(&tenant.name) + wanted > most)
    }

    /// Asserts that the ledger agrees with those who have `promises` and hold residents (each hold
    /// by its digest): nothing is promised or held by nobody or twice, nothing is promised that is
    /// there, and all of it fits the budget. Allocates; for tests.
    pub fn check<'a>(
        &self,
        promises: impl Iterator<Item = &'a Promise>,
        holds: impl Iterator<Item = Digest>,
    ) {
        let mut promised = HashMap::new();
        for promise in promises {
            let twice = promised.insert(promise.digest, promise.bytes);
            assert_eq!(twice, None, "{} is promised twice", promise.digest);
        }
        assert_eq!(self.promised, promised, "promises");
        assert!(self.used().fits(self.max), "{:?} of {:?}", self.used(), self.max);
        let mut held: HashMap<Digest, usize> = HashMap::new();
        holds.for_each(|digest| *held.entry(digest).or_default() += 1);
        let mut uses = HashSet::new();
        for (digest, r) in &self.residents {
            let holders = held.remove(digest).unwrap_or(0);
            assert_eq!(r.holders.count(), holders, "holders of {digest}");
            assert!(!r.leaving || holders == 0, "{digest} is leaving and held");
            assert!(!r.closing || self.claimed, "{digest} is closing for nobody");
            assert!(!promised.contains_key(digest), "{digest} is there and on its way");
            assert!(r.entered <= r.used && r.used <= self.clock, "clock of {digest}");
            assert!(uses.insert(r.used), "{digest} was used in the moment of another");
        }
        assert!(held.is_empty(), "held and not resident: {held:?}");
    }
}
